"""Rows with labels: of each a number, which stands for what it has of all that there is in the column."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ...errors import DataError
from .labels import label_lists, separators_of
from .rows import Rows, batches, column_type, open_rows


@dataclass(frozen=True)
class Labelled(Rows):
    """Rows of a classification.

    Attributes:
        multi_label: whether a row may have several labels, or none.
        codes: for each kept row the position of its labels in `sets`.
        raw: the distinct values of the column, as the data set has them.
        sets: for each of them its labels; exactly one where not `multi_label`; None where it is missing. ("None of
            them" is a label where there may be several.)
    """

    multi_label: bool
    codes: np.ndarray
    raw: list[Any]
    sets: list[tuple[Any, ...] | None]

    @property
    def same(self) -> np.ndarray:
        """For each kept row a number, equal for equal labels in whatever order."""
        known: dict[frozenset[Any] | None, int] = {}
        sets = (None if labels is None else frozenset(labels) for labels in self.sets)
        numbers = np.array([known.setdefault(labels, len(known)) for labels in sets], np.uint64)
        return np.asarray(numbers[self.codes])

    def label(self, index: int) -> Any:
        """Returns the label of a row: a list where there may be several, None where it is missing."""
        labels = self.sets[self.codes[index]]
        return labels if labels is None else list(labels) if self.multi_label else labels[0]

    def target(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's label."""
        return {"label": self.label(index)}

    def where(self, holds: Callable[[tuple[Any, ...] | None], bool]) -> np.ndarray:
        """Returns the positions of the rows for whose labels something holds."""
        return np.flatnonzero(np.array([holds(labels) for labels in self.sets], bool)[self.codes])

    def having(self, some: Collection[Any]) -> np.ndarray:
        """Returns the positions of the rows that have one of these labels."""
        return self.where(lambda labels: any(label in some for label in labels or ()))

    @cached_property
    def counts(self) -> Counter[Any]:
        """Label -> number of rows that have it, in the order in which they come."""
        first = np.full(len(self.sets), len(self))
        np.minimum.at(first, self.codes, np.arange(len(self)))
        sizes = np.bincount(self.codes, minlength=len(self.sets))
        found: Counter[Any] = Counter()
        for code in np.argsort(first, kind="stable")[: int((sizes > 0).sum())]:
            for label in self.sets[code] or ():
                found[label] += int(sizes[code])
        return found

    def named(self, change: Callable[[Any], Any]) -> Labelled:
        """Returns the rows with other names for labels. Of two labels of a row that are now one, one stays."""
        sets = [labels and tuple(dict.fromkeys(map(change, labels))) for labels in self.sets]
        return replace(self, sets=sets)

    def written(self, label_type: pa.DataType) -> dict[str, pa.Array]:
        """Returns the column `label`, where it has to be written anew."""
        kind = pa.list_(label_type) if self.multi_label else label_type
        labels = [labels and list(labels) if self.multi_label else labels and labels[0] for labels in self.sets]
        if kind == column_type(self.data, "label") and labels == self.raw:
            return {}
        used = set(np.unique(self.codes).tolist())
        values = pa.array([label if code in used else None for code, label in enumerate(labels)], kind)
        return {"label": values.take(pa.array(self.codes))}


def open_labelled(
    splits: dict[str, Dataset], sources: dict[str, str], multi_label: bool, separators: str | None
) -> dict[str, Labelled]:
    """Takes the labels out of splits with canonical columns.

    Args:
        splits, sources, multi_label, separators: as of `check_classification`.

    Raises:
        DataError: the columns `text` and `label` are not there, or hold something else than texts and labels.
    """
    opened = {}
    for name, data in splits.items():
        texts = [column for column in ("text", "text_pair") if column in data.column_names or column == "text"]
        rows = open_rows(name, data, sources.get(name, name), texts, "label")
        codes, raw = _codes(rows.data)
        _refuse_odd_labels(rows, codes, raw, multi_label)
        opened[name] = (rows, codes, raw)
    if multi_label and separators is None:
        separators = separators_of(opened["train"][2])
    made = {}
    for name, (rows, codes, raw) in opened.items():
        lists = label_lists(raw, multi_label, separators)
        missing = [value is None if multi_label else not labels for value, labels in zip(raw, lists, strict=True)]
        sets = [None if gone else tuple(labels) for gone, labels in zip(missing, lists, strict=True)]
        made[name] = rows.into(Labelled, multi_label=multi_label, codes=codes, raw=raw, sets=sets)
    return made


def same_label_type(splits: dict[str, Labelled], labels: Sequence[Any] = ()) -> tuple[dict[str, Labelled], set[str]]:
    """Makes all labels text where they are not of one type, as when one split is CSV and another JSON.

    Args:
        splits: all of them.
        labels: those that are known already, whose type is kept: "3" is 3 where the model was trained on 3.

    Returns:
        The splits, and the names of those that were changed.
    """
    if labels:
        names, kind = {str(label): label for label in labels}, type(labels[0])

        def meant_by(label: Any) -> Any:
            return label if isinstance(label, kind) else names.get(str(label).strip(), label)

        meant = {name: rows.named(meant_by) for name, rows in splits.items()}
        return meant, {name for name, rows in splits.items() if meant[name].sets != rows.sets}
    types = {type(label) for rows in splits.values() for label in rows.counts}
    if len(types) < 2:
        return splits, set()
    return {name: rows.named(str) for name, rows in splits.items()}, {
        name for name, rows in splits.items() if any(not isinstance(label, str) for label in rows.counts)
    }


def _codes(data: Dataset) -> tuple[np.ndarray, list[Any]]:
    """Returns for each row the number of its value of `label`, and the distinct values."""
    known: dict[Any, int] = {}
    raw: list[Any] = []
    codes = array("i")
    for (values,) in batches(data, ["label"]):
        for value in values:
            key = repr(value) if isinstance(value, (list, dict, float)) else value  # NaN does not equal itself
            code = known.setdefault(key, len(raw))
            if code == len(raw):
                raw.append(value)
            codes.append(code)
    return np.frombuffer(codes, np.int32) if codes else np.empty(0, np.int32), raw


def _refuse_odd_labels(rows: Rows, codes: np.ndarray, raw: list[Any], multi_label: bool) -> None:
    def where(code: int) -> str:
        return rows.place(int(np.argmax(codes == code)))

    nested = next((code for code, value in enumerate(raw) if _is_nested(value)), None)
    if nested is not None:
        raise DataError(
            f"{where(nested)}: the label is an object",
            found=repr(raw[nested])[:160],
            expected="a text or a number" + (", or a list of them" if multi_label else ""),
        )
    lists = [code for code, value in enumerate(raw) if isinstance(value, list)]
    if lists and not multi_label:
        raise DataError(
            f"{where(lists[0])}: the label is a list",
            found=repr(raw[lists[0]])[:160],
            expected="one label a row",
            mend="multi_label: true, if a row may have several labels or none",
        )
    vectors = [raw[code] for code in lists]
    equally_long = len({len(value) for value in vectors}) == 1 and len(vectors[0]) > 2
    if equally_long and all(item in (0, 1) for vector in vectors for item in vector):
        raise DataError(
            f"{rows.source}: the labels look like vectors of 0 and 1",
            found=f"{where(lists[0])}: {vectors[0]}"[:160],
            expected='the labels that hold, e.g. ["toxic", "insult"]',
            mend="write the names, or the positions, of the ones instead of the vector",
        )


def _is_nested(value: Any) -> bool:
    inside = value if isinstance(value, list) else ()
    return isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in inside)
