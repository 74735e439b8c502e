"""Comparing two runs: what is said follows from the statistics, on many rows and on few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from hybridtune.checkpoint import Base
from hybridtune.comparison import compare

TASK = {"name": "classification", "labels": ["ham", "spam"]}


def run(folder: Path, gold: list[int], predicted: list[int]) -> Path:
    """The files of a run that are compared."""
    (folder / "model").mkdir(parents=True)
    base = Base("base", None, "", "AutoModelForSequenceClassification", {})
    about = {"kind": "checkpoint", "task": TASK, "base": vars(base), "max_length": 64, "sha256": {}}
    (folder / "model" / "hybridtune.json").write_text(json.dumps(about))
    (folder / "data.json").write_text(json.dumps({"splits": {"test": {"fingerprint": "same"}}}))
    lines = [
        {"row": row, "gold": right, "label": said, "stats": {"gold": right, "predicted": said}}
        for row, (right, said) in enumerate(zip(gold, predicted, strict=True))
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compared(folder: Path, gold: list[int], a: list[int], b: list[int]) -> dict[str, Any]:
    return compare(run(folder / "a", gold, a), run(folder / "b", gold, b))


def wrong(gold: list[int], *rows: int) -> list[int]:
    return [1 - label if row in rows else label for row, label in enumerate(gold)]


def test_few_rows_decide_nothing_that_mcnemar_does_not_see(tmp_path: Path) -> None:
    gold = [0, 1] * 4
    told = compared(tmp_path, gold, wrong(gold, 0, 1, 2, 3), gold)  # four rows better of eight
    assert told["mcnemar_p"] == pytest.approx(scipy.stats.binomtest(4, 4).pvalue) == 0.125
    assert told["metrics"]["macro_f1"]["difference"]["low"] > 0
    assert not any("better" in reason for reason in told["reasons"])
    assert "not decided" in told["reasons"][-1]


@pytest.mark.parametrize("second", [True, False])
def test_what_both_see_is_said(tmp_path: Path, second: bool) -> None:
    gold = [0, 1] * 100
    good, bad = gold, wrong(gold, *range(20))
    told = compared(tmp_path, gold, *((bad, good) if second else (good, bad)))
    which = "second" if second else "first"
    assert told["mcnemar_p"] < 0.001
    assert told["reasons"][1] == f"accuracy: the {which} is better, McNemar's p is below 0.05"
    assert f"macro_f1: the {which} is better, the interval leaves zero out" in told["reasons"]


def test_an_even_exchange_is_no_difference(tmp_path: Path) -> None:
    gold = [0, 1] * 100
    told = compared(tmp_path, gold, wrong(gold, 0, 1, 2, 3), wrong(gold, 4, 5, 6, 7))
    assert told["mcnemar_p"] == 1
    assert told["reasons"][1:] == ["no metric differs by more than chance could explain"]
