"""Reads the test set once, after the choice was written, and scores everything that is shown in that one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from . import answer, checkpoint, predict
from . import console as consoles
from . import model as models
from .errors import RecipeError, RunError
from .files import read_json, refuse_no_run, write_text
from .own_metrics import OwnMetrics
from .select import Decision
from .tasks import Baseline, Stats, Task
from .tasks.metrics import SENTENCES, mean_and_spread
from .trial import FEW_VALIDATION_ROWS, Setting, Trial


@dataclass(frozen=True)
class Scores:
    """A model's metrics on labelled rows, with all that the report says of them."""

    stats: Stats
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def score(predictor: predict.Predictor, rows: Dataset, own: OwnMetrics | None = None) -> Scores:
    """Predicts labelled rows and scores them.

    Args:
        predictor: the tuned model.
        rows: with the task's columns, its target among them.
        own: metrics of the user's own.
    """
    task = predictor.task
    items = task.encode(rows, predictor.tokenizer, predictor.limit)
    logits = predictor.logits(items)
    stats = task.row_stats(logits, items, rows)
    predictions = task.decode(logits, items, rows)
    found = task.intervals(stats) | (
        own.intervals(task.gold(rows), [one[task.answer] for one in predictions]) if own else {}
    )
    return Scores(stats, {name: interval.as_dict() for name, interval in found.items()}, predictions)


def evaluate(
    setting: Setting, decision: Decision, train: Dataset, test: Dataset, with_baselines: bool, console: consoles.Console
) -> tuple[dict[str, Any], Scores, Task]:
    """Scores every trial and the baselines on the test rows.

    Args:
        setting: what the trials share.
        decision: which of them was chosen.
        train: rows that the baselines learn from.
        test: rows that nothing has been trained or chosen on.
        with_baselines: whether baselines are made.
        console: shows how far the answers are.

    Returns:
        What evaluation.json says, the chosen model's scores, and its task with what was fitted on validation rows.
    """
    scores, fitted = {}, {}
    for trial in (trial for candidate in decision.candidates for trial in candidate.trials):
        predictor, key = fit(_predictor(setting, trial), setting.of_fold(trial.fold)), trial.folder
        with console.watch(f"{trial.strategy}, test rows") as predictor.watch:
            scores[key], fitted[key] = score(predictor, test, setting.own_metrics), predictor.task
    best, task = scores[decision.trial.folder], fitted[decision.trial.folder]
    baselines, failed = _baselines(setting, train, test) if with_baselines else ([], [])
    candidates = []
    for candidate in decision.candidates:
        shown = candidate.best(decision.metric, decision.direction)
        entry = candidate.as_dict(decision.metric)
        # The goal may be a metric that the test rows have not: the loss, or one of the user's own.
        runs = [
            metrics[decision.metric]["value"]
            for trial in candidate.trials
            if decision.metric in (metrics := scores[trial.folder].metrics)
        ]
        told = mean_and_spread(runs) if runs else None
        candidates.append(
            {
                "strategy": candidate.strategy,
                "chosen": candidate is decision.chosen,
                "metrics": scores[shown.folder].metrics,
                **{key: entry[key] for key in ("trainable", "total", "seconds", "peak_bytes")},
                "seeds": [
                    {"seed": t.seed, "fold": t.fold, "metrics": scores[t.folder].metrics} for t in candidate.trials
                ],
                "mean": {decision.metric: told["mean"]} if told else {},
                "spread": {decision.metric: told["std"]} if told else {},
            }
        )
    notes, missed = verdicts(task, best.metrics)
    evaluation = {
        "metrics": best.metrics,
        "rows": len(test),
        "model": "model",
        "goal": {"metric": decision.metric, "direction": decision.direction},
        "candidates": candidates,
        "baselines": baselines,
        **task.errors(best.stats, test, best.predictions),
        "notes": notes,
        "warnings": [
            *missed,
            *doubts_of(best.metrics),
            *_doubts(setting, decision, best.metrics, baselines),
            *failed,
            *task.doubts,
            *task.looks(best.stats),
        ],
    }
    return evaluation, best, task


def doubts_of(metrics: dict[str, Any]) -> list[str]:
    """What is said of intervals that cannot be relied on, each sentence once, with the metrics that share it."""
    told: dict[str, list[str]] = {}
    for name, interval in metrics.items():
        for sentence in interval["warning"].split(SENTENCES) if "warning" in interval else ():
            told.setdefault(sentence, []).append(name)
    return [f"{', '.join(names)}: {sentence}" for sentence, names in sorted(told.items())]


def verdicts(task: Task, metrics: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What was asked for beside the goal: what is kept on the rows of these metrics, and what is missed."""
    found = task.kept(metrics)
    return [text for text, fine in found if fine], [text for text, fine in found if not fine]


def fit(predictor: predict.Predictor, setting: Setting) -> predict.Predictor:
    """A tuned model with what its task fits on validation rows, where it fits anything."""
    if not predictor.task.fits:
        return predictor
    fitted = predictor.task.fitted(predictor.logits(setting.validation), setting.validation, setting.validation_rows)
    return replace(predictor, task=fitted)


def _doubts(
    setting: Setting, decision: Decision, metrics: dict[str, Any], baselines: list[dict[str, Any]]
) -> Iterator[str]:
    """What makes the choice, or the whole tuning, doubtful."""
    metric, sign = decision.metric, 1 if decision.direction == "maximize" else -1
    comparable = [one for one in baselines if metric in one["metrics"]]
    if metric in metrics and comparable:
        best = max(comparable, key=lambda one: sign * one["metrics"][metric]["value"])
        own, other = metrics[metric]["value"], best["metrics"][metric]["value"]
        if sign * own <= sign * other:
            yield (
                f"{decision.chosen.strategy} does not beat the best baseline on the test rows: "
                f"{metric} {consoles.number(own)}, {best['name']} {consoles.number(other)}"
            )
    if len(setting.validation_rows) < FEW_VALIDATION_ROWS and not setting.folds:
        yield (
            f"only {len(setting.validation_rows)} validation rows: which strategy and which epoch is best on them "
            "is mostly chance"
        )


def write_predictions(path: Path, rows: Dataset, task: Task, scores: Scores) -> None:
    """Writes predictions.jsonl: for each test row its line, its gold label, what was predicted, and its statistics."""
    write_text(path, "".join(_lines(rows, task, scores)))


def _lines(rows: Dataset, task: Task, scores: Scores) -> list[str]:
    lines, files = [], rows["_source"][:] if "_source" in rows.column_names else None  # of several files
    for at, (number, gold, prediction) in enumerate(
        zip(rows["_row"][:], task.gold(rows), scores.predictions, strict=True)
    ):
        stats = {name: values[at].tolist() for name, values in scores.stats.items()}
        source = {"source": files[at]} if files else {}
        line = {**source, "row": number, "gold": gold, **prediction, "stats": stats}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _predictor(setting: Setting, trial: Trial) -> predict.Predictor:
    loaded, _, _ = checkpoint.load(trial.stages[-1])
    setting.task.prepare(loaded.model, loaded.tokenizer)
    size = setting.recipe.per_device_eval_batch_size or answer.BATCH
    predictor = predict.Predictor(loaded.model, loaded.tokenizer, setting.task, setting.limit, size)
    return predictor.to(models.pick_device(setting.recipe.device))


def _baselines(setting: Setting, train: Dataset, test: Dataset) -> tuple[list[dict[str, Any]], list[str]]:
    """What evaluation.json says of the baselines, and what could not be measured of them."""
    task: Task = setting.task
    gold = task.gold(test)
    made, failed = [], []
    for one in task.baselines(train, test, _frozen(setting, train, test) if task.pooled else None):
        baseline = Baseline(*one)
        found = task.intervals(baseline.stats)
        if baseline.answers is not None:
            try:
                found |= setting.own_metrics.intervals(gold, baseline.answers)
            except RecipeError as error:  # it may never say what a metric divides by; the run is not lost for it
                failed.append(f"baseline {baseline.name}: {error.problem}: {error.found}")
        metrics = {name: interval.as_dict() for name, interval in found.items()}
        made.append({"name": baseline.name, "detail": baseline.detail, "metrics": metrics})
    return made, failed


def _frozen(setting: Setting, *tables: Dataset) -> Any:
    """Mean hidden states of the model as it was given, for each table of rows."""
    task, loaded = setting.task, setting.load().loaded
    loaded.model.to(models.pick_device(setting.recipe.device))  # type: ignore[arg-type]
    items = (task.encode(rows, loaded.tokenizer, setting.limit) for rows in tables)
    return tuple(predict.features(loaded.model, one, loaded.tokenizer, answer.BATCH) for one in items)


def read_evaluation(run: Path) -> dict[str, Any]:
    """evaluation.json of a finished run.

    Raises:
        RunError: the run has none.
    """
    refuse_no_run(run)
    if not (run / "evaluation.json").is_file():
        raise RunError(f"{run}: has no evaluation.json", mend="give a run that is finished")
    return dict(read_json(run / "evaluation.json"))
