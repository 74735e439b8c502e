"""Compares two runs on the same test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import tasks
from .errors import RunError
from .files import read_json
from .tasks import Stats
from .tasks.metrics import mcnemar, paired_difference


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
    right_a, right_b = _right(stats_a), _right(stats_b)
    p = mcnemar(right_a, right_b)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    reasons = [f"only the first is right on {only_a} rows, only the second on {only_b}: McNemar p = {p:.3g}"]
    for name, metric in found.items():
        low, high = metric["difference"]["low"], metric["difference"]["high"]
        if low > 0 or high < 0:
            reasons.append(f"{name}: the {'second' if low > 0 else 'first'} is better, the interval leaves zero out")
    if len(reasons) == 1:
        reasons.append("no metric differs by more than chance could explain (every interval holds zero)")
    return {"a": str(a), "b": str(b), "rows": len(lines_a), "metrics": found, "mcnemar_p": p, "reasons": reasons}


def _predictions(run: Path) -> tuple[tasks.Task, list[dict[str, Any]]]:
    path = run / "predictions.jsonl"
    if not path.is_file():
        raise RunError(f"{run}: has no predictions.jsonl", mend="give a run that is finished")
    about = read_json(run / "model" / "hybridtune.json")["task"]
    return tasks.load(about["name"]).from_state(about), [
        json.loads(line) for line in path.read_text("utf-8").split("\n") if line
    ]


def _fingerprint(run: Path) -> Any:
    """Of the test rows' texts and labels."""
    return read_json(run / "data.json")["splits"]["test"].get("fingerprint")


def _aligned(task: tasks.Task, lines: list[dict[str, Any]]) -> Stats:
    return {name: np.array([line["stats"][name] for line in lines]) for name in lines[0]["stats"]}


def _right(stats: Stats) -> np.ndarray:
    same = stats["gold"] == stats["predicted"]
    return np.asarray(same if same.ndim == 1 else same.all(1))
