"""What a file is: by its suffix, and by its content where the two do not agree."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile

from ...errors import DataError
from .encoding import Text
from .files import CONLL_SUFFIXES, SHEET_SUFFIXES, SUFFIXES, File
from .notes import Notes

DELIMITERS = (",", ";", "\t", "|")

_BY_SUFFIX = {".csv": "table", ".tsv": "table", ".json": "json", ".jsonl": "lines", ".ndjson": "lines"}
_BY_SUFFIX |= dict.fromkeys(CONLL_SUFFIXES, "conll")
_SPOKEN = {
    "table": "a table of delimited text",
    "json": "JSON",
    "lines": "JSON Lines",
    "parquet": "Parquet",
    ".xlsx": "an Excel sheet (.xlsx)",
    ".xls": "an old Excel sheet (.xls)",
    ".ods": "an OpenDocument sheet (.ods)",
}
_SAVE = "save its rows as CSV or JSON Lines (UTF-8)"
_UNPACK = "unpack it, and name the file of rows in it"
# What is no file of rows: how it begins, what it is, what to do.
_OTHERS = (
    (b"%PDF", "a PDF document", _SAVE),
    (b"{\\rtf", "an RTF document", _SAVE),
    (b"SQLite format 3", "an SQLite database", _SAVE),
    (b"\x89PNG", "a picture (PNG)", _SAVE),
    (b"\xff\xd8\xff", "a picture (JPEG)", _SAVE),
    (b"GIF8", "a picture (GIF)", _SAVE),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"ARROW1", "an Arrow file", "save it as Parquet"),
    (b"\x89HDF", "an HDF5 file", "save it as Parquet or CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull"),
)
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<\?xml)", re.IGNORECASE)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_JSON_START = re.compile(r"\s*(\{\s*[\"'}]|\[\s*[\[{\"'\]])")


def binary_kind(file: File, notes: Notes) -> str | None:
    """Returns "parquet" or the suffix of a sheet, or None for what may be a text file.

    Raises:
        DataError: the file is of a kind that holds no rows, or its suffix is of one that it is not.
    """
    head = file.head(512)
    found = None
    if head.startswith(b"PAR1"):
        found = "parquet"
    elif head.startswith(b"PK\x03\x04"):
        found = _zip_kind(file)
    elif head.startswith(_OLE):
        found = _ole_kind(file)
    for magic, kind, mend in _OTHERS:
        if head.startswith(magic):
            raise _no_rows(file, kind, mend)
    if _PAGE.match(head):
        raise _no_rows(file, "a web page or XML, not a file of rows", "download the file itself, " + _SAVE)
    if found is not None and file.suffix != (found if found in SHEET_SUFFIXES else ".parquet"):
        notes.warn(f"{file.name}: is {_SPOKEN[found]}, whatever its suffix says, and is read as such")
    return found


def text_kind(text: Text, notes: Notes) -> str:
    """Returns "table", "json", "lines" or "conll".

    Raises:
        DataError: the file is empty, or holds no rows of any kind.
    """
    file, sample = text.file, text.sample()
    if not sample.strip("\ufeff \t\r\n"):
        raise DataError(f"{file.name}: the file is empty", expected="a header and rows, or one JSON object a line")
    by_suffix = _BY_SUFFIX.get(file.suffix)
    found = _by_content(sample, by_suffix)
    if found is None and by_suffix is None:
        raise _unread(file)
    kind = found or by_suffix or "table"
    if kind != by_suffix and (by_suffix, kind) != ("json", "lines"):  # as many hubs name JSON Lines
        notes.warn(f"{file.name}: is {_SPOKEN[kind]}, whatever its suffix says, and is read as such")
    return kind


def _by_content(sample: str, by_suffix: str | None) -> str | None:
    """What the text is, where it can be seen."""
    if by_suffix == "conll":
        return "conll"
    start = sample.lstrip("\ufeff")
    if _JSON_START.match(start):
        first, _, rest = start.lstrip().partition("\n")
        if first.lstrip().startswith("["):
            return "json"
        if by_suffix == "lines":
            return "json" if first.strip() == "{" else "lines"
        return "lines" if _is_object(first) and rest.strip() else ("json" if by_suffix != "table" else _objects(first))
    if by_suffix == "table":
        return "table"
    broken_json = by_suffix in ("json", "lines") and ('":' in start or "{" in start)
    return "table" if not broken_json and _is_table(start) else None


def _objects(first: str) -> str:
    """What a .csv is that begins with a brace: its one line may be a header in odd brackets."""
    return "lines" if _is_object(first) else ("json" if first.strip() == "{" else "table")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(sample: str) -> bool:
    """Whether one delimiter cuts the header, and all lines below it, into as many cells."""
    lines = sample.splitlines(keepends=True)[:50]
    for delimiter in DELIMITERS:
        try:
            rows = [row for row in csv.reader(io.StringIO("".join(lines), newline=""), delimiter=delimiter) if row]
        except csv.Error:
            continue
        if len(rows) > 1 and len(rows[0]) > 1 and {len(row) for row in rows[:-1] or rows} == {len(rows[0])}:
            return True
    return False


def _zip_kind(file: File) -> str:
    """Which of the many kinds of files that are ZIP archives inside this one is."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            names = archive.namelist()
            kind = archive.read("mimetype").decode("ascii", "replace") if "mimetype" in names else ""
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        if file.suffix in (".xlsx", ".ods"):
            return file.suffix  # whose reader says what is wrong
        raise _no_rows(file, f"a damaged ZIP archive ({error})", "copy or download it once more") from error
    if any(name.startswith("xl/") for name in names):
        return ".xlsx"
    if "spreadsheet" in kind:
        return ".ods"
    for folder, document in (("word/", "a Word document (.docx)"), ("ppt/", "a presentation (.pptx)")):
        if any(name.startswith(folder) for name in names):
            raise _no_rows(file, document, _SAVE)
    raise _no_rows(file, f"a ZIP archive with {', '.join(names[:4])}", _UNPACK)


def _ole_kind(file: File) -> str:
    """Old Office files are all of one container; encrypted new ones are put into it too."""
    with file.open() as stream:
        content = stream.read(2**24)
    if "EncryptedPackage".encode("utf-16-le") in content:
        raise _no_rows(file, "protected by a password", "save it without a password, or as CSV (UTF-8)")
    if "WordDocument".encode("utf-16-le") in content:
        raise _no_rows(file, "a Word document (.doc)", _SAVE)
    return ".xls"


def _no_rows(file: File, kind: str, mend: str) -> DataError:
    return DataError(f"{file.name}: is {kind}", expected=f"rows: {', '.join(SUFFIXES)}", mend=mend)


def _unread(file: File) -> DataError:
    if file.suffix in SUFFIXES:
        return DataError(
            f"{file.name}: is not a readable {file.suffix.removeprefix('.')} file",
            found=f"content that begins with {file.head(16)!r}",
            mend="save it anew, or give it the suffix of what it is",
        )
    return DataError(
        f"{file.name}: files of this kind are not read",
        found=file.suffix or "no suffix",
        expected=", ".join(SUFFIXES) + ", or a folder with a sub-folder of .txt files for each class",
        mend="save the rows in one of these",
    )
