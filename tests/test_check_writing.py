"""The checks of translations and summaries: faults that were planted are found, and sound rows are left alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.check import Finding, check_summarization, check_translation
from hybridtune.errors import DataError

ENGLISH = """the old bridge was closed for repairs after the heavy storm of last week . people of both towns have to
take another road until it is opened again in spring and many of them are not happy about that"""
GERMAN = """die alte brücke wurde nach dem schweren sturm der letzten woche für reparaturen gesperrt . menschen aus
beiden orten müssen bis zum frühling eine andere strasse nehmen und viele von ihnen sind darüber nicht froh"""


def rows(count: int, seed: int = 0, **names: str) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    english, german = ENGLISH.split(), GERMAN.split()
    a, b = names.get("text", "source"), names.get("target", "target")
    made = []
    for _ in range(count):
        size = chance.randint(8, 16)
        made.append({a: " ".join(chance.choices(english, k=size)), b: " ".join(chance.choices(german, k=size))})
    return made


def checked(train: list[dict[str, Any]], check: Any = check_translation, **more: Any) -> tuple[Any, dict[str, Finding]]:
    others = {name: more.pop(name) for name in ("validation", "test") if name in more}
    splits = {
        name: Dataset.from_list([{**row, "_row": number} for number, row in enumerate(of, 2)])
        for name, of in {"train": train, **others}.items()
    }
    made, found = check(splits, sources={name: f"{name}.csv" for name in splits}, **more)
    return made, {f"{one.kind} {one.split}": one for one in found}


def test_sound_rows_are_left_as_they_are() -> None:
    train, test = rows(60), rows(20, 1)
    made, found = checked(train, test=test, languages=("en", "de"))
    assert found == {}
    assert made["train"].remove_columns("_row").to_list() == train
    assert made["test"].remove_columns("_row").to_list() == test


def test_what_every_check_does_is_done() -> None:
    train = rows(60)
    train[3]["target"] = None
    train[4]["target"] = "  "
    train[5]["source"] = ""
    train[7] = dict(train[6])
    train[8] = {**train[9], "target": train[10]["target"]}
    test = [*rows(10, 1), {"source": train[20]["source"].upper(), "target": rows(1, 5)[0]["target"]}]
    made, found = checked(train, test=test)
    assert {key: one.count for key, one in found.items()} == {
        "missing_label train": 2,
        "empty_text train": 1,
        "duplicate train": 1,
        "conflict train": 2,
        "leak train": 1,
    }
    assert len(made["train"]) == 60 - 2 - 1 - 1 - 1
    assert len(made["test"]) == 11
    assert found["duplicate train"].examples[0]["row"] == 9
    assert found["duplicate train"].examples[0]["target"] == train[6]["target"]
    assert found["conflict train"].did.startswith("kept: the same text stands there with other target")


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match=r"test\.csv:12: the row has no target"):
        checked(rows(30), test=[*rows(10, 1), {"source": "a", "target": None}])
    with pytest.raises(DataError, match="no rows of train are left"):
        checked([{"source": "a b", "target": ""}] * 3)
    with pytest.raises(DataError, match="target is not a text"):
        checked([{"source": "a b", "target": ["a", "b"]}] * 3)


def test_copies_and_odd_lengths_are_counted_and_kept() -> None:
    train = rows(200)
    for at in (5, 6, 7):
        train[at]["target"] = train[at]["source"].upper()
    train[11]["target"] = " ".join(train[11]["target"].split() * 9)
    train[12]["target"] = "ja"
    made, found = checked(train)
    assert len(made["train"]) == 200
    assert [one["row"] for one in found["copied_target train"].examples] == [7, 8, 9]
    assert found["copied_target train"].level == "warning"
    assert [one["row"] for one in found["length_ratio train"].examples] == [13, 14]
    assert found["length_ratio train"].level == "info"


@pytest.mark.parametrize(
    ("turned", "languages", "said"),
    [
        (60, ("en", "de"), "the other way round than was said"),
        (15, (None, None), "some rows may be the other way round"),
        (0, ("en", "de"), None),
    ],
)
def test_languages_in_the_wrong_order_are_suspected(turned: int, languages: Any, said: str | None) -> None:
    train = rows(60)
    train[:turned] = [{"source": row["target"], "target": row["source"]} for row in train[:turned]]
    found = checked(train, languages=languages)[1].get("language_order train")
    assert (found is None) == (said is None)
    if said and found:
        assert said in found.did
        assert found.level == "warning"


def test_one_language_on_both_sides_is_suspected() -> None:
    train = rows(60)
    for row, other in zip(train, rows(60, 7), strict=True):
        row["target"] = other["source"]
    assert "both seem to be in en" in checked(train)[1]["language_order train"].did


def test_summaries() -> None:
    train = rows(300, text="document", target="summary")
    for row in train:
        row["summary"] = " ".join(row["document"].split()[:3])
    train[2]["summary"] = train[2]["document"] + " and more"
    train[3]["summary"] = train[3]["document"]
    train[4]["summary"] = None
    made, found = checked(train, check_summarization)
    assert {key: (one.count, one.level) for key, one in found.items()} == {
        "missing_label train": (1, "warning"),
        "copied_target train": (1, "info"),
        "long_summary train": (1, "info"),
    }
    assert len(made["train"]) == 299
    assert found["long_summary train"].examples[0]["summary"].endswith("and more")


def test_numbers_become_texts() -> None:
    made, _ = checked([{"source": 1, "target": 2}, {"source": 3, "target": 4}, {"source": 5, "target": 6}])
    assert made["train"]["source"][:] == ["1", "3", "5"]
    assert made["train"]["target"][:] == ["2", "4", "6"]
