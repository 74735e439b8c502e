"""Reads labelled rows, wherever they are, into a `datasets.Dataset`.

Every data set that comes out has plain columns (text, numbers, lists; no ClassLabel, no category) and a column `_row`:
the line where the row starts in .csv, .tsv, .jsonl and CoNLL files, the number of the row elsewhere, both from 1. Where
rows come from several files, `_source` names the file of each, and `_row` is counted in that file.
"""

from __future__ import annotations

import re
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict

from ...errors import DataError, first_line
from . import sources
from .columns import find_columns, map_columns, rename_columns, say_empty
from .delimited import long_cells
from .encoding import look
from .files import READ_AS, SUFFIXES, TEXT_SUFFIXES, File
from .folders import load_saved, read_text_folder, text_folder
from .formats import batches
from .header import UNNAMED
from .notes import Notes
from .sources import Part, places, weigh
from .spool import Batch, MixedTypes, Spool, without_empty
from .tables import ROW, SOURCE, Form, from_dicts, from_frame, plain

__all__ = [
    "ROW",
    "SOURCE",
    "SUFFIXES",
    "Notes",
    "Source",
    "describe",
    "find_columns",
    "map_columns",
    "places",
    "read",
    "rename_columns",
    "say_empty",
    "weigh",
]

Place: TypeAlias = str | Path | dict[str, Any]
Source: TypeAlias = Place | Sequence[Place] | Dataset | DatasetDict | pd.DataFrame | Sequence[dict[str, Any]]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read(source: Source, split: str, *, max_rows: int | None = None, notes: Notes | None = None) -> Dataset:
    """Reads the rows of one split. Files may be larger than memory.

    Args:
        source: a file (its kind is one of `SUFFIXES`, text files also as .gz, .zst or .bz2), a pattern of files, an
            address (`s3://...`), a folder that `save_to_disk` wrote or that has a sub-folder of .txt files for each
            class, or a hub id; several of these, as a list of them or of `{"path", "weight"}`; or a
            `datasets.Dataset`, a pandas frame or a list of dicts.
        split: "train", "validation" or "test"; picks the split where the source holds several.
        max_rows: at most so many rows, spread evenly over the source so that a sorted file keeps its classes.
        notes: say what becomes of rows that cannot be read, and are told what there is to say. Where there are none,
            such rows are refused, and the rest are Python's warnings.

    Returns:
        The rows, with the column `_row`, and with `_source` where they are from several files. Weights are not yet
        looked at: `weigh` does that, once the rows are checked.

    Raises:
        DataError: there is no such file, it cannot be read, or it holds no rows.
    """
    told, where = notes or Notes(), _name(source)
    with tempfile.TemporaryDirectory(prefix="hybridtune-", ignore_cleanup_errors=True) as folder:
        rows = _rows(source, split, where, told, Path(folder))
    if notes is None:
        for text in told.warnings:
            warnings.warn(text, stacklevel=2)
    if len(rows) == 0:
        bad = [one for one in told.rejected if one["source"]]
        raise DataError(
            f"{where}: has no rows",
            found=f"{len(bad)} that cannot be read, the first in line {bad[0]['line']}: {bad[0]['problem']}"
            if bad
            else None,
            expected=f"the rows of {split}",
            mend="correct that line" if bad else "give a source that has some",
        )
    if max_rows is not None and max_rows < len(rows):
        table = rows.select(_spread(len(rows), max_rows)).with_format("arrow")[:].combine_chunks()
        rows = _as_dataset(table)
    return rows


def describe(source: Any) -> str:
    """Returns what data.json calls the source: the path as given, or the kind of object.

    A text file in another encoding than UTF-8 is reported: "a.csv, read as cp1252".
    """
    name = _name(source)
    if not isinstance(source, (str, Path)):
        return name
    path = Path(source).expanduser()
    if not (name.lower().endswith(TEXT_SUFFIXES) and path.is_file()):
        return name
    try:
        encoding = look(File(name, path)).encoding
    except DataError:  # read() says it
        return name
    return name if encoding == "utf-8" else f"{name}{READ_AS}{encoding}"


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if sources.are_places(source):
        return sources.describe(source)
    kinds = {Dataset: "datasets.Dataset", DatasetDict: "datasets.DatasetDict", pd.DataFrame: "pandas.DataFrame"}
    for kind, name in kinds.items():
        if isinstance(source, kind):
            return name
    return "list of dicts" if isinstance(source, (list, tuple)) else type(source).__name__


def _rows(source: Any, split: str, where: str, notes: Notes, folder: Path) -> Dataset:
    if sources.are_places(source):
        parts = sources.expand(source, split)
        opened = {part: _open(part, split, folder) for part in parts}
        if len(parts) == 1 and isinstance(opened[parts[0]], Dataset):
            return _numbered(plain(opened[parts[0]], where))
        return _as_dataset(_spooled(opened, notes, folder))
    if isinstance(source, (Dataset, DatasetDict)):
        return _numbered(plain(_split_of(source, split, where), where))
    if isinstance(source, pd.DataFrame):
        return _numbered(from_frame(source))
    if isinstance(source, (list, tuple)):
        return _numbered(from_dicts(source, where))
    raise DataError(
        f"{split}: rows cannot be read from this",
        found=where,
        expected="a path, a hub id, a datasets.Dataset, a pandas.DataFrame or a list of dicts",
    )


def _numbered(table: pa.Table) -> Dataset:
    names = [name for name in table.column_names if name not in (ROW, SOURCE)]
    numbers = pa.array(np.arange(1, len(table) + 1), pa.int64())
    return _as_dataset(table.select(names).append_column(ROW, numbers))


def _as_dataset(table: pa.Table) -> Dataset:
    """With a fingerprint of its own: `datasets` would take one over all bytes, and copy them for it."""
    return Dataset(table, fingerprint=uuid.uuid4().hex)


def _spooled(opened: dict[Part, Any], notes: Notes, folder: Path) -> pa.Table:
    """All rows of all places, in their order. Columns of several types are found at the end, and read once more."""
    forms: dict[str, Form] = {}
    mark = notes.mark()
    while True:
        with tempfile.TemporaryDirectory(dir=folder) as inside, long_cells():
            spool = Spool(Path(inside), forms)
            try:
                for part, source in opened.items():
                    for names, numbers in _batches_of(part, source, notes):
                        several = len(opened) > 1 and SOURCE not in names
                        told = {SOURCE: pa.repeat(part.name, len(numbers))} if several else {}
                        spool.add(({**names, **told}, numbers))
                table = spool.finish()
            except MixedTypes as mixed:
                forms |= mixed.forms
                notes.rewind(mark)
                continue
        return without_empty(table, UNNAMED)


def _batches_of(part: Part, source: Any, notes: Notes) -> Iterator[Batch]:
    if isinstance(source, File):
        yield from batches(source, notes)
    elif isinstance(source, Path):
        yield from read_text_folder(source, notes)
    else:
        number = 0
        for batch in plain(source, part.name).to_batches():
            yield dict(zip(batch.schema.names, batch.columns, strict=True)), range(number + 1, number + 1 + len(batch))
            number += len(batch)


def _spread(count: int, limit: int) -> np.ndarray:
    """Picks one row out of each of `limit` equal stretches.

    At a place in the stretch that varies (always the same way): with a fixed step, every second row of a file whose
    classes alternate would be of one class.
    """
    edges = np.arange(limit + 1) * count // limit
    places: np.ndarray = edges[:-1] + (np.random.default_rng(0).random(limit) * np.diff(edges)).astype(np.int64)
    return places


def _open(part: Part, split: str, folder: Path) -> File | Path | Dataset:
    """What a place is: a file, a folder of classes, or a data set."""
    name = part.name
    if "://" in name:
        path = sources.fetch(name, folder)
        if not path.is_file():
            raise DataError(f"{name}: there is no such file", mend=sources.missing_file(path))
        return File(name, path)
    path = Path(name).expanduser()
    if path.is_dir():
        classes = text_folder(path, split)
        return classes if classes is not None else _split_of(load_saved(name, path), split, name)
    if path.is_file():
        return File(name, path)
    if path.exists():
        raise DataError(f"{name}: is neither a file nor a folder", mend="copy its content into a file")
    if name.lower().endswith((*SUFFIXES, *TEXT_SUFFIXES)) or not _HUB_ID.fullmatch(name):
        raise DataError(f"{name}: there is no such file", mend=sources.missing_file(path))
    try:
        return _split_of(datasets.load_dataset(name, split=split), split, name)
    except Exception as error:  # whatever the hub, its client or a loader may raise
        raise DataError(
            f"{name}: there is no such file or folder, and no data set of that name could be loaded from the hub",
            found=first_line(error),
            mend=f"{sources.missing_file(path)}, or check the hub id, its splits and the connection",
        ) from error


def _split_of(source: Any, split: str, where: str) -> Dataset:
    rows = source
    if isinstance(source, DatasetDict):
        if split not in source:
            raise DataError(f'{where}: has no split "{split}"', found=", ".join(source))
        rows = source[split]
    if not isinstance(rows, Dataset):
        raise DataError(f"{where}: is not a data set of rows", found=type(rows).__name__)
    return rows.with_format(None)
