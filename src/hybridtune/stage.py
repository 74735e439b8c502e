"""One stage as Trainer sees it: its arguments, its log and its metrics."""

from __future__ import annotations

import copy
import json
import math
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .errors import RecipeError, TrainingError
from .files import disk_errors, write_json, write_text
from .recipe import Stage, Training

if TYPE_CHECKING:
    from .train import HybridTrainer

LOG, METRICS = "log.jsonl", "metrics.json"
# What Trainer reports of an evaluation beside its metrics.
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
# Keys of a stage that are TrainingArguments' own.
_ARGUMENTS = frozenset(Training.model_fields) - {
    *("early_stopping_patience", "early_stopping_threshold", "max_seconds", "layerwise_lr_decay")
}


def arguments_of(asked: TrainingArguments, stage: Stage, folder: Path, evaluates: bool) -> TrainingArguments:
    """The arguments of one stage: those asked for, with the stage's own in their place, made to fit each other.

    Raises:
        RecipeError: a value that it cannot have, or early stopping without evaluations.
    """
    arguments = copy.copy(asked)  # dataclasses.replace would reset the accelerator's state
    for key in _ARGUMENTS:
        value, old = getattr(stage, key), getattr(asked, key)
        if value is None:
            continue
        try:
            setattr(arguments, key, type(old)(value) if isinstance(old, Enum) else value)
        except ValueError:
            raise RecipeError(
                f"stage {stage.name}: {key} cannot be {value}",
                expected=", ".join(str(known.value) for known in type(old)),
            ) from None
    arguments.output_dir = str(folder)
    arguments.learning_rate = max(rule.learning_rate or 0.0 for rule in stage.rules)
    if not evaluates:
        arguments.eval_strategy = IntervalStrategy.NO
    stops = stage.early_stopping_patience is not None
    if stops and arguments.eval_strategy == IntervalStrategy.NO:
        raise RecipeError(
            f"stage {stage.name}: early_stopping_patience needs evaluations",
            mend="give validation data (eval_dataset) and eval_strategy: epoch",
        )
    if arguments.eval_strategy == IntervalStrategy.STEPS and arguments.eval_steps is None:
        arguments.eval_steps = arguments.logging_steps
    if arguments.eval_strategy == IntervalStrategy.NO or arguments.save_strategy == SaveStrategy.NO:
        arguments.load_best_model_at_end = False
    if arguments.load_best_model_at_end or stops or arguments.save_strategy == SaveStrategy.BEST:
        arguments.metric_for_best_model = arguments.metric_for_best_model or "loss"
        if arguments.greater_is_better is None:
            arguments.greater_is_better = not arguments.metric_for_best_model.endswith("loss")
    if arguments.load_best_model_at_end:
        if arguments.save_strategy != SaveStrategy.BEST:
            arguments.save_strategy = SaveStrategy(arguments.eval_strategy.value)
            arguments.save_steps = arguments.eval_steps or arguments.save_steps
        arguments.save_total_limit = arguments.save_total_limit or 1  # the best and the last
    return arguments


class StageLog(TrainerCallback):  # type: ignore[misc]
    """Writes log.jsonl, one object a logged step, and metrics.json."""

    def __init__(self, trainer: HybridTrainer, number: int, stage: Stage) -> None:
        self.trainer, self.stage, self.folder = trainer, stage, trainer.folder_of(number, stage)
        self.metrics: dict[str, Any] = {}
        self.started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the log; of a stage that goes on, what came after its checkpoint is forgotten."""
        self.started = time.perf_counter()
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / METRICS).unlink(missing_ok=True)
        path = self.folder / LOG
        lines = path.read_text("utf-8").splitlines() if path.is_file() and state.global_step else []
        write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A logged step, or an evaluation.

        Raises:
            TrainingError: the model gives no numbers any more.
        """
        logs = logs or {}
        losses = [value for key, value in logs.items() if key.startswith("eval_") and key.endswith("_loss")]
        if any(isinstance(loss, float) and not math.isfinite(loss) for loss in losses):
            raise TrainingError(
                f"stage {self.stage.name}: the loss on validation data is not a number at step {state.global_step}",
                mend="lower the learning rate; look at the last lines of " + str(self.folder / LOG),
            )
        if "loss" in logs and state.is_world_process_zero:
            line = {
                "stage": self.stage.name,
                "step": state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "seconds": round(self.seconds, 3),
            }
            with disk_errors(self.folder), (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line)) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sums the stage up."""
        composition, assembly = self.trainer.composition, self.trainer.assembly
        assert composition is not None
        assert assembly is not None
        self.metrics = {
            "name": self.stage.name,
            "rules": [str(rule) for rule in self.stage.rules],
            "steps": state.global_step,
            "seconds": round(self.seconds, 3),
            "trainable": sum(assembly.parameter(name).numel() for name in composition.names),
            "best_step": state.best_global_step,
            "best_metric": state.best_metric,
            "evaluations": [_evaluation(logged) for logged in state.log_history if _evaluation(logged)],
        }

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.perf_counter() - self.started

    def write_metrics(self) -> None:
        """Writes metrics.json."""
        write_json(self.folder / METRICS, _finite(self.metrics))


def _evaluation(logged: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json says of one evaluation; nothing of other things that were logged."""
    values = {key.removeprefix("eval_"): value for key, value in logged.items() if key.startswith("eval_")}
    kept = {key: value for key, value in values.items() if key not in SPEED}
    return {"step": logged["step"], "epoch": logged.get("epoch"), **kept} if kept else {}


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
