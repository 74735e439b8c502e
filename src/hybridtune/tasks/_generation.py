"""What tasks share whose models write a text, token by token: encoder-decoders and decoders alone."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from datasets import Dataset

from .. import tasks
from ..data.checking import check
from ..data.checking.rows import as_text, texts_of
from ..errors import RecipeError
from . import Logits, Stats, _writing
from ._prompts import Prompts
from ._texts import NO_SPACES, pad_on_the_right, script_of, word_places

if TYPE_CHECKING:
    import torch
    from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

IGNORED = -100
GENERATE_ON = 200  # rows: a text takes a forward a token, and all validation rows often more than an epoch does
SHOWN = 10
EXAMPLE = 300  # characters
MANY_ODD = 0.1  # of the texts
REPEATED = 4  # times that three words stand in a text which repeats itself, or one behind the other


class WritingTask(tasks.Task):
    """Rows of a text and what is to be written about it; perhaps `references`, other texts that would be as right.

    Args:
        template: what the model is told, with a place for the text.
        settings: of `generate`, that the recipe gives; the model's own count besides.
        generate_on: on how many validation rows it writes during training.
        script: of what is written, as `_texts.script_of` has it; found out from train where not given.
        hints: the user's own names of columns.
    """

    most_new_tokens: ClassVar[int] = _writing.MAX_NEW_TOKENS
    auto_class = "AutoModelForSeq2SeqLM"  # of a decoder alone see `model.load`
    peft_type = "SEQ_2_SEQ_LM"
    writes = True
    answer = "text"
    keys: tuple[str, ...] = ("template", "generate_on", *_writing.SETTINGS)
    target: ClassVar[str]

    def __init__(
        self,
        *,
        template: str | None = None,
        settings: dict[str, Any] | None = None,
        generate_on: int = GENERATE_ON,
        script: str = "",
        hints: dict[str, str] | None = None,
    ) -> None:
        self.template, self.generate_on, self.script = template, generate_on, script
        self.settings = {"max_new_tokens": self.most_new_tokens, **(settings or {})}
        self.hints = dict(hints or {})
        self.encoder_decoder = True  # `prepare` is told by the model
        self._tokenizer: Any = None
        self._config: Any = None  # the model's generation_config
        self._last = 0  # place that a text can have at most

    @classmethod
    def arguments(cls, recipe: Recipe) -> dict[str, Any]:
        """What the recipe says of all these tasks, as arguments.

        Raises:
            RecipeError: the template has no place for the text, or a setting is of beams and there is one alone.
        """
        place = f"{{{cls.placed()}}}"
        if recipe.template is not None and place not in recipe.template:
            raise RecipeError(
                f"template: has no place for the {cls.placed()}",
                found=recipe.template,
                expected=f"such as: '{cls.__module__.rpartition('.')[2]}: {place}'",
            )
        given = {"settings": _writing.settings_of(recipe), "template": recipe.template, "hints": recipe.data.columns}
        return given | ({"generate_on": recipe.generate_on} if recipe.generate_on else {})

    @classmethod
    def placed(cls) -> str:
        """What the place of a row's text is called in a template."""
        return cls.inputs[0]

    @property
    def read_texts(self) -> tuple[str, ...]:
        """The columns of the texts that the model reads."""
        return self.inputs

    @classmethod
    def suits(cls, model: Any) -> bool:
        """No model says whether it translates or sums up; HybridTrainer knows the loss of language models by itself."""
        return False

    def state(self) -> dict[str, Any]:
        """How texts are put before the model and how it writes."""
        keys = ("name", "template", "settings", "generate_on", "script", "hints")
        return {key: getattr(self, key) for key in keys}

    def model_config(self) -> dict[str, Any]:
        """Nothing: `prepare` tells the model how to write."""
        return {}

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pads on the right, and tells the model's generation_config how it writes and where it ends.

        Raises:
            ModelError: it sees the words that it is to write, nothing tells it where to begin, or no token to end.
        """
        _writing.refuse_encoders(model)
        pad_on_the_right(model, tokenizer)
        self.encoder_decoder, self._tokenizer = bool(model.config.is_encoder_decoder), tokenizer
        prompts = self._prompts(tokenizer)
        prompts.refuse()
        self._config = _writing.set_up(model, tokenizer, self.settings, prompts.end)
        self._last = _writing.longest(model, int(self.settings["max_new_tokens"]), 1) - 1

    def remarks(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """That the model was made with words in front of such texts, as T5 was, and no template gives them."""
        told: dict[str, dict[str, Any]] = getattr(model.config, "task_specific_params", None) or {}
        found = [words for name in self.called(told) if (words := str(told[name].get("prefix") or "").strip())]
        if self.template or not found:
            return []
        others = f" (it knows {len(found)} such)" if len(found) > 1 else ""
        said = f"the model was made with {found[0]!r} in front of such texts{others}, and no template says so"
        return [(f"{said}: template: '{found[0]} {{{self.about}}}'", "warning")]

    def called(self, names: Iterable[str]) -> list[str]:
        """Those of the names in models' configurations that mean this task, the likest first."""
        return [name for name in names if name == self.name]

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        chat = not self.encoder_decoder and bool(tokenizer.chat_template)
        return Prompts(tokenizer, self.template or self.untold(chat), self.about, self.encoder_decoder, chat)

    @property
    def about(self) -> str:
        """The column of the text that is written about: where all is too long, its end is cut off."""
        return self.inputs[-1]

    def untold(self, chat: bool) -> str:
        """What the model is told where the recipe has no template."""
        return f"{{{self.about}}}"

    def chosen(self) -> dict[str, Any]:
        """How the model writes, and how often in training."""
        return {"generate_on": self.generate_on, **_writing.settings_in(self._config)}

    def target_limit(self, limit: int) -> int | None:
        """As many as the model may write, but of a decoder's text no more than half."""
        return self._longest(limit)

    def target_mend(self, limit: int) -> str:
        """`max_new_tokens`, or the tokens that there are at all."""
        if self._longest(limit) == int(self.settings["max_new_tokens"]):
            return "raise max_new_tokens where it should"
        if self.encoder_decoder:
            return f"raise max_length, which is {limit}, where it should"
        return (
            f"half of the {limit} tokens of max_length are kept for them: raise that, as far as the model has positions"
        )

    def _longest(self, limit: int) -> int:
        return min(int(self.settings["max_new_tokens"]), limit if self.encoder_decoder else limit // 2)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Tokens of rows. To a decoder alone a row is one text: `prompt` tells how many tokens it is given of it.

        `target_length` is that of the whole target; of one longer than `max_new_tokens` the rest is not learnt.
        """
        prompts, longest = self._prompts(tokenizer), self._longest(limit)
        room = limit if self.encoder_decoder else limit - longest
        texts = zip(*(texts_of(rows, name) for name in self.inputs), strict=True)
        given, lengths, unknown = prompts.said([dict(zip(self.inputs, row, strict=True)) for row in texts], room)
        columns: dict[str, Any] = {"input_ids": given, "length": [length + limit - room for length in lengths]}
        columns["unknown"] = unknown
        if self.target in rows.column_names:
            found = prompts.written([golds[0] for golds in self.golds(rows)], longest)
            columns |= dict(zip(("labels", "target_length", "target_unknown"), found, strict=True))
        if not self.encoder_decoder:
            columns["prompt"] = [len(ids) for ids in given]
            if written := columns.get("labels"):
                columns["input_ids"] = [a + b for a, b in zip(given, written, strict=True)]
                columns["labels"] = [[IGNORED] * len(a) + b for a, b in zip(given, written, strict=True)]
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        return Dataset.from_dict(columns)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads labels too."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)  # type: ignore[return-value]

    def questions(self, items: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Without what the model is to write."""
        if "prompt" not in items.column_names:
            return super().questions(items, tokenizer)
        given = [ids[:count] for ids, count in zip(items["input_ids"][:], items["prompt"][:], strict=True)]
        return Dataset.from_dict({"input_ids": given, "attention_mask": [[1] * len(ids) for ids in given]})

    def respond(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tokens that it writes, [rows, tokens], those behind the end padded."""
        return _writing.write(model, batch, int(self.settings["max_new_tokens"]))

    def difference(self, ours: Logits, theirs: Logits) -> float:
        """The share of rows for which something else is written."""
        return float(np.mean([a != b for a, b in zip(map(self._own, ours), map(self._own, theirs), strict=True)]))

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the tokens to be written, summed, over those of the global batch."""
        from torch.nn.functional import cross_entropy

        shift = 0 if self.encoder_decoder else 1  # a decoder alone predicts the next token of its own text
        logits = outputs["logits"][:, : labels.shape[1] - shift]
        labels = labels[:, shift:].to(logits.device)
        exact = logits.float() if logits.element_size() < 4 else logits
        total = cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels.ne(IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _own(self, ids: np.ndarray) -> list[int]:
        """The tokens of a text up to its end, without one that is forced to come first, such as its language."""
        written: list[int] = ids.tolist()
        end = next((at for at, one in enumerate(written) if one in self._ends), len(written))
        return written[1 if written[:1] == [self._config.forced_bos_token_id] else 0 : end]

    @property
    def _ends(self) -> set[int]:
        """The tokens that a text may end with."""
        ends = self._config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def texts(self, answers: Logits) -> list[str]:
        """What was written."""
        told = self._tokenizer.batch_decode([self._own(ids) for ids in answers], skip_special_tokens=True)
        return [text.strip() for text in told]

    def decode(self, logits: Logits, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """What was written."""
        return [{self.answer: text} for text in self.texts(logits)]

    def say(self, prediction: dict[str, Any]) -> str:
        """The text."""
        return str(prediction[self.answer])

    def golds(self, rows: Dataset) -> list[list[str]]:
        """For each row the texts that would be right; the first is learnt."""
        more = rows["references"][:] if "references" in rows.column_names else [None] * len(rows)
        return [
            [text, *(str(one) for one in ([others] if isinstance(others, str) else others or []) if one)]
            for text, others in zip(texts_of(rows, self.target), more, strict=True)
        ]

    def lacking(self, rows: Dataset) -> np.ndarray:
        """Those whose text to be written is empty."""
        return np.array([not as_text(value).strip() for value in rows[self.target][:]], bool)

    def row_stats(self, logits: Logits, items: Dataset, rows: Dataset) -> Stats:
        """What the scores are computed from, and how the texts look."""
        return {**self.stats(self.texts(logits), rows), "cut": np.array(list(map(self._is_cut, logits)))}

    def _is_cut(self, ids: np.ndarray) -> bool:
        """Whether a text does not end by itself; BART and its kin have an end forced into the last place."""
        ends = np.flatnonzero(np.isin(ids, list(self._ends)))
        forced = self._config.forced_eos_token_id is not None
        return not len(ends) or bool(forced and ends[0] == self._last)

    def stats(self, texts: Sequence[str], rows: Dataset) -> Stats:
        """The same of texts that no model has written."""
        golds = self.golds(rows)
        looks = [
            (len(text), np.mean(list(map(len, gold))), not text, _repeats(text), _copied(text, source), text in gold)
            for text, gold, source in zip(texts, golds, texts_of(rows, self.about), strict=True)
        ]
        names = ("characters", "gold_characters", "empty", "repeats", "copied", "exact")
        columns = dict(zip(names, map(np.array, zip(*looks, strict=True)), strict=True))
        return {**self.scores(texts, golds), **columns}

    @abstractmethod
    def scores(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> Stats:
        """For each text what the metrics are computed from."""

    @abstractmethod
    def each(self, stats: Stats) -> np.ndarray:
        """A score of each row by itself, by which rows are shown."""

    @property
    @abstractmethod
    def signatures(self) -> dict[str, str]:
        """How the metrics are computed, so that others can do the same."""

    def right(self, stats: Stats) -> np.ndarray:
        """Whether the text is exactly one of the right ones."""
        return np.asarray(stats["exact"]).astype(bool)

    def learn_script(self, train: Dataset, language: str | None = None) -> list[check.Finding]:
        """Finds out how words are told apart, and says so where they have no spaces between them."""
        texts = texts_of(train, self.target)
        self.script = self.script or script_of(texts, language)
        if self.script not in NO_SPACES:
            return []
        told = ", ".join(f"{name} {how}" for name, how in self.signatures.items())
        did = f"words have no spaces between them there: {told}"
        return [check.Finding("no_spaces", "train", len(texts), did, "info", [])]

    def strata(self, rows: Dataset) -> None:
        """All rows are alike."""

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """How long the texts of each split are, in characters: medians and the longest."""
        found = []
        for name, rows in splits.items():
            entry: dict[str, Any] = {"split": name}
            texts = {name: texts_of(rows, name) for name in self.read_texts}
            texts[self.target] = [golds[0] for golds in self.golds(rows)]
            for column, of_rows in texts.items():
                lengths = list(map(len, of_rows))
                entry |= {f"{column}_median": float(np.median(lengths)), f"{column}_longest": max(lengths)}
            found.append(entry)
        return {"written": found}

    def errors(self, stats: Stats, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """How the texts look, and the best and the worst of them beside what would have been right."""
        order = np.argsort(self.each(stats), kind="stable")
        golds = self.golds(rows)
        texts = [" | ".join(row) for row in zip(*(texts_of(rows, name) for name in self.read_texts), strict=True)]

        def shown(numbers: np.ndarray) -> list[dict[str, Any]]:
            return [
                {
                    "row": rows["_row"][int(at)],
                    "text": texts[at][:EXAMPLE],
                    "gold": " / ".join(golds[at])[:EXAMPLE],
                    "predicted": predictions[at][self.answer][:EXAMPLE],
                }
                for at in numbers
            ]

        count = min(SHOWN, -(-len(order) // 2))
        written = {
            "length_ratio": float(stats["characters"].sum() / max(stats["gold_characters"].sum(), 1)),
            "copied": float(stats["copied"].mean()),
            **{name: int(stats[key].sum()) for name, key in (("exact", "exact"), ("empty", "empty"))},
            "repeating": int(stats["repeats"].sum()),
            "cut_off": int(stats["cut"].sum()),
        }
        return {
            "signatures": self.signatures,
            "written": written,
            "best_rows": shown(order[::-1][:count]),
            "worst_rows": shown(order[:count]),
        }

    def looks(self, stats: Stats) -> list[str]:
        """That many texts do not end, repeat themselves or are empty."""
        count, most = len(stats["cut"]), self.settings["max_new_tokens"]
        kinds = {
            "cut": f"have no end within max_new_tokens ({most})",
            "repeats": "repeat themselves",
            "empty": "are empty",
        }
        found = [(int(stats[name].sum()), said) for name, said in kinds.items()]
        told = [f"{odd} {said}" for odd, said in found if odd > MANY_ODD * count]
        return [f"of {count} texts " + ", ".join(told)] if told else []

    @property
    def reading(self) -> str:
        """What the model is told, and how it writes."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        template = self._prompts(self._tokenizer).template
        told = f"It is told `{template}`. " if template != f"{{{self.about}}}" else ""
        return f"{told}Its generation_config.json says how it writes: {settings}. `hybridtune predict` does both."


def _repeats(text: str) -> bool:
    """Whether three words stand in it again and again, or one behind itself."""
    words = [text[slice(*place)] for place in word_places(text)]
    runs = Counter(zip(words, words[1:], words[2:], strict=False))
    longest = max((len(list(same)) for _, same in groupby(words)), default=0)
    return max(longest, *runs.values(), 0) >= REPEATED


def _copied(text: str, source: str) -> float:
    """The share of its pairs of words that stand in the source."""
    mine, theirs = (list(pairwise([one[slice(*place)] for place in word_places(one)])) for one in (text, source))
    there = set(theirs)
    return sum(pair in there for pair in mine) / len(mine) if mine else 0.0
