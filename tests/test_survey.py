"""What is said of the data without changing it: near duplicates, languages, suspects, the learning curve."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import texts
import tiny
from datasets import Dataset

from hybridtune import api, survey
from hybridtune.console import Console
from hybridtune.errors import ModelError
from hybridtune.model import Loaded, token_limit
from hybridtune.tasks import classification, regression

ENGLISH = (
    "The parcel with the blue lamp was left in front of the wrong house yesterday.",
    "I would like to change the address of my order before it is sent out.",
    "Your shop charged my card twice for a single pair of winter boots.",
)
GERMAN = "Ich habe meine Bestellung noch nicht bekommen und möchte wissen, wo sie geblieben ist."


def rows(*of: str) -> Dataset:
    return Dataset.from_list([{"text": text, "label": "a", "_row": number} for number, text in enumerate(of, 1)])


def test_near_duplicates_and_languages() -> None:
    splits = {
        "train": rows(*ENGLISH, ENGLISH[1][:-1] + "!!"),
        "test": rows(GERMAN, ENGLISH[0].replace("blue", "blues")),
    }
    findings, told = survey.of_texts(classification.Task(["a"]), splits)
    assert {(one.kind, one.split, one.count, one.level) for one in findings} == {
        ("near_duplicate", "train", 1, "warning"),
        ("near_duplicate", "train", 1, "info"),
    }
    across = next(one for one in findings if one.level == "warning")
    assert across.examples[0]["row"] == 1
    assert (across.examples[0]["other_split"], across.examples[0]["other_row"]) == ("test", 2)
    assert told["languages"]["train"]["en"] > 0.7
    assert told["languages"]["test"]["de"] == 0.5
    assert told["near_duplicates_looked_at"] == 6


def of_gaussians(wrong: int) -> tuple[survey.Features, set[int]]:
    """Two classes far apart, some of whose labels are flipped."""
    chance = np.random.default_rng(0)
    gold = np.arange(400) % 2
    x = (chance.normal(size=(400, 8)) + 3 * gold[:, None]).astype(np.float32)
    flipped = set(chance.choice(300, wrong, replace=False).tolist())
    labels = [["no", "yes"][label ^ (at in flipped)] for at, label in enumerate(gold.tolist())]
    table = Dataset.from_list([{"text": f"row {n}", "label": label, "_row": n + 1} for n, label in enumerate(labels)])
    return survey.Features(x[:300], x[300:], table.select(range(300)), table.select(range(300, 400))), flipped


def test_flipped_labels_are_suspects() -> None:
    features, flipped = of_gaussians(9)
    findings, curve = survey.of_features(classification.Task(["no", "yes"]), features, 0)
    assert findings[0].count == pytest.approx(9, abs=2)
    for example in findings[0].examples:
        assert example["row"] - 1 in flipped
        assert {example["label"], example["suggestion"]} == {"no", "yes"}
    assert curve.points[-1].rows == 300
    json.dumps([findings[0].as_dict(), curve.as_dict()])


def test_numbers_far_from_what_the_text_says_are_suspects() -> None:
    chance = np.random.default_rng(1)
    x = chance.normal(size=(200, 4)).astype(np.float32)
    values = x @ [1.0, 2.0, 0.0, -1.0] + 0.1 * chance.normal(size=200)
    values[7] += 30
    table = Dataset.from_list([{"text": "t", "label": float(v), "_row": n} for n, v in enumerate(values)])
    features = survey.Features(x[:150], x[150:], table.select(range(150)), table.select(range(150, 200)))
    findings, curve = survey.of_features(regression.Task(), features, 0)
    assert findings[0].examples[0]["row"] == 7
    assert curve.metric == "r2"


def test_a_model_too_large_for_half_a_minute_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(survey.WORK, "cpu", 1e6)
    model = tiny.classifier("bert")
    task, table = classification.Task(["a"]), rows(*ENGLISH)
    loaded = Loaded(model, tiny.tokenizer(), "", ())
    items = {"train": task.encode(table, tiny.tokenizer(), 16), "validation": task.encode(table, tiny.tokenizer(), 16)}
    assert "too large" in str(survey.features(task, loaded, {"train": table, "validation": table}, items, 0))


@pytest.mark.parametrize("on", [True, False])
def test_it_is_said_and_written_unless_it_is_not_wanted(base: Path, on: bool) -> None:
    out = io.StringIO()
    data = {**texts.splits(120, 40, 40), "survey": on}
    told = api.check({"model": str(base), "task": "classification", "data": data}, Console(stream=out))
    assert ("languages" in told) == ("curve" in told) == on
    assert ("enough data?" in out.getvalue()) == on


def test_a_last_text_over_the_edge_of_a_block_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtune.data.doubts.near._BLOCK", 8)
    found, _ = survey.of_texts(
        classification.Task(["a"]), {"train": rows(ENGLISH[0], ENGLISH[0].replace("blue", "blues"))}
    )
    assert [one.count for one in found] == [1]


@pytest.mark.parametrize(("asked", "taken"), [(0, 0), (None, 512)])
def test_a_length_that_holds_no_text_is_refused(asked: int | None, taken: int) -> None:
    with pytest.raises(ModelError, match="hold no text"):
        token_limit(tiny.classifier("bert"), tiny.tokenizer(), asked, taken)


@pytest.mark.parametrize(
    ("train", "test", "warned"),
    [
        ({"en": 0.9, "unsure": 0.1}, {"de": 1.0}, True),
        ({"en": 0.9, "unsure": 0.1}, {"en": 0.4, "de": 0.2, "unsure": 0.4}, False),
        ({"unsure": 1.0}, {"de": 1.0}, False),
        ({"en": 1.0}, {"unsure": 1.0}, False),
    ],
)
def test_another_language_is_told_where_both_are_known(
    train: dict[str, float], test: dict[str, float], warned: bool
) -> None:
    out = io.StringIO()
    survey.say_languages({"train": train, "test": test}, Console(stream=out))
    assert ("test: most texts are" in out.getvalue()) is warned
