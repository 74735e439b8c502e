"""Excel and OpenDocument sheets: the first sheet with rows, its first row the names of the columns."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pandas as pd

from ...errors import DataError, first_line
from .files import File
from .header import column_names
from .notes import Notes
from .spool import BATCH_CHARACTERS, BATCH_ROWS, Batch

_PACKAGES = {".xls": "xlrd", ".ods": "odfpy"}
_LOOKED_AT = 60


def read_sheet(file: File, kind: str, notes: Notes) -> Iterator[Batch]:
    """Reads a sheet; a row's number is that of the sheet.

    Args:
        file: the file.
        kind: ".xlsx", ".xls" or ".ods", which may not be its suffix.
        notes: are told where there are other sheets.

    Raises:
        DataError: the file is damaged, has no rows, or the package that reads it is missing.
    """
    try:
        rows = _excel_rows(file, notes) if kind == ".xlsx" else _pandas_rows(file, kind, notes)
        yield from _batches(file, rows, notes)
    except DataError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(kind, "openpyxl")
        raise DataError(
            f"{file.name}: reading {kind} files needs the package {package}, which is not installed",
            mend=f"pip install {package}, or save the sheet as .xlsx or CSV (UTF-8)",
        ) from error
    except Exception as error:  # whatever the libraries raise on XML or records that are damaged
        raise DataError(
            f"{file.name}: is not a readable {kind} file",
            found=first_line(error, 160),
            mend="open it in a spreadsheet and save it anew, or save it as CSV (UTF-8)",
        ) from error


def _batches(file: File, rows: Iterator[tuple[int, list[Any]]], notes: Notes) -> Iterator[Batch]:
    filled = ((number, cells) for number, cells in rows if any(cell is not None for cell in cells))
    number, header = next(filled, (0, []))
    if not header:
        raise DataError(f"{file.name}: the sheet is empty", expected="a header and rows")
    width = max(at for at, cell in enumerate(header, 1) if cell is not None)
    first = list(islice(filled, _LOOKED_AT))
    if not first:
        shown = ", ".join(map(_as_text, header[:width]))
        raise DataError(f"{file.name}: there is a header but no rows", found=shown[:160])
    sample = [[_as_text(cell) for cell in [*cells, *[None] * width][:width]] for _, cells in first]
    names = column_names([_as_text(cell) for cell in header[:width]], sample, f"{file.name}, row {number}", notes)
    cells_of: list[list[Any]] = []
    numbers: list[int] = []
    size = 0
    for number, cells in chain(first, filled):
        over = [cell for cell in cells[width:] if cell is not None]
        if over:
            text = " | ".join(map(_as_text, cells))
            problem = f"the row has cells beyond the {width} columns of the header"
            notes.reject(file.name, number, problem, text, found=_as_text(over[0]))
            continue
        cells_of.append([*cells, *[None] * width][:width])
        numbers.append(number)
        size += sum(len(cell) for cell in cells if isinstance(cell, str))
        if len(cells_of) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield dict(zip(names, map(list, zip(*cells_of, strict=True)), strict=True)), numbers
            cells_of, numbers, size = [], [], 0
    if cells_of:
        yield dict(zip(names, map(list, zip(*cells_of, strict=True)), strict=True)), numbers


def _excel_rows(file: File, notes: Notes) -> Iterator[tuple[int, list[Any]]]:
    import openpyxl

    if not zipfile.is_zipfile(file.path):
        raise DataError(
            f"{file.name}: is not a readable .xlsx file",
            found=f"content that begins with {file.head(16)!r}",
            mend="save the sheet as .xlsx or CSV (UTF-8) again",
        )
    with file.path.open("rb") as stream:  # of a path it would look at the suffix
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
        _say_others(file, [one.title for one in book.worksheets], notes)
        for number, cells in enumerate(book.worksheets[0].iter_rows(values_only=True), 1):
            yield number, [_plain(cell) for cell in cells]


def _pandas_rows(file: File, kind: str, notes: Notes) -> Iterator[tuple[int, list[Any]]]:
    engine = "xlrd" if kind == ".xls" else "odf"
    with pd.ExcelFile(file.path, engine=engine) as book:
        _say_others(file, [str(name) for name in book.sheet_names], notes)
        frame = book.parse(0, header=None, dtype=object, keep_default_na=False, na_values=[""])
    for number, cells in enumerate(frame.itertuples(index=False, name=None), 1):
        yield number, [None if cell is None or cell is pd.NaT or cell != cell else _plain(cell) for cell in cells]


def _say_others(file: File, names: list[str], notes: Notes) -> None:
    if len(names) > 1:
        others = ", ".join(names[1:])
        notes.warn(f'{file.name}: only the first sheet, "{names[0]}", is read, not {others}')


def _plain(cell: Any) -> Any:
    if isinstance(cell, (datetime.date, datetime.time)):
        return cell.isoformat()
    return cell if cell is None or isinstance(cell, (str, bool, int, float)) else str(cell)


def _as_text(cell: Any) -> str:
    return "" if cell is None else str(cell)
