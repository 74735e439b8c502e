"""What the checks refuse, with the file, the row and the mend."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.check import check_classification
from hybridtune.errors import DataError

SOURCES = {"train": "train.csv", "validation": "dev.jsonl, read as cp1252", "test": "datasets.Dataset"}

Row = tuple[Any, Any]


def check(
    train: list[Row], validation: list[Row] | None = None, test: list[Row] | None = None, multi_label: bool = False
) -> dict[str, Dataset]:
    """Checks (text, label) rows whose `_row` begins with 2, as in a CSV file."""
    splits = {}
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if rows:
            texts, labels = ([row[at] for row in rows] for at in (0, 1))
            splits[name] = Dataset.from_dict({"text": texts, "label": labels, "_row": range(2, len(rows) + 2)})
    return check_classification(splits, sources=SOURCES, multi_label=multi_label)[0]


def many(label: Any, count: int) -> list[Row]:
    return [(f"{label} number {number}", label) for number in range(count)]


CLEAN = many("ham", 10) + many("spam", 10)


@pytest.mark.parametrize(("split", "place"), [("validation", r"dev\.jsonl:4"), ("test", r"datasets\.Dataset, row 4")])
def test_rows_without_a_label_are_refused_elsewhere(split: str, place: str) -> None:
    rows: list[Row] = [("a", "ham"), ("b", "ham"), ("c", ""), ("d", None)]
    with pytest.raises(DataError, match=rf"^{place}: the row has no label\n.*2 of 4 rows"):
        check(CLEAN, *([rows] if split == "validation" else [None, rows]))


def test_one_class_only() -> None:
    with pytest.raises(DataError, match=r"^train\.csv: train has one class only\n.*spam on all 5 rows"):
        check(many("spam", 5))
    with pytest.raises(DataError, match=r"one class only[\s\S]*other classes also stand in validation"):
        check([*many("spam", 5), ("x", "ham")], [("x", "ham")])


def test_a_label_that_train_does_not_know() -> None:
    with pytest.raises(
        DataError, match=r'^dev\.jsonl:3: train has no label "spann"\n.*2 rows[\s\S]*did you mean "spam"'
    ):
        check(CLEAN, [("a", "ham"), ("b", "spann"), ("c", "spann")])
    with pytest.raises(DataError, match=r'^datasets\.Dataset, row 2: train has no label "7"[\s\S]*expected: 0, 1'):
        check(many(0, 9) + many(1, 9), test=[("a", 7)])


def test_a_class_that_leaks_away_altogether() -> None:
    with pytest.raises(DataError, match=r'train has no label "rare"[\s\S]*all rows of this class in train also stand'):
        check([*CLEAN, ("x", "rare")], [("x", "rare"), ("y", "ham")])


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ([number / 7 for number in range(200)], "a regression"),
        ([f"{number % 60}.5" for number in range(600)], "a regression"),
        (list(range(60)), "a regression"),
        ([f"summary of text {number}" for number in range(60)], "free text"),
    ],
)
def test_what_is_no_class(labels: list[Any], word: str) -> None:
    with pytest.raises(
        DataError, match=rf"^train\.csv: the label column does not look like classes, but like {word}\n"
    ):
        check([(f"text {at}", label) for at, label in enumerate(labels)])


@pytest.mark.parametrize(
    "labels",
    [
        [f"intent {number % 60}" for number in range(120)],  # many classes, two rows each
        [number % 60 for number in range(120)],
        [number % 10 / 2 for number in range(100)],  # stars, halves too
        [f"only {number}" for number in range(50)],
    ],
)
def test_what_may_be_classes(labels: list[Any]) -> None:
    repaired = check([(f"text {at}", label) for at, label in enumerate(labels)])
    assert len(set(repaired["train"]["label"])) == len(set(labels))


def test_nothing_left() -> None:
    with pytest.raises(
        DataError, match=r"train\.csv: no rows of train are left[^\n]*\n.*missing_label: 2 rows dropped"
    ):
        check([("a", None), ("b", None)])
    with pytest.raises(DataError, match=r"no rows of train are left[^\n]*\n.*empty_text: 1 rows dropped"):
        check([("", "a")])
    with pytest.raises(DataError, match=r"dev\.jsonl: no rows of validation are left[^\n]*\n.*leak: 1 rows"):
        check(CLEAN, [("x", "ham")], [("X", "ham")])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"body": ["a"], "label": ["x"]}, r"train\.csv: there is no column text\n.*body, label"),
        ({"text": ["a"], "topic": ["x"]}, r"train\.csv: there is no column label\n.*text, topic"),
        ({"text": [["a", "b"]], "label": ["x"]}, r"train\.csv:1: text is not a text[\s\S]*join the words"),
        ({"text": [["a"], ["b", "c"]], "label": ["x", "y"]}, r"train\.csv:2: text is not a text[\s\S]*join the words"),
        ({"text": ["a", "b"], "label": [[], ["x"]]}, r"train\.csv:1: the label is a list[\s\S]*multi_label: true"),
        ({"text": ["a"], "label": [{"k": 1}]}, r"train\.csv:1: the label is an object"),
    ],
)
def test_columns_that_cannot_be_used(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_classification({"train": Dataset.from_dict(data)}, sources=SOURCES, multi_label=False)


def test_train_is_needed() -> None:
    with pytest.raises(DataError, match="there is no train split"):
        check_classification(
            {"test": Dataset.from_dict({"text": ["a"], "label": ["b"]})}, sources={}, multi_label=False
        )


@pytest.mark.parametrize(
    ("label", "message"),
    [(["a"], "train has one class only"), ([], "no row of train has a label"), ("", "no row of train")],
)
def test_one_label_or_none_on_every_row(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check([(f"text {number}", label) for number in range(20)], multi_label=True)


def test_objects_in_a_list_of_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"train\.csv:3: the label is an object[\s\S]*or a list of them"):
        check([("a", []), ("b", [{"name": "x"}])], multi_label=True)


def test_vectors_of_zeros_and_ones_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"train\.csv: the labels look like vectors of 0 and 1\n.*train\.csv:2: \[1, 0, 0\]"
    ):
        check([("a", [1, 0, 0]), ("b", [0, 1, 1])], multi_label=True)
