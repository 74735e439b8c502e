"""Extractive question answering: the answer is a piece of the context (SQuAD), or there is none."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np
from datasets import Dataset

from .. import tasks
from ..data.checking import check
from ..data.checking.answers import answers_of
from ..data.checking.rows import texts_of
from . import Baseline, Logits, Stats, _squad
from ._texts import pad_on_the_right
from ._windows import of_rows, windows
from .metrics import Interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.checking.findings import Finding
    from ..recipe import Recipe

MAX_ANSWER = 30  # tokens
N_BEST = 20
SHOWN = 10
EXAMPLE = 300  # characters
NEVER = -1e4  # a logit that half precision can hold and no softmax notices
NOTHING = ("", -1)  # an answer and where it begins
# For each row the score of no answer, and the best pieces of its context, by their characters, with theirs.
Candidates: TypeAlias = list[tuple[float, dict[tuple[int, int], float]]]


class Task(tasks.Task):
    """Extractive question answering.

    A context that is longer than the model can take is cut into windows that overlap; in each, every piece of at most
    `max_answer_length` tokens is a candidate, with the sum of its first token's start logit and its last one's end
    logit as score (Devlin et al. 2019). All pieces are looked at, not only those of the best starts and ends.

    Args:
        no_answer: whether rows may have no answer; found out from train where not given. The first token then stands
            for it, and no answer is given where its score exceeds that of the best piece by more than `threshold`.
        threshold: fitted on validation rows for the best F1.
        max_answer_length: in tokens.
        n_best_size: how many candidates `predict` gives.
        doc_stride: tokens that two windows of a context share.
        hints: the user's own names of columns.
    """

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    peft_type = None  # PEFT's own model for QUESTION_ANS keeps token_type_ids to itself (0.21): other logits
    windowed = True
    keys = ("doc_stride", "max_answer_length", "n_best_size")
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "question": ("query", "question_text"),
        "context": ("passage", "paragraph", "document", "article"),
        "answers": ("answer", "answer_text"),
    }
    required: tuple[str, ...] = ("question", "context", "answers")
    inputs: tuple[str, ...] = ("question", "context")
    target: ClassVar[str] = "answers"
    answer = "answer"
    per_token = True

    def __init__(
        self,
        *,
        no_answer: bool | None = None,
        threshold: float = 0.0,
        max_answer_length: int = MAX_ANSWER,
        n_best_size: int = N_BEST,
        doc_stride: int | None = None,
        hints: dict[str, str] | None = None,
    ) -> None:
        self.no_answer, self.threshold = no_answer, threshold
        self.max_answer_length, self.n_best_size, self.doc_stride = max_answer_length, n_best_size, doc_stride
        self.hints = dict(hints or {})
        self.metrics = {"f1": "maximize", "exact_match": "maximize"}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads doc_stride, max_answer_length, n_best_size and the columns' names."""
        given = {key: getattr(recipe, key) for key in cls.keys}
        return cls(hints=recipe.data.columns, **{key: value for key, value in given.items() if value is not None})

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks that answers stand where they are said to; learns whether there may be none."""
        splits, findings = check.check_question_answering(splits, sources=sources)
        if self.no_answer is None:
            self.no_answer = any(not golds for golds in _squad.golds_of(splits["train"]))
        return splits, findings

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits, sources = {"test": rows}, {"test": source}
        splits, findings = check.check_question_answering(splits, sources=sources, no_answer=bool(self.no_answer))
        return splits["test"], findings

    def state(self) -> dict[str, Any]:
        """How contexts are cut and answers chosen."""
        keys = ("name", "no_answer", "threshold", "max_answer_length", "n_best_size", "doc_stride", "hints")
        return {key: getattr(self, key) for key in keys}

    def chosen(self) -> dict[str, Any]:
        """How many answers are looked at, and how long they may be."""
        return {"max_answer_length": self.max_answer_length, "n_best_size": self.n_best_size}

    def model_config(self) -> dict[str, Any]:
        """A start and an end logit for each token."""
        return {"num_labels": 2}

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pads on the right, and leaves padding out."""
        pad_on_the_right(model, tokenizer)
        self.ready(model)

    def ready(self, model: PreTrainedModel) -> None:
        """Padding cannot be the answer: else it would have a share in the softmax, and a row's loss would depend on the
        rows that it stands beside."""
        if _without_padding not in model._forward_hooks.values():
            model.register_forward_hook(_without_padding, with_kwargs=True)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Windows of the contexts, each behind its question. `labels`: the answer's first and last token.

        In a window that does not hold the whole answer, both are the first token.
        """
        columns = windows(tokenizer, texts_of(rows, "context"), limit, self.doc_stride, texts_of(rows, "question"))
        if self.target in rows.column_names:
            spans = [_span(answers) for answers in rows[self.target][:]]
            places = zip(columns["row"], columns["starts"], columns["ends"], strict=True)
            columns["labels"] = [_tokens(spans[row], np.array(starts), np.array(ends)) for row, starts, ends in places]
        return Dataset.from_dict(columns)

    def logits(self, output: Any) -> torch.Tensor:
        """Start and end logits, [windows, tokens, 2]."""
        import torch

        return torch.stack([output[0], output[1]], -1)

    def with_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`start_positions` and `end_positions`, as transformers' models have them, as labels; those that lie outside
        of the window count as little as there."""
        if "labels" in batch or not {"start_positions", "end_positions"} <= batch.keys():
            return batch
        import torch

        labels = torch.stack([batch["start_positions"], batch["end_positions"]], -1).clamp(min=0)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        outside = labels >= mask.sum(1, keepdim=True)
        rest = {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions")}
        return {**rest, "labels": labels.masked_fill(outside, -100)}

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of start and end over the tokens, summed, over the global batch's labels: two a window."""
        from torch.nn.functional import cross_entropy

        logits = self.logits(outputs).float()
        labels = labels.to(logits.device)
        total = cross_entropy(logits, labels, reduction="sum")  # tokens are the classes, [windows, tokens, 2]
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    def _candidates(self, logits: Logits, items: Dataset, rows: Dataset) -> Candidates:
        starts, ends = items["starts"][:], items["ends"][:]
        found = []
        for mine in of_rows(items["row"][:], len(rows)):
            nothing = min((float(logits[window][0].sum()) for window in mine), default=0.0)
            pieces: dict[tuple[int, int], float] = {}
            for window in mine:
                for piece, value in self._pieces(logits[window], np.array(starts[window]), np.array(ends[window])):
                    pieces[piece] = max(value, pieces.get(piece, -np.inf))
            best = sorted(pieces.items(), key=lambda item: -item[1])[: self.n_best_size]
            found.append((nothing, dict(best)))
        return found

    def _pieces(self, logits: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[tuple[tuple[int, int], float]]:
        """The best pieces of a window: their characters and scores."""
        here = np.flatnonzero(starts >= 0)  # the context is one stretch of tokens
        if not len(here):
            return []
        start, end = logits[here, 0], logits[here, 1]
        longest = min(self.max_answer_length, len(here))
        padded = np.concatenate([end, np.full(longest - 1, -np.inf, end.dtype)])
        scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)  # [first token, length - 1]
        flat = scores.ravel()
        top = np.argpartition(-flat, min(self.n_best_size, len(flat)) - 1)[: self.n_best_size]
        first, more = np.unravel_index(top[np.isfinite(flat[top])], scores.shape)
        return [
            ((int(starts[here[a]]), int(ends[here[a + b]])), float(scores[a, b]))
            for a, b in zip(first, more, strict=True)
        ]

    def _answers(self, found: Candidates, contexts: Sequence[str]) -> list[tuple[str, int]]:
        """For each row the answer and the character where it begins; "" and -1 for none."""
        answers = []
        for (nothing, pieces), context in zip(found, contexts, strict=True):
            piece = next(iter(pieces), None)
            none = piece is None or (self.no_answer and nothing - pieces[piece] > self.threshold)
            answers.append(NOTHING if piece is None or none else _cut_out(context, piece))
        return answers

    def decode(self, logits: Logits, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """`answer`, `start` (its first character in the context, -1 for no answer), `score` and `n_best`.

        Scores are the softmax over the best candidates, no answer among them where there may be none.
        """
        found, contexts = self._candidates(logits, items, rows), texts_of(rows, "context")
        decoded = []
        for (nothing, pieces), context, answer in zip(found, contexts, self._answers(found, contexts), strict=True):
            named = [(_cut_out(context, piece), value) for piece, value in pieces.items()]
            if self.no_answer or not named:
                named.append((NOTHING, nothing - self.threshold))
            named.sort(key=lambda one: -one[1])
            values = np.exp(np.array([value for _, value in named]) - named[0][1])
            best = [
                {"answer": text, "start": start, "score": round(float(share), 6)}
                for ((text, start), _), share in zip(named, values / values.sum(), strict=True)
            ]
            chosen = next(one for one in best if (one["answer"], one["start"]) == answer)
            decoded.append({**chosen, "n_best": best[: self.n_best_size]})
        return decoded

    def say(self, prediction: dict[str, Any]) -> str:
        """The answer and its score."""
        return f"{prediction['answer'] or 'no answer'} ({prediction['score']:.0%})"

    def row_stats(self, logits: Logits, items: Dataset, rows: Dataset) -> Stats:
        """Exact match and F1 of each row's answer, and whether the row has one."""
        found = self._candidates(logits, items, rows)
        answers = [answer for answer, _ in self._answers(found, texts_of(rows, "context"))]
        return _squad.stats(answers, _squad.golds_of(rows))

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """Exact match and F1, 0 to 100, as the official script of SQuAD."""
        return _squad.aggregate(stats)

    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """Wilson for exact match, BCa bootstrap for F1."""
        return _squad.intervals(stats)

    def right(self, stats: Stats) -> np.ndarray:
        """Whether the answer is exactly one of the right ones."""
        return np.asarray(stats["exact_match"] == 1)

    @property
    def apart(self) -> tuple[str, ...]:
        """Questions on one context stay together."""
        return ("context",)

    @property
    def fits(self) -> bool:
        """Where there may be no answer, when to give none."""
        return bool(self.no_answer)

    def fitted(self, logits: Logits, items: Dataset, rows: Dataset) -> Self:
        """With the threshold that gives the best F1 on these rows."""
        golds, contexts = _squad.golds_of(rows), texts_of(rows, "context")
        found = self._candidates(logits, items, rows)
        pieces = [next(iter(one), None) for _, one in found]
        margins = np.array(
            [nothing - (one[p] if p else -np.inf) for (nothing, one), p in zip(found, pieces, strict=True)]
        )
        texts = [_cut_out(text, piece)[0] if piece else "" for text, piece in zip(contexts, pieces, strict=True)]
        given, none = (_squad.stats(answers, golds)["f1"] for answers in (texts, [""] * len(texts)))
        # The rows in the order of their margins: with a threshold between two, those after it get no answer.
        order = np.argsort(margins, kind="stable")
        gains = np.concatenate([[0.0], np.cumsum((given - none)[order])])
        cut = int(gains.argmax())
        sides = np.concatenate([[margins[order[0]] - 1], margins[order], [margins[order[-1]] + 1]])
        low, high = (float(np.clip(side, -1e4, 1e4)) for side in sides[cut : cut + 2])
        return self.from_state({**self.state(), "threshold": (low + high) / 2})

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """The sentence that is most like the question; where there may be no answer, never any."""
        made = [_squad.likest_sentence(train, test)]
        if self.no_answer:
            made.append(("no answer", "to every question", [""] * len(test)))
        golds = _squad.golds_of(test)
        return [Baseline(name, how, _squad.stats(answers, golds), answers) for name, how, answers in made]

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """How many questions, contexts and answers each split has."""
        return {"answers": [_squad.profile(name, rows) for name, rows in splits.items()]}

    def errors(self, stats: Stats, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The wrong answers that the model was most sure of."""
        order = np.lexsort((-np.array([one["score"] for one in predictions]), stats["f1"]))
        questions, contexts = texts_of(rows, "question"), texts_of(rows, "context")
        golds = _squad.golds_of(rows)
        worst = [
            {
                "row": rows["_row"][int(at)],
                "text": f"{questions[at]} | {contexts[at]}"[:EXAMPLE],
                "gold": " / ".join(dict.fromkeys(golds[at])) or "no answer",
                "predicted": self.say(predictions[at]),
            }
            for at in order[:SHOWN]
            if stats["f1"][at] < 1
        ]
        return {"worst_rows": worst}

    def strata(self, rows: Dataset) -> Sequence[Sequence[Hashable]]:
        """Whether there is an answer."""
        return [(bool(golds),) for golds in _squad.golds_of(rows)]


def _without_padding(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: start and end logits of padding are as low as can be."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape == output["start_logits"].shape:
        for key in ("start_logits", "end_logits"):
            logits = output[key]
            output[key] = logits.masked_fill(~mask.bool(), NEVER)
    return output


def _span(answers: Any) -> tuple[int, int] | None:
    """The characters of the first answer; later ones are other people's words for it."""
    text, start = next(iter(answers_of(answers)), ("", None))
    return None if start is None or start < 0 else (start, start + len(text))  # it may stand nowhere in the context


def _tokens(span: tuple[int, int] | None, starts: np.ndarray, ends: np.ndarray) -> list[int]:
    """First and last token of the answer in a window, both 0 where it does not hold all of it."""
    here = np.flatnonzero(starts >= 0)
    if span is None or not len(here) or starts[here[0]] > span[0] or ends[here[-1]] < span[1]:
        return [0, 0]
    first = here[np.flatnonzero(ends[here] > span[0])[0]]
    last = here[np.flatnonzero(starts[here] < span[1])[-1]]
    return [int(first), int(last)] if first <= last else [0, 0]


def _cut_out(context: str, piece: tuple[int, int]) -> tuple[str, int]:
    """The words of a piece, and where they begin; some tokenizers count the space before a word to it."""
    text = context[slice(*piece)]
    return text.strip(), piece[0] + len(text) - len(text.lstrip())
