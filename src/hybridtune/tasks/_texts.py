"""What tasks share whose rows are a text, or a pair of texts, with one target for the whole of it."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from datasets import Dataset

from .. import tasks
from ..data.checking.rows import texts_of
from ..errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

# Of scripts without spaces every character is a word.
_WORD = re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"
                   "(?:(?![\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])\\w)+|[^\\w\\s]")  # fmt: skip
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3041-\u30ff]")
NO_SPACES = ("zh", "ja")
_LANGUAGES = {"zh": "zh", "zho": "zh", "cmn": "zh", "yue": "zh", "ja": "ja", "jpn": "ja"}
_LOOKED_AT = 1000  # texts whose script is looked at


class TextTask(tasks.Task):
    """Rows of `text`, or `text` and `text_pair`, which one sequence model reads; the target is of the whole row.

    Args:
        template: how a text is put before the model, with a place for `{text}` and perhaps `{text_pair}`.
        pairs: whether rows are pairs of texts.
        hints: the user's own names of columns.
    """

    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    target: ClassVar[str] = "label"
    pooled = True
    keys: tuple[str, ...] = ("template",)
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("sentence", "sentence1", "message", "content", "review", "premise", "question1", "utterance", "tweet"),
        "text_pair": ("sentence2", "hypothesis", "question2"),
    }

    def __init__(self, *, template: str | None, pairs: bool, hints: dict[str, str] | None) -> None:
        self.template, self.hints = template, dict(hints or {})
        self._take_pairs(pairs)

    @staticmethod
    def of_texts(recipe: Recipe) -> dict[str, Any]:
        """The recipe's template and hints, as arguments.

        Raises:
            RecipeError: the template has no place for the text.
        """
        if recipe.template is not None and "{text}" not in recipe.template:
            raise RecipeError(
                "template: has no place for the text", found=recipe.template, expected="such as: 'Message: {text}'"
            )
        return {"template": recipe.template, "hints": recipe.data.columns}

    def _take_pairs(self, pairs: bool) -> None:
        """Whether a row is a pair of texts: then both are needed, else a second text is no matter."""
        self.pairs = pairs
        self.inputs = ("text", "text_pair") if pairs else ("text",)
        self.required = (*self.inputs, self.target)

    def find_pairs(self, splits: dict[str, Dataset], sources: dict[str, str]) -> dict[str, Dataset]:
        """Learns from train whether rows are pairs; a second text that only other splits have is left out.

        Raises:
            DataError: train has pairs, another split has none.
            RecipeError: the template has a place for a second text that rows do not have.
        """
        self._take_pairs("text_pair" in splits["train"].column_names)
        for name, rows in splits.items():
            if self.pairs and "text_pair" not in rows.column_names:
                raise DataError(
                    f"{sources[name]} ({name}): there is no column for text_pair, but train has one",
                    found=", ".join(column for column in rows.column_names if column != "_row"),
                    mend="give every file both texts, or none",
                )
            if not self.pairs and "text_pair" in rows.column_names:
                splits = {**splits, name: rows.remove_columns("text_pair")}
        if self.template is not None and "{text_pair}" in self.template and not self.pairs:
            raise RecipeError("template: has a place for text_pair, but rows are no pairs", found=self.template)
        return splits

    def of_inputs(self, rows: Dataset) -> Dataset:
        """The rows without a second text that the model was not trained on."""
        return rows if self.pairs or "text_pair" not in rows.column_names else rows.remove_columns("text_pair")

    def state(self) -> dict[str, Any]:
        """How texts are put together."""
        return {"name": self.name, "template": self.template, "pairs": self.pairs, "hints": self.hints}

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pads on the right, with the end token where a decoder brings no pad token.

        Decoders pool the last token that is not padding: the pad token must be known to the model too.
        """
        pad_on_the_right(model, tokenizer)

    def texts(self, rows: Dataset) -> tuple[list[str], list[str] | None]:
        """The texts (and their pairs) that the tokenizer gets, the template filled in."""
        pairs = texts_of(rows, "text_pair") if "text_pair" in rows.column_names else None
        texts = texts_of(rows, "text")
        if self.template is None:
            return texts, pairs
        if pairs is not None and "{text_pair}" in self.template:
            return [_fill(self.template, text=t, text_pair=p) for t, p in zip(texts, pairs, strict=True)], None
        return [_fill(self.template, text=text) for text in texts], pairs

    def joined(self, rows: Dataset) -> list[str]:
        """Each row as one text, for baselines and examples."""
        texts, pairs = self.texts(rows)
        return texts if pairs is None else [f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)]

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Token ids, unpadded; a pair is truncated at its longer side. An empty text is one pad token, not none."""
        texts, pairs = self.texts(rows)
        full = tokenizer(texts, pairs, truncation=False, verbose=False)
        encoded = tokenizer(texts, pairs, truncation=True, max_length=limit)
        columns: dict[str, Any] = {key: encoded[key] for key in encoded if key in tokenizer.model_input_names}
        for at in (at for at, ids in enumerate(encoded["input_ids"]) if not ids):
            fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 1}
            for key in columns:
                columns[key][at] = [fill.get(key, 0)]
        columns["length"] = [len(ids) for ids in full["input_ids"]]
        columns["unknown"] = count_unknown(full["input_ids"], tokenizer)
        if self.target in rows.column_names:
            columns["labels"] = self.targets(rows)
        return Dataset.from_dict(
            {key: value if isinstance(value, list) else value.tolist() for key, value in columns.items()}
        )

    @property
    def apart(self) -> tuple[str, ...]:
        """Whether rows are pairs is not known yet where a part is held out."""
        return ("text", "text_pair")

    @abstractmethod
    def targets(self, rows: Dataset) -> np.ndarray:
        """What the model has to give for each row, as `labels` are.

        Raises:
            DataError: a row has none, or one that the model does not know.
        """


def regresses(model: Any) -> bool:
    """Whether a sequence classifier gives numbers and not classes: as transformers decides."""
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    return kind == "regression" or (kind is None and getattr(config, "num_labels", 2) == 1)


def pad_on_the_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a pad token known to both, the end token where there is none of its own.

    Raises:
        ModelError: the tokenizer has no token to pad with.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise ModelError(
                "the tokenizer has no pad, end or unknown token to pad with",
                mend="add one: tokenizer.add_special_tokens({'pad_token': ...})",
            )
        tokenizer.pad_token = token
    model.config.pad_token_id = tokenizer.pad_token_id


def count_unknown(ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many tokens of each row the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    return [row.count(unknown) if unknown is not None else 0 for row in ids]


def _fill(template: str, **values: str) -> str:
    """Fills `{text}` in; other braces stay (a JSON example in a template is no mistake)."""
    return re.sub(r"\{(text_pair|text)\}", lambda match: values.get(match.group(1), ""), template)


def word_places(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end: runs of letters and digits, single signs, single Chinese or Japanese
    characters."""
    return [found.span() for found in _WORD.finditer(text)]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the spaces around them."""
    return [found.group().strip() for found in _SENTENCE.finditer(text) if found.group().strip()]


def script_of(texts: Sequence[str], language: str | None = None) -> str:
    """How the words of texts are told apart.

    Args:
        texts: their characters tell, where no language does.
        language: a code such as zh, zh_CN, zho_Hans or ja_XX.

    Returns:
        "zh" or "ja", whose words have no spaces between them; "latin" where all letters but very few are a to z; else
        "other".
    """
    known = _LANGUAGES.get(re.split("[_-]", (language or "").lower())[0])
    if known:
        return known
    letters = "".join(character for text in texts[:_LOOKED_AT] for character in text if character.isalpha())
    han, kana = len(_HAN.findall(letters)), len(_KANA.findall(letters))
    if 2 * (han + kana) > len(letters):
        return "ja" if 20 * kana > han + kana else "zh"
    return "latin" if 100 * sum(map(str.isascii, letters)) >= 99 * len(letters) else "other"
