"""The five steps. `tune()` reads like their list; everything else here is the run that it leaves behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import console as consoles
from . import environment, evaluate, export, predict, prepare, report, select, tasks, trial, yaml12
from . import model as models
from .console import Console
from .data import read
from .errors import DataError, HybridtuneError, RecipeError, RunError, UserError, unknown
from .files import disk_errors, read_json, write_json, write_text
from .recipe import Recipe, Strategy
from .select import Decision
from .tasks import Task
from .trial import Setting, Trial

# All that a tuning writes into its folder, and all that it ever removes from there.
_ASKED = "asked.json"
_OWN_FILES = (
    *("recipe.yaml", "environment.json", "data.json", "plan.json", "decision.json", "evaluation.json"),
    *("explanation.json", "predictions.jsonl", "report.html", _ASKED),
)
_OWN_FOLDERS = ("trials", "stages", "model")
# Keys that a resumed run may have changed.
_FREE = {"output", "defaults", "data", "strategy", "push_to_hub", "hub_model_id", "hub_private_repo"}


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
    asked = Recipe.make(recipe, **keys)
    task = tasks.load(asked.task).from_recipe(asked)
    metric = _goal(asked, task, compute_metrics is not None)
    folder = _output(asked, resume, overwrite)

    console.step(1, f"goal: {_direction(asked)} {metric} of {asked.task}")
    machine = environment.describe(models.pick_device(asked.device))

    console.step(2, "data")
    rows, about = prepare.rows_of(asked, task, console)
    setting, lengths = prepare.setting_of(
        asked, task, metric, rows, console, (*callbacks, _Progress(console)), compute_metrics
    )

    console.step(3, "strategy")
    plan, defaults = prepare.plan_of(setting, console)

    console.step(4, f"tune: {len(plan)} {'strategy' if len(plan) == 1 else 'strategies'}, chosen on validation data")
    with nullcontext() if resume else _left_as_it_was(folder):
        _begin(folder, setting, {"environment.json": machine, "data.json": about | lengths}, plan, defaults, resume)
        decision = _race(setting, folder, console)

    console.step(5, f"evaluate: {len(rows['test'])} test rows, read by a model for the first time")
    with disk_errors(folder):
        evaluation = _evaluate(setting, decision, rows, folder, console)
        report.write_report(folder)
    run = Run(folder, asked.device)
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
        model: torch.nn.Module = self.predictor.model
        return model

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

    def predict(self, rows: Iterable[Any], columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """Predicts rows: dicts of the task's columns, or bare strings where one text is all.

        Args:
            rows: a list of them, a `datasets.Dataset` or a pandas frame.
            columns: what the columns are called, where they are not called as in training: {"text": "message"}.
        """
        return self.predictor.predict(rows, columns)

    def push_to_hub(self, name: str | None = None, private: bool | None = None, token: str | None = None) -> None:
        """Uploads `model/` to the hub.

        Args:
            name: repository; the run folder's name where not given.
            private: whether a new repository is private.
            token: of the hub; the stored one where not given.

        Raises:
            HybridtuneError: the hub cannot be reached, or does not take it.
        """
        import huggingface_hub

        name = name or self.folder.resolve().name
        model = self.folder / "model" if (self.folder / "model").is_dir() else self.folder
        hub = huggingface_hub.HfApi(token=token)
        try:
            repository = hub.create_repo(name, private=private, exist_ok=True).repo_id
            hub.upload_folder(repo_id=repository, folder_path=str(model), commit_message="Tuned model")
        except Exception as error:  # whatever the hub, its client or the network may raise
            raise HybridtuneError(
                f"hub: {model} was not uploaded to {name}",
                found=(str(error).strip() or type(error).__name__).splitlines()[0],
                mend=f'the run is finished; try again with hybridtune.load("{self.folder}").push_to_hub("{name}")',
            ) from error


class _Progress(TrainerCallback):  # type: ignore[misc]
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
            shown = dict.fromkeys((str(args.metric_for_best_model), "loss"))
            values = "  ".join(f"{key} {metrics.get('eval_' + key, float('nan')):.4f}" for key in shown)
            self.console.line(f"    {self.stage}  epoch {state.epoch:g}  {values}", "dim")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        self.console.finish()


def _direction(recipe: Recipe) -> str:
    return "minimize" if recipe.goal.minimize else "maximize"


def _goal(recipe: Recipe, task: Task, own_metrics: bool) -> str:
    metric, way = recipe.goal.metric or task.metric, _direction(recipe)
    known = {**task.metrics, "loss": "minimize"}
    if metric not in known and not own_metrics:
        raise RecipeError(f"goal: {unknown('metric', metric, known)}", expected=", ".join(known))
    if recipe.goal.metric and known.get(metric, way) != way:
        raise RecipeError(f"goal: {way} {metric}", expected=f"{known[metric]}: {metric}")
    return metric


def _output(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """The run folder. Nothing is written or removed yet.

    Raises:
        RunError: it cannot be written, or holds something that the user has not said what to do with.
    """
    folder = Path(recipe.output).expanduser()
    if resume and overwrite:
        raise RunError("output: --resume and --overwrite exclude each other", mend="give one of them")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"output: {there} is a file", mend="choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"output: {there} cannot be written", mend="choose another output")
    if there is not folder or not any(folder.iterdir()):
        return folder
    if not (folder / _ASKED).is_file():
        raise RunError(f"output: {folder} holds other files", mend="choose another output, or empty it")
    if not (resume or overwrite):
        raise RunError(
            f"output: {folder} already holds a run", mend="choose another output, or give --resume or --overwrite"
        )
    if resume:
        before, asked = read_json(folder / _ASKED), _asked(recipe)
        changed = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
        if changed:
            raise RunError(
                f"output: the run in {folder} was begun with another recipe",
                found=f"different {', '.join(changed)}",
                mend="resume with the same recipe, or give --overwrite",
            )
    return folder


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same for a run to be resumed."""
    tree = recipe.model_dump(mode="json", exclude_defaults=True, exclude=_FREE)
    tree["strategy"] = [strategy.model_dump(mode="json", exclude_none=True) for strategy in recipe.strategies()]
    return tree | {"data": _data(recipe)}


def _data(recipe: Recipe) -> dict[str, Any]:
    """`data:` as plain values: rows that were given in Python are named by their kind."""
    given = {name: getattr(recipe.data, name) for name in ("train", "validation", "test")}
    told = {
        name: str(value) if isinstance(value, (str, Path)) else read.describe(value)
        for name, value in given.items()
        if value is not None
    }
    return told | ({"columns": dict(recipe.data.columns)} if recipe.data.columns else {})


def _begin(
    folder: Path,
    setting: Setting,
    files: dict[str, Any],
    plan: Sequence[Strategy],
    defaults: Sequence[str],
    resume: bool,
) -> None:
    """Writes what is known before anything is trained. What an earlier run has left makes way, unless it is resumed.

    Raises:
        RunError: the disk is full or read-only, or a resumed run was begun with other rows.
    """
    if resume and (folder / "data.json").is_file():
        before, now = read_json(folder / "data.json")["splits"], files["data.json"]["splits"]
        changed = [name for name in now if before.get(name, {}).get("fingerprint") != now[name]["fingerprint"]]
        if changed:
            raise RunError(
                f"output: the run in {folder} was begun with other rows",
                found=f"different {', '.join(changed)}",
                mend="resume with the same files, or give --overwrite",
            )
    if not resume:
        _clear(folder)
    recipe = setting.recipe
    write_json(folder / _ASKED, _asked(recipe))
    for name, value in files.items():
        write_json(folder / name, value)
    tree = recipe.model_dump(mode="json", exclude={"data", "goal", "strategy", "defaults"}, exclude_none=True)
    tree |= {
        "goal": {_direction(recipe): setting.metric},
        "data": _data(recipe),
        "strategy": [strategy.model_dump(mode="json", exclude_none=True) for strategy in plan],
        "defaults": [*([] if recipe.goal.metric else [f"goal.{_direction(recipe)}"]), *defaults],
    }
    write_text(folder / "recipe.yaml", yaml12.dump(tree))


@contextmanager
def _left_as_it_was(folder: Path) -> Iterator[None]:
    """Takes back what was written where a mistake shows before anything was trained: the mended call can be made."""
    try:
        yield
    except UserError:
        trained = [*folder.glob(f"trials/*/{trial.RESULT}"), *folder.glob("trials/*/stages/*/checkpoint-*")]
        logs = folder.glob("trials/*/stages/*/log.jsonl")
        if not trained and not any(log.stat().st_size for log in logs):
            _clear(folder)
            if folder.resolve() != Path.cwd():
                with suppress(OSError):  # other files are there
                    folder.rmdir()
        raise


def _clear(folder: Path) -> None:
    """Removes what a tuning writes, and nothing else that may lie beside it."""
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def _race(setting: Setting, folder: Path, console: Console) -> Decision:
    strategies, seeds = setting.recipe.strategies(), setting.recipe.all_seeds()

    def begin(strategy: str, seed: int) -> None:
        console.line(
            f"  {strategy}" + (f", seed {seed}" if len(seeds) > 1 else ""), "bold" if console.is_terminal else None
        )

    def end(done: Trial) -> None:
        spent = f"{consoles.seconds(done.seconds)}, {consoles.count(done.trainable)} trained"
        console.line(
            f"    {setting.metric} {done.validation[setting.metric]:.4f} on validation, {spent}, "
            f"{consoles.memory(done.peak_bytes)}"
        )

    with disk_errors(folder):
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
    drift = export.difference(last, folder / "model", rows["test"].select(range(min(16, len(rows["test"])))).to_list())
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


def evaluate_run(
    folder: Path, data: Any, device: str = "auto", columns: dict[str, str] | None = None
) -> dict[str, Any]:
    """Scores a tuned model on labelled rows; without rows, gives the run's own evaluation.

    Args:
        folder: of the run.
        data: anything that `data: {test: ...}` may be.
        device: where the model is put.
        columns: what the rows' columns are called, where they are not called as in training.

    Raises:
        RunError: the run is not finished.
        DataError: the rows cannot be read, or have a label that the model does not know.
    """
    if data is None:
        return evaluate.read_evaluation(folder)
    tuned = load(folder, device)
    task, source = tuned.predictor.task, read.describe(data)
    table = read.read(data, "test")
    hints = {**{name: own for name, own in task.hints.items() if own in table.column_names}, **(columns or {})}
    rows = read.map_columns(table, "test", source, task.columns, hints, task.required)
    try:
        scores = evaluate.score(tuned.predictor, rows.select_columns([*task.required, "_row"]))
    except DataError as error:
        raise DataError(
            f"{source}: {error.problem}", found=error.found, expected=error.expected, mend=error.mend
        ) from None
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
    inputs = predict.load(output, "cpu").task.inputs
    texts = [
        dict.fromkeys(inputs, text)
        for text in ("one short text", "and another one, which is a little longer than the first")
    ]
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
    values = [row] if isinstance(row, str) else [value for key, value in row.items() if key != "_row"]
    shown = " ".join(" | ".join(map(str, values)).split())
    label = prediction.get("label")
    score = prediction.get("scores", {}).get(str(label))
    return f"{label}" + (f" ({score:.0%})" if score is not None else "") + f"  {shown[:100]}"
