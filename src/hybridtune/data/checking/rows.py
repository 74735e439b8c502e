"""The rows of a split as the checks see them.

The texts stay in the data set, which may lie on a disk. Of every row only a few numbers are in memory: where it is, a
hash of its texts, and what a task keeps of its target.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint

from ...errors import DataError
from ..reading.files import LINED_SUFFIXES, READ_AS
from ..reading.tables import ROW

BATCH = 10_000

R = TypeVar("R")


@dataclass(frozen=True)
class Rows:
    """What of a split is still kept. Each task has a kind of its own, with arrays of its own.

    Attributes:
        split: its name.
        source: the file or kind of object, for messages.
        texts: the columns that hold its texts.
        data: the data set as it came.
        at: the positions of the kept rows in `data`.
        number: their `_row`.
        keys: for each kept row eight bytes, equal for equal texts.
        empty: for each kept row whether a text is missing that it cannot do without.
        gaps: for each kept row whether one of its texts is no text: missing, or a number.
    """

    split: str
    source: str
    texts: tuple[str, ...]
    data: Dataset
    at: np.ndarray
    number: np.ndarray
    keys: np.ndarray
    empty: np.ndarray
    gaps: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    @property
    def same(self) -> np.ndarray:
        """For each kept row eight bytes, equal for equal targets."""
        raise NotImplementedError

    def target(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's target, such as its label."""
        raise NotImplementedError

    def keep(self, wanted: np.ndarray) -> Self:
        """Returns the rows for which `wanted` holds."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: a[wanted] for name, a in arrays.items() if isinstance(a, np.ndarray)})

    def place(self, index: int) -> str:
        """Returns where a row stands: file:line, or the number of the row where there are no lines."""
        return place(self.source, int(self.number[index]))

    def row(self, index: int) -> dict[str, Any]:
        """Returns a row as the data set has it."""
        found: dict[str, Any] = self.data[int(self.at[index])]
        return found

    def into(self, kind: Callable[..., R], **arrays: Any) -> R:
        """Returns these rows as those of a task, with what belongs to it."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(self)}, **arrays)

    @cached_property
    def kept(self) -> Dataset:
        """The kept rows as the data set has them."""
        return self.data if len(self) == len(self.data) else self.data.select(self.at)

    def batches(self, *columns: str) -> Iterator[tuple[list[Any], ...]]:
        """Yields the values of these columns, some thousand kept rows at a time."""
        return batches(self.kept, columns)

    def plain_texts(self) -> dict[str, pa.ChunkedArray]:
        """Returns the columns of texts that have to be written anew, as something in them is no text."""
        if not self.gaps.any():
            return {}
        return {
            name: self.rewritten(lambda values: list(map(as_text, values)), pa.string(), name) for name in self.texts
        }

    def rewritten(self, change: Callable[..., list[Any]], kind: pa.DataType, *columns: str) -> pa.ChunkedArray:
        """Returns a column that `change` makes of the values of these columns, for the kept rows."""
        return pa.chunked_array([pa.array(change(*values), kind) for values in self.batches(*columns)], kind)

    def to_dataset(self, columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> Dataset:
        """Returns what is kept as a data set of its own.

        It knows of no file, lest datasets keep what is made of it beside the user's own.

        Args:
            columns: those that are not what they were, for the kept rows. All others are not copied.
        """
        table: pa.Table = self.data.data.table
        inside = self.data._indices  # where rows were picked before, the table still has all of them
        places = self.at if inside is None else inside.column(0).to_numpy()[self.at]
        whole = len(places) == table.num_rows and bool((places == np.arange(len(places))).all())
        if columns and not whole:
            back = np.full(table.num_rows, -1, np.int32)
            back[places] = np.arange(len(places))
            columns = {name: values.take(pa.array(back, mask=back < 0)) for name, values in columns.items()}
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, values)
        made = of_table(table)
        return made if whole else made.select(places)


def of_table(table: pa.Table) -> Dataset:
    """Returns a table as a data set; without a fingerprint of ours, datasets would take one of all bytes."""
    return Dataset(table.replace_schema_metadata(None), fingerprint=generate_random_fingerprint())


def open_rows(
    split: str,
    data: Dataset,
    source: str,
    texts: Sequence[str],
    target: str,
    needed: int = 1,
    read: Callable[[Any], str] | None = None,
) -> Rows:
    """Looks at the texts of a split.

    Args:
        split: its name.
        data: with canonical columns.
        source: what `describe` returned.
        texts: the columns of its texts.
        target: the column of what is to be learnt, which has to be there too.
        needed: how many of the texts of a row have to say something.
        read: what makes a text of a value, where values need not be texts.

    Raises:
        DataError: a column is not there, or holds something else than texts.
    """
    where = source.partition(READ_AS)[0]
    data = data.with_format(None)
    for name in (*texts, target):
        if name not in data.column_names:
            raise DataError(f"{where}: there is no column {name}", found=", ".join(data.column_names))
    if read is None:
        for name in texts:
            _refuse_no_text(data, name, where)
    keys, says, gaps = text_keys(data, texts, read or as_text)
    number = row_numbers(data).astype(np.int32)
    at = np.arange(len(data), dtype=np.int32)
    return Rows(split, where, tuple(texts), data, at, number, keys, says < needed, gaps)


def batches(data: Dataset, columns: Sequence[str]) -> Iterator[tuple[list[Any], ...]]:
    """Yields the values of these columns, some thousand rows at a time."""
    for table in data.select_columns(list(columns)).with_format("arrow").iter(BATCH):
        yield tuple(table[name].to_pylist() for name in columns)


def text_keys(
    data: Dataset, columns: Sequence[str], read: Callable[[Any], str] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each row the `text_key` of its texts, how many of them say something, and whether one is no text."""
    read = read or as_text
    keys, says, gaps = [], [], []
    for values in batches(data, columns):
        texts = [list(map(read, column)) for column in values]
        keys.append(np.frombuffer(b"".join(map(text_key, *texts)), np.uint64))
        says.append(sum(np.array([bool(text.strip()) for text in column], np.int8) for column in texts))
        gaps.append(np.array([not all(isinstance(value, str) for value in row) for row in zip(*values, strict=True)]))
    if not keys:
        return np.empty(0, np.uint64), np.empty(0, np.int8), np.empty(0, bool)
    return np.concatenate(keys), np.concatenate(says), np.concatenate(gaps)


def as_text(value: Any) -> str:
    """Returns a value as text: a missing one is empty, the words of a list stand with spaces between them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(map(as_text, value))
    return "" if pd.isna(value) else str(value)


def texts_of(data: Dataset, column: str) -> list[str]:
    """Returns the values of a column as texts."""
    return list(map(as_text, data[column][:]))


def text_key(*texts: str) -> bytes:
    """Returns eight bytes that are equal for texts that differ only by case, white space or Unicode form."""
    return hashlib.blake2b(plain_text(*texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def plain_text(*texts: str) -> str:
    """Returns the texts as one, without differences of case, white space and Unicode form."""
    return "\x1f".join(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


def place(source: str, number: int) -> str:
    """Returns where a row stands: file:line, or the number of the row where there are no lines."""
    return f"{source}:{number}" if source.lower().endswith(LINED_SUFFIXES) else f"{source}, row {number}"


def row_numbers(data: Dataset) -> np.ndarray:
    """Returns `_row`, or 1, 2, 3, ... where the data set did not come from `read`."""
    if ROW not in data.column_names:
        return np.arange(1, len(data) + 1)
    numbers: np.ndarray = data.with_format("numpy", columns=[ROW])[ROW][:]
    return numbers


def column_type(data: Dataset, name: str) -> pa.DataType:
    """Returns the type that a column has in Arrow."""
    return data.data.table.schema.field(name).type


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_string(kind: pa.DataType) -> bool:
    """Whether values of this type are texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _refuse_no_text(data: Dataset, name: str, where: str) -> None:
    kind = column_type(data, name)
    if not (is_list(kind) or pa.types.is_struct(kind)):
        return
    values = (value for (batch,) in batches(data, [name]) for value in batch)
    found = [(int(number), value) for number, value in zip(row_numbers(data), values, strict=True) if value is not None]
    if not found:
        return
    # Beside a list, reading makes a text a list of one.
    number, value = next((one for one in found if not isinstance(one[1], list) or len(one[1]) != 1), found[0])
    raise DataError(
        f"{place(where, number)}: {name} is not a text",
        found=repr(value)[:160],
        expected="a text",
        mend="join the words of a list with spaces" if isinstance(value, list) else None,
    )
