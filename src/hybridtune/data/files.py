"""Rows out of CSV, TSV, JSON and JSON Lines files, each with the line where it starts.

Python's own csv and json modules do the parsing, because pyarrow's and pandas' readers guess types ("NA" becomes a
missing value) and cannot say on which line a row starts once a cell holds a line break.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

from ..errors import DataError

DELIMITERS = (",", ";", "\t", "|")
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
READ_AS = ", read as "  # what `describe` puts between a path and its encoding
LINED_SUFFIXES = (".csv", ".tsv", ".jsonl")  # where a row is found by its line

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What files are saved in today. Of all that Python knows, old Macintosh code pages would win on short texts.
_COMMON_ENCODINGS = [f"cp125{digit}" for digit in range(9)]
_COMMON_ENCODINGS += ["cp874", "koi8_r", "iso8859_2", "iso8859_15", "gb18030", "big5", "cp932", "euc_jp", "cp949"]
_BROKEN = "\ufffd"


def read_text_file(path: Path) -> tuple[dict[str, list[Any]], list[int]]:
    """Reads a text file by its suffix.

    Args:
        path: a .csv, .tsv, .json or .jsonl file.

    Returns:
        The columns, and for each row the line where it starts (in .json, where one line may hold everything, the
        number of the entry).

    Raises:
        DataError: the file cannot be decoded or parsed, or holds no rows.
    """
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty", expected="a header and rows, or one JSON object a line")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(text, path)
    entries = _json_entries(text, path) if path.suffix.lower() == ".json" else _json_lines(text, path)
    names = dict.fromkeys(name for _, entry in entries for name in entry)
    return {name: [entry.get(name) for _, entry in entries] for name in names}, [row for row, _ in entries]


def encoding_of(path: Path) -> str:
    """Returns the encoding that a text file is read as, "utf-8" where it fits.

    Raises:
        DataError: the file cannot be opened or decoded.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened", found=error.strerror) from error
    return _encoding(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _encoding(path: Path, size: int, changed: int) -> str:
    """Size and time of change are there so that a file that was written anew is looked at anew."""
    raw = _bytes(path)
    for bom, name in _BOMS:
        if raw.startswith(bom):
            return name
    try:
        raw.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError as error:
        place, byte = error.start, raw[error.start]
    loose = raw.decode("utf-8", "replace")
    broken = loose.count(_BROKEN)
    # In another encoding hardly any non-ASCII character is valid UTF-8 by chance, so this file is UTF-8 with damage.
    if sum(1 for character in loose if character > "\x7f") - broken > broken:
        line = raw.count(b"\n", 0, place) + 1
        column = place - raw.rfind(b"\n", 0, place)
        raise DataError(
            f"{path}:{line}:{column}: a byte is not UTF-8, though the rest of the file is",
            found=f"byte 0x{byte:02x}" + (f", and {broken - 1} more such places" if broken > 1 else ""),
            mend="save the file as UTF-8 again, or correct that line",
        )
    guesses = from_bytes(raw, cp_isolation=_COMMON_ENCODINGS) or from_bytes(raw)
    guess = guesses.best()
    if guess is None:
        raise DataError(f"{path}: the encoding cannot be told", expected="UTF-8", mend="save the file as UTF-8")
    # Short texts often fit several code pages equally well. Then the most common one is the best guess.
    equal = [other for other in guesses if (other.chaos, other.coherence) == (guess.chaos, guess.coherence)]
    western = any("cp1252" in other.could_be_from_charset for other in equal)
    return "cp1252" if western else guess.encoding


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened", found=error.strerror) from error


def _text(path: Path) -> str:
    encoding = encoding_of(path)
    try:
        return _bytes(path).decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not readable as {encoding}", found=str(error), mend="save the file as UTF-8"
        ) from error


def _table(text: str, path: Path) -> tuple[dict[str, list[Any]], list[int]]:
    delimiter = _delimiter(text, path)
    with _long_cells():
        (first, header), *records = _records(text, delimiter, path)
    rows: list[tuple[int, list[str]]] = []
    for line, cells in records:
        if len(cells) == len(header):
            rows.append((line, cells))
        elif len(cells) > 1 or cells[0].strip():  # a line of spaces is no row
            raise DataError(
                f"{path}:{line}: the row has {len(cells)} cells, the header {len(header)}",
                found=" | ".join(cells)[:160],
                expected=" | ".join(header)[:160],
                mend=f"put cells that hold {_word(delimiter)} or line breaks in double quotes",
            )
    if not rows:
        raise DataError(f"{path}: there is a header but no rows", found=", ".join(header)[:160])
    columns: dict[str, list[Any]] = {}
    for position, cell in enumerate(header):
        name, values = cell.strip(), [cells[position] for _, cells in rows]
        if not name and not any(values):
            continue  # a spreadsheet's empty last column
        name = name or f"unnamed_{position + 1}"  # pandas' to_csv leaves the index without a name
        if name in columns:
            raise DataError(
                f'{path}:{first}: the header has two columns "{name}"',
                found=", ".join(header),
                mend="rename one of them",
            )
        columns[name] = values
    return columns, [line for line, _ in rows]


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells of more than 131,072 characters; its limit is one for the whole process."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _delimiter(text: str, path: Path) -> str:
    """Picks the delimiter that cuts the header, and then as many rows as possible into as many cells."""
    first_line = text.lstrip("\r\n").split("\n", 1)[0]
    if path.suffix.lower() == ".tsv" and "\t" in first_line:
        return "\t"
    sample = text[:65536]
    best, best_share = ",", 0.0
    for delimiter in DELIMITERS:
        rows = [row for row in islice(csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter), 60) if row]
        if len(rows) > 2 and len(sample) < len(text):
            rows.pop()  # may have been cut off
        if not rows or len(rows[0]) < 2:
            continue
        share = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        if share > best_share:
            best, best_share = delimiter, share
    return best


def _records(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the cells of each row, with the line where it starts; blank lines are passed over.

    Raises:
        DataError: a quote is never closed, or closed in the middle of a cell.
    """
    if delimiter == "\t" and _one_row_a_line(text):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip("\r"):
                yield number, _cells(line.removesuffix("\r"))
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: the quotes of the row that starts here do not match",
            found=str(error),
            mend='write a double quote inside a quoted cell twice: "he said ""yes"""',
        ) from error


def _one_row_a_line(text: str) -> bool:
    """Whether every line of a TSV has the header's tabs: then a stray quote is text, and must not swallow lines."""
    if "\r" in text.replace("\r\n", "\n"):
        return False
    tabs = {line.count("\t") for line in text.split("\n") if line.strip("\r")}
    return len(tabs) == 1 and tabs != {0}


def _cells(line: str) -> list[str]:
    plain = line.split("\t")
    if '"' not in line:
        return plain
    try:
        quoted = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return plain
    return quoted if len(quoted) == len(plain) else plain


def _word(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f'"{delimiter}"'


def _json_lines(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    entries = []
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}:{error.colno}: the line is not JSON ({error.msg})",
                found=line.strip()[:160],
                expected="one JSON object a line",
            ) from error
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}:{number}: the line is not a JSON object",
                found=line.strip()[:160],
                expected='an object such as {"text": "...", "label": "..."}',
            )
        entries.append((number, entry))
    return entries


def _json_entries(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            # JSON Lines under the name .json, as many hubs write it
            return [(number, entry) for number, (_, entry) in enumerate(_json_lines(text, path), 1)]
        raise DataError(f"{path}:{error.lineno}:{error.colno}: is not JSON ({error.msg})") from error
    if not isinstance(tree, list):
        found = f"an object with {', '.join(list(tree)[:8])}" if isinstance(tree, dict) else type(tree).__name__
        raise DataError(f"{path}: is not a list of objects", found=found, expected='[{"text": "...", ...}, ...]')
    if not tree:
        raise DataError(f"{path}: the list is empty", expected='[{"text": "...", ...}, ...]')
    for number, entry in enumerate(tree, 1):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: entry {number} is not an object", found=repr(entry)[:160], expected='{"text": "...", ...}'
            )
    return list(enumerate(tree, 1))
