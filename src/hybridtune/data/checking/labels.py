"""What the labels of a classification are: their names, their types, and which of them are meant to be the same."""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from datasets import Dataset
from rapidfuzz.distance import DamerauLevenshtein

from ...errors import DataError

SEPARATORS = "|;,"

TYPO_ROWS = 3
TYPO_SHARE = 0.05
DOUBT_SHARE = 0.25  # up to here, too frequent to be renamed and too rare to be sure of
TYPO_EDITS = 2
TYPO_LENGTH = 5

_LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_BETWEEN_WORDS = re.compile(r"(?<=([^\W_]))[\s_-]+(?=([^\W_]))")


def split_labels(value: Any, separators: str = SEPARATORS) -> list[Any]:
    """Returns the labels of a row that may have several.

    Args:
        value: a list, a single label, or a text that holds labels between separators or as a written list
            ("['a', 'b']", as pandas writes lists into CSV). None and "" are no labels.
        separators: the first of these that a text holds is the one it is cut at, so that the others may stand in the
            labels' names.
    """
    if isinstance(value, str):
        text = value.strip()
        separator = next((character for character in separators if character in text), None)
        written = written_list(text)
        if written is not None:
            return split_labels(written, "")
        items: Iterable[Any] = text.split(separator) if separator else [text]
    else:
        items = value if isinstance(value, (list, tuple, set)) else [value]
    labels = (item.strip() if isinstance(item, str) else tidy(item) for item in items)
    return list(dict.fromkeys(label for label in labels if label is not None and label != ""))


def written_list(text: str) -> list[Any] | None:
    """Returns the list that a text writes out, or None.

    That is "['a', 'b']", as pandas writes lists into CSV, or "['a' 'b']", as it writes arrays.
    """
    if text.startswith("[") and text.endswith("]"):
        with suppress(ValueError, SyntaxError, TypeError):  # brackets in a label
            value = ast.literal_eval(text)
            if not isinstance(value, list) or any(isinstance(item, (list, dict, set)) for item in value):
                return None
            texts = _LITERAL.findall(text)  # which Python reads as one where no comma stands between them
            return [ast.literal_eval(item) for item in texts] if len(texts) > len(value) else value
    return None


def separators_of(values: Iterable[Any]) -> str:
    """Returns the one separator that a column of label texts uses, so that a lone "a, b" among "c|d" stays whole."""
    texts = [value for value in values if isinstance(value, str)]
    return next((character for character in SEPARATORS if any(character in text for text in texts)), SEPARATORS)


def tidy(label: Any) -> Any:
    """Returns a label as it is kept: whole floats as int, other floats as text, blank and NaN as None."""
    if isinstance(label, str):
        return label if label.strip() else None
    if isinstance(label, float):
        if math.isnan(label):
            return None
        return int(label) if label.is_integer() else str(label)
    return label


def label_names(train: Dataset, multi_label: bool) -> list[Any]:
    """Returns the distinct labels: numbers in order of size, texts in order of the alphabet.

    Types are kept. Where numbers and texts are mixed, all become text.
    """
    return sort_labels(label for labels in label_lists(train["label"][:], multi_label) for label in labels)


def sort_labels(labels: Iterable[Any]) -> list[Any]:
    """Returns the distinct labels in order, of one type."""
    distinct = set(labels)
    if len({type(label) for label in distinct}) > 1:
        distinct = {str(label) for label in distinct}
    return sorted(distinct)


def label_lists(values: Sequence[Any], multi_label: bool, separators: str | None = None) -> list[list[Any]]:
    """Returns for every row the list of its labels; of a single-label row without a label, an empty one.

    Args:
        values: of the column label.
        multi_label: whether a row may have several labels, or none.
        separators: as of `split_labels`; looked for in the values themselves where not given.
    """
    if multi_label:
        separators = separators_of(values) if separators is None else separators
        return [split_labels(value, separators) for value in values]
    return [[] if value is None else [value] for value in map(tidy, values)]


def label_table(splits: dict[str, Dataset], names: Sequence[Any], multi_label: bool) -> list[dict[str, Any]]:
    """Returns a row for each label with the number of rows that have it in each split, 0 where there is no split."""
    counts = {
        split: Counter(label for labels in label_lists(rows["label"][:], multi_label) for label in labels)
        for split, rows in splits.items()
    }
    return [
        {"label": name, **{split: counts.get(split, Counter())[name] for split in ("train", "validation", "test")}}
        for name in names
    ]


def variant_key(label: str) -> str:
    """Returns what labels that differ only by case, white space, "-" and "_" have in common.

    Only what stands between words counts: "A-" is not "A", "-1" is not "1", "1-2" is not "12".
    """
    folded = unicodedata.normalize("NFC", label).casefold().strip()
    return _BETWEEN_WORDS.sub(lambda at: " " if at[1].isdigit() or at[2].isdigit() else "", folded)


def variants(counts: Counter[Any]) -> dict[Any, Any]:
    """Returns label -> the more frequent label that it is a way of writing of. Of equals, the first stays."""
    main: dict[str, str] = {}
    renames = {}
    for label, _ in counts.most_common():
        if isinstance(label, str) and main.setdefault(variant_key(label), label) != label:
            renames[label] = main[variant_key(label)]
    return renames


def typos(counts: Counter[Any], share: float = TYPO_SHARE) -> dict[Any, Any]:
    """Returns label -> the frequent label, of which it has at most that share, that it likely is a misspelling of.

    A misspelling is rare, close, and begins with the right letter; what begins otherwise ("likely" and "unlikely",
    "import" and "export") is more often a word of its own.
    """
    words = [label for label in counts if isinstance(label, str) and len(label) >= TYPO_LENGTH]
    renames = {}
    for label in words:
        if counts[label] > TYPO_ROWS:
            continue
        near = [
            (edits, -counts[other], other)
            for other in words
            if counts[label] <= share * counts[other]
            and other[0].casefold() == label[0].casefold()
            and (edits := DamerauLevenshtein.distance(label, other, score_cutoff=TYPO_EDITS)) <= TYPO_EDITS
            and _letters(label) != _letters(other)
        ]
        if near:
            renames[label] = min(near)[2]
    return renames


def _letters(label: str) -> str:
    return "".join(character for character in label if not character.isdigit())


def ways_of_writing(counts: Counter[Any], train: Counter[Any], renames: dict[Any, Any]) -> dict[Any, Any]:
    """Returns label -> what it is called in train, for the labels of a split.

    Args:
        counts: of the split.
        train: of train, which may know one way of writing only, where another split has others.
        renames: what `variants` has found in train.
    """
    known = {label for label in train if label not in renames}
    by_key = {variant_key(label): label for label in known if isinstance(label, str)}
    written = {label: by_key.get(variant_key(label)) for label in counts if isinstance(label, str)}
    mine = {label: renames[label] for label in counts if label in renames}
    for label, name in written.items():
        if name is not None and label not in known:
            mine.setdefault(label, name)
    return mine


def refuse_what_is_no_class(counts: Counter[Any], where: str) -> None:
    """Refuses a label column that holds numbers of a scale, or free text.

    Raises:
        DataError: there are more than 50 distinct labels, and they are fractions or hardly ever repeat.
    """
    if len(counts) <= 50:
        return
    fractions = [label for label in counts if _is_fraction(label)]
    numeric = all(_number(label) is not None for label in counts)
    if not (numeric and fractions) and len(counts) <= 0.5 * counts.total():
        return
    examples = ", ".join(str(label)[:40] for label in list(counts)[:5])
    raise DataError(
        f"{where}: the label column does not look like classes, but like {'a regression' if numeric else 'free text'}",
        found=f"{len(counts)} distinct values in {counts.total()} rows, e.g. {examples}",
        expected="a few classes, each on many rows",
        mend="check that data.columns names the right column as label"
        + (": for numbers on a scale task: regression, or cut them into ranges and name those" if numeric else ""),
    )


def is_number(label: Any) -> bool:
    """Whether a label is a number, or a text that writes one."""
    return _number(label) is not None


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def _is_fraction(label: Any) -> bool:
    number = _number(label)
    return number is not None and math.isfinite(number) and not number.is_integer()
