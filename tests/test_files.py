"""Text files: they hold what Python's own writers put into them; what is damaged is refused with file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from hybridtune.data.reading.read import describe, read
from hybridtune.errors import DataError

ROWS = [
    {"text": "Hello, you", "label": "ham"},
    {"text": 'He said "no"; twice | thrice', "label": "ham"},
    {"text": "two\nlines, and\ttab", "label": "spam"},
    {"text": "NA", "label": "null"},
    {"text": "nan", "label": "None"},
    {"text": "", "label": "1"},
    {"text": "Grüße 你好 🙂", "label": "007"},
]


def without_row(rows: Dataset) -> list[dict[str, Any]]:
    return list(rows.remove_columns("_row").to_list())


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def write_csv(path: Path, delimiter: str, **options: Any) -> Path:
    with path.open("w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}, {"encoding": "utf-8-sig"}])
def test_csv_as_pythons_csv_module_wrote_it(tmp_path: Path, delimiter: str, options: dict[str, Any]) -> None:
    rows = read(write_csv(tmp_path / "a.csv", delimiter, **options), "train")
    assert without_row(rows) == ROWS
    assert rows["_row"][:] == [2, 3, 4, 6, 7, 8, 9]  # the row of line 4 holds a line break


def test_tsv_as_pandas_reads_it(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.tsv", "\t")
    expected = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert without_row(read(path, "train")) == expected.to_dict("records")


def test_csv_lines_agree_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\n\ntext,label\n\none,a\r\n"two\n\nlong",b\n   \nthree,c\n')
    rows = read(path, "train")
    lines = path.read_text().split("\n")
    assert rows["_row"][:] == [5, 6, 10]
    assert [lines[row - 1].strip('"\r')[:3] for row in rows["_row"]] == ["one", "two", "thr"]


def test_stray_quotes_of_a_tsv_swallow_no_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tsv", 'label\ttext\nham\t"Hi there\nspam\tBye" now\nham\t"quoted ""cell"""\nham\t5" disk\n'
    )
    rows = read(path, "train")
    assert rows["text"][:] == ['"Hi there', 'Bye" now', 'quoted "cell"', '5" disk']
    assert rows["_row"][:] == [2, 3, 4, 5]


def test_old_line_ends_and_long_cells(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert read(write(tmp_path / "mac.tsv", "text\tlabel\ra\tx\rb\ty\r"), "train")["_row"][:] == [2, 3]
    long = "x" * (limit + 10)
    assert read(write(tmp_path / "long.csv", f"text,label\n{long},a\n"), "train")["text"][0] == long
    assert csv.field_size_limit() == limit


def test_columns_without_a_name(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}).to_csv(tmp_path / "index.csv")
    assert read(tmp_path / "index.csv", "train").column_names == ["unnamed_1", "text", "label", "_row"]
    path = write(tmp_path / "sheet.csv", "text, label ,\na,x,\n")
    assert read(path, "train").column_names == ["text", "label", "_row"]


def test_single_column(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "text\nhello\nyou there\n"), "test")["text"][:] == ["hello", "you there"]


def test_json_lines(tmp_path: Path) -> None:
    text = (
        '{"text": "a\u2028b", "label": 1}\n\n{"label": 0, "extra": [1, 2]}\n{"text": "\\ud83d broken", "label": null}\n'
    )
    rows = read(write(tmp_path / "a.jsonl", text), "train")
    assert rows["text"][:] == ["a\u2028b", None, "\ufffd broken"]
    assert rows["label"][:] == [1, 0, None]
    assert rows["extra"][:] == [None, [1, 2], None]
    assert rows["_row"][:] == [1, 3, 4]


def test_json_list_and_lines_under_its_name(tmp_path: Path) -> None:
    entries = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}]
    path = write(tmp_path / "a.json", json.dumps(entries, indent=2))
    assert without_row(read(path, "train")) == entries
    assert read(path, "train")["_row"][:] == [1, 2]
    lines = write(tmp_path / "b.json", "\n".join(map(json.dumps, entries)))
    assert without_row(read(lines, "train")) == entries


@pytest.mark.parametrize(
    ("encoding", "name", "text"),
    [
        ("cp1252", "cp1252", "Ich möchte meine Bestellung ändern – Schöne Grüße aus Köln"),
        ("latin-1", "cp1252", "El niño está aquí, ¿dónde está mi pedido?"),
        ("cp1252", "cp1252", "C’est génial à Noël – merci, très déçu du café"),
        ("cp1250", "cp1250", "Zażółć gęślą jaźń, proszę o zwrot pieniędzy"),
        ("cp1251", "cp1251", "Сколько нужно ждать доставку, если я сделал заказ ещё в прошлый понедельник"),
        ("koi8-r", "koi8_r", "Сколько нужно ждать доставку, если я сделал заказ ещё в прошлый понедельник"),
        ("cp1253", "cp1253", "Πού είναι η παραγγελία μου, ευχαριστώ πολύ"),
        ("cp932", "cp932", "注文はどこですか。ありがとうございます"),
        ("gb18030", "gb18030", "我的订单在哪里，非常感谢你们"),
        ("utf-16", "utf-16", "Grüße 你好"),
        ("utf-32", "utf-32", "Grüße 你好"),
    ],
)
def test_other_encodings_are_detected_and_reported(tmp_path: Path, encoding: str, name: str, text: str) -> None:
    path = write(tmp_path / "a.csv", "text;label\n" + f"{text};x\n" * 3, encoding)
    assert read(path, "train")["text"][:] == [text] * 3
    assert describe(path) == f"{path}, read as {name}"


def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nGrüße aus Köln,x\n", "cp1252")
    assert describe(path).endswith("cp1252")
    write(path, "text,label\nGrüße aus Köln,x\n")
    assert describe(path) == str(path)


def test_one_damaged_byte_does_not_turn_utf8_into_mojibake(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nGrüße,x\nKöln,y\n".encode() + b"caf\xe9,z\n")
    with pytest.raises(DataError, match=r"a\.csv:4:4: a byte is not UTF-8.*\n.*0xe9"):
        read(path, "train")
    assert describe(path) == str(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", r"a\.csv: the file is empty"),
        ("a.jsonl", " \n\n", r"a\.jsonl: the file is empty"),
        ("a.csv", "text,label\n", r"a\.csv: there is a header but no rows"),
        ("a.csv", "text,label\na,b\nc,d,e\n", r"a\.csv:3: the row has 3 cells, the header 2"),
        ("a.tsv", "text\tlabel\n\na\tb\n\nonly\n", r"a\.tsv:5: the row has 1 cells, the header 2[\s\S]*a tab"),
        ("a.csv", 'text,label\na,b\n"open,x\nc,d\n', r"a\.csv:3: the quotes of the row that starts here do not match"),
        ("a.csv", 'text,label\n"a" b,x\n', r"a\.csv:2: the quotes of the row"),
        ("a.csv", "text,label,text\na,b,c\n", r'a\.csv:1: the header has two columns "text"'),
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', r"a\.jsonl:2:10: the line is not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl:2: the line is not a JSON object"),
        ("a.json", '[{"text": "a"},\n {"text": b}]', r"a\.json:2:11: is not JSON"),
        ("a.json", '{"data": 1, "version": 1}', r"a\.json: is not a list of objects\n.*data, version"),
        ("a.json", '{"data": [], "version": 1}', r"a\.json: the list is empty"),
        ("a.json", "[]", r"a\.json: the list is empty"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json:1: entry 2 is not an object"),
        ("a.txt", "hello", r"a\.txt: files of this kind are not read\n.*\.txt\n.*\.csv, \.tsv"),
        ("a.xlsx", "PK", r"a\.xlsx: is not a readable xlsx file\n.*b'PK'"),
        ("a.parquet", "PAR", r"a\.parquet: is not a readable parquet file"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, text), "train")
