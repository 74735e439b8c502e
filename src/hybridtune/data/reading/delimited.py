"""CSV and TSV, row by row, each with the line where it starts.

Python's own csv module does the parsing, because pyarrow's and pandas' readers guess types ("NA" becomes a missing
value) and cannot say on which line a row starts once a cell holds a line break.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from ...errors import DataError
from .encoding import SAMPLE, Text
from .header import column_names
from .kinds import DELIMITERS
from .notes import Notes
from .spool import BATCH_CHARACTERS, BATCH_ROWS, Batch

LONGEST_CELL = 2**26  # of a quote that never closes, no more than this is read

_SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"?\r?\n')  # Excel's
_LOOKED_AT = 60
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that could not be decoded


@dataclass(frozen=True)
class _Dialect:
    """How a file is cut into cells.

    Attributes:
        delimiter: what stands between cells.
        quoting: what csv.reader is told of quotes.
        stray_quotes: whether every line is a row, so that a quote that does not fit is text.
        skipped: lines before the header.
        rows: the first rows, cut so.
    """

    delimiter: str
    quoting: dict[str, Any]
    stray_quotes: bool
    skipped: int
    rows: list[list[str]]


class _Record(NamedTuple):
    line: int
    cells: list[str]
    text: str
    problem: str | None


def read_table(text: Text, notes: Notes) -> Iterator[Batch]:
    """Reads a file of delimited text.

    Raises:
        DataError: it has no header or no rows, or a row cannot be read.
    """
    name, dialect = text.file.name, _dialect(text)
    with text.open() as stream:
        records = _records(stream, dialect)
        header = next((record for record in records if record.cells or record.problem), None)
        if header is None:
            raise DataError(f"{name}: the file is empty", expected="a header and rows")
        _refuse_bad_header(header, text)
        names = column_names(header.cells, dialect.rows[1:], f"{name}:{header.line}", notes)
        number, size = 0, 0
        flat: list[str] = []  # cell after cell: many small lists would keep the garbage collector busy
        lines: list[int] = []
        lined, width, damaged = text.file.lined, len(header.cells), text.damage is not None
        for record in records:
            line, cells, raw, problem = record
            # What is plainly a row is not looked at further: there may be many millions.
            plain = problem is None and len(cells) == width and cells != header.cells and "\0" not in raw
            if (not plain or damaged) and not _is_row(record, header, dialect, text, notes):
                continue
            number += 1
            flat.extend(cells)
            lines.append(line if lined else number)
            size += len(raw) + width
            if len(lines) == BATCH_ROWS or size > BATCH_CHARACTERS:
                yield _batch(names, flat, lines)
                flat, lines, size = [], [], 0
    if lines:
        yield _batch(names, flat, lines)
    if number == 0 and not notes.rejected:
        raise DataError(
            f"{name}: there is a header but no rows",
            found=", ".join(header.cells)[:160],
            mend="give a file with rows below the header",
        )


@contextmanager
def long_cells() -> Iterator[None]:
    """The csv module refuses cells of more than 131,072 characters; its limit is one for the whole process."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _batch(names: list[str], flat: list[str], lines: list[int]) -> Batch:
    return {name: flat[at :: len(names)] for at, name in enumerate(names)}, lines


def _refuse_bad_header(header: _Record, text: Text) -> None:
    problem = header.problem or bad_character(header.text, text)
    if problem is not None:
        raise DataError(
            f"{text.file.name}:{header.line}: {problem}",
            found=ascii(header.text.strip())[:160],
            expected="the names of the columns",
            mend="correct the first line",
        )


def _is_row(record: _Record, header: _Record, dialect: _Dialect, text: Text, notes: Notes) -> bool:
    """Whether a record is a row; what is one but cannot be read goes to the notes."""
    cells, problem, width = record.cells, record.problem, len(header.cells)
    if problem is None and not cells:
        return False
    if problem is None:
        problem = bad_character(record.text, text)
    if problem is None and len(cells) == width and (width == 1 or cells != header.cells):
        return True
    found, expected, mend = None, None, None
    if problem is None:
        if len(cells) == 1 and not cells[0].strip():
            return False  # a line of spaces
        if len(cells) == width:
            problem, mend = "the header stands there once more", "take that line out"
        else:
            problem = f"the row has {len(cells)} cells, the header {width}"
            found, expected = " | ".join(cells)[:160], " | ".join(header.cells)[:160]
            word = "a tab" if dialect.delimiter == "\t" else f'"{dialect.delimiter}"'
            mend = f"put cells that hold {word} or line breaks in double quotes"
    elif record.problem:
        mend = 'write a double quote inside a quoted cell twice: "he said ""yes"""'
    notes.reject(text.file.name, record.line, problem, record.text, found=found, expected=expected, mend=mend)
    return False


def bad_character(line: str, text: Text) -> str | None:
    """Returns what is wrong with the characters of a row, where anything is."""
    if "\0" in line:
        return "the row holds a NUL character"
    if text.damage is not None and _ESCAPED.search(line):
        return "a byte of the row is not UTF-8"
    return None


def _records(stream: Iterable[str], dialect: _Dialect) -> Iterator[_Record]:
    """Yields what the file holds, row by row, blank ones too.

    A row whose quotes do not match is its first line, with the problem; the next line starts a row again.
    """
    lines = iter(stream)
    for _ in range(dialect.skipped):
        next(lines, None)
    if dialect.stray_quotes:
        for number, line in enumerate(lines, dialect.skipped + 1):
            yield _Record(number, _cells(line.rstrip("\r\n")), line, None)
        return
    again: deque[str] = deque()
    record: list[str] = []

    def feed() -> Iterator[str]:
        while True:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            record.append(line)
            yield line

    start = dialect.skipped + 1
    reader = csv.reader(feed(), delimiter=dialect.delimiter, strict=True, **dialect.quoting)
    while True:
        try:
            cells, problem = next(reader), None
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"the quotes of the row that starts here do not match ({error})"
            again.extendleft(reversed(record[1:]))
            del record[1:]
            reader = csv.reader(feed(), delimiter=dialect.delimiter, strict=True, **dialect.quoting)
        yield _Record(start, cells, record[0] if len(record) == 1 else "".join(record), problem)
        start += len(record)
        record.clear()


def _cells(line: str) -> list[str]:
    if not line:
        return []
    plain = line.split("\t")
    if '"' not in line:
        return plain
    try:
        quoted = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return plain
    return quoted if len(quoted) == len(plain) else plain


def _dialect(text: Text) -> _Dialect:
    """Picks what cuts the header, and then as many rows as possible into as many cells."""
    sample = text.sample()
    said = _SEPARATOR_LINE.match(sample)
    body = sample[said.end() :] if said else sample
    whole = len(sample) < SAMPLE
    delimiters = (said.group(1),) if said else DELIMITERS
    first_line = body.lstrip("\r\n").split("\n", 1)[0]
    if not said and text.file.suffix == ".tsv" and "\t" in first_line:
        delimiters = ("\t",)
    best: tuple[str, dict[str, Any], list[list[str]]] = (delimiters[0], {}, _cut(body, delimiters[0], {}, whole))
    best_share = -1.0
    for delimiter in delimiters:
        for quoting in _quotings(body):
            rows = _cut(body, delimiter, quoting, whole)
            if not rows or (len(rows[0]) < 2 and len(delimiters) > 1):
                continue
            share = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
            if share > best_share:
                best, best_share = (delimiter, quoting, rows), share
    delimiter, quoting, rows = best
    stray = delimiter == "\t" and not quoting and _one_row_a_line(text)
    return _Dialect(delimiter, quoting, stray, int(bool(said)), rows)


def _quotings(sample: str) -> list[dict[str, Any]]:
    """The ways of quoting that a file may have, the common one first."""
    ways: list[dict[str, Any]] = [{}]
    if '\\"' in sample:
        ways.append({"escapechar": "\\", "doublequote": False})
    if sample.lstrip().startswith("'"):
        ways.append({"quotechar": "'"})
    return ways


def _cut(sample: str, delimiter: str, quoting: dict[str, Any], whole: bool) -> list[list[str]]:
    """The first rows of a sample, cut into cells, as far as its quotes match; an empty row for what does not."""
    rows: list[list[str]] = []
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True, **quoting)
    try:
        rows.extend(row for row in islice(reader, _LOOKED_AT) if row)
    except csv.Error:
        rows.append([])
    if not whole and 2 < len(rows) < _LOOKED_AT:
        rows.pop()  # may have been cut off
    return rows


def _one_row_a_line(text: Text) -> bool:
    """Whether every line of a TSV has the header's tabs: then a stray quote is text, and must not swallow lines."""
    tabs = None
    with text.open() as stream:
        for line in stream:
            if line.strip("\r\n"):
                here = line.count("\t")
                if here == 0 or here != (tabs := here if tabs is None else tabs):
                    return False
    return tabs is not None
