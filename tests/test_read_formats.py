"""Formats, several files, weights, and files that do not fit in memory: the same rows as Python's own readers give."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import openpyxl
import pyarrow as pa
import pytest
from datasets import Dataset

from hybridtune import prepare, tasks
from hybridtune.console import Console
from hybridtune.data.reading import encoding, read, sources, spool
from hybridtune.data.reading.read import Notes
from hybridtune.errors import DataError
from hybridtune.recipe import Recipe

CSV = "text,label\nhello there,ham\nbuy now,spam\n"
GOOD = [{"text": "hello there", "label": "ham"}, {"text": "buy now", "label": "spam"}]


def plain(rows: Dataset) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows.to_list()]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# Formats


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.zst", "a.csv.bz2", "a.jsonl.gz", "a.json.zst"])
def test_compressed(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in GOOD)
    text = {"csv": CSV, "jsonl": lines, "json": json.dumps(GOOD)}[name.split(".")[1]]
    kind = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[name.split(".")[2]]
    with pa.output_stream(str(tmp_path / name), compression=kind) as file:
        file.write(text.encode())
    rows = read.read(tmp_path / name, "train")
    assert plain(rows) == GOOD
    place = read.places(rows, str(tmp_path / name))
    assert place(1) == {"csv": f"{tmp_path}/{name}:3", "jsonl": f"{tmp_path}/{name}:2"}.get(
        name.split(".")[1], f"{tmp_path}/{name}, row 2"
    )


def test_gz_of_several_members(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv.gz", gzip.compress(CSV[:15].encode()) + gzip.compress(CSV[15:].encode()))
    assert plain(read.read(path, "train")) == GOOD


@pytest.mark.parametrize("space", [" ", "\t"])
def test_conll(tmp_path: Path, space: str) -> None:
    text = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n# # O\n\n\n# id 12\nPeter NNP B-PER\n".replace(" ", space)
    rows = read.read(write(tmp_path / "a.conll", text), "train")
    assert rows.to_list() == [
        {"tokens": ["EU", "rejects", "#"], "tags": ["B-ORG", "O", "O"], "_row": 3},
        {"tokens": ["Peter"], "tags": ["B-PER"], "_row": 9},
    ]


def test_tokens_keep_their_odd_spaces(tmp_path: Path) -> None:
    rows = read.read(
        write(tmp_path / "a.iob2", "1\u00a0000 B-N\n\u3000 O\n\nNew York\tB-L\n"), "train", notes=Notes("skip")
    )
    assert rows["tokens"][0] == ["1\u00a0000", "\u3000"]
    assert read.read(write(tmp_path / "b.bio", "New York\tB-L\n"), "train")["tokens"][0] == ["New York"]


def squad() -> list[dict[str, Any]]:
    answers = [{"text": "Paris", "answer_start": 3}, {"text": "in Paris", "answer_start": 0}]
    known = {"id": "1", "question": "Where?", "answers": answers, "is_impossible": False}
    unknown = {"id": "2", "question": "Why?", "answers": [], "plausible_answers": answers, "is_impossible": True}
    return [{"title": "t", "paragraphs": [{"context": "in Paris, today", "qas": [known, unknown]}]}]


@pytest.mark.parametrize("form", [{"version": "2.0", "data": squad()}, squad()])
def test_squad_is_flattened(tmp_path: Path, form: Any) -> None:
    rows = read.read(write(tmp_path / "a.json", json.dumps(form)), "train")
    context = "in Paris, today"
    answers = {"text": ["Paris", "in Paris"], "answer_start": [3, 0]}
    assert rows.to_list() == [
        {"id": "1", "question": "Where?", "context": context, "answers": answers, "_row": 1},
        {"id": "2", "question": "Why?", "context": context, "answers": {"text": [], "answer_start": []}, "_row": 2},
    ]
    flat = plain(rows)
    lines = write(tmp_path / "flat.jsonl", "".join(json.dumps(row) + "\n" for row in flat))
    assert plain(read.read(lines, "train")) == flat


def test_one_list_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"version": 3, "tags": ["x"], "rows": GOOD}))
    assert plain(read.read(path, "train")) == GOOD


def test_excel(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["text", "label", None], [None], ["a", 1], ["b", 2.5], [None, None], ["c", None], [3, 4]]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    rows = read.read(tmp_path / "a.xlsx", "train")
    assert rows["text"][:] == ["a", "b", "c", "3"]
    assert rows["label"][:] == [1.0, 2.5, None, 4.0]
    assert rows["_row"][:] == [3, 4, 6, 7]
    assert read.places(rows, "a.xlsx")(2) == "a.xlsx, row 6"


@pytest.mark.parametrize(("suffix", "package"), [(".xls", "xlrd"), (".ods", "odfpy")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError(f"Missing optional dependency '{package}'")

    monkeypatch.setattr("pandas.ExcelFile", missing)
    path = tmp_path / f"a{suffix}"
    if suffix == ".xls":
        write(path, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    else:
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
    with pytest.raises(DataError, match=rf"needs the package {package}[\s\S]*pip install {package}"):
        read.read(path, "train")


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name, text in {"neg/2.txt": "bad", "neg/1.txt": "worse\r\nby far\n", "pos/1.txt": "gut, schön"}.items():
        write(tmp_path / "set" / "train" / name, text)
    write(tmp_path / "set" / "test" / "pos" / "1.txt", "fine")
    write(tmp_path / "set" / "train" / "pos" / "notes.md", "")
    (tmp_path / "set" / "train" / "empty").mkdir()
    notes = Notes()
    rows = read.read(tmp_path / "set", "train", notes=notes)
    assert plain(rows) == [
        {"text": "worse\nby far", "label": "neg"},
        {"text": "bad", "label": "neg"},
        {"text": "gut, schön", "label": "pos"},
    ]
    assert read.places(rows, "set")(2) == str(tmp_path / "set" / "train" / "pos" / "1.txt")
    assert plain(read.read(tmp_path / "set", "test")) == [{"text": "fine", "label": "pos"}]
    assert plain(read.read(tmp_path / "set" / "train", "validation")) == plain(rows)
    assert len(notes.warnings) == 2 and "notes.md" in notes.warnings[1] and "empty" in notes.warnings[0]


# Other machines


def test_addresses(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/a.csv", CSV.encode())
    memory.pipe("/set/b.jsonl.gz", gzip.compress(json.dumps(GOOD[0]).encode()))
    rows = read.read("memory://set/a.csv", "train")
    assert plain(rows) == GOOD and read.places(rows, "memory://set/a.csv")(1) == "memory://set/a.csv:3"
    both = read.read("memory://set/*", "train")
    assert plain(both) == [*GOOD, GOOD[0]] and both["_source"][2].endswith("set/b.jsonl.gz")
    local = write(tmp_path / "a.csv", CSV)
    assert plain(read.read(f"file://{local}", "train")) == GOOD
    for name, message in {
        "memory://set/no.csv": "there is no such file",
        "memory://set": "is a folder",
        "memory://set/*.tsv": "no file matches",
        "nosuch://set/a.csv": "cannot be read from there",
        f"file://{tmp_path}/b.csv": "there is no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            read.read(name, "train")


# Several files


def test_several_files_are_told_apart(tmp_path: Path) -> None:
    one = write(tmp_path / "a.csv", CSV)
    two = write(tmp_path / "b.jsonl", '\n{"text": "x", "label": 1, "id": 7}\n')
    rows = read.read([one, two], "train", notes=(notes := Notes()))
    assert plain(rows) == [{**row, "id": None} for row in GOOD] + [{"text": "x", "label": "1", "id": 7}]
    place = read.places(rows, "whatever")
    assert [place(at) for at in range(3)] == [f"{one}:2", f"{one}:3", f"{two}:2"]
    read.say_empty(rows, ["text", "label"], rows, notes)
    assert notes.warnings == []
    read.say_empty(rows, ["text", "id", "whatever"], rows, notes)
    said = f"{one}: none of its rows has a value for id, as rows of other files have; its columns: text, label"
    assert notes.warnings == [said]
    assert read.describe([one, {"path": two, "weight": 2}]) == f"{one}, {two} (weight 2)"
    assert len(read.read([one, two], "train", max_rows=2)) == 2


def test_patterns(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / "data" / f"{name}.csv", f"text\n{name}\n")
    rows = read.read(f"{tmp_path}/data/*.csv", "test")
    assert rows["text"][:] == ["a", "b", "c"] and rows["_row"][:] == [2, 2, 2]
    odd = write(tmp_path / "data" / "[a].csv", "text\nodd\n")
    assert read.read(odd, "test")["text"][:] == ["odd"]  # a file of that name is no pattern
    with pytest.raises(DataError, match=r"\*\.tsv: no file matches the pattern\n.*a\.csv"):
        read.read(f"{tmp_path}/data/*.tsv", "test")
    with pytest.raises(DataError, match=r"a\.csv is named twice"):
        read.read([f"{tmp_path}/data/a.csv", f"{tmp_path}/data/?.csv"], "train")


@pytest.mark.parametrize(("weight", "times"), [(2.0, 20), (0.5, 5), (2.5, 25), (1, 10)])
def test_weights(tmp_path: Path, weight: float, times: int) -> None:
    one = write(tmp_path / "a.csv", "text\n" + "".join(f"a{number}\n" for number in range(10)))
    two = write(tmp_path / "b.csv", "text\n" + "".join(f"b{number}\n" for number in range(10)))
    source = [{"path": str(one), "weight": weight}, str(two)]
    rows = read.read(source, "train")
    assert len(rows) == 20
    weighed = read.weigh(rows, source, 3)
    texts = weighed["text"][:]
    assert (
        sum(text[0] == "a" for text in texts) == times
        and [text for text in texts if text[0] == "b"] == rows["text"][10:]
    )
    counts = {texts.count(f"a{number}") for number in range(10)}
    assert counts <= {int(weight), int(np.ceil(weight))}
    assert weighed.to_list() == read.weigh(rows, source, 3).to_list()
    if weight != 1:
        with pytest.raises(DataError, match=r"data\.test: .*a\.csv has a weight"):
            read.read(source, "test")


@pytest.mark.parametrize("weight", [0, -1, "much", True, float("nan")])
def test_weights_that_are_none(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(DataError, match="is no number above zero"):
        read.read([{"path": "a.csv", "weight": weight}], "train")


def test_the_same_file_among_several(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.csv", CSV)
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    assert sources.same_files(f"{tmp_path}/*.csv", str(tmp_path / "b.csv")) == [str(tmp_path / "b.csv")]
    assert sources.same_files([tmp_path / "a.csv"], tmp_path / "link.csv") == [str(tmp_path / "link.csv")]
    assert sources.same_files(tmp_path / "a.csv", GOOD) == []


# Larger than memory


VALUES: list[list[Any]] = [
    [1, 2, 3, 4, 5],
    [1, 2.5, None, 4, 5],
    [1, 2.5, 3, 4, "x"],
    ["x", 1, True, None, 2.0],
    [True, False, 1, 0, None],
    [None, None, None, None, "late"],
    [["a"], ["b", "c"], [], None, ["d"]],
    [["a"], "b", None, "c", 1],
    [[1], [2.5], ["x"], [], None],
    [{"a": 1}, {"b": "x"}, None, {"a": 2.5}, {}],
    [{"a": 1}, {"a": "x"}, None, 3, "y"],
    [2**60 + 1, 2.5, 1, 2, 3],
    [1, 2**70, 2, 3, 4],
    [{"t": [], "s": []}, {"t": ["x"], "s": [1]}, {"t": [], "s": []}, None, {"t": ["y"], "s": [2]}],
]


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("held", [0, 2**25])
def test_batches_give_what_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], held: int
) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"v": value}) + "\n" for value in values))
    whole = read.read(path, "train", notes=Notes())
    monkeypatch.setattr("hybridtune.data.reading.jsons.BATCH_ROWS", 2)
    monkeypatch.setattr(spool, "HELD_BYTES", held)
    for order in (slice(None), slice(None, None, -1)):
        turned = values[order]
        write(path, "".join(json.dumps({"v": value}) + "\n" for value in turned))
        batches = read.read(path, "train", notes=Notes())
        assert batches["v"][:] == whole["v"][order]
        if not any(isinstance(value, dict) for value in values):  # fields come in the order in which they are met
            assert batches.features == whole.features


def test_many_batches_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtune.data.reading.delimited.BATCH_ROWS", 7)
    monkeypatch.setattr(spool, "HELD_BYTES", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f'"text\n{n}",{n % 3}\n' for n in range(100)))
    rows = read.read(path, "train")
    assert rows["text"][:] == [f"text\n{n}" for n in range(100)]
    assert rows["_row"][:] == [2 + 2 * n for n in range(100)]
    assert [one.name for one in tmp_path.iterdir()] == ["a.csv"]  # nothing is left, and the rows are still there
    assert rows.select([50, 3])["label"][:] == ["2", "0"]


def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    monkeypatch.setattr(spool, "HELD_BYTES", 0)
    monkeypatch.setattr(spool.ipc, "new_stream", lambda path, schema: pa.ipc.RecordBatchStreamWriter(full, schema))
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(DataError, match=r"no space left[\s\S]*TMPDIR"):
        read.read(write(tmp_path / "a.csv", CSV), "train")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_encodings_do_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(encoding, "_CHUNK", chunk)
    damaged = write(tmp_path / f"{chunk}.csv", "text,label\nGrüße,x\n€ Köln,y\n".encode() + b"caf\xe9,z\n")
    with pytest.raises(DataError, match=r"\.csv:4:4: a byte is not UTF-8"):
        read.read(damaged, "train")
    fine = write(tmp_path / f"fine{chunk}.csv", "text,label\nGrüße,🙂\n")
    assert read.read(fine, "train")["label"][:] == ["🙂"]
    cut = write(tmp_path / f"cut{chunk}.csv", "text,label\nGrüße 你好,x\n".encode() + "é".encode()[:1])
    with pytest.raises(DataError, match=r"\.csv:3:1: a byte is not UTF-8"):
        read.read(cut, "train")


def test_a_late_letter_decides_the_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK", 4096)
    rows = "plain words,x\n" * 5000 + "schöne Grüße aus Köln – für Sie,y\nüber Nacht gelöscht,y\n"
    path = write(tmp_path / "a.csv", ("text,label\n" + rows).encode("cp1252"))
    assert read.describe(path).endswith("read as cp1252")
    assert read.read(path, "train", notes=Notes())["text"][5001] == "über Nacht gelöscht"


# In a tuning


def recipe_of(tmp_path: Path, **data: Any) -> tuple[Recipe, Any]:
    recipe = Recipe.make(model="m", task="classification", data=data, output=str(tmp_path / "run"))
    return recipe, tasks.load(recipe.task).from_recipe(recipe)


def test_rejected_rows_and_weights_reach_the_tuning(tmp_path: Path) -> None:
    def rows(name: str, count: int, more: str = "") -> str:
        lines = "".join(f"{name} text number {number * 7919},{'ab'[number % 2]}\n" for number in range(count))
        return str(write(tmp_path / f"{name}.csv", "text,label\n" + lines + more))

    train = [{"path": rows("one", 20, "broken\n"), "weight": 3}, rows("two", 20)]
    recipe, task = recipe_of(
        tmp_path, train=train, validation=rows("valid", 10), test=rows("test", 10), on_bad_row="skip"
    )
    notes, stream = Notes(), Console(quiet=True)
    splits, about = prepare.rows_of(recipe, task, stream, notes)
    assert len(splits["train"]) == 80 and about["splits"]["train"]["rows"] == 80
    assert about["rejected"] == 1 and notes.rejected[0]["line"] == 22 and notes.rejected[0]["text"] == "broken"
    assert any("1 rows cannot be read and are left out" in text for text in notes.warnings)
    strict, task = recipe_of(tmp_path, train=train, validation=rows("valid", 10), test=rows("test", 10))
    with pytest.raises(DataError, match=r"one\.csv:22: the row has 1 cells"):
        prepare.rows_of(strict, task, stream)
    same, task = recipe_of(tmp_path, train=f"{tmp_path}/*.csv", test=str(tmp_path / "test.csv"), on_bad_row="skip")
    with pytest.raises(DataError, match=r"data\.test: is the same file as data\.train\n.*test\.csv"):
        prepare.rows_of(same, task, stream)


def test_no_file_is_left_open(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", CSV)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        read.read(path, "train")
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 2
