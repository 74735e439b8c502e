"""Every kind of file, read to batches of columns: which kind it is, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import parquet

from ...errors import DataError, first_line
from .conll import read_conll
from .delimited import read_table
from .encoding import look
from .files import File
from .jsons import JsonReader
from .kinds import binary_kind, text_kind
from .notes import Notes
from .sheets import read_sheet
from .spool import BATCH_ROWS, Batch
from .tables import PANDAS_INDEX, ROW, SOURCE, without_dictionaries


def batches(file: File, notes: Notes) -> Iterator[Batch]:
    """Reads a file of rows.

    Raises:
        DataError: it is none, or it cannot be read.
    """
    for columns, numbers in _read(file, notes):
        yield {name: values for name, values in columns.items() if name not in (ROW, SOURCE)}, numbers


def _read(file: File, notes: Notes) -> Iterator[Batch]:
    kind = binary_kind(file, notes)
    if kind == "parquet":
        return _parquet(file)
    if kind is not None:
        return read_sheet(file, kind, notes)
    text = look(file)
    if text.damage is not None and notes.on_bad_row == "refuse":
        raise DataError(text.damage.problem, found=text.damage.found, mend=notes.mend(str(text.damage.mend)))
    if text.guessed:
        notes.warn(
            f"{file.name}, read as {text.encoding}, which is a guess: where letters look wrong, save the file as UTF-8"
        )
    kind = text_kind(text, notes)
    if kind == "table":
        return read_table(text, notes)
    if kind == "conll":
        return read_conll(text, notes)
    reader = JsonReader(text, notes)
    return reader.lines() if kind == "lines" else reader.whole()


def _parquet(file: File) -> Iterator[Batch]:
    try:
        with parquet.ParquetFile(file.path) as stored:
            names = [name for name in stored.schema_arrow.names if not name.startswith(PANDAS_INDEX)]
            _refuse_twins(file, names)
            number = 0
            for batch in stored.iter_batches(BATCH_ROWS, columns=names):
                table = without_dictionaries(pa.Table.from_batches([batch]))
                yield dict(zip(names, table.columns, strict=True)), range(number + 1, number + 1 + len(table))
                number += len(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{file.name}: is not a readable parquet file",
            found=first_line(error, 160),
            mend="copy it once more, or write it anew: it may be cut off",
        ) from error


def _refuse_twins(file: File, names: list[str]) -> None:
    twin = next((name for name in names if names.count(name) > 1), None)
    if twin is not None:
        raise DataError(f'{file.name}: has two columns "{twin}"', found=", ".join(names), mend="rename one of them")
