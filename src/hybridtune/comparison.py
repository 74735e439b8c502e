"""Compares two runs on the same test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import predict
from .errors import RunError
from .files import read_json, refuse_no_run
from .tasks import Stats, Task
from .tasks.metrics import mcnemar, paired_difference

SIGNIFICANT = 0.05


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Differences of the metrics (b - a) with paired bootstrap intervals, and McNemar's exact test of right and wrong.

    Raises:
        RunError: a run is not finished, or the two were not tested on the same rows.
    """
    task, lines_a = _predictions(a)
    other, lines_b = _predictions(b)
    gold_a, gold_b = ([(line["row"], line["gold"]) for line in lines] for lines in (lines_a, lines_b))
    if type(task) is not type(other) or gold_a != gold_b or _fingerprint(a) != _fingerprint(b):
        raise RunError(
            f"{a} and {b} were not tested on the same rows",
            found=f"{len(lines_a)} and {len(lines_b)} rows",
            mend="tune both with the same test file",
        )
    stats_a, stats_b = _aligned(task, lines_a), _aligned(task, lines_b)
    shown_a, shown_b = task.aggregate(stats_a), task.aggregate(stats_b)
    found: dict[str, Any] = {}
    for name in shown_a:
        difference = paired_difference(stats_b, stats_a, lambda stats, name=name: task.aggregate(stats)[name])  # type: ignore[misc]
        found[name] = {"a": shown_a[name], "b": shown_b[name], "difference": difference.as_dict()}
    right_a, right_b = task.right(stats_a), task.right(stats_b)
    p = mcnemar(right_a, right_b)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    reasons = [
        f"only the first is right on {only_a} rows, only the second on {only_b}: McNemar p = {p:.3g}",
        *_verdicts(found, p, only_a < only_b),
    ]
    return {"a": str(a), "b": str(b), "rows": len(lines_a), "metrics": found, "mcnemar_p": p, "reasons": reasons}


def _verdicts(found: dict[str, Any], p: float, second_is_right: bool) -> list[str]:
    """What the statistics allow to say.

    McNemar's test is exact for accuracy, so it alone decides there. Of another metric, an interval that leaves zero out
    decides where it can be relied on; where it warns (few rows), only together with McNemar's test.
    """
    verdicts, unsure = [], []
    if p < SIGNIFICANT:
        verdicts.append(f"accuracy: the {_which(second_is_right)} is better, McNemar's p is below {SIGNIFICANT}")
    for name, metric in found.items():
        difference = metric["difference"]
        if name == "accuracy" or difference["low"] <= 0 <= difference["high"]:
            continue
        if p < SIGNIFICANT or "warning" not in difference:
            better = _which(difference["low"] > 0)
            verdicts.append(f"{name}: the {better} is better, the interval leaves zero out")
        else:
            unsure.append(name)
    if unsure:
        verdicts.append(
            f"{', '.join(unsure)}: the interval leaves zero out, but is not to be relied on with so few rows, and "
            "McNemar's test finds no difference: not decided"
        )
    return verdicts or ["no metric differs by more than chance could explain"]


def _which(second: bool) -> str:
    return "second" if second else "first"


def _predictions(run: Path) -> tuple[Task, list[dict[str, Any]]]:
    refuse_no_run(run)
    path = run / "predictions.jsonl"
    if not path.is_file():
        raise RunError(f"{run}: has no predictions.jsonl", mend="give a run that is finished")
    task, _, _ = predict.read_about(run / "model")
    return task, [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def _fingerprint(run: Path) -> Any:
    """Of the test rows' texts and labels."""
    return read_json(run / "data.json")["splits"]["test"].get("fingerprint")


def _aligned(task: Task, lines: list[dict[str, Any]]) -> Stats:
    return {name: np.array([line["stats"][name] for line in lines]) for name in lines[0]["stats"]}
