"""Tagging: a tag for every word (names, parts of speech), from words with tags or from texts with marked spans."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from .. import tasks
from ..data.checking import check
from ..data.checking.findings import Finding
from ..data.checking.spans import spans_of, tagged
from . import Baseline, Logits, Stats
from ._texts import pad_on_the_right, word_places
from ._windows import of_rows, windows

if TYPE_CHECKING:
    import torch
    from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

OUTSIDE = "O"
SHOWN = 10
EXAMPLE = 300  # characters
_LETTERS = {"L": "E", "U": "S", "M": "I"}
_PREFIXED = re.compile(r"[BIESLUM]-.+$")


class Task(tasks.Task):
    """Tagging. A word's tag is read off its first token; rows too long for the model are cut into windows.

    Rows have `tokens` and `tags`, or a `text` and `spans` (`[{"start", "end", "label"}]`, in characters, or triples of
    the same); a text is cut into words, and spans become tags with B- and I-.

    Args:
        tags: in the order of the logits.
        of_text: whether rows are texts with spans.
        doc_stride: tokens that two windows of a row share.
        hints: the user's own names of columns.
    """

    name = "tagging"
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    windowed = True
    keys = ("doc_stride",)
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "tokens": ("words", "sentence_tokens"),
        "tags": ("ner_tags", "pos_tags", "labels", "label", "upos"),
        "text": ("sentence", "content"),
        "spans": ("entities", "annotations"),
    }
    target: ClassVar[str] = "tags"
    answer = "tags"
    per_token = True

    def __init__(
        self,
        tags: Sequence[str] = (),
        *,
        of_text: bool = False,
        doc_stride: int | None = None,
        hints: dict[str, str] | None = None,
    ) -> None:
        self.tags, self.doc_stride, self.hints = list(tags), doc_stride, dict(hints or {})
        self._take_texts(of_text)
        self.metrics = dict.fromkeys(("f1", "precision", "recall", "macro_f1", "accuracy"), "maximize")

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads doc_stride and the columns' names."""
        return cls(doc_stride=recipe.doc_stride, hints=recipe.data.columns)

    def _take_texts(self, of_text: bool) -> None:
        self.of_text = of_text
        self.inputs = ("text",) if of_text else ("tokens",)
        self.required = ("text", "spans") if of_text else ("tokens", "tags")

    def look_at(self, columns: Sequence[str]) -> None:
        """Texts with spans, unless there are tokens."""
        worded = self.has("tokens", columns) and self.has("tags", columns)
        self._take_texts(self.has("spans", columns) and self.has("text", columns) and not worded)

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks words and tags; learns the tags."""
        widened = list[Finding]()
        if self.of_text:
            for name, rows in splits.items():
                made, found = tagged(rows, name, sources.get(name, name), word_places)
                splits, widened = {**splits, name: made}, [*widened, *found]
        splits, findings = check.check_tagging(splits, sources=sources)
        if not self.tags:
            every = {tag for tags in splits["train"]["tags"][:] for tag in tags}
            self.tags = sorted(every, key=lambda tag: (tag != OUTSIDE, tag))
        return splits, [*widened, *findings]

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        widened = list[Finding]()
        if self.of_text:
            rows, widened = tagged(rows, "test", source, word_places)
        splits, findings = check.check_tagging({"test": rows}, sources={"test": source}, tags=self.tags)
        return splits["test"], [*widened, *findings]

    def state(self) -> dict[str, Any]:
        """The tags, and how rows are cut."""
        keys = ("name", "tags", "of_text", "doc_stride", "hints")
        return {key: getattr(self, key) for key in keys}

    def model_config(self) -> dict[str, Any]:
        """Number and names of the tags."""
        return {
            "num_labels": len(self.tags),
            "id2label": dict(enumerate(self.tags)),
            "label2id": {tag: number for number, tag in enumerate(self.tags)},
        }

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pads on the right."""
        pad_on_the_right(model, tokenizer)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads labels too."""
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer)  # type: ignore[return-value]

    def rows_from(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """A bare text is cut into words where the model was tuned on words."""
        rows = super().rows_from(inputs)
        if not self.of_text:
            for row in rows:
                if isinstance(row.get("tokens"), str):
                    row["tokens"] = [row["tokens"][slice(*at)] for at in word_places(row["tokens"])]
        return rows

    def problem(self, column: str, value: Any) -> str | None:
        """Words are a list of texts."""
        if column != "tokens" or value is None:
            return super().problem(column, value)
        listed = isinstance(value, list) and all(isinstance(word, str) for word in value)
        return None if listed else "is not a list of words"

    def _written(self, rows: Dataset) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Each row as a text, and where in it its words stand."""
        if self.of_text:
            texts = ["" if text is None else str(text) for text in rows["text"][:]]
            return texts, [word_places(text) for text in texts]
        words = [[str(word) for word in row or []] for row in rows["tokens"][:]]
        places = []
        for row in words:
            ends = np.cumsum([len(word) + 1 for word in row], dtype=np.int64) - 1
            places.append([(int(end) - len(word), int(end)) for word, end in zip(row, ends, strict=True)])
        return [" ".join(row) for row in words], places

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Windows of the rows. `words`: which word begins with a token, else -1; `labels`: its tag, else -100."""
        texts, places = self._written(rows)
        columns = windows(tokenizer, texts, limit, self.doc_stride)
        starts, ends = columns.pop("starts"), columns.pop("ends")
        columns["words"] = [
            _first_tokens(np.array(a), np.array(b), places[row])
            for a, b, row in zip(starts, ends, columns["row"], strict=True)
        ]
        if self.target in rows.column_names:
            numbers = self._numbers(rows)
            columns["labels"] = [
                [-100 if word < 0 else numbers[row][word] for word in words]
                for words, row in zip(columns["words"], columns["row"], strict=True)
            ]
        return Dataset.from_dict(columns)

    def _numbers(self, rows: Dataset) -> list[list[int]]:
        """Numbers of the tags; a tag that train does not have cannot be learnt or found: -100."""
        number = {tag: at for at, tag in enumerate(self.tags)}
        return [[number.get(str(tag), -100) for tag in tags] for tags in rows["tags"][:]]

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the words' first tokens, summed, over those of the global batch."""
        from torch.nn.functional import cross_entropy

        logits = outputs["logits"].float()
        labels = labels.to(logits.device)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return total / (labels.ne(-100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _tags_of(self, logits: Logits, items: Dataset, rows: Dataset) -> list[tuple[list[str], list[float]]]:
        """For each row the tags of its words and their probabilities; of a word in two windows, the one where it stands
        further from the edge counts."""
        _, places = self._written(rows)
        words = items["words"][:]
        found = []
        for mine, of_row in zip(of_rows(items["row"][:], len(rows)), places, strict=True):
            tags, shares = [OUTSIDE if OUTSIDE in self.tags else self.tags[0]] * len(of_row), [0.0] * len(of_row)
            depth = [-1] * len(of_row)
            for window in mine:
                values = np.exp(logits[window] - logits[window].max(-1, keepdims=True))
                values /= values.sum(-1, keepdims=True)
                for at, word in enumerate(words[window]):
                    inside = min(at, len(words[window]) - 1 - at)
                    if word >= 0 and inside > depth[word]:
                        best = int(values[at].argmax())
                        tags[word], shares[word], depth[word] = self.tags[best], float(values[at, best]), inside
            found.append((tags, shares))
        return found

    def decode(self, logits: Logits, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """`tags` of the words and, where tags mark names, `entities`: label, text, start and end (characters of a text,
        else numbers of words), and the mean probability of its words."""
        texts, places = self._written(rows)
        decoded = []
        for (tags, shares), text, of_row in zip(self._tags_of(logits, items, rows), texts, places, strict=True):
            answer: dict[str, Any] = {"tags": tags}
            if self.marks_names:
                answer["entities"] = [
                    {
                        "label": label,
                        "text": text[of_row[first][0] : of_row[last][1]],
                        "start": of_row[first][0] if self.of_text else first,
                        "end": of_row[last][1] if self.of_text else last + 1,
                        "score": round(float(np.mean(shares[first : last + 1])), 6),
                    }
                    for label, first, last in entities(tags)
                ]
            decoded.append(answer)
        return decoded

    @property
    def marks_names(self) -> bool:
        """Whether tags mark stretches of words (B-PER, I-PER), and do not stand each for itself (NOUN)."""
        return all(tag == OUTSIDE or _PREFIXED.match(tag) for tag in self.tags)

    def say(self, prediction: dict[str, Any]) -> str:
        """What was found."""
        if "entities" not in prediction:
            return " ".join(prediction["tags"])
        return "; ".join(f"{one['label']}: {one['text']}" for one in prediction["entities"]) or "nothing"

    @property
    def _kinds(self) -> list[str]:
        """What is counted: labels of names, or tags."""
        return (
            sorted({label for tag in self.tags for label, _, _ in entities([tag])}) if self.marks_names else self.tags
        )

    def row_stats(self, logits: Logits, items: Dataset, rows: Dataset) -> Stats:
        """For each row and kind of name (or tag) how many are right, predicted and gold; and its right words."""
        return self._stats([tags for tags, _ in self._tags_of(logits, items, rows)], _gold(rows))

    def _stats(self, predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> Stats:
        counted = entities if self.marks_names else lambda tags: [(tag, at, at) for at, tag in enumerate(tags)]
        kinds = {kind: at for at, kind in enumerate(self._kinds)}
        counts = np.zeros((3, len(gold), len(kinds) + 1), dtype=np.int64)  # the last is what train does not have
        words = np.zeros((2, len(gold)), dtype=np.int64)
        for row, (mine, right) in enumerate(zip(predicted, gold, strict=True)):
            found, wanted = set(counted(mine)), set(counted(right))
            for at, group in enumerate((found & wanted, found, wanted)):
                for label, _, _ in group:
                    counts[at, row, kinds.get(label, len(kinds))] += 1
            words[:, row] = sum(a == b for a, b in zip(mine, right, strict=True)), len(right)
        stats = dict(zip(("hits", "predicted", "gold"), counts, strict=True))
        return {**stats, "right_words": words[0], "words": words[1]}

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """Of all names together (or tags, where they stand each for itself) F1, precision and recall; the mean F1 over
        the kinds that occur; the share of right words."""
        hits, predicted, gold = (stats[key].sum(0) for key in ("hits", "predicted", "gold"))
        precision, recall = _share(hits.sum(), predicted.sum()), _share(hits.sum(), gold.sum())
        occurs = predicted + gold > 0
        each = 2 * hits[occurs] / (predicted + gold)[occurs]
        return {
            "f1": _share(2 * precision * recall, precision + recall),
            "precision": precision,
            "recall": recall,
            "macro_f1": float(each.mean()) if occurs.any() else 0.0,
            "accuracy": _share(stats["right_words"].sum(), stats["words"].sum()),
        }

    def right(self, stats: Stats) -> np.ndarray:
        """Whether all words of a row have the right tag."""
        return np.asarray(stats["right_words"] == stats["words"])

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """The tag that each word most often has in train."""
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for tokens, tags in zip(train["tokens"][:], train["tags"][:], strict=True):
            for word, tag in zip(tokens, tags, strict=True):
                seen[word][tag] += 1
        usual = sum(seen.values(), Counter()).most_common(1)[0][0]
        most = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
        predicted = [[most.get(word, usual) for word in tokens] for tokens in test["tokens"][:]]
        detail = f"the tag that a word most often has in train, {usual} for other words"
        return [Baseline("tag of the word", detail, self._stats(predicted, _gold(test)), predicted)]

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """How often each kind of name (or tag) stands in each split."""
        golds = {name: _gold(rows) for name, rows in splits.items()}
        counts = {name: self._stats(tags, tags)["gold"].sum(0) for name, tags in golds.items()}
        return {
            "labels": [
                {"label": kind, **{name: int(counts[name][at]) for name in splits}}
                for at, kind in enumerate(self._kinds)
            ]
        }

    def errors(self, stats: Stats, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A table of the kinds, and the rows with most mistakes."""
        hits, predicted, gold = (stats[key].sum(0) for key in ("hits", "predicted", "gold"))
        table = [
            {
                "label": kind,
                "precision": _share(hits[at], predicted[at]),
                "recall": _share(hits[at], gold[at]),
                "f1": _share(2 * hits[at], predicted[at] + gold[at]),
                "support": int(gold[at]),
                "predicted": int(predicted[at]),
            }
            for at, kind in enumerate(self._kinds)
        ]
        wrong = stats["words"] - stats["right_words"]
        texts, golds = self._written(rows)[0], _gold(rows)
        worst = []
        for at in np.argsort(-wrong, kind="stable")[:SHOWN]:
            if not wrong[at]:
                break
            shown = {"tags": golds[at]}
            if self.marks_names:
                words = rows["tokens"][int(at)]
                shown["entities"] = [
                    {"label": label, "text": " ".join(words[first : last + 1])}
                    for label, first, last in entities(golds[at])
                ]
            worst.append(
                {
                    "row": rows["_row"][int(at)],
                    "text": texts[at][:EXAMPLE],
                    "gold": self.say(shown)[:EXAMPLE],
                    "predicted": self.say(predictions[at])[:EXAMPLE],
                }
            )
        return {"per_class": table, "worst_rows": worst}

    def strata(self, rows: Dataset) -> Sequence[Sequence[Hashable]]:
        """The kinds of names (or tags) of a row, the rarest first."""
        found: list[set[str]]
        if self.of_text:
            found = [
                {str(span.get("label")) for span in spans_of(spans) if isinstance(span, dict)}
                for spans in rows["spans"][:]
            ]
        else:
            found = [{label for label, _, _ in entities(tags)} or set(tags) for tags in _gold(rows)]
        counts: Counter[Any] = Counter(label for labels in found for label in labels)
        return [sorted(labels, key=lambda label: (counts[label], label)) for labels in found]


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Label, first and last word of each stretch that tags mark, as seqeval (and conlleval) reads them.

    BILOU and BMES are read as BIOES: other letters for the same places.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    read = [_LETTERS.get(tag[0], tag[0]) + tag[1:] if tag[1:2] == "-" else tag for tag in tags]
    return [(str(label), int(first), int(last)) for label, first, last in get_entities(read)]


def _first_tokens(starts: np.ndarray, ends: np.ndarray, places: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the word that begins with it, or -1.

    Tokens of some tokenizers begin with the space before a word: the last character tells whose token it is.
    """
    if not places:
        return [-1] * len(starts)
    begins, stops = (np.array(side) for side in zip(*places, strict=True))
    word = np.searchsorted(begins, ends - 1, side="right") - 1
    inside = (starts >= 0) & (word >= 0) & (ends <= stops[word]) & (starts <= begins[word])
    first = inside & (np.concatenate([[-1], word[:-1]]) != word)
    return list(np.where(first, word, -1).tolist())


def _gold(rows: Dataset) -> list[list[str]]:
    return [[str(tag) for tag in tags] for tags in rows["tags"][:]]


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
