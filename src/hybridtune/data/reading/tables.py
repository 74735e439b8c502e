"""Plain Arrow tables out of dicts, frames and data sets: text, numbers and lists, whatever they were before."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Dataset

from ...errors import DataError

ROW = "_row"
"""The column that says where a row came from."""

SOURCE = "_source"
"""The column that says which of several files a row came from."""

Form: TypeAlias = Literal["lists", "texts", "text"]
"""What a column's values are made, where they are of several types: lists, lists of text, or text."""

PANDAS_INDEX = "__index_level_"
REFUSALS = (pa.ArrowException, OverflowError, TypeError, ValueError)


def from_columns(columns: dict[str, list[Any]]) -> pa.Table:
    """Returns a table of these columns. Values of several types in one column become text."""
    return pa.table({name: array(values) for name, values in columns.items()})


def from_dicts(rows: Iterable[Any], where: str) -> pa.Table:
    """Returns a table with every key that any of the dicts has.

    Raises:
        DataError: a row is not a dict.
    """
    rows = list(rows)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: row {number} is not a dict", found=repr(row)[:160], expected='{"text": "...", ...}'
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return from_columns({str(name): [row.get(name) for row in rows] for name in names})


def from_frame(frame: pd.DataFrame) -> pa.Table:
    """Returns a table of a pandas frame, without its index. NaN becomes missing.

    Raises:
        DataError: two columns have one name.
    """
    names = [str(name) for name in frame.columns]
    _refuse_twins(names, "pandas.DataFrame")
    return pa.table({name: _from_series(frame.iloc[:, at]) for at, name in enumerate(names)})


def plain(rows: Dataset, where: str) -> pa.Table:
    """Returns the rows as a table without `_row` and `_source`, and with the names of classes in place of numbers.

    Raises:
        DataError: two columns have one name.
    """
    table: pa.Table = rows.with_format("arrow")[:]
    _refuse_twins(table.column_names, where)
    columns = {}
    for name in table.column_names:
        if name in (ROW, SOURCE) or name.startswith(PANDAS_INDEX):
            continue
        column, feature = table[name], rows.features[name]
        inner = getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel):
            column = pa.array([_class(feature, value) for value in column.to_pylist()])
        elif isinstance(inner, ClassLabel):
            lists = column.to_pylist()
            column = pa.array(
                [None if values is None else [_class(inner, value) for value in values] for values in lists],
                pa.list_(pa.string()),
            )
        columns[name] = column
    return pa.table(columns)


def without_dictionaries(table: pa.Table) -> pa.Table:
    """Returns the table with categories written out (`datasets` does not take them)."""
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(at, field.name, table.column(at).cast(field.type.value_type))
    return table.replace_schema_metadata(None)


def _refuse_twins(names: list[str], where: str) -> None:
    twins = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twins:
        raise DataError(f'{where}: has two columns "{twins[0]}"', found=", ".join(names), mend="rename one of them")


def _class(feature: ClassLabel, value: int | None) -> str | None:
    """Returns the name of a class; -1 stands for "not labelled" in many published test sets."""
    return None if value is None or value < 0 else str(feature.names[value])


def _from_series(values: pd.Series) -> pa.Array:
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype if not values.isna().any() else object)
    try:
        made = pa.Array.from_pandas(values)
    except REFUSALS:
        return array([None if _missing(value) else value for value in values])
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def array(values: Sequence[Any], form: Form | None = None) -> pa.Array:
    """Returns values as one column. Values of several types become lists where there are lists among them, else text.

    Args:
        values: plain Python values.
        form: what they have to become, whatever they are.
    """
    if form is None:
        with suppress(*REFUSALS):
            return pa.array(values)
        form = "lists" if any(isinstance(value, list) for value in values) else "text"
    if form == "text":
        return pa.array([_as_text(value) for value in values], pa.string())
    lists = [value if value is None or isinstance(value, list) else [value] for value in values]
    if form == "lists":  # one label here, a list of them there
        with suppress(*REFUSALS):
            return pa.array(lists)
    texts = [None if value is None else [_as_text(item) for item in value] for value in lists]
    return pa.array(texts, pa.list_(pa.string()))


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return whole_characters(str(value))


def whole_characters(text: str) -> str:
    """Returns a text without halves of surrogate pairs, as "\\ud83d" in JSON, which are no characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
