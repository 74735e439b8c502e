"""The checks: what is repaired and what is only reported, each against counts made by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.check import Finding, check_classification, label_names, label_table
from hybridtune.data.reading.read import read

SHARED = Path(__file__).parents[1] / "../shared/data"
SOURCES = {"train": "train.csv", "validation": "dev.jsonl, read as cp1252", "test": "datasets.Dataset"}

Row = tuple[Any, ...]


def rows_of(*rows: Row) -> Dataset:
    """(text, label) or (text, pair, label), with `_row` from 2, as in a CSV file."""
    names = ("text", "label") if len(rows[0]) == 2 else ("text", "text_pair", "label")
    columns = {name: [row[at] for row in rows] for at, name in enumerate(names)}
    return Dataset.from_dict({**columns, "_row": list(range(2, len(rows) + 2))})


def many(label: Any, count: int, word: str = "") -> list[Row]:
    return [(f"{word or label} number {number}", label) for number in range(count)]


def check(
    train: list[Row], validation: list[Row] | None = None, test: list[Row] | None = None, multi_label: bool = False
) -> tuple[dict[str, Dataset], dict[tuple[str, str], Finding]]:
    given = {"train": train, "validation": validation, "test": test}
    splits = {name: rows_of(*rows) for name, rows in given.items() if rows}
    before = {name: split.to_list() for name, split in splits.items()}
    repaired, found = check_classification(splits, sources=SOURCES, multi_label=multi_label)
    assert {name: split.to_list() for name, split in splits.items()} == before  # inputs stay as they were
    json.dumps([item.as_dict() for item in found])
    assert all(len(item.examples) <= 5 and item.level in ("info", "warning") for item in found)
    by_kind = {(item.kind, item.split): item for item in found}
    assert len(by_kind) == len(found)
    return repaired, by_kind


CLEAN = many("ham", 10) + many("spam", 10)


def test_clean_data_come_back_as_they_were() -> None:
    repaired, found = check(CLEAN, many("ham", 3, "x") + many("spam", 3, "y"))
    assert found == {}
    assert repaired["train"].to_list() == rows_of(*CLEAN).to_list()
    assert repaired["validation"]["label"][:] == ["ham"] * 3 + ["spam"] * 3


# Missing and empty


def test_rows_without_a_label_are_dropped_from_train() -> None:
    repaired, found = check([("a", None), *CLEAN, ("b", ""), ("c" * 500, "  ")])
    item = found["missing_label", "train"]
    assert (item.count, item.level, item.did) == (3, "warning", "dropped")
    assert [(example["row"], example["text"]) for example in item.examples] == [(2, "a"), (23, "b"), (24, "c" * 160)]
    assert repaired["train"]["_row"][:] == list(range(3, 23))


def test_empty_texts() -> None:
    repaired, found = check(
        [("", "ham"), *CLEAN, (" \n\t", "spam"), (None, "spam")], [("", "ham"), (None, "spam"), ("x", "ham")]
    )
    assert found["empty_text", "train"].count == 3
    assert found["empty_text", "validation"].count == 2
    assert "kept" in found["empty_text", "validation"].did
    assert len(repaired["train"]) == 20
    assert repaired["validation"]["text"][:] == ["", "", "x"]


def test_empty_texts_are_no_leak_and_a_pair_says_something() -> None:
    train = [(f"a {n}", f"b {n}", str(n % 2)) for n in range(20)] + [("", "pair only", "1"), ("", "", "1")]
    repaired, found = check(train, [("", "", "1")], [("", "", "0")])
    assert found["empty_text", "train"].count == 1
    assert ("leak", "validation") not in found
    assert len(repaired["train"]) == 21


def test_numbers_become_text() -> None:
    repaired, _ = check([(number, "ab"[number % 2]) for number in range(20)])
    assert repaired["train"]["text"][:3] == ["0", "1", "2"]


# Names of labels


def test_ways_of_writing_a_label_become_the_frequent_one() -> None:
    train = many("card arrival", 9) + many("other", 9) + [("x", "Card_Arrival"), ("y", "card-arrival"), ("z", " other")]
    repaired, found = check(train, [("q", "CARD ARRIVAL"), ("r", "Other")])
    item = found["label_variant", "train"]
    assert (item.count, item.level) == (3, "info")
    assert item.examples[0] == {"row": 20, "text": "x", "label": "Card_Arrival", "suggestion": "card arrival"}
    assert Counter(repaired["train"]["label"]) == {"card arrival": 11, "other": 10}
    assert found["label_variant", "validation"].count == 2
    assert repaired["validation"]["label"][:] == ["card arrival", "other"]


def test_a_misspelt_label_is_renamed() -> None:
    train = many("positive", 150) + many("negative", 150) + [("x", "positve"), ("y", "negatvie"), ("z", "negatvie")]
    repaired, found = check(train, [("q", "positve"), ("r", "negative")])
    item = found["label_typo", "train"]
    assert (item.count, item.level) == (3, "warning")
    assert item.did == "renamed positve -> positive (1), negatvie -> negative (2)"
    assert item.examples[0] == {"row": 302, "text": "x", "label": "positve", "suggestion": "positive"}
    assert Counter(repaired["train"]["label"]) == {"positive": 151, "negative": 152}
    assert repaired["validation"]["label"][:] == ["positive", "negative"]
    assert found["label_typo", "validation"].count == 1


def test_a_label_that_may_be_misspelt_is_kept_and_named() -> None:
    train = many("refund", 19) + many("order", 19) + [("x", "refnd")]
    repaired, found = check(train)
    item = found["doubtful_label", "train"]
    assert (item.count, item.level) == (1, "warning")
    assert item.did == "kept, but perhaps misspelt: refnd (1) for refund (19)"
    assert item.examples == [{"row": 40, "text": "x", "label": "refnd", "suggestion": "refund"}]
    assert Counter(repaired["train"]["label"]) == {"refund": 19, "order": 19, "refnd": 1}
    assert ("doubtful_label", "train") not in check(many("refund", 11) + many("refnd", 3))[1]  # more than a quarter


def test_the_separator_of_train_is_that_of_all_splits() -> None:
    train = [(f"a {n}", "red, green|blue") for n in range(10)] + [(f"b {n}", "blue") for n in range(10)]
    repaired, _ = check(train, [("x", "red, green")], multi_label=True)
    assert repaired["validation"]["label"][:] == [["red, green"]]


def test_labels_of_two_types_become_text() -> None:
    repaired, found = check(many(0, 9) + many(1, 9), [("x", "0"), ("y", "1")])
    assert set(repaired["train"]["label"]) == {"0", "1"}
    assert repaired["validation"]["label"][:] == ["0", "1"]
    assert found["label_type", "train"].count == 18
    assert ("label_type", "validation") not in found


@pytest.mark.parametrize(
    ("labels", "expected"),
    [((0, 1), [0, 1]), ((1.0, 2.0), [1, 2]), ((0.5, 1.5), ["0.5", "1.5"]), ((True, False), [True, False])],
)
def test_types_of_labels(labels: tuple[Any, Any], expected: list[Any]) -> None:
    repaired, _ = check(many(labels[0], 9) + many(labels[1], 9))
    kept = repaired["train"]["label"]
    assert [kept[0], kept[17]] == expected
    assert type(kept[0]) is type(expected[0])


# Rows that stand there twice


def test_repeated_rows_are_dropped_after_the_first() -> None:
    again = [
        ("HAM  number\u00a01", "ham"),
        ("\uff48am number 2", "ham"),
        ("spam number 1 ", "spam"),
        ("spam number 1", "ham"),
    ]
    repaired, found = check([*CLEAN, *again])
    item = found["duplicate", "train"]
    assert (item.count, item.level) == (3, "info")
    assert item.examples[0] == {"row": 22, "text": again[0][0], "label": "ham", "other_row": 3}
    assert repaired["train"]["_row"][:] == [*range(2, 22), 25]
    conflict = found["conflict", "train"]
    assert (conflict.count, conflict.level) == (2, "warning")
    assert conflict.examples == [
        {"row": 25, "text": "spam number 1", "label": "ham", "other_row": 13, "other_label": "spam"}
    ]


def test_repeated_rows_of_a_test_are_kept_and_reported() -> None:
    test = [("x", "ham"), ("y", "spam"), ("X ", "ham"), ("y", "ham"), ("", "ham"), ("", "ham")]
    repaired, found = check(CLEAN, None, test)
    item = found["duplicate", "test"]
    assert (item.count, item.level) == (1, "info")
    assert item.examples == [{"row": 4, "text": "X ", "label": "ham", "other_row": 2}]
    assert "interval" in item.did
    _, found = check(CLEAN, [*test, ("z", "ham"), ("z", "ham")], [("x", "ham"), ("w", "spam")])
    assert found["leak", "validation"].count == 2
    assert found["duplicate", "validation"].count == 1  # of rows that are left
    assert "interval" not in found["duplicate", "validation"].did
    assert len(repaired["test"]) == len(test)
    assert ("duplicate", "train") not in found


def test_a_pair_is_one_text() -> None:
    train = [(f"a {n}", f"b {n}", str(n % 2)) for n in range(20)]
    repaired, found = check(
        [*train, ("a 0", "b 1", "0"), ("A 0", "B 0", "0")], [("a 3", "b 3", "1"), ("a 4", "b 5", "0")]
    )
    assert found["duplicate", "train"].count == 1
    assert found["duplicate", "train"].examples[0]["text_pair"] == "B 0"
    assert found["leak", "train"].examples == [
        {"row": 5, "text": "a 3", "text_pair": "b 3", "label": "1", "other_row": 2, "other_split": "validation"}
    ]
    assert len(repaired["train"]) == 20


def test_leaks_are_taken_out_of_train_and_validation() -> None:
    validation = [("ham number 0", "ham"), ("Shared", "ham"), ("new", "spam")]
    test = [("shared", "ham"), ("SPAM number 3", "spam"), ("ham NUMBER 4", "spam")]
    repaired, found = check(CLEAN + many("ham", 9, "h") + many("spam", 9, "s"), validation, test)
    item = found["leak", "train"]
    assert (item.count, item.level, item.did) == (3, "warning", "dropped: also in test (2) and validation (1)")
    assert [(example["row"], example["other_split"], example["other_row"]) for example in item.examples] == [
        (2, "validation", 2),
        (6, "test", 4),
        (15, "test", 3),
    ]
    assert found["leak", "validation"].count == 1
    assert repaired["validation"]["text"][:] == ["ham number 0", "new"]
    assert repaired["test"].to_list() == rows_of(*test).to_list()
    assert not set(repaired["train"]["text"]) & {"ham number 0", "ham number 4", "spam number 3"}


# Sizes of classes


def test_small_and_unequal_classes() -> None:
    _, found = check(many("a", 80) + many("b", 8) + many("c", 7) + many("d", 20), many("a", 2, "x") + many("d", 2, "y"))
    small = found["small_class", "train"]
    assert (small.count, small.level) == (1, "warning")
    assert small.examples == [{"row": 90, "text": "c number 0", "label": "c", "rows": 7}]
    unequal = found["imbalance", "train"]
    assert (unequal.count, unequal.level) == (1, "warning")  # 80 is ten times 8, and not more
    assert "a has 80 rows, c has 7" in unequal.did
    absent = found["absent_class", "validation"]
    assert (absent.count, absent.level) == (2, "info")
    assert absent.did.endswith("b, c")


def test_a_second_check_finds_nothing_to_repair() -> None:
    train = many("ham", 120) + many("spam", 120) + [("x", "HAM"), ("y", "Spam"), ("x", "ham"), ("", "ham"), ("z", None)]
    repaired, _ = check(train, [("ham number 1", "Ham"), ("v", "spam")])
    again, found = check_classification(repaired, sources=SOURCES, multi_label=False)
    assert found == []
    assert {name: split.to_list() for name, split in again.items()} == {n: s.to_list() for n, s in repaired.items()}


# Several labels


def test_rows_with_several_labels() -> None:
    train = [(f"text {n}", ["a|b", "a", "", "b|c, d"][n % 4]) for n in range(40)]
    repaired, found = check(
        [*train, ("x", "B"), ("no", None), ("text 0", "b|a")], [("y", "c, d|a"), ("z", "")], multi_label=True
    )
    assert repaired["train"]["label"][:4] == [["a", "b"], ["a"], [], ["b", "c, d"]]
    assert repaired["train"]["label"][40:] == [["b"]]
    assert repaired["validation"]["label"][:] == [["c, d", "a"], []]
    assert found["missing_label", "train"].count == 1
    assert found["duplicate", "train"].count == 1
    assert label_names(repaired["train"], True) == ["a", "b", "c, d"]
    assert label_table(repaired, ["a", "b", "c, d"], True) == [
        {"label": "a", "train": 20, "validation": 1, "test": 0},
        {"label": "b", "train": 21, "validation": 0, "test": 0},
        {"label": "c, d", "train": 10, "validation": 1, "test": 0},
    ]


def test_variants_within_a_row_become_one_label() -> None:
    repaired, _ = check([*((f"t {n}", ["a", "b"]) for n in range(9)), ("x", ["A", "a"])], multi_label=True)
    assert repaired["train"]["label"][-1] == ["a"]


def test_two_rare_classes_in_one_row_are_both_shown() -> None:
    _, found = check([*((f"t {n}", ["a", "b"]) for n in range(9)), ("x", ["c", "d"])], multi_label=True)
    assert [example["label"] for example in found["small_class", "train"].examples] == ["d", "c"]


def test_several_labels_may_be_one_label_or_none() -> None:
    repaired, _ = check([(f"t {n}", ["a"] if n % 2 else []) for n in range(20)], multi_label=True)
    assert label_names(repaired["train"], True) == ["a"]


# Tables and lengths


# Real data


REAL = [
    ("sms_spam_tiny", 2, 0, 0),
    ("banking77", 77, 4, 7),
    ("snips", 7, 207, 10),  # 11 rows of train, two of which are one text
    ("thucnews_titles_zh", 10, 7, 8),  # 6 in test and 2 in validation
    ("xlmt_sentiment/fr", 3, 0, 6),
]


@pytest.mark.parametrize(("name", "classes", "repeats", "leaks"), REAL)
def test_real_data(name: str, classes: int, repeats: int, leaks: int) -> None:
    """The README of each set counts its repeats, within train and between splits, by a program of its own."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"the shared data set is not there: {SHARED / name}")
    files = {split: SHARED / name / f"{split}.jsonl" for split in ("train", "validation", "test")}
    splits = {split: read(file, split) for split, file in files.items()}
    repaired, found = check_classification(splits, sources=dict.fromkeys(files, name), multi_label=False)
    counts = Counter({(item.kind, item.split): item.count for item in found})
    assert (counts["duplicate", "train"], counts["leak", "train"]) == (repeats, leaks)
    assert not {"label_variant", "label_typo", "missing_label", "empty_text"} & {item.kind for item in found}
    assert len(repaired["train"]) == len(splits["train"]) - repeats - leaks
    assert len(label_names(repaired["train"], False)) == classes


@pytest.mark.parametrize(("values", "told"), [(range(11), True), (range(10), False), ("abcdefghijklm", False)])
def test_many_labels_that_are_numbers_may_be_a_scale(values: Any, told: bool) -> None:
    labels = [value for value in values for _ in range(9)]
    rows = Dataset.from_dict({"text": [f"text {n}" for n in range(len(labels))], "label": labels})
    _, found = check_classification({"train": rows}, sources=SOURCES, multi_label=False)
    said = [finding for finding in found if finding.kind == "numeric_labels"]
    assert bool(said) == told
    assert all("task: regression" in finding.did and finding.count == 11 for finding in said)
