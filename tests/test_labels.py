"""Labels: their names, their types, and which of them are meant to be the same."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.check import label_names, label_table, split_labels
from hybridtune.data.checking.labels import typos, variant_key, variants


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Spam", "spam", True),
        ("new york", "new_York", True),
        ("non-spam", "nonspam", True),
        ("top 10", "top-10", True),
        ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"), True),
        ("-1", "1", False),
        ("A-", "A", False),
        ("--", "-", False),
        ("1-2", "12", False),
        ("+", "-", False),
        ("C++", "C", False),
    ],
)
def test_what_is_a_way_of_writing(one: str, other: str, same: bool) -> None:
    assert (variant_key(one) == variant_key(other)) is same


def test_of_equally_frequent_ways_of_writing_the_first_stays() -> None:
    assert variants(Counter({"Yes": 2, "yes": 2, "no": 1, 3: 9})) == {"yes": "Yes"}


@pytest.mark.parametrize(
    ("rare", "count", "frequent", "total", "renamed"),
    [
        ("positve", 3, "positive", 60, True),
        ("positve", 3, "positive", 59, False),  # more than 5 %
        ("positve", 4, "positive", 1000, False),  # more than 3 rows
        ("postve", 1, "positive", 50, True),  # two edits
        ("pstve", 1, "positive", 50, False),  # three
        ("spma", 1, "spam", 1000, False),  # too short
        ("topic 12", 1, "topic 13", 1000, False),  # only digits differ
        ("unlikely", 2, "likely", 1000, False),  # begins otherwise: a word of its own
        ("export", 2, "import", 1000, False),
    ],
)
def test_what_is_a_misspelling(rare: str, count: int, frequent: str, total: int, renamed: bool) -> None:
    assert typos(Counter({frequent: total, rare: count})) == ({rare: frequent} if renamed else {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a|b", ["a", "b"]),
        ("a; b ;c", ["a", "b", "c"]),
        ("a, b,a", ["a", "b"]),
        ("red, green|blue", ["red, green", "blue"]),
        ("a", ["a"]),
        ("", []),
        (None, []),
        ([], []),
        (["a", None, " a "], ["a"]),
        (["a, b"], ["a, b"]),
        ([3, 1], [3, 1]),
        (4, [4]),
        ([1.0, 2.0], [1, 2]),
        ("['a', 'b c']", ["a", "b c"]),
        ('["a, x"]', ["a, x"]),
        ("['a' 'b, c']", ["a", "b, c"]),  # as pandas writes arrays
        ("[]", []),
        ("[unclosed, x", ["[unclosed", "x"]),
        ("[[1]]", ["[[1]]"]),
    ],
)
def test_split_labels(value: Any, expected: list[Any]) -> None:
    assert split_labels(value) == expected


@pytest.mark.parametrize(
    ("labels", "multi_label", "expected"),
    [
        ([10, 9, 10, 2], False, [2, 9, 10]),
        (["10", "9", "b", "a", None], False, ["10", "9", "a", "b"]),
        ([True, False], False, [False, True]),
        ([[3], [1, 2], []], True, [1, 2, 3]),
        (["b|a", "c"], True, ["a", "b", "c"]),
        ([2.0, 1.0, float("nan")], False, [1, 2]),
        (["b, a", "c"], False, ["b, a", "c"]),
    ],
)
def test_label_names(labels: list[Any], multi_label: bool, expected: list[Any]) -> None:
    names = label_names(Dataset.from_dict({"label": labels}), multi_label)
    assert names == expected
    assert [type(name) for name in names] == [type(name) for name in expected]


def test_label_table() -> None:
    splits = {"train": Dataset.from_dict({"label": list("aabab")}), "test": Dataset.from_dict({"label": list("bbbb")})}
    assert label_table(splits, ["a", "b"], False) == [
        {"label": "a", "train": 3, "validation": 0, "test": 0},
        {"label": "b", "train": 2, "validation": 0, "test": 4},
    ]
