"""Reads labelled rows, wherever they are, into a `datasets.Dataset`.

Every data set that comes out has plain columns (text, numbers, lists; no ClassLabel, no category) and a column `_row`:
the line where the row starts in .csv, .tsv and .jsonl files, the number of the row elsewhere, both from 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from ..errors import DataError, nearest_file
from .columns import find_columns, map_columns, rename_columns
from .files import READ_AS, TEXT_SUFFIXES, encoding_of, read_text_file
from .tables import ROW, from_columns, from_dicts, from_frame, plain, without_dictionaries

__all__ = ["ROW", "SUFFIXES", "Source", "describe", "find_columns", "map_columns", "read", "rename_columns"]

Source: TypeAlias = str | Path | Dataset | DatasetDict | pd.DataFrame | Sequence[dict[str, Any]]

SUFFIXES = (*TEXT_SUFFIXES, ".parquet")

_SHEETS = (".xls", ".xlsx", ".ods")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read(source: Source, split: str, *, max_rows: int | None = None) -> Dataset:
    """Reads the rows of one split.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file, a folder that `save_to_disk` wrote, a hub id, a
            `datasets.Dataset`, a pandas frame or a list of dicts.
        split: "train", "validation" or "test"; picks the split where the source holds several.
        max_rows: at most so many rows, spread evenly over the source so that a sorted file keeps its classes.

    Returns:
        The rows, with the column `_row`.

    Raises:
        DataError: there is no such file, it cannot be read, or it holds no rows.
    """
    where = _name(source)
    rows, numbers = _rows(source, split, where)
    if len(rows) == 0:
        raise DataError(f"{where}: has no rows", expected=f"the rows of {split}")
    if max_rows is not None and max_rows < len(rows):
        chosen = _spread(len(rows), max_rows)
        rows, numbers = rows.select(chosen), numbers[chosen]
    return Dataset(plain(rows, where).append_column(ROW, pa.array(numbers, pa.int64())))


def describe(source: Any) -> str:
    """Returns what data.json calls the source: the path as given, or the kind of object.

    A text file in another encoding than UTF-8 is reported: "a.csv, read as cp1252".
    """
    path = _text_file(source)
    if path is None:
        return _name(source)
    try:
        encoding = encoding_of(path)
    except DataError:  # read() says it
        return _name(source)
    return _name(source) if encoding == "utf-8" else f"{_name(source)}{READ_AS}{encoding}"


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    kinds = {Dataset: "datasets.Dataset", DatasetDict: "datasets.DatasetDict", pd.DataFrame: "pandas.DataFrame"}
    for kind, name in kinds.items():
        if isinstance(source, kind):
            return name
    return "list of dicts" if isinstance(source, (list, tuple)) else type(source).__name__


def _text_file(source: Any) -> Path | None:
    """The source as a path, where it is an existing text file of rows."""
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    return path if path.suffix.lower() in TEXT_SUFFIXES and path.is_file() else None


def _rows(source: Any, split: str, where: str) -> tuple[Dataset, np.ndarray]:
    """Returns the rows as they are, and the number of each."""
    path = _text_file(source)
    if path is not None:
        columns, lines = read_text_file(path)
        return Dataset(from_columns(columns)), np.asarray(lines)
    rows: Dataset
    if isinstance(source, (str, Path)):
        rows = _load(where, Path(source).expanduser(), split)
    elif isinstance(source, (Dataset, DatasetDict)):
        rows = _split_of(source, split, where)
    elif isinstance(source, pd.DataFrame):
        rows = Dataset(from_frame(source))
    elif isinstance(source, (list, tuple)):
        rows = Dataset(from_dicts(source, where))
    else:
        raise DataError(
            f"{split}: rows cannot be read from this",
            found=where,
            expected="a path, a hub id, a datasets.Dataset, a pandas.DataFrame or a list of dicts",
        )
    return rows, np.arange(1, len(rows) + 1)


def _spread(count: int, limit: int) -> np.ndarray:
    """Picks one row out of each of `limit` equal stretches.

    At a place in the stretch that varies (always the same way): with a fixed step, every second row of a file whose
    classes alternate would be of one class.
    """
    edges = np.arange(limit + 1) * count // limit
    places: np.ndarray = edges[:-1] + (np.random.default_rng(0).random(limit) * np.diff(edges)).astype(np.int64)
    return places


def _load(name: str, path: Path, split: str) -> Dataset:
    if path.is_dir():
        return _load_folder(name, path, split)
    if path.is_file():
        return _load_parquet(name, path)
    if path.suffix.lower() in (*SUFFIXES, *_SHEETS) or not _HUB_ID.fullmatch(name):
        raise DataError(f"{name}: there is no such file", mend=_nearest_file(path))
    try:
        return _split_of(datasets.load_dataset(name, split=split), split, name)
    except Exception as error:  # whatever the hub, its client or a loader may raise
        raise DataError(
            f"{name}: there is no such file or folder, and no data set of that name could be loaded from the hub",
            found=(str(error) or type(error).__name__).splitlines()[0],
            mend=f"{_nearest_file(path)}, or check the hub id, its splits and the connection",
        ) from error


def _load_folder(name: str, path: Path, split: str) -> Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        raise DataError(
            f"{name}: the folder holds no data set that can be loaded",
            found=", ".join(files[:8]) or "no data files",
            expected="a folder written by save_to_disk",
            mend=f"name one of its files, e.g. {path / files[0]}" if files else "name a file of rows",
        ) from error
    return _split_of(loaded, split, name)


def _load_parquet(name: str, path: Path) -> Dataset:
    suffix = path.suffix.lower()
    if suffix != ".parquet":
        raise DataError(
            f"{name}: files of this kind are not read",
            found=suffix or "no suffix",
            expected=", ".join(SUFFIXES),
            mend="save the sheet as CSV (UTF-8)" if suffix in _SHEETS else "save the rows in one of these",
        )
    try:
        return Dataset(without_dictionaries(parquet.read_table(path)))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: is not a readable parquet file", found=str(error).splitlines()[0]) from error


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = nearest_file(path)
    return f"did you mean {near}?" if near else "give the path of an existing file"


def _split_of(source: Any, split: str, where: str) -> Dataset:
    rows = source
    if isinstance(source, DatasetDict):
        if split not in source:
            raise DataError(f'{where}: has no split "{split}"', found=", ".join(source))
        rows = source[split]
    if not isinstance(rows, Dataset):
        raise DataError(f"{where}: is not a data set of rows", found=type(rows).__name__)
    return rows.with_format(None)
