"""The check of a regression: each fault planted by hand, with what is found, done and said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.check import Finding, check_regression
from hybridtune.errors import DataError

SOURCES = {"train": "train.csv", "validation": "dev.jsonl, read as cp1252", "test": "datasets.Dataset"}

Row = tuple[str | None, Any]


def check(
    train: list[Row], validation: list[Row] | None = None, test: list[Row] | None = None
) -> tuple[dict[str, Dataset], dict[tuple[str, str], Finding]]:
    """Checks (text, label) rows whose `_row` begins with 2, as in a CSV file."""
    splits = {}
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if rows:
            texts, labels = ([row[at] for row in rows] for at in (0, 1))
            splits[name] = Dataset.from_dict({"text": texts, "label": labels, "_row": range(2, len(rows) + 2)})
    before = str({name: split.to_list() for name, split in splits.items()})  # as text, as NaN does not equal itself
    repaired, found = check_regression(splits, sources=SOURCES)
    assert str({name: split.to_list() for name, split in splits.items()}) == before
    json.dumps([item.as_dict() for item in found], allow_nan=False)
    by_kind = {(item.kind, item.split): item for item in found}
    assert len(by_kind) == len(found)
    return repaired, by_kind


CLEAN: list[Row] = [(f"text {n}", n / 7) for n in range(20)]
AS_TEXT: list[Row] = [(f"text {n}", f"{n}.5") for n in range(20)]


def test_clean_data_come_back_as_they_were() -> None:
    repaired, found = check(CLEAN, [("a", 1.5)], [("b", 2.5)])
    assert found == {}
    assert repaired["train"]["label"][:] == [n / 7 for n in range(20)]
    assert repaired["test"].to_list() == [{"text": "b", "label": 2.5, "_row": 2}]


def test_missing_numbers() -> None:
    repaired, found = check([("a", None), *CLEAN, ("b", float("nan"))])
    item = found["missing_label", "train"]
    assert (item.count, item.did, [example["row"] for example in item.examples]) == (2, "dropped", [2, 23])
    assert len(repaired["train"]) == 20
    repaired, found = check([*AS_TEXT, ("x", " N/A "), ("y", ""), ("z", "null")])
    assert found["missing_label", "train"].count == 3
    assert repaired["train"]["label"][:2] == [0.5, 1.5]
    with pytest.raises(DataError, match=r"^dev\.jsonl:3: the row has no label\n.*1 of 2 rows of validation"):
        check(AS_TEXT, [("x", "1.0"), ("y", "n/a")])


def test_what_is_no_number() -> None:
    repaired, found = check([*AS_TEXT, ("x", "good"), ("y", "inf"), ("z", "1_000"), ("w", "1.234,5")])
    item = found["no_number", "train"]
    assert (item.count, item.level, item.did) == (4, "warning", "dropped")
    assert item.examples[0] == {"row": 22, "text": "x", "label": "good"}
    assert len(repaired["train"]) == 20
    assert check([*CLEAN, ("x", float("-inf"))])[1]["no_number", "train"].count == 1
    with pytest.raises(
        DataError, match=r"^datasets\.Dataset, row 2: the label is not a number\n.*good; 1 of 1 rows of test"
    ):
        check(AS_TEXT, test=[("x", "good")])
    with pytest.raises(DataError, match=r"^train\.csv:2: the label is not a number[\s\S]*task: classification"):
        check([(f"text {n}", "ham" if n % 3 else "7") for n in range(1, 20)])


def test_texts_become_numbers() -> None:
    repaired, found = check(AS_TEXT, [("v", "\u22123")])
    assert not [finding for (kind, _), finding in found.items() if kind == "label_type"]  # as all of a CSV file are
    assert repaired["train"]["label"][:3] == [0.5, 1.5, 2.5]
    assert repaired["validation"]["label"][:] == [-3.0]


def test_a_decimal_comma() -> None:
    repaired, found = check([(f"text {n}", f"{n},{n}5") for n in range(20)], [("x", "1,234"), ("y", "2")])
    item = found["decimal_comma", "train"]
    assert (item.count, item.level) == (20, "warning")
    assert item.examples[3] == {"row": 5, "text": "text 3", "label": "3,35", "suggestion": 3.35}
    assert found["decimal_comma", "validation"].count == 1
    assert repaired["validation"]["label"][:] == [1.234, 2.0]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["1,5", "2.5"], r"train\.csv:2: 1,5, and train\.csv:3: 2\.5"),
        (["12", "1,234"], r"train\.csv:3: 1,234\n"),  # a thousand or more than one
    ],
)
def test_a_comma_that_may_mean_two_things(labels: list[str], told: str) -> None:
    with pytest.raises(DataError, match=rf"^train\.csv:[23]: the comma in a number may be[^\n]*\n.*{told}"):
        check([(f"text {n}", label) for n, label in enumerate(labels)])


def test_lists_of_numbers() -> None:
    train: list[Row] = [(f"text {n}", [n, n / 2]) for n in range(20)]
    repaired, found = check([*train, ("x", [1, None]), ("y", [])], [("v", [1, 2])])
    assert found["missing_label", "train"].count == 2
    assert repaired["train"]["label"][:3] == [[0, 0], [1, 0.5], [2, 1]]
    assert repaired["validation"]["label"][:] == [[1.0, 2.0]]
    written, found = check([(f"text {n}", f"[{n}, 0.5]") for n in range(9)])
    assert written["train"]["label"][4] == [4, 0.5]
    assert found["constant_target", "train"].did.startswith("kept, but there is nothing to learn: number 2 of")
    one, _ = check([(f"text {n}", [n]) for n in range(9)])
    assert one["train"]["label"][:3] == [0, 1, 2]


@pytest.mark.parametrize(("split", "place"), [("train", r"train\.csv:22"), ("test", r"datasets\.Dataset, row 2")])
def test_lists_of_different_lengths(split: str, place: str) -> None:
    train: list[Row] = [(f"text {n}", [n, n / 2]) for n in range(20)]
    odd: list[Row] = [("x", [1, 2, 3])]
    with pytest.raises(DataError, match=rf"^{place}: the label has 3 numbers, that of most rows of train 2\n"):
        check(train + odd) if split == "train" else check(train, test=odd)


def test_one_number_only() -> None:
    with pytest.raises(DataError, match=r"^train\.csv: train has one number only\n.*3\.0 on all 9 rows"):
        check([(f"text {n}", 3) for n in range(9)])
    with pytest.raises(DataError, match=r"one number only[\s\S]*other numbers also stand in validation"):
        check([*((f"text {n}", 3) for n in range(9)), ("x", 4)], [("x", 4)])


def test_numbers_far_from_the_others() -> None:
    train: list[Row] = [(f"text {n}", n / 10) for n in range(101)]  # quartiles 2.5 and 7.5 without the code
    repaired, found = check([*train, ("x", 999), ("y", 22)], [("v", 1), ("w", -50)])
    item = found["outlier", "train"]
    assert (item.count, item.level) == (1, "warning")
    assert item.examples == [{"row": 103, "text": "x", "label": 999.0}]
    assert found["outlier", "validation"].examples == [{"row": 3, "text": "w", "label": -50.0}]
    assert len(repaired["train"]) == 103


def test_a_few_whole_numbers_may_be_classes() -> None:
    _, found = check([(f"text {n}", n % 5) for n in range(40)])
    assert (found["few_values", "train"].count, found["few_values", "train"].level) == (5, "info")
    assert "only 0, 1, 2, 3, 4; if" in found["few_values", "train"].did
    assert ("few_values", "train") not in check([(f"text {n}", n % 5 / 2) for n in range(40)])[1]
    assert ("few_values", "train") not in check([(f"text {n}", n % 11) for n in range(40)])[1]


def test_texts_that_stand_there_twice() -> None:
    train: list[Row] = [*CLEAN, ("TEXT  3", 3 / 7), ("text 4", 1.0), ("text 4", 2.0), ("", 7.0)]
    validation: list[Row] = [("Text 0", 0.0), ("shared", 1.0), ("own", 1.0)]
    repaired, found = check(train, validation, [("shared", 5.0), ("text 1", 9.9)])
    assert found["empty_text", "train"].count == 1
    assert found["duplicate", "train"].examples == [{"row": 22, "text": "TEXT  3", "label": 3 / 7, "other_row": 5}]
    conflict = found["conflict", "train"]
    assert conflict.count == 3
    assert conflict.did.endswith("with another label; they differ by 1.429 on average, by 1.429 at most")  # 2 - 4 / 7
    assert conflict.examples[0]["other_row"] == 6 and conflict.examples[0]["other_label"] == 4 / 7
    assert found["leak", "train"].did == "dropped: also in test (1) and validation (1)"
    assert found["leak", "validation"].count == 1
    assert repaired["validation"]["text"][:] == ["Text 0", "own"]
    assert len(repaired["test"]) == 2


def test_a_second_check_finds_nothing_to_repair() -> None:
    repaired, _ = check([*AS_TEXT, ("x", "good"), ("", "3"), ("text 3", "3.5")], [("text 1", "1,5"[:1])])
    again, found = check_regression(repaired, sources=SOURCES)
    assert found == []
    assert {name: split.to_list() for name, split in again.items()} == {n: s.to_list() for n, s in repaired.items()}


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"^train\.csv: there is no column label\n.*text, score"):
        check_regression({"train": Dataset.from_dict({"text": ["a"], "score": [1]})}, sources=SOURCES)
    with pytest.raises(DataError, match="there is no train split"):
        check_regression({}, sources={})


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        ("1,234.5", "1234.5"),
        ("1.234.567", "1234567"),
        ("1 234", "1234"),
        ("12'345", "12345"),
        ("12 kg", "12"),
        ("\u20ac 3.50", "3.50"),
        ("3,50 \u20ac", "3.50"),
        ("-3 \u00b0C", "-3"),
        ("5%", "5"),
        ("90 km/h", "90"),
        ("12 of 30", None),
        ("2020-01-02", None),
        ("3/5", None),
        ("abc12", None),
        ("good", None),
    ],
)
def test_marks_and_units_are_named_in_the_mend(label: str, plain: str | None) -> None:
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [label] * 3, "_row": [2, 3, 4]})
    with pytest.raises(DataError, match="the label is not a number") as raised:
        check_regression({"train": rows}, sources={"train": "a.csv"})
    said = f"write the number alone, without marks between thousands or a unit: {plain} for {label}"
    assert raised.value.mend == (
        said if plain else "correct these rows; for labels that are names, task: classification"
    )
