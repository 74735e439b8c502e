"""Holding out: by label, the same for the same seed, and with no text on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hybridtune.data import split
from hybridtune.data.checking.labels import label_lists
from hybridtune.data.reading.read import read
from hybridtune.data.split import k_folds
from hybridtune.errors import DataError

SMS = Path(__file__).parents[1] / "../shared/data/sms_spam_tiny"


def rows_of(labels: list[Any], texts: list[str] | None = None) -> Dataset:
    unlike = [f"{hashlib.sha1(str(n).encode()).hexdigest()[:16]} {n}" for n in range(len(labels))]
    return Dataset.from_dict({"text": texts or unlike, "label": labels})


def hold_out(rows: Dataset, fraction: float, seed: int, *, multi_label: bool) -> tuple[Dataset, Dataset]:
    """As for a classification."""
    labels = label_lists(rows["label"][:], multi_label)
    texts = [name for name in ("text", "text_pair") if name in rows.column_names]
    strata = [next(iter(of_row), None) for of_row in labels]
    return split.hold_out(rows, fraction, seed, texts=texts, strata=strata, keep=labels)


def test_every_row_is_on_one_side_in_its_order() -> None:
    rows = rows_of(["a", "b", "c"] * 20)
    kept, held = hold_out(rows, 0.25, 3, multi_label=False)
    assert len(held) == 15
    assert sorted(kept["text"][:] + held["text"][:]) == sorted(rows["text"])
    for side in (kept, held):
        numbers = [int(text.split()[1]) for text in side["text"]]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.33, 0.5])
@pytest.mark.parametrize("sizes", [{"a": 700, "b": 100}, {"a": 50, "b": 30, "c": 20}, {0: 11, 1: 13, 2: 17}])
def test_classes_are_held_out_in_proportion(fraction: float, sizes: dict[Any, int]) -> None:
    rows = rows_of([label for label, size in sizes.items() for _ in range(size)])
    _, held = hold_out(rows, fraction, 0, multi_label=False)
    counts = Counter(held["label"])
    assert len(held) == round(fraction * len(rows))
    assert all(abs(counts[label] - fraction * size) < 1 for label, size in sizes.items())


def test_almost_equal_texts_are_on_one_side() -> None:
    chance = np.random.default_rng(0)
    texts = ["".join(chance.choice(list("abcdefghijklmnopqrst "), 40)) for _ in range(60)]
    rows = rows_of(["a", "b"] * 60, [text + end for text in texts for end in ("", "!!")])
    _, held = hold_out(rows, 0.25, 0, multi_label=False)
    assert len(held) == 30
    assert {text.removesuffix("!!") for text in held["text"]} == {t for t in held["text"] if not t.endswith("!!")}


def test_rows_of_one_template_do_not_all_stick_together() -> None:
    rows = rows_of(["a", "b"] * 100, [f"please put song number {n} on my list of songs" for n in range(200)])
    assert len(hold_out(rows, 0.2, 0, multi_label=False)[1]) == 40


def test_the_seed_decides() -> None:
    rows = rows_of(["a", "b"] * 50)
    first, again, other = (hold_out(rows, 0.2, seed, multi_label=False)[1]["text"][:] for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_stay_together(seed: int) -> None:
    texts = [f"Text {n // 3}" if n % 2 else f"  text\u00a0{n // 3} " for n in range(90)]
    kept, held = hold_out(rows_of(["ab"[n // 3 % 2] for n in range(90)], texts), 0.3, seed, multi_label=False)
    plain = [{" ".join(text.split()).casefold() for text in side["text"]} for side in (kept, held)]
    assert not plain[0] & plain[1]
    assert abs(len(held) - 27) <= 4


def test_pairs_count_as_one_text() -> None:
    pairs = {"text": ["same"] * 20, "text_pair": [f"p {n}" for n in range(20)], "label": [0, 1] * 10}
    assert len(hold_out(Dataset.from_dict(pairs), 0.2, 0, multi_label=False)[1]) == 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_every_class_keeps_a_row(seed: int, fraction: float) -> None:
    labels = ["big"] * 30 + ["two"] * 2 + ["one"] + [f"pair {n // 2}" for n in range(20)]
    texts = [f"text {n}" for n in range(len(labels))]
    texts[0] = texts[30]  # a text of "two" that "big" has too
    kept, held = hold_out(rows_of(labels, texts), fraction, seed, multi_label=False)
    assert set(kept["label"]) == set(labels)
    assert len(held) > 0


@pytest.mark.parametrize("seed", range(8))
def test_a_class_that_only_shares_texts_keeps_a_row(seed: int) -> None:
    rows = rows_of(["big"] * 20 + ["shy"] * 2, [f"text {n}" for n in range(20)] + ["text 3", "text 4"])
    kept, _ = hold_out(rows, 0.9, seed, multi_label=False)
    assert "shy" in kept["label"][:]


def test_single_rows_stay_and_do_not_use_up_the_rounding() -> None:
    _, held = hold_out(rows_of(["big"] * 40 + [f"one {n}" for n in range(10)]), 0.2, 0, multi_label=False)
    assert Counter(held["label"]) == {"big": 9}  # a fifth of 40, and one of the two that make a fifth of 50


def test_several_labels_go_by_the_first() -> None:
    rows = rows_of([["a", "x"], ["b"], [], ["b", "y"]] * 15)
    kept, held = hold_out(rows, 0.2, 1, multi_label=True)
    assert Counter(next(iter(labels), None) for labels in held["label"]) == {"a": 3, "b": 6, None: 3}
    assert {label for labels in kept["label"] for label in labels} == {"a", "b", "x", "y"}
    texts = rows_of(["a|x", "b", "", "b|y"] * 15)
    assert hold_out(texts, 0.2, 1, multi_label=True)[1]["text"][:] == held["text"][:]


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        (
            rows_of(["a", "b"] * 4),
            0.5,
            r"too few rows to hold out a part \(0\.5\)[^\n]*\n.*8 rows[\s\S]*validation file",
        ),
        (rows_of(["a", "b"] * 6), 0.01, "too few rows"),
        (rows_of([str(n) for n in range(12)]), 0.5, "too few rows"),
        (rows_of(["a", "b"] * 6, ["same"] * 12), 0.5, "too few rows"),
        (rows_of(["a", "b"] * 6), 0.0, "not a fraction"),
        (rows_of(["a", "b"] * 6), 1.0, "not a fraction"),
    ],
)
def test_what_cannot_be_held_out(rows: Dataset, fraction: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hold_out(rows, fraction, 0, multi_label=False)


def test_without_strata_and_with_lists_of_words() -> None:
    tokens = [["Word", str(n // 2)] for n in range(60)]
    kept, held = split.hold_out(Dataset.from_dict({"tokens": tokens}), 0.2, 0, texts=["tokens"], strata=None)
    assert len(held) == 12
    assert not {tuple(row) for row in kept["tokens"]} & {tuple(row) for row in held["tokens"]}


def test_strata_need_not_be_a_column() -> None:
    rows = rows_of(["a"] * 100)
    bins = [n // 50 for n in range(100)]
    held = split.hold_out(rows, 0.1, 3, texts=["text"], strata=bins)[1]
    assert Counter(int(text.split()[1]) // 50 for text in held["text"]) == {0: 5, 1: 5}


@pytest.mark.parametrize("k", [2, 3, 5])
def test_each_row_is_held_out_once(k: int) -> None:
    labels = ["a"] * 31 + ["b"] * 17 + ["c"] * 2
    rows = rows_of(labels)
    folds = k_folds(rows, k, 0, texts=["text"], strata=labels)
    assert sorted(text for _, held in folds for text in held["text"]) == sorted(rows["text"])
    sizes = [len(held) for _, held in folds]
    assert max(sizes) - min(sizes) <= 1
    for label in "abc":
        shares = [held["label"][:].count(label) for _, held in folds]
        assert max(shares) - min(shares) <= 1
    for kept, held in folds:
        assert sorted(kept["text"][:] + held["text"][:]) == sorted(rows["text"])
        numbers = [int(text.split()[1]) for text in held["text"]]
        assert numbers == sorted(numbers)


def test_folds_keep_equal_texts_together_and_the_seed_decides() -> None:
    rows = rows_of(["a", "b"] * 30, [f"Text {n // 4}" if n % 2 else f" text  {n // 4}" for n in range(60)])
    folds = k_folds(rows, 4, 1, texts=["text"], strata=None)
    for kept, held in folds:
        assert not {text.split()[1] for text in kept["text"]} & {text.split()[1] for text in held["text"]}
    assert [held["text"][:] for _, held in folds] == [
        held["text"][:] for _, held in k_folds(rows, 4, 1, texts=["text"], strata=None)
    ]
    assert folds[0][1]["text"][:] != k_folds(rows, 4, 2, texts=["text"], strata=None)[0][1]["text"][:]


def test_too_many_folds() -> None:
    rows = rows_of(["a", "b"] * 6, ["same"] * 11 + ["other"])
    with pytest.raises(DataError, match=r"too few rows for 3 folds\n.*2 different texts"):
        k_folds(rows, 3, 0, texts=["text"], strata=None)
    with pytest.raises(DataError, match="number of folds is too small"):
        k_folds(rows, 1, 0, texts=["text"], strata=None)


def test_real_data() -> None:
    if not SMS.is_dir():
        pytest.skip(f"the shared data set is not there: {SMS}")
    kept, held = hold_out(read(SMS / "train.jsonl", "train"), 0.1, 0, multi_label=False)
    assert Counter(held["label"]) == {"ham": 70, "spam": 10}
    assert Counter(kept["label"]) == {"ham": 630, "spam": 90}
    assert sorted(kept["_row"][:] + held["_row"][:]) == list(range(1, 801))
