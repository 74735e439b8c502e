"""One trial: one strategy with one seed, from the loaded model to its score on validation data."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from . import answer, guard
from . import model as models
from . import start as starts
from .console import Console
from .engine import OFF, Caches
from .engine.precision import Choice
from .errors import TrainingError, first_line
from .files import read_json, write_json
from .memory import PeakMemory
from .own_metrics import NO_METRICS, OwnMetrics
from .recipe import Recipe, Strategy
from .resolve import Plan
from .stage import METRICS, SPEED, is_finished
from .start import Start
from .tasks import Logits, Task, for_the_model
from .train import HybridTrainer
from .tuned import Tuned

RESULT = "trial.json"
# Below this, one standard error of an accuracy of 80% is more than 5 points: larger than most gaps between strategies.
FEW_VALIDATION_ROWS = 50
# Keys of the recipe that TrainingArguments gets as they are.
_PASSED = ("per_device_eval_batch_size", "fp16", "report_to", "dataloader_num_workers")


@dataclass(frozen=True)
class Setting:
    """What all trials of a run share.

    Attributes:
        recipe, task: as asked for.
        metric: that decides.
        train, validation: rows cut into items of tokens.
        validation_rows: as they were before.
        folds: where rows take turns, what `train`, `validation` and `validation_rows` are in each of them.
        limit: rows are cut after that many tokens.
        plans: every candidate with every value, tried on the model.
        precision: what is computed in.
        own_metrics, callbacks, compute_metrics: the user's own.
        caches: what frozen layers give the rows.
        tokenizer: whose vocabulary the model gets; None leaves it its own.
        console: is shown how far the writing of validation rows is.
    """

    recipe: Recipe
    task: Task
    metric: str
    train: Dataset
    validation: Dataset
    validation_rows: Dataset
    limit: int
    plans: Sequence[Plan]
    precision: Choice
    own_metrics: OwnMetrics = NO_METRICS
    callbacks: Sequence[TrainerCallback] = ()
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    caches: Caches = field(default_factory=Caches)
    folds: Sequence[tuple[Dataset, Dataset, Dataset]] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    console: Console = field(default_factory=lambda: Console(quiet=True))

    def of_fold(self, fold: int | None) -> Setting:
        """The setting of a trial that was validated on a fold; without folds, this one."""
        if fold is None:
            return self
        train, validation, rows = self.folds[fold]
        return replace(self, train=train, validation=validation, validation_rows=rows)

    @property
    def direction(self) -> str:
        """maximize or minimize."""
        known = {"loss": "minimize", **self.task.metrics, **self.own_metrics.directions}
        return "minimize" if self.recipe.goal.minimize else known.get(self.metric, "maximize")

    def load(self) -> Start:
        """Loads the model afresh, made ready for the task."""
        return load(self.recipe, self.task, self.tokenizer)


def load(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase | None = None) -> Start:
    """Loads a recipe's model, made ready for the task, with the vocabulary of a tokenizer where one is given.

    Raises:
        ModelError: the model cannot be loaded or cannot do the task.
    """
    start = bare(recipe, task, tokenizer)
    task.prepare(start.loaded.model, start.loaded.tokenizer)
    return start


def bare(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase | None = None) -> Start:
    """The same, not made ready."""
    return starts.load(
        recipe.model,
        task.auto_class,
        task.model_config(),
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        tokenizer=tokenizer,
    )


@dataclass(frozen=True)
class Trial:
    """What came of a trial.

    Attributes:
        validation: metrics on validation data of the model that was kept.
        seconds: of training and its evaluations, without what was lost to interruptions.
        peak_bytes: memory that it took at its peak, beyond what the process held before the model was loaded; of an
            interrupted trial that of its last attempt.
        trainable, total: numbers of parameters; of several stages the largest.
        fold: on which it was validated, where rows take turns.
    """

    strategy: str
    seed: int
    folder: str
    validation: dict[str, float]
    seconds: float
    peak_bytes: int | None
    trainable: int
    total: int
    fold: int | None = None

    @property
    def stages(self) -> list[Path]:
        """The folders of its stages, in order, until the chosen trial's become the run's own."""
        found = (Path(self.folder) / "stages").iterdir()
        return sorted((f for f in found if f.name.split("-")[0].isdigit()), key=lambda f: int(f.name.split("-")[0]))


def run(setting: Setting, strategy: Strategy, seed: int, folder: Path, fold: int | None = None) -> Trial:
    """Trains a strategy; goes on with, or reads, what an earlier trial in this folder has left.

    Args:
        setting: what all trials share.
        strategy: resolved.
        seed: set before the model is loaded and before every stage.
        folder: of the trial; its stages go into `stages/`.
        fold: that it is validated on, where rows take turns.

    Raises:
        TrainingError: it ran out of memory, or its model gives no numbers any more.
    """
    if (folder / RESULT).is_file() and (folder / "stages").is_dir():
        return Trial(**{**read_json(folder / RESULT), "folder": str(folder)})
    setting = setting.of_fold(fold)
    memory = PeakMemory(models.pick_device(setting.recipe.device))
    set_seed(seed)
    start, task = setting.load(), setting.task
    loaded = start.loaded
    # Less padding; what comes of it is put back in the rows' order.
    order = np.argsort([len(ids) for ids in setting.validation["input_ids"][:]], kind="stable")
    loaded.model._hybridtune = Tuned(start.assembly, start.base, strategy)  # type: ignore[assignment]
    trainer = HybridTrainer(
        loaded.model,
        training_arguments(setting, seed, folder),
        train_dataset=for_the_model(setting.train, loaded.tokenizer, labels=True),
        eval_dataset=for_the_model(setting.validation.select(order), loaded.tokenizer, labels=True),
        data_collator=task.collator(loaded.tokenizer),
        processing_class=loaded.tokenizer,
        preprocess_logits_for_metrics=lambda outputs, labels: task.logits(outputs),
        compute_loss_func=task.loss,
        compute_metrics=None if task.writes else _metrics(setting, order),
        measure=_measure(setting, loaded.tokenizer) if task.writes else None,
        callbacks=list(setting.callbacks),
        strategy=strategy,
        base=start.base,
        engine=setting.recipe.engine,
        caches=setting.caches,
        manifest={
            "task": task.state(),
            "max_length": setting.limit,
            "strategy": strategy.model_dump(mode="json", exclude_none=True),
        },
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(SaysHow(trainer, setting.console))
    for stage, path in zip(strategy.stages, trainer.stage_folders, strict=True):
        if is_finished(path):
            setting.console.line(f"    {stage.name}  finished before")
    if not trainer.can_resume:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier trial did not come far enough
    try:
        trainer.train(resume_from_checkpoint=trainer.can_resume)
    except RuntimeError as error:
        if not guard.is_out_of_memory(error):
            raise
        raise TrainingError(
            f"strategy {strategy.name}: out of memory",
            found=first_line(error),
            mend="lower per_device_train_batch_size and raise gradient_accumulation_steps, or take a smaller strategy",
        ) from error
    metrics = {key.removeprefix("eval_"): value for key, value in _evaluated(trainer).items()}
    metrics = {key: float(value) for key, value in metrics.items() if key not in SPEED}
    if not all(math.isfinite(value) for value in metrics.values()):
        raise TrainingError(
            f"strategy {strategy.name}: its metrics on validation data are no numbers",
            found=", ".join(f"{key} {value}" for key, value in metrics.items()),
            mend="lower the learning rate",
        )
    stages = [read_json(stage / METRICS) for stage in trainer.stage_folders]
    trial = Trial(
        strategy.name,
        seed,
        str(folder),
        metrics,
        round(sum(stage["seconds"] for stage in stages), 3),
        memory.peak(),
        max(stage["trainable"] for stage in stages),
        sum(parameter.numel() for parameter in loaded.model.parameters()),
        fold,
    )
    write_json(folder / RESULT, {key: value for key, value in vars(trial).items() if key != "folder"})
    return trial


class SaysHow(TrainerCallback):  # type: ignore[misc]
    """Says of each stage how its rows are run, and where it goes on."""

    def __init__(self, trainer: HybridTrainer, console: Console) -> None:
        self.trainer, self.console, self.said = trainer, console, False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.said = False
        if state.global_step:
            self.console.line(f"    goes on after step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Not before: an engine may be tried on the first batch."""
        engine = self.trainer.engine
        if not self.said and engine and engine.reason in ("", OFF):  # of others there was a warning
            self.console.line(f"    {engine}", "dim")
        self.said = True


def _evaluated(trainer: HybridTrainer) -> dict[str, float]:
    """What was measured on validation data of the weights that were kept."""
    for logged in trainer.state.log_history:
        if logged["step"] == trainer.restored_step and "eval_loss" in logged:
            return {key: value for key, value in logged.items() if key.startswith("eval_")}
    return dict(trainer.evaluate())


def training_arguments(setting: Setting, seed: int, folder: Path) -> TrainingArguments:
    """The recipe's keys that are TrainingArguments' own and that no stage carries."""
    recipe = setting.recipe
    passed = {key: value for key in _PASSED if (value := getattr(recipe, key)) is not None}
    passed.setdefault("per_device_eval_batch_size", 64)
    device = models.pick_device(recipe.device)
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=setting.precision.bf16,
        disable_tqdm=True,
        label_names=["labels"],
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model=setting.metric,
        greater_is_better=setting.direction == "maximize",
        **passed,
    )


def _scores(setting: Setting, logits: Logits, items: Dataset, rows: Dataset) -> dict[str, float]:
    """The task's metrics, and those of the user's own."""
    task, own = setting.task, setting.own_metrics
    found = task.aggregate(task.row_stats(logits, items, rows))
    return found | own.measure(task, task.decode(logits, items, rows), rows) if own.functions else found


def _metrics(setting: Setting, order: np.ndarray) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics, with the user's own beside them."""
    task, lengths = setting.task, [len(ids) for ids in setting.validation["input_ids"][:]]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        answers = dict(zip(order.tolist(), prediction.predictions, strict=True))
        logits = [answers[item][: lengths[item]] if task.per_token else answers[item] for item in range(len(order))]
        found = _scores(setting, logits, setting.validation, setting.validation_rows)
        return found | (setting.compute_metrics(prediction) if setting.compute_metrics else {})

    return compute


def _measure(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> Callable[[PreTrainedModel], dict[str, float]]:
    """The metrics of the texts that a model writes for validation rows: for all, or for some from first to last.

    They are written as those of test rows are, so that a model which is kept scores what was logged of it.
    """
    task, count = setting.task, len(setting.validation_rows)
    chosen = np.linspace(0, count - 1, min(count, task.generate_on or count)).round().astype(int)
    items, rows = task.answered(setting.validation).select(chosen), setting.validation_rows.select(chosen)
    size = setting.recipe.per_device_eval_batch_size or answer.BATCH

    def measure(model: PreTrainedModel) -> dict[str, float]:
        with setting.console.watch("writing validation rows") as watch:
            written = answer.answers(model, task, items, tokenizer, size, watch)
        found = _scores(setting, written, items, rows)
        if setting.compute_metrics is None:
            return found
        pad = tokenizer.pad_token_id
        given = [_padded([np.asarray(ids) for ids in of], pad) for of in (written, items["labels"][:])]
        return found | setting.compute_metrics(EvalPrediction(*given))

    return measure


def _padded(rows: Sequence[np.ndarray], pad: int) -> np.ndarray:
    """Tokens of rows as one array, [rows, tokens]."""
    made = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    for row, ids in zip(made, rows, strict=True):
        row[: len(ids)] = np.where(ids == -100, pad, ids)
    return made
