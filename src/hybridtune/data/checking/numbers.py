"""Numbers out of a column: of whatever type it is, one a row or a list of them."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import DataError
from .labels import written_list
from .rows import Rows, batches, column_type, is_list
from .twins import mixed

FINE, MISSING, NO_NUMBER = range(3)

_NOTHING = {"", "na", "n/a", "nan", "nil", "none", "null", "missing", "unknown", "-", "--", "?"}
_COMMA = re.compile(r"[+-]?\d+,\d+")
_MARKS = "[,.'\u2019 \u00a0\u202f]"  # between thousands, in one country or another
_MARKED = re.compile(rf"(?P<whole>\d{{1,3}}(?P<mark>{_MARKS})\d{{3}}(?:(?P=mark)\d{{3}})*)(?:[.,](?P<rest>\d+))?")
_UNIT = r"[^\W\d]{1,12}(?:/[^\W\d]{1,8})?|[^\w\s]{1,2}[^\W\d]?"  # kg, km/h, %, \u20ac, \u00b0C
_MEASURE = re.compile(
    rf"(?P<before>(?:[^\W\d]{{1,4}} |[^\W\d]{{0,3}}[^\w\s.,+-] ?)?)(?P<sign>-?)"
    rf"(?P<number>\d(?:\d|{_MARKS}(?=\d))*)(?P<after>(?:\s?(?:{_UNIT}))?)"
)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


@dataclass(frozen=True)
class Numbers(Rows):
    """Rows of a regression.

    Attributes:
        values: for each kept row its numbers; NaN where it has none.
        faults: for each kept row `FINE`, `MISSING` or `NO_NUMBER`.
        texts_were: for each kept row 0, or 1 where its number was a text, or 2 where a comma stood in it.
        several: whether a target is a list.
        as_given: whether the column is what it has to be already.
    """

    values: np.ndarray
    faults: np.ndarray
    texts_were: np.ndarray
    several: bool
    as_given: bool

    @property
    def same(self) -> np.ndarray:
        """For each kept row eight bytes, equal for equal numbers."""
        bits = (self.values + 0.0).view(np.uint64)  # -0.0 is 0.0
        found: np.ndarray = bits[:, 0]
        for at in range(1, bits.shape[1]):
            found = mixed(found, bits[:, at])
        return found

    def target(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's numbers."""
        if self.faults[index]:
            return self.given(index)
        return {"label": self.values[index].tolist() if self.several else float(self.values[index, 0])}

    def given(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's target as it stands there."""
        return {"label": str(self.row(index)["label"])[:160]}

    def written(self) -> dict[str, pa.Array]:
        """Returns the column `label`, where it has to be written anew."""
        if self.as_given:
            return {}
        flat = pa.array(self.values.ravel())
        if not self.several:
            return {"label": flat}
        offsets = np.arange(len(self) + 1) * self.values.shape[1]
        return {"label": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)}


@dataclass
class Column:
    """What stands in a column, one number after the other.

    Attributes:
        flat: all numbers.
        widths: for each row how many of them are its own; 0 where it has none.
        faults: for each row `FINE`, `MISSING` or `NO_NUMBER`.
        texts: for each row 0, or 1 where it is a text, or 2 where a comma stands in it.
        lists: whether a row is a list.
    """

    flat: array[float] = field(default_factory=lambda: array("d"))
    widths: array[int] = field(default_factory=lambda: array("i"))
    faults: array[int] = field(default_factory=lambda: array("b"))
    texts: array[int] = field(default_factory=lambda: array("b"))
    lists: bool = False

    def take(self, value: Any, comma: bool) -> None:
        """Takes the target of the next row."""
        items = value if isinstance(value, list) else written_list(value.strip()) if isinstance(value, str) else None
        self.lists |= items is not None
        self.texts.append(0 if not isinstance(value, str) else 2 if comma and "," in value else 1)
        fault, numbers = FINE, []
        for item in [value] if items is None else items:
            number = number_of(item, comma)
            fault = max(fault, MISSING if number is None else FINE if math.isfinite(number) else NO_NUMBER)
            numbers.append(number or 0.0)
        fault = fault if numbers else MISSING
        self.faults.append(fault)
        self.widths.append(0 if fault else len(numbers))
        self.flat.extend(() if fault else numbers)


def number_of(value: Any, comma: bool) -> float | None:
    """Returns a value as a number: infinity where it is none, and None where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        text = value.strip().replace("\u2212", "-")  # the minus sign of typesetters
        if text.casefold() in _NOTHING:
            return None
        value = text.replace(",", ".") if comma and _COMMA.fullmatch(text) else text
    try:
        return float(value) if "_" not in str(value) else math.inf
    except (TypeError, ValueError):
        return math.inf


def plain_number(text: str) -> str | None:
    """Returns what a text that is no number was meant as, where it is one with marks between thousands or a unit."""
    found = _MEASURE.fullmatch(text.strip())
    if not found or not (found["before"] or found["after"] or _MARKED.fullmatch(found["number"])):
        return None
    marked, number = _MARKED.fullmatch(found["number"]), found["number"]
    if marked:
        whole = "".join(character for character in marked["whole"] if character.isdigit())
        return found["sign"] + whole + (f".{marked['rest']}" if marked["rest"] else "")
    return found["sign"] + number.replace(",", ".") if number_of(number.replace(",", "."), False) is not None else None


def open_numbers(splits: dict[str, Rows], width: int | None = None) -> dict[str, Numbers]:
    """Takes the numbers out of splits. A comma in all of them, as in 3,5, is a decimal point.

    Args:
        splits: with the column `label`.
        width: how many numbers a row has; what most rows of train have where not given.

    Raises:
        DataError: lists are of different lengths, or commas cannot be told from points.
    """
    comma = _decimal_comma(splits.values())
    columns = {}
    for name, rows in splits.items():
        columns[name] = Column()
        for (values,) in batches(rows.data, ["label"]):
            for value in values:
                columns[name].take(value, comma)
    several = any(column.lists for column in columns.values())
    usual = "the model gives" if width is not None else "that of most rows of train"
    if width is None:
        widths = np.frombuffer(columns["train"].widths or array("i", [0]), np.int32)
        width = int(np.bincount(widths[widths > 0]).argmax()) if (widths > 0).any() else 1
    several &= width > 1
    made = {}
    for name, rows in splits.items():
        column = columns[name]
        _refuse_other_lengths(rows, np.array(column.widths), width, usual)
        numbers = np.full((len(rows), width), np.nan)
        faults = np.array(column.faults, np.int8)
        numbers[faults == FINE] = np.array(column.flat).reshape(-1, width)
        kind = column_type(rows.data, "label")
        as_given = kind == (pa.list_(pa.float64()) if several else pa.float64())
        texts_were = np.array(column.texts, np.int8)
        made[name] = rows.into(
            Numbers, values=numbers, faults=faults, texts_were=texts_were, several=several, as_given=as_given
        )
    return made


def _is_numeric(kind: pa.DataType) -> bool:
    kind = kind.value_type if is_list(kind) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _decimal_comma(splits: Iterable[Rows]) -> bool:
    """Whether "3,5" is 3.5 here. There may not be points too, as in "1.5", nor thousands alone."""
    comma: str | None = None
    sure, point = False, None
    for rows in splits:
        if _is_numeric(column_type(rows.data, "label")):
            continue
        for at, value in enumerate(value for (values,) in batches(rows.data, ["label"]) for value in values):
            text = value.strip() if isinstance(value, str) else ""
            if _COMMA.fullmatch(text):
                comma = comma or f"{rows.place(at)}: {text}"
                sure |= not _THOUSANDS.fullmatch(text)
            elif "." in text and math.isfinite(number_of(text, False) or 0.0):
                point = point or f"{rows.place(at)}: {text}"
    if comma is None:
        return False
    if point is not None or not sure:
        raise DataError(
            f"{comma.rpartition(':')[0]}: the comma in a number may be a decimal comma or one of thousands",
            found=comma if point is None else f"{comma}, and {point}",
            expected="3.5 or 3,5 in all rows, and no marks between thousands",
            mend="write all numbers with a decimal point",
        )
    return True


def _refuse_other_lengths(rows: Rows, widths: np.ndarray, width: int, usual: str) -> None:
    other = np.flatnonzero((widths > 0) & (widths != width))
    if len(other):
        raise DataError(
            f"{rows.place(other[0])}: the label has {widths[other[0]]} numbers, {usual} {width}",
            found=f"{str(rows.row(other[0])['label'])[:120]}; {len(other)} of {len(rows)} rows of {rows.split}",
            expected="as many numbers on every row",
            mend="correct these rows, or take them out of the file",
        )
