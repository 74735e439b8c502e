"""Files that are not as they should be: each is repaired with a warning, or refused with one error that names the place
and the mend; and with `on_bad_row: skip` bad rows are kept aside, never lost.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pytest

from hybridtune.data.reading.read import Notes, read
from hybridtune.errors import DataError

GOOD = [{"text": "hello there", "label": "ham"}, {"text": "buy now", "label": "spam"}]
CSV = "text,label\nhello there,ham\nbuy now,spam\n"
LINES = "".join(json.dumps(row) + "\n" for row in GOOD)
CHINESE = "文本,标签\n我的订单在哪里,物流\n非常感谢你们,感谢\n"


def parquet(rows: int) -> bytes:
    stream = io.BytesIO()
    pd.DataFrame({"text": [f"text {number}" for number in range(rows)], "label": ["a", "b"] * (rows // 2)}).to_parquet(
        stream
    )
    return stream.getvalue()


def archive(**files: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, text in files.items():
            made.writestr(name.replace("__", "/"), text)
    return stream.getvalue()


def sheet(*rows: list[Any], others: tuple[str, ...] = ()) -> bytes:
    book, stream = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    for name in others:
        book.create_sheet(name)
    book.save(stream)
    return stream.getvalue()


def rows_of(path: Path, notes: Notes | None = None) -> list[dict[str, Any]]:
    return list(read(path, "train", notes=notes or Notes()).remove_columns("_row").to_list())


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# What is repaired: the rows that come out, and what is said of it (nothing where there is nothing to know).

REPAIRED: dict[str, tuple[str, bytes | str, list[dict[str, Any]] | None, str]] = {
    "mark of UTF-8": ("a.csv", CSV.encode("utf-8-sig"), GOOD, ""),
    "mark of UTF-8 in JSON Lines": ("a.jsonl", LINES.encode("utf-8-sig"), GOOD, ""),
    "mark of UTF-8 in JSON": ("a.json", json.dumps(GOOD).encode("utf-8-sig"), GOOD, ""),
    "marks of files that were put together": ("a.jsonl", LINES + "\ufeff" + LINES, GOOD * 2, ""),
    "UTF-16 with a mark": ("a.csv", CSV.encode("utf-16"), GOOD, ""),
    "UTF-16 without a mark": ("a.csv", CSV.encode("utf-16-le"), GOOD, ""),
    "UTF-16 the other way round": ("a.csv", CSV.encode("utf-16-be"), GOOD, ""),
    "UTF-16 of Chinese without a mark": (
        "a.csv",
        CHINESE.encode("utf-16-le"),
        [{"文本": "我的订单在哪里", "标签": "物流"}, {"文本": "非常感谢你们", "标签": "感谢"}],
        "",
    ),
    "GB18030": (
        "a.csv",
        CHINESE.encode("gb18030"),
        [{"文本": "我的订单在哪里", "标签": "物流"}, {"文本": "非常感谢你们", "标签": "感谢"}],
        r"a\.csv, read as gb18030, which is a guess",
    ),
    "Windows letters": (
        "a.csv",
        "text,label\nschöne Grüße aus Köln – für Sie,gut\nüber Nacht gelöscht,schlecht\n".encode("cp1252"),
        [
            {"text": "schöne Grüße aus Köln – für Sie", "label": "gut"},
            {"text": "über Nacht gelöscht", "label": "schlecht"},
        ],
        r"read as cp1252, which is a guess",
    ),
    "line ends of Windows": ("a.csv", CSV.replace("\n", "\r\n"), GOOD, ""),
    "line ends of all kinds": ("a.csv", "text,label\r\nhello there,ham\nbuy now,spam\r", GOOD, ""),
    "line ends of Windows in JSON Lines": ("a.jsonl", LINES.replace("\n", "\r\n"), GOOD, ""),
    "no last line end": ("a.csv", CSV.rstrip(), GOOD, ""),
    "line break in quotes": ("a.csv", 'text,label\n"two\r\nlines",a\n', [{"text": "two\r\nlines", "label": "a"}], ""),
    "semicolons": ("a.csv", CSV.replace(",", ";"), GOOD, ""),
    "Excel's own first line": ("a.csv", "sep=;\r\n" + CSV.replace(",", ";"), GOOD, ""),
    "decimal commas": ("a.csv", "score;label\n1,5;2,25\n", [{"score": "1,5", "label": "2,25"}], ""),
    "single quotes": ("a.csv", "'text','label'\n'hello, you','ham'\n", [{"text": "hello, you", "label": "ham"}], ""),
    "backslashes before quotes": (
        "a.csv",
        'text,label\n"he said \\"yes\\", twice",a\n"b",c\n',
        [{"text": 'he said "yes", twice', "label": "a"}, {"text": "b", "label": "c"}],
        "",
    ),
    "labels that look alike": (
        "a.csv",
        "text,label\na,1\nb,1.0\nc, 1\n",
        [{"text": "a", "label": "1"}, {"text": "b", "label": "1.0"}, {"text": "c", "label": " 1"}],
        "",
    ),
    "pictures of several characters": (
        "a.csv",
        "text,label\n👩‍👩‍👧‍👦 family 🏳️‍🌈,❤️\n",
        [{"text": "👩‍👩‍👧‍👦 family 🏳️‍🌈", "label": "❤️"}],
        "",
    ),
    "names with characters that cannot be seen": (
        "a.csv",
        "\u200btext,la\u00adbel\u00a0\nhello there,ham\nbuy now,spam\n",
        GOOD,
        r"a\.csv:1: took characters that cannot be seen out of the column name '\\u200btext'",
    ),
    "keys with characters that cannot be seen": ("a.jsonl", LINES.replace("text", "\u200btext"), GOOD, ""),
    "a single column": ("a.csv", "text\nhello\n", [{"text": "hello"}], ""),
    "columns without a name and content": ("a.csv", "text,label,,\na,b,,\n", [{"text": "a", "label": "b"}], ""),
    "NaN": ("a.jsonl", '{"text": "a", "score": NaN}\n', [{"text": "a", "score": None}], r"a\.jsonl: 1 times NaN"),
    "half a character": (
        "a.jsonl",
        '{"text": "a \\ud83d", "more": {"k": ["\\ude00"]}}\n',
        [{"text": "a \ufffd", "more": {"k": ["\ufffd"]}}],
        r"1 rows with half a character",
    ),
    "nested objects": ("a.jsonl", '{"text": "a", "more": {"k": [1, {"l": 2}]}}\n', None, ""),
    "CSV under the name of JSON": ("a.json", CSV, GOOD, r"a\.json: is a table of delimited text, whatever"),
    "CSV under the name of JSON Lines": ("a.jsonl", CSV, GOOD, r"a\.jsonl: is a table of delimited text"),
    "CSV under the name of Parquet": ("a.parquet", CSV, GOOD, r"a\.parquet: is a table of delimited text"),
    "JSON under the name of CSV": ("a.csv", json.dumps(GOOD, indent=1), GOOD, r"a\.csv: is JSON, whatever"),
    "JSON Lines under the name of CSV": ("a.csv", LINES, GOOD, r"a\.csv: is JSON Lines, whatever"),
    "JSON under the name of JSON Lines": ("a.jsonl", json.dumps(GOOD), GOOD, r"a\.jsonl: is JSON, whatever"),
    "JSON Lines under the name of JSON": ("a.json", LINES, GOOD, ""),
    "a table without a suffix": ("rows", CSV, GOOD, r"rows: is a table of delimited text"),
    "Parquet under the name of CSV": ("a.csv", parquet(2), None, r"a\.csv: is Parquet, whatever"),
    "Excel under the name of CSV": (
        "a.csv",
        sheet(["text", "label"], ["hello there", "ham"], ["buy now", "spam"]),
        GOOD,
        r"a\.csv: is an Excel sheet",
    ),
    "compressed without saying so": ("a.csv", gzip.compress(CSV.encode()), GOOD, ""),
    "compressed only by name": ("a.csv.gz", CSV, GOOD, ""),
    "several sheets": (
        "a.xlsx",
        sheet(["text", "label"], ["hello there", "ham"], [None, None], ["buy now", "spam"], others=("Notes",)),
        GOOD,
        r'only the first sheet, "Sheet", is read, not Notes',
    ),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_repaired(tmp_path: Path, case: str) -> None:
    name, content, expected, said = REPAIRED[case]
    notes = Notes()
    rows = rows_of(write(tmp_path, name, content), notes)
    if expected is not None:
        assert rows == expected
    if said:
        assert any(pd.Series([text]).str.contains(said).item() for text in notes.warnings), notes.warnings
    else:
        assert notes.warnings == []
    assert notes.rejected == []


# What is refused: file, line and mend.

REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "an empty file": ("a.csv", "", r"a\.csv: the file is empty"),
    "an empty file of spaces": ("a.jsonl", b"\xef\xbb\xbf \r\n", r"a\.jsonl: the file is empty"),
    "an empty sheet": ("a.xlsx", sheet(), r"a\.xlsx: the sheet is empty"),
    "only a header": ("a.csv", "text,label\n", r"a\.csv: there is a header but no rows"),
    "only a header in a sheet": ("a.xlsx", sheet(["text", "label"]), r"a\.xlsx: there is a header but no rows"),
    "too many cells": (
        "a.csv",
        "text,label\na,b\nc,d,e\n",
        r"a\.csv:3: the row has 3 cells, the header 2[\s\S]*quotes",
    ),
    "too few cells": ("a.csv", "text,label,id\na,b,1\nc,d\n", r"a\.csv:3: the row has 2 cells, the header 3"),
    "cells beyond a sheet's header": (
        "a.xlsx",
        sheet(["text", "label"], ["a", "b", "c"]),
        r"a\.xlsx:2: .* beyond the 2",
    ),
    "NUL": ("a.csv", "text,label\na,b\nc\0,d\n", r"a\.csv:3: the row holds a NUL character"),
    "NUL in JSON Lines": ("a.jsonl", LINES + '{"text": "\0"}\n', r"a\.jsonl:3: the row holds a NUL"),
    "Python's literals": ("a.json", str(GOOD), r"a\.json:1:3: is not JSON[\s\S]*Python's own literals.*json\.dumps"),
    "Python's literals in lines": (
        "a.jsonl",
        str(GOOD[0]) + "\n",
        r"a\.jsonl:1:2: the line is not JSON[\s\S]*json\.dumps",
    ),
    "a broken line": (
        "a.jsonl",
        LINES + '{"text": "c"\n',
        r"a\.jsonl:3:\d+: the line is not JSON[\s\S]*on_bad_row: skip",
    ),
    "a comma too many": (
        "a.json",
        '[{"text": "a"},\n {"text": "b",}]',
        r"a\.json:2:\d+: is not JSON[\s\S]*take out the comma",
    ),
    "a comma too many in a list": (
        "a.json",
        '[{"text": "a"},\n]',
        r"a\.json:2:1: is not JSON[\s\S]*take out the comma",
    ),
    "a line that ends too early": (
        "a.jsonl",
        '{"text": "a", "label":\n{"text": "b", "label": "c"}\n',
        r"a\.jsonl:1:\d+: the line is not JSON[\s\S]*the line ends too early",
    ),
    "JSON that ends too early": (
        "a.json",
        '[{"text": "a"}, {"text": "b"',
        r"a\.json:1:29: is not JSON[\s\S]*ends too early",
    ),
    "something after the JSON": ("a.json", '[{"text": "a"}]\n]', r"a\.json:2:1: is not JSON \(Extra data\)"),
    "Infinity": ("a.jsonl", '{"text": "a", "score": -Infinity}\n', r"a\.jsonl:1:1: .*-Infinity is no number"),
    "a key twice": ("a.jsonl", '{"text": "a", "text": "b"}\n', r'a\.jsonl:1:1: .*the key "text" twice'),
    "a number for JSON": ("a.json", "42", r"a\.json: is not a list of objects\n.*int: 42"),
    "a text for JSON": ("a.json", '"rows"', r"a\.json: is not a list of objects\n.*str: 'rows'"),
    "no JSON at all": ("a.json", "hello", r"a\.json:1:1: is not JSON"),
    "JSON by columns": ("a.json", pd.DataFrame(GOOD).to_json(), r'a\.json: is not a list[\s\S]*orient="records"'),
    "JSON too deep": ("a.json", "[" * 100_000, r"a\.json:1:1: is not JSON \(nested too deeply\)"),
    "a number too long": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"a\.jsonl:1:1: the line is not JSON \(Exceeds"),
    "no header": (
        "a.csv",
        "hello there,ham\nbuy now,spam\nsee you,ham\n",
        r'a\.csv:1: the first row looks like data.*\n.*"ham" stands in 1 of[\s\S]*add a first line',
    ),
    "no header, all texts": (
        "a.csv",
        "I want my money back!,1\nWhere is it?,0\n",
        r"a\.csv:1: the first row looks like data.*\n.*none of its cells",
    ),
    "no header in a sheet": (
        "a.xlsx",
        sheet(["hello there", "ham"], ["buy", "spam"], ["bye", "ham"]),
        r"a\.xlsx, row 1: the first row looks like data",
    ),
    "two columns of one name": (
        "a.csv",
        "text,label,text\na,b,c\n",
        r'a\.csv:1: the header has two columns "text"\n.*\n.*rename',
    ),
    "two columns that look the same": (
        "a.csv",
        "text,text\u200b\na,b\n",
        r'a\.csv:1: the header has two columns "text"',
    ),
    "a quote that never closes": (
        "a.csv",
        'text,label\na,b\n"open,x\nc,d\n',
        r"a\.csv:3: the quotes of the row that starts here",
    ),
    "a quote in the header that never closes": (
        "a.csv",
        '"text,label\na,b\n',
        r"a\.csv:1: the quotes of the row[\s\S]*first line",
    ),
    "the header once more": (
        "a.csv",
        CSV + CSV,
        r"a\.csv:4: the header stands there once more\n.*\n.*take that line out",
    ),
    "a damaged byte": (
        "a.csv",
        "text,label\nGrüße,x\nKöln,y\n".encode() + b"caf\xe9,z\n",
        r"a\.csv:4:4: a byte is not UTF-8[\s\S]*0xe9",
    ),
    "half of a Parquet": ("a.parquet", parquet(400)[:2000], r"a\.parquet: is not a readable parquet file"),
    "half of a gz": (
        "a.csv.gz",
        gzip.compress(bytes(range(32, 127)) * 9 + CSV.encode())[:60],
        r"a\.csv\.gz: the compressed file is cut off or damaged",
    ),
    "an xlsx that is none": ("a.xlsx", b"PK\x03\x04 no archive", r"a\.xlsx: is not a readable \.xlsx file"),
    "half of an xlsx": ("a.xlsx", sheet(["text"], ["a"])[:3000], r"a\.xlsx: is not a readable \.xlsx file"),
    "an xlsx under a password": (
        "a.xlsx",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600) + "EncryptedPackage".encode("utf-16-le"),
        r"a\.xlsx: is protected by a password",
    ),
    "a Word document": ("a.csv", archive(word__document="x"), r"a\.csv: is a Word document \(\.docx\)"),
    "an old Word document": (
        "a.csv",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600) + "WordDocument".encode("utf-16-le"),
        r"a\.csv: is a Word document \(\.doc\)",
    ),
    "a ZIP archive": ("a.csv", archive(rows="x"), r"a\.csv: is a ZIP archive with rows[\s\S]*unpack"),
    "a PDF": ("a.csv", b"%PDF-1.7 ...", r"a\.csv: is a PDF document[\s\S]*save its rows as CSV"),
    "a web page": ("a.csv", "\n<!DOCTYPE html><html>", r"a\.csv: is a web page[\s\S]*download the file itself"),
    "NUL in the header": ("a.csv", "text\0,label\na,b\n", r"a\.csv:1: the row holds a NUL[\s\S]*the first line"),
    "JSON Lines whose first line is cut": (
        "a.jsonl",
        LINES[6:],
        r"a\.jsonl:1:\d+: the line is not JSON",
    ),
    "a pointer": ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"git lfs pull"),
    "binary": ("a.csv", bytes(range(256)) * 40, r"a\.csv: is not a text file"),
    "plain text": ("a.txt", "hello\n", r"a\.txt: files of this kind are not read"),
    "tokens without tags": ("a.conll", "EU B-ORG\nrejects\n", r"a\.conll:2: the token has no tag"),
    "tokens with other columns": (
        "a.conll",
        "EU NNP B-ORG\nsays O\n",
        r"a\.conll:2: the line has 2 columns, those before have 3",
    ),
    "no tokens": ("a.conll", "-DOCSTART- O\n\n", r"a\.conll: holds no tokens"),
    "SQuAD without questions": (
        "a.json",
        '{"data": [{"paragraphs": [{"context": "x"}]}]}',
        r"a\.json:1: data\[0\]\.paragraphs\[0\] has no context or no qas",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, name, content), "train", notes=Notes())


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    write(tmp_path / "a.csv", "part.csv", CSV)
    with pytest.raises(DataError, match=r"a\.csv: the folder holds no data set[\s\S]*part\.csv"):
        read(tmp_path / "a.csv", "train")


def test_very_long_texts_and_very_many_columns(tmp_path: Path) -> None:
    long = "word " * 400_000
    assert rows_of(write(tmp_path, "a.csv", f"text,label\n{long},a\n")) == [{"text": long, "label": "a"}]
    assert rows_of(write(tmp_path, "a.jsonl", json.dumps({"text": long})))[0]["text"] == long
    names = [f"c{number}" for number in range(3000)]
    wide = write(tmp_path, "wide.csv", ",".join(names) + "\n" + ",".join(names[::-1]) + "\n")
    assert rows_of(wide) == [dict(zip(names, names[::-1], strict=True))]


# on_bad_row: skip

BAD_ROWS: dict[str, tuple[str, bytes | str, list[str], list[tuple[int, str, str]]]] = {
    "cells": ("a.csv", "text,label\na,x\nb\nc,y\nd,e,f\n", ["a", "c"], [(3, "1 cells", "b"), (5, "3 cells", "d,e,f")]),
    "a quote that never closes": (
        "a.csv",
        'text,label\na,x\n"open,x\nc,y\n"d, e",z\n',
        ["a", "c", "d, e"],
        [(3, "quotes", '"open,x')],
    ),
    "NUL": ("a.csv", "text,label\na,x\nb\0,y\nc,z\n", ["a", "c"], [(3, "NUL", "b\0,y")]),
    "a byte": (
        "a.csv",
        "text,label\nä,x\nö,y\n".encode() + b"\xe9,z\nc,x\n",
        ["ä", "ö", "c"],
        [(4, "UTF-8", "\udce9,z")],
    ),
    "JSON": (
        "a.jsonl",
        '{"text": "a"}\n{"text": \n["b"]\n{"text": "c"}',
        ["a", "c"],
        [(2, "not JSON", '{"text": '), (3, "object", '["b"]')],
    ),
    "entries": ("a.json", '[{"text": "a"},\n3, {"text": "c"}]', ["a", "c"], [(2, "entry 2", "3")]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_kept_aside(tmp_path: Path, case: str) -> None:
    name, content, texts, rejected = BAD_ROWS[case]
    path, notes = write(tmp_path, name, content), Notes("skip")
    assert [row["text"] for row in rows_of(path, notes)] == texts
    assert [(one["source"], one["line"], one["text"]) for one in notes.rejected] == [
        (str(path), line, text) for line, _, text in rejected
    ]
    for one, (_, problem, _) in zip(notes.rejected, rejected, strict=True):
        assert problem in one["problem"]
    with pytest.raises(DataError, match=r"a\.\w+:\d"):
        read(path, "train", notes=Notes("refuse"))


def test_a_row_of_tokens_is_kept_aside_whole(tmp_path: Path) -> None:
    path, notes = write(tmp_path, "a.conll", "a O\nb O\n\nc O\nd\ne O\n\nf B-X\n"), Notes("skip")
    assert rows_of(path, notes) == [{"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["f"], "tags": ["B-X"]}]
    assert [(one["line"], one["text"]) for one in notes.rejected] == [(5, "c O\nd\ne O")]


def test_a_file_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\na\nb\n")
    with pytest.raises(DataError, match=r"a\.csv: has no rows\n.*2 that cannot be read, the first in line 2"):
        read(path, "train", notes=Notes("skip"))


# Nothing but DataError, whatever is done to a file


def damage(content: bytes, at: int) -> list[bytes]:
    """Cut off there; a byte changed; a stretch taken out; zeros; a quote, a brace and a line end put in."""
    flipped = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
    put_in = [content[:at] + extra + content[at:] for extra in (b'"', b"{", b"\n", b"\r", b"\0\0\0", b"\xff\xfe", b",")]
    return [content[:at], flipped, content[:at] + content[at + 7 :], *put_in]


def outcome(path: Path, notes: Notes) -> tuple[DataError | None, list[Any]]:
    try:
        return None, read(path, "train", notes=notes).to_list()
    except DataError as error:
        return error, []


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.csv", lambda: CSV.encode()),
        ("a.tsv", lambda: CSV.replace(",", "\t").encode()),
        ("a.jsonl", lambda: LINES.encode()),
        ("a.json", lambda: json.dumps({"data": GOOD}).encode()),
        ("a.conll", lambda: b"EU B-ORG\nrejects O\n\nPeter B-PER\n"),
        ("a.csv.gz", lambda: gzip.compress(CSV.encode())),
        ("a.parquet", lambda: parquet(4)),
        ("a.xlsx", lambda: sheet(["text", "label"], ["a", "b"])),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_any_damage_is_read_or_refused(tmp_path: Path, name: str, make: Callable[[], bytes], on_bad_row: Any) -> None:
    content = make()
    for at in range(0, len(content), max(len(content) // 25, 1)):
        for broken in damage(content, at):
            path = write(tmp_path, name, broken)
            error, rows = outcome(path, Notes(on_bad_row))
            assert str(path) in error.problem if error is not None else len(rows) > 0
