"""The five steps. `tune()` reads like their list; everything else here is the run that it leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import console as consoles
from . import environment, evaluate, export, predict, prepare, report, select, tasks, trial
from . import model as models
from .console import Console
from .data import read
from .errors import RecipeError, RunError, unknown
from .files import disk_errors, read_json, write_json, write_text
from .recipe import Recipe, Strategy
from .select import Decision
from .tasks import Task
from .trial import Setting, Trial


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
        UserError: what was asked for cannot be done as it was written; nothing has been trained then.
    """
    console = console or Console()
    asked = Recipe.make(recipe, **keys)
    task = tasks.load(asked.task).from_recipe(asked)
    metric = _goal(asked, task, compute_metrics is not None)
    folder = _open(asked, resume, overwrite)

    console.step(1, f"goal: {'minimize' if asked.goal.minimize else 'maximize'} {metric} of {asked.task}")
    write_json(folder / "environment.json", environment.describe(models.pick_device(asked.device)))

    console.step(2, "data")
    rows, about = prepare.rows_of(asked, task, console)
    setting, lengths = prepare.setting_of(
        asked, task, metric, rows, console, (*callbacks, _Progress(console)), compute_metrics
    )
    write_json(folder / "data.json", about | lengths)

    console.step(3, "strategy")
    plan, defaults = prepare.plan_of(setting, console)
    _write_recipe(folder, asked, plan, defaults)

    console.step(4, f"tune: {len(plan)} {'strategy' if len(plan) == 1 else 'strategies'}, chosen on validation data")
    decision = _race(setting, folder, console)

    console.step(5, f"evaluate: {len(rows['test'])} test rows, read by a model for the first time")
    evaluation = _evaluate(setting, decision, rows, folder, console)
    report.write_report(folder)
    run = Run(folder)
    _say_result(run, evaluation, console)
    if asked.push_to_hub:
        run.push_to_hub(asked.hub_model_id, asked.hub_private_repo, asked.hub_token)
    return run


def load(folder: str | Path, device: str = "auto") -> Run:
    """Loads a run, or a model folder that a run has handed over.

    Raises:
        RunError: the folder is neither.
    """
    return Run(Path(folder), device)


@dataclass
class Run:
    """A finished tuning.

    Attributes:
        folder: where it is.
        device: where its model is put.
    """

    folder: Path
    device: str = "auto"

    def __post_init__(self) -> None:
        _ = self.predictor  # a folder that is no run is refused at once

    @cached_property
    def predictor(self) -> predict.Predictor:
        """The tuned model with its tokenizer and task."""
        return predict.load(self.folder, self.device)

    @property
    def model(self) -> torch.nn.Module:
        """The tuned model."""
        return self.predictor.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.predictor.tokenizer

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json."""
        return evaluate.read_evaluation(self.folder)

    @property
    def decision(self) -> dict[str, Any]:
        """decision.json."""
        return dict(read_json(self.folder / "decision.json"))

    def predict(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Predicts rows: dicts of the task's columns, or bare strings where one text is all."""
        return self.predictor.predict(rows)

    def push_to_hub(self, name: str | None = None, private: bool | None = None, token: str | None = None) -> None:
        """Uploads `model/` to the hub.

        Args:
            name: repository; the run folder's name where not given.
            private: whether a new repository is private.
            token: of the hub; the stored one where not given.
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repository = hub.create_repo(name or self.folder.name, private=private, exist_ok=True).repo_id
        hub.upload_folder(repo_id=repository, folder_path=str(self.folder / "model"), commit_message="Tuned model")


class _Progress(TrainerCallback):
    """Shows a stage's steps as a bar, and its evaluations as lines."""

    def __init__(self, console: Console) -> None:
        self.console, self.training, self.stage = console, False, ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True
        self.stage = Path(args.output_dir).name.partition("-")[2]
        self.console.begin(self.stage, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.console.advance(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = metrics or {}
        if state.is_world_process_zero and self.training:
            key = str(args.metric_for_best_model)
            self.console.line(
                f"    {self.stage}  epoch {state.epoch:g}  {key} {metrics.get('eval_' + key, float('nan')):.4f}  loss {metrics.get('eval_loss', float('nan')):.4f}",
                "dim",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        self.console.finish()


def _goal(recipe: Recipe, task: Task, own_metrics: bool) -> str:
    metric = recipe.goal.metric or task.metric
    if metric not in task.metrics and metric != "loss" and not own_metrics:
        raise RecipeError(f"goal: {unknown('metric', metric, task.metrics)}", expected=", ".join(task.metrics))
    way = "minimize" if recipe.goal.minimize else "maximize"
    if recipe.goal.metric and task.metrics.get(metric, way) != way:
        raise RecipeError(f"goal: {way} {metric}", expected=f"{task.metrics[metric]}: {metric}")
    return metric


def _open(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """Makes the run folder; what is there is kept unless the user says otherwise."""
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output: {folder} is a file", mend="choose another output")
    taken = folder.is_dir() and any(folder.iterdir())
    is_run = (folder / "recipe.yaml").is_file()
    if taken and not is_run:
        raise RunError(f"output: {folder} holds other files", mend="choose another output, or empty it")
    if taken and not (resume or overwrite):
        raise RunError(
            f"output: {folder} already holds a run", mend="choose another output, or give --resume or --overwrite"
        )
    asked = recipe.model_dump(mode="json", exclude_unset=True, exclude={"output", "data", "defaults"})
    if taken and resume:
        before = read_json(folder / "asked.json")
        if before != asked:
            changed = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
            raise RunError(
                f"output: the run in {folder} was begun with another recipe",
                found=f"different {', '.join(changed)}",
                mend="resume with the same recipe, or give --overwrite",
            )
    if taken and overwrite and not resume:
        shutil.rmtree(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (taken and resume):
        write_json(folder / "asked.json", asked)
        _write_recipe(folder, recipe, recipe.strategies(), [])
    return folder


def _write_recipe(folder: Path, recipe: Recipe, strategies: Sequence[Strategy], defaults: Sequence[str]) -> None:
    """Writes recipe.yaml: what was asked for, with every value that was chosen. It can be tuned again as it is."""
    tree = recipe.model_dump(mode="json", exclude={"data", "strategy", "defaults"}, exclude_none=True)
    data = {
        name: read.describe(value) if name in ("train", "validation", "test") else value
        for name in recipe.data.model_fields_set
        if (value := getattr(recipe.data, name)) is not None
    }
    tree |= {
        "data": data,
        "strategy": [s.model_dump(mode="json", exclude_none=True) for s in strategies],
        "defaults": list(defaults),
    }
    write_text(folder / "recipe.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))


def _race(setting: Setting, folder: Path, console: Console) -> Decision:
    strategies, seeds = setting.recipe.strategies(), setting.recipe.all_seeds()

    def begin(strategy: str, seed: int) -> None:
        console.line(
            f"  {strategy}" + (f", seed {seed}" if len(seeds) > 1 else ""), "bold" if console.is_terminal else None
        )

    def end(done: Trial) -> None:
        console.line(
            f"    {setting.metric} {done.validation[setting.metric]:.4f} on validation, {consoles.seconds(done.seconds)}, {consoles.count(done.trainable)} trained, {consoles.memory(done.peak_bytes)}"
        )

    decision = select.race(setting, strategies, seeds, folder / "trials", begin, end)
    write_json(folder / "decision.json", decision.as_dict())
    console.line(f"  chosen: {decision.chosen.strategy}" + "".join(f"\n    {reason}" for reason in decision.reasons))
    return decision


def _evaluate(
    setting: Setting, decision: Decision, rows: dict[str, Dataset], folder: Path, console: Console
) -> dict[str, Any]:
    evaluation, scores = evaluate.evaluate(setting, decision, rows["train"], rows["test"], setting.recipe.baselines)
    last = decision.trial.stages[-1]
    kind, snippet = export.write(folder / "model", last)
    drift = export.difference(
        last, folder / "model", [row for row in rows["test"].select(range(min(16, len(rows["test"])))).to_list()]
    )
    if drift > 1e-3:
        raise RunError(
            f"{folder / 'model'}: gives other logits than the tuned model",
            found=f"difference {drift:g}",
            mend="this is a bug: please report it with the recipe",
        )
    evaluation |= {
        "model_kind": kind,
        "model_difference": drift,
        "load": snippet.replace("FOLDER", str(folder / "model")),
    }
    _hand_over_stages(folder, decision.trial)
    evaluate.write_predictions(folder / "predictions.jsonl", rows["test"], scores)
    write_json(folder / "evaluation.json", evaluation)
    headings = (
        "",
        f"test {setting.metric} (95%)",
        "accuracy" if "accuracy" in evaluation["metrics"] else "",
        "trained",
        "seconds",
        "memory",
    )
    table = [
        (
            ("> " if candidate["chosen"] else "  ") + candidate["strategy"],
            consoles.interval(candidate["metrics"][setting.metric]) if setting.metric in candidate["metrics"] else "-",
            f"{candidate['metrics']['accuracy']['value']:.3f}" if "accuracy" in candidate["metrics"] else "",
            consoles.count(candidate["trainable"]),
            f"{candidate['seconds']:.1f}",
            consoles.memory(candidate["peak_bytes"]),
        )
        for candidate in evaluation["candidates"]
    ]
    table += [
        (
            "  " + b["name"],
            consoles.interval(b["metrics"][setting.metric]) if setting.metric in b["metrics"] else "-",
            f"{b['metrics']['accuracy']['value']:.3f}" if "accuracy" in b["metrics"] else "",
            "-",
            "-",
            "-",
        )
        for b in evaluation["baselines"]
    ]
    chosen = next(number for number, candidate in enumerate(evaluation["candidates"]) if candidate["chosen"])
    console.table(headings, table, bold=chosen)
    for warning in evaluation["warnings"]:
        console.warn(warning)
    return evaluation


def _hand_over_stages(folder: Path, chosen: Trial) -> None:
    """The chosen trial's stages become the run's own."""
    source, target = Path(chosen.folder) / "stages", folder / "stages"
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)


def _say_result(run: Run, evaluation: dict[str, Any], console: Console) -> None:
    console.line(f"\n  model   {run.folder / 'model'} ({evaluation['model_kind']})")
    console.line(f"  report  {run.folder / 'report.html'}")
    console.line(f'  try     hybridtune predict {run.folder} "..."')


def check(recipe: str | Path | dict[str, Any] | Recipe, console: Console | None = None) -> dict[str, Any]:
    """Step 2 alone: what is wrong with the data, and what tuning would do about it. Writes nothing.

    Returns:
        What data.json would say.

    Raises:
        DataError: the data cannot be tuned on as it is.
    """
    console = console or Console()
    asked = Recipe.make(recipe)
    task = tasks.load(asked.task).from_recipe(asked)
    rows, about = prepare.rows_of(asked, task, console)
    _, lengths = prepare.setting_of(asked, task, task.metric, rows, console)
    return about | lengths


def evaluate_run(folder: Path, data: Any, device: str = "auto") -> dict[str, Any]:
    """Scores a tuned model on labelled rows; without rows, gives the run's own evaluation.

    Raises:
        RunError: the run is not finished.
        DataError: the rows cannot be read, or have a label that the model does not know.
    """
    if data is None:
        return evaluate.read_evaluation(folder)
    tuned = load(folder, device)
    task, source = tuned.predictor.task, read.describe(data)
    rows = read.map_columns(read.read(data, "test"), "test", source, task.columns, {}, task.required)
    scores = evaluate.score(tuned.predictor, rows)
    warnings = sorted({metric["warning"] for metric in scores.metrics.values() if "warning" in metric})
    return {"model": str(folder), "data": source, "rows": len(rows), "metrics": scores.metrics, "warnings": warnings}


def export_run(folder: Path, output: Path, kind: str | None = None) -> dict[str, Any]:
    """Writes a run's model into a new folder.

    Returns:
        The kind, the snippet that loads it, and by how much its logits differ from the tuned model's.

    Raises:
        RunError: the run is not finished, the folder exists, or the model cannot be handed over so.
    """
    if kind not in (None, *export.KINDS):
        raise RunError(f"kind: {unknown('kind', str(kind), export.KINDS)}", expected=", ".join(export.KINDS))
    if output.exists():
        raise RunError(f"output: {output} exists", mend="choose another output")
    evaluate.read_evaluation(folder)
    stage = export.last_stage(folder)
    written, snippet = export.write(output, stage, kind)  # type: ignore[arg-type]
    texts = [{"text": "one short text"}, {"text": "and another one, which is a little longer than the first"}]
    return {
        "kind": written,
        "output": str(output),
        "load": snippet.replace("FOLDER", str(output)),
        "difference": export.difference(stage, output, texts),
    }


def rows_for_prediction(run: Run, path: Path) -> list[dict[str, Any]]:
    """Rows of a file, for `Run.predict`."""
    return [dict(row) for row in read.read(path, "input").to_list()]


def say_prediction(row: Any, prediction: dict[str, Any]) -> str:
    """One line for a person."""
    shown = row if isinstance(row, str) else " | ".join(str(value) for key, value in row.items() if key != "_row")
    label = prediction.get("label")
    score = prediction.get("scores", {}).get(str(label))
    return f"{label}" + (f" ({score:.0%})" if score is not None else "") + f"  {shown[:100]}"
