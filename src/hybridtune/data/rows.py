"""The rows of a split as the checks see them: plain Python lists next to the data set that they came from."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset

from ..errors import DataError
from .files import LINED_SUFFIXES, READ_AS
from .labels import label_lists
from .tables import ROW


@dataclass(frozen=True)
class Rows:
    """What of a split is still kept.

    Attributes:
        split: its name.
        source: the file or kind of object, for messages.
        multi_label: whether a row may have several labels, or none.
        data: the data set as it came.
        at: the positions of the kept rows in `data`.
        number: their `_row`.
        texts: for each kept row its texts: one, or two where there is a `text_pair`.
        keys: for each kept row the `text_key` of its texts.
        labels: for each kept row its labels; exactly one where not `multi_label`, none where it is missing.
        missing: for each kept row whether it has no label. ("None of them" is a label where there may be several.)
    """

    split: str
    source: str
    multi_label: bool
    data: Dataset
    at: list[int]
    number: list[int]
    texts: list[tuple[str, ...]]
    keys: list[bytes]
    labels: list[list[Any]]
    missing: list[bool]

    def __len__(self) -> int:
        return len(self.at)

    def keep(self, wanted: Sequence[bool]) -> Rows:
        """Returns the rows for which `wanted` holds."""
        names = ("at", "number", "texts", "keys", "labels", "missing")
        lists: dict[str, Any] = {name: list(compress(getattr(self, name), wanted)) for name in names}
        return replace(self, **lists)

    def place(self, index: int) -> str:
        """Returns where a row stands: file:line, or the number of the row where there are no lines."""
        return place(self.source, self.number[index])

    def label(self, index: int) -> Any:
        """Returns the label of a row as the data set has it: a list where there may be several."""
        labels = self.labels[index]
        return labels if self.multi_label else next(iter(labels), None)

    def counts(self) -> Counter[Any]:
        """Returns label -> number of rows that have it."""
        return Counter(label for labels in self.labels for label in labels)

    def is_empty(self, index: int) -> bool:
        """Whether none of the texts of a row says anything."""
        return not any(text.strip() for text in self.texts[index])

    def to_dataset(self, label_type: pa.DataType) -> Dataset:
        """Returns what is kept as a data set of its own."""
        rows = self.data if len(self) == len(self.data) else self.data.select(self.at)
        table: pa.Table = rows.with_format("arrow")[:]
        columns = {name: table[name] for name in table.column_names}
        for position, name in enumerate(name for name in ("text", "text_pair") if name in columns):
            columns[name] = pa.array([texts[position] for texts in self.texts], pa.string())
        labels = [self.label(index) for index in range(len(self))]
        columns["label"] = pa.array(labels, pa.list_(label_type) if self.multi_label else label_type)
        return Dataset(pa.table(columns))


def place(source: str, number: int) -> str:
    """Returns where a row stands: file:line, or the number of the row where there are no lines."""
    return f"{source}:{number}" if source.lower().endswith(LINED_SUFFIXES) else f"{source}, row {number}"


def text_key(*texts: str) -> bytes:
    """Returns eight bytes that are equal for texts that differ only by case, white space or Unicode form."""
    plain = "\x1f".join(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def row_numbers(data: Dataset) -> list[int]:
    """Returns `_row`, or 1, 2, 3, ... where the data set did not come from `read`."""
    if ROW not in data.column_names:
        return list(range(1, len(data) + 1))
    numbers: list[int] = data[ROW][:]
    return numbers


def text_columns(data: Dataset, where: str) -> list[tuple[str, ...]]:
    """Returns for each row its `text`, and its `text_pair` where there is one; missing ones are empty, numbers text.

    Raises:
        DataError: there is no column `text`, or it holds something else than text.
    """
    if "text" not in data.column_names:
        raise DataError(f"{where}: there is no column text", found=", ".join(data.column_names))
    columns = []
    for name in ("text", "text_pair"):
        if name not in data.column_names:
            continue
        values = data[name][:]
        odd = next((at for at, value in enumerate(values) if isinstance(value, (list, dict))), None)
        if odd is not None:
            raise DataError(
                f"{place(where, row_numbers(data)[odd])}: {name} is not a text",
                found=repr(values[odd])[:160],
                expected="a text",
                mend="join the words of a list with spaces" if isinstance(values[odd], list) else None,
            )
        columns.append(["" if pd.isna(value) else str(value) for value in values])
    return list(zip(*columns, strict=True))


def open_rows(split: str, data: Dataset, source: str, multi_label: bool, separators: str | None = None) -> Rows:
    """Takes the texts and labels out of a data set with canonical columns.

    Raises:
        DataError: the columns `text` and `label` are not there, or hold something else than texts and labels.
    """
    where = source.partition(READ_AS)[0]
    data = data.with_format(None)
    texts = text_columns(data, where)
    if "label" not in data.column_names:
        raise DataError(f"{where}: there is no column label", found=", ".join(data.column_names))
    values = data["label"][:]
    numbers = row_numbers(data)
    _refuse_odd_labels(values, numbers, where, multi_label)
    keys = [text_key(*pair) for pair in texts]
    labels = label_lists(values, multi_label, separators)
    missing = [value is None if multi_label else not row for value, row in zip(values, labels, strict=True)]
    return Rows(split, where, multi_label, data, list(range(len(data))), numbers, texts, keys, labels, missing)


def _refuse_odd_labels(values: Sequence[Any], numbers: Sequence[int], where: str, multi_label: bool) -> None:
    first_list = next((index for index, value in enumerate(values) if isinstance(value, list)), None)
    first_nested = next((index for index, value in enumerate(values) if _is_nested(value)), None)
    if first_nested is not None:
        raise DataError(
            f"{place(where, numbers[first_nested])}: the label is an object",
            found=repr(values[first_nested])[:160],
            expected="a text or a number" + (", or a list of them" if multi_label else ""),
        )
    if first_list is not None and not multi_label:
        raise DataError(
            f"{place(where, numbers[first_list])}: the label is a list",
            found=repr(values[first_list])[:160],
            expected="one label a row",
            mend="multi_label: true, if a row may have several labels or none",
        )
    vectors = [value for value in values if isinstance(value, list)]
    equally_long = len({len(value) for value in vectors}) == 1 and len(vectors[0]) > 2
    if equally_long and all(item in (0, 1) for vector in vectors for item in vector):
        raise DataError(
            f"{where}: the labels look like vectors of 0 and 1",
            found=f"{place(where, numbers[first_list or 0])}: {vectors[0]}"[:160],
            expected='the labels that hold, e.g. ["toxic", "insult"]',
            mend="write the names, or the positions, of the ones instead of the vector",
        )


def _is_nested(value: Any) -> bool:
    inside = value if isinstance(value, list) else ()
    return isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in inside)


def same_label_type(splits: dict[str, Rows]) -> tuple[dict[str, Rows], set[str]]:
    """Makes all labels text where they are not of one type, as when one split is CSV and another JSON.

    Returns:
        The splits, and the names of those that were changed.
    """
    types = {type(label) for rows in splits.values() for labels in rows.labels for label in labels}
    if len(types) < 2:
        return splits, set()
    changed = {
        name: replace(rows, labels=[[str(label) for label in labels] for labels in rows.labels])
        for name, rows in splits.items()
    }
    return changed, {name for name, rows in splits.items() if changed[name].labels != rows.labels}
