"""Reading: every kind of source gives the same rows; what cannot be read is refused with the place and the mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hybridtune.data.reading.read import describe, map_columns, read
from hybridtune.errors import DataError

SMS = Path(__file__).parents[1] / "../shared/data/sms_spam_tiny"


def without_row(rows: Dataset) -> list[dict[str, Any]]:
    return list(rows.remove_columns("_row").to_list())


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# Sources


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, "1"], ["1", "1"]),
        ([True, "a", None], ["True", "a", None]),
        ([1, 2.5], [1.0, 2.5]),
        (["a", ["b", "c"], None], [["a"], ["b", "c"], None]),
        ([["a"], [1]], [["a"], ["1"]]),
        ([{"k": 1}, "x"], ['{"k": 1}', "x"]),
        ([2**70, 1], [str(2**70), "1"]),
    ],
)
def test_mixed_types_become_one(values: list[Any], expected: list[Any]) -> None:
    assert read([{"text": "t", "label": value} for value in values], "train")["label"][:] == expected


def test_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b", None], "label": [3, 1, 2], "kind": pd.Categorical(["x", "y", "x"])})
    frame.index = [7, 8, 9]
    frame.to_parquet(tmp_path / "a.parquet")
    rows = read(str(tmp_path / "a.parquet"), "train")
    assert without_row(rows) == [
        {"text": "a", "label": 3, "kind": "x"},
        {"text": "b", "label": 1, "kind": "y"},
        {"text": None, "label": 2, "kind": "x"},
    ]
    assert rows["_row"][:] == [1, 2, 3]


def test_saved_folder_with_class_labels(tmp_path: Path) -> None:
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["neg", "pos"]),
            "tags": List(ClassLabel(names=["a", "b"])),
        }
    )
    data = Dataset.from_dict({"text": ["x", "y"], "label": [1, -1], "tags": [[0, 1], []]}, features=features)
    DatasetDict({"train": data}).save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    expected = [{"text": "x", "label": "pos", "tags": ["a", "b"]}, {"text": "y", "label": None, "tags": []}]
    assert without_row(read(tmp_path / "both", "train")) == expected
    assert without_row(read(tmp_path / "one", "test")) == expected
    assert without_row(read(data.with_format("numpy"), "train")) == expected
    assert data.features["label"] == features["label"]  # what came in is as it was
    with pytest.raises(DataError, match=r'has no split "validation"\n.*train'):
        read(tmp_path / "both", "validation")


def test_frames_and_dicts() -> None:
    frame = pd.DataFrame({"text": ["a", None, "c"], "label": [1, 2, np.nan], "odd": ["x", 2, None], 5: [1, 2, 3]})
    frame["kind"] = pd.Categorical(["p", None, "q"])
    rows = read(frame.iloc[::-1], "train")
    assert rows["text"][:] == ["c", None, "a"]
    assert rows["label"][:] == [None, 2.0, 1.0]
    assert rows["odd"][:] == [None, "2", "x"]
    assert rows["5"][:] == [3, 2, 1]
    assert rows["kind"][:] == ["q", None, "p"]
    assert rows["_row"][:] == [1, 2, 3]
    assert without_row(read([{"text": "a"}, {"label": 1}], "train")) == [
        {"text": "a", "label": None},
        {"text": None, "label": 1},
    ]


def test_the_row_number_is_of_this_source() -> None:
    first = read([{"text": str(number)} for number in range(9)], "train")
    again = read(first.select([8, 2]), "train")
    assert again.to_list() == [{"text": "8", "_row": 1}, {"text": "2", "_row": 2}]


def test_hub_id_goes_to_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_dict({"text": ["a"]})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/some-set", "validation")["text"][:] == ["a"]
    assert asked == [("someone/some-set", "validation")]
    assert describe("someone/some-set") == "someone/some-set"


def test_describe() -> None:
    assert describe("no/such.csv") == "no/such.csv"
    assert describe(Dataset.from_dict({"a": [1]})) == "datasets.Dataset"
    assert describe(pd.DataFrame()) == "pandas.DataFrame"
    assert describe([{"text": "a"}]) == "list of dicts"


# max_rows


def test_sample_keeps_order_classes_and_line_numbers(tmp_path: Path) -> None:
    lines = [f"{number},{'abcd'[number // 250]}" for number in range(1000)]
    path = write(tmp_path / "a.csv", "\n".join(["text,label", *lines]))
    rows = read(path, "train", max_rows=40)
    assert len(rows) == 40
    assert rows["_row"][:] == [int(text) + 2 for text in rows["text"]] == sorted(rows["_row"])
    assert [rows["label"][:].count(name) for name in "abcd"] == [10, 10, 10, 10]
    assert rows.to_list() == read(path, "train", max_rows=40).to_list()


def test_sample_of_alternating_classes_has_both() -> None:
    rows = read([{"text": "t", "label": number % 2} for number in range(400)], "train", max_rows=200)
    assert 70 < sum(rows["label"]) < 130


@pytest.mark.parametrize("limit", [5, 6, 1000])
def test_sample_of_more_than_all_is_all(limit: int) -> None:
    assert len(read([{"text": "t"}] * 5, "train", max_rows=limit)) == 5


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_sample_has_no_row_twice(limit: int) -> None:
    assert len(set(read([{"text": "t"}] * 5, "train", max_rows=limit)["_row"])) == limit


# What is refused


def test_a_missing_file_is_not_taken_for_any_other_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"rows\.csv: there is no such file\n.*give the path of an existing file"):
        read(tmp_path / "rows.csv", "train")
    with pytest.raises(DataError, match=r"test\.tsv: there is no such file\n.*did you mean .*test\.csv\?"):
        read(tmp_path / "test.tsv", "train")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text\na\n")
    write(tmp_path / "notes.md", "")
    with pytest.raises(DataError, match=r"trian\.csv: there is no such file\n.*did you mean .*/train\.csv\?"):
        read(tmp_path / "trian.csv", "train")
    with pytest.raises(DataError, match="give the path of an existing file"):
        read(tmp_path / "zzzz.jsonl", "train")
    with pytest.raises(DataError, match=r"there is no folder .*/nowhere either"):
        read(tmp_path / "nowhere" / "a.csv", "train")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", "text\na\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"review: there is no such file or folder, and no data set[\s\S]*reviews\.csv"):
        read("review", "train")


def test_folder_without_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder holds no data set[^\n]*\n.*no data files"):
        read(tmp_path, "train")
    write(tmp_path / "a.csv", "text\na\n")
    with pytest.raises(DataError, match=r"mend:.*/a\.csv"):
        read(tmp_path, "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of dicts: has no rows\n.*train"),
        (pd.DataFrame({"text": []}), "pandas.DataFrame: has no rows"),
        (Dataset.from_dict({"text": []}), "datasets.Dataset: has no rows"),
        ([{"text": "a"}, "b"], "list of dicts: row 2 is not a dict\n.*'b'"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), 'pandas.DataFrame: has two columns "a"'),
        (17, "train: rows cannot be read from this\n.*int"),
    ],
)
def test_bad_objects_are_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(source, "train")


# Columns

WANTED = {"text": ("sentence", "message"), "text_pair": ("sentence2",), "label": ("intent", "target")}


def mapped(columns: list[str], hints: dict[str, str] | None = None) -> dict[str, Any]:
    """The columns' new names, each with the name it had: every cell holds the name of its column."""
    rows = read([{name: name for name in columns}], "train")
    renamed = map_columns(rows, "train", "a.csv", WANTED, hints or {}, ["text", "label"])
    assert len(set(renamed.column_names)) == len(renamed.column_names)
    return without_row(renamed)[0]


@pytest.mark.parametrize(
    ("columns", "hints", "expected"),
    [
        (["text", "label"], {}, {"text": "text", "label": "label"}),
        (["id", "Message", "TARGET"], {}, {"id": "id", "text": "Message", "label": "TARGET"}),
        (["message", "sentence", "intent"], {}, {"text": "sentence", "message": "message", "label": "intent"}),
        (["Text", "text", "label"], {}, {"text": "text", "Text": "Text", "label": "label"}),
        (["sentence", "sentence2", "label"], {}, {"text": "sentence", "text_pair": "sentence2", "label": "label"}),
        (["a", "b"], {"text": "b", "label": "a"}, {"text": "b", "label": "a"}),
        (["text", "label"], {"text": "label", "label": "text"}, {"text": "label", "label": "text"}),
        (["text", "body", "label"], {"text": "body"}, {"text": "body", "label": "label"}),
        (["text", "body", "label"], {"text": "body", "text_pair": "text"}, None),
    ],
)
def test_columns_get_their_names(columns: list[str], hints: dict[str, str], expected: dict[str, str] | None) -> None:
    assert mapped(columns, hints) == (expected or {"text": "body", "text_pair": "text", "label": "label"})


@pytest.mark.parametrize(
    ("columns", "hints", "message"),
    [
        (
            ["body", "label"],
            {},
            r"a\.csv \(train\): there is no column for text\n.*body, label\n.*text or sentence or mess",
        ),
        (["body", "label"], {}, r"data: \{columns: \{text: body\}\} or --column text=body"),
        (["text"], {}, r"no column for label[\s\S]*add a column label"),
        (
            ["text", "label"],
            {"text": "txt"},
            r'a\.csv \(train\): there is no column "txt".*\n.*text, label\n.*mean "text"',
        ),
        (["text", "label"], {"tekst": "text"}, r'unknown column "tekst", did you mean "text"'),
        (["text", "label"], {"text": "text", "label": "text"}, r'"text" is named twice'),
    ],
)
def test_columns_that_are_not_there(columns: list[str], hints: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mapped(columns, hints)


def test_the_encoding_is_no_part_of_the_place() -> None:
    with pytest.raises(DataError, match=r"^a\.csv \(test\): there is no column for text"):
        map_columns(read([{"b": 1}], "test"), "test", "a.csv, read as cp1252", WANTED, {}, ["text"])


# The package


def test_no_model_library_is_imported() -> None:
    code = "import sys, hybridtune.data.reading.read, hybridtune.data.checking.check, hybridtune.data.split\n"
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_real_data() -> None:
    if not SMS.is_dir():
        pytest.skip(f"the shared data set is not there: {SMS}")
    rows = read(SMS / "train.jsonl", "train")
    expected = [json.loads(line) for line in (SMS / "train.jsonl").read_text("utf-8").split("\n") if line]
    assert without_row(rows) == expected
    assert rows["_row"][:] == list(range(1, 801))
