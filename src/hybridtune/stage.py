"""One stage as Trainer sees it: its arguments, its log and its metrics, and what of it a checkpoint has to keep."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
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
    *("early_stopping_patience", "early_stopping_threshold", "max_seconds", "layerwise_lr_decay"),
    "max_tokens_per_micro_batch",
}
# What Trainer looks at for `gradient_checkpointing`: a later name of it, which the old one is only turned into once.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in TrainingArguments.__annotations__
)
# Where trainer_state.json keeps what of a stage Trainer itself forgets.
_KEPT = "hybridtune"


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
    if stage.gradient_checkpointing is not None:
        setattr(arguments, CHECKPOINTING, stage.gradient_checkpointing)
    if stage.num_train_epochs is not None and stage.max_steps is None:
        arguments.max_steps = -1  # none: Trainer would take those asked for instead of the stage's own epochs
    arguments.output_dir = str(folder)
    arguments.logging_nan_inf_filter = False  # a loss that is no number stops the training: see guard.py
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
    return arguments


def is_finished(folder: Path) -> bool:
    """Whether a stage was trained to its end; metrics.json is what is written last."""
    return (folder / METRICS).is_file()


class StageLog(TrainerCallback):  # type: ignore[misc]
    """Writes log.jsonl, one object a logged step, and metrics.json; ends the stage when its time is over.

    It also sees to it that a stage can go on from each of its checkpoints as if it had never stopped: the checkpoint of
    the last step of an epoch, or of the stage, is written after the evaluation that follows this step, and every
    checkpoint carries `state()`.
    """

    def __init__(self, trainer: HybridTrainer, number: int, stage: Stage) -> None:
        self.trainer, self.stage, self.folder = trainer, stage, trainer.folder_of(number, stage)
        self.metrics: dict[str, Any] = {}
        self.started = time.perf_counter()
        self.timed_out = False
        self.engine = ""  # how the rows of a training that goes on were run before
        self._at_boundary = False  # between the last step of an epoch, or of the stage, and the epoch's end
        self._save_due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the log; of a stage that goes on, what came after its checkpoint is forgotten."""
        self.started = time.perf_counter()
        if state.global_step:
            self._go_on(state)
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / METRICS).unlink(missing_ok=True)
        path = self.folder / LOG
        lines = _whole_lines(path) if path.is_file() and state.global_step else []
        write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= state.global_step))

    def _go_on(self, state: TrainerState) -> None:
        """Takes up what a checkpoint has kept: time, the loss not yet logged, and the counters of callbacks."""
        kept = state.stateful_callbacks.get(_KEPT, {})
        self.started -= kept.get("seconds", 0.0)
        self.trainer.micro_batch_halvings = kept.get("micro_batch_halvings", 0)
        self.timed_out = kept.get("timed_out", False)
        self.engine = kept.get("engine", "")
        if kept:
            self.trainer._tr_loss = torch.tensor(kept["loss"], device=self.trainer._tr_loss.device)
            self.trainer._globalstep_last_logged = kept["logged_step"]
        stateful = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, ExportableState)]
        for name in {type(callback).__name__ for callback in stateful}:
            saved = state.stateful_callbacks.get(name, [])
            saved = saved if isinstance(saved, list) else [saved]  # Trainer appends: of several, the last ones count
            same = [callback for callback in stateful if type(callback).__name__ == name]
            for callback, one in zip(reversed(same), reversed(saved), strict=False):
                for key, value in one.get("attributes", {}).items():
                    setattr(callback, key, value)

    def keep_in(self, state: TrainerState) -> None:
        """Puts what Trainer would forget into the state that is about to be saved; the log is on the disk before it."""
        if state.is_world_process_zero and (self.folder / LOG).is_file():
            with (self.folder / LOG).open("rb") as file:
                os.fsync(file.fileno())
        state.stateful_callbacks[_KEPT] = {
            "seconds": round(self.seconds, 3),
            "loss": self.trainer.accelerator.gather(self.trainer._tr_loss).mean().item(),
            "logged_step": self.trainer._globalstep_last_logged,
            "micro_batch_halvings": self.trainer.micro_batch_halvings,
            "timed_out": self.timed_out,
            "engine": self._engine,
            "stopped": self.trainer.control.should_training_stop and state.global_step < state.max_steps,
        }

    @staticmethod
    def has_ended(state: TrainerState) -> bool:
        """Whether the training was over when this state was saved."""
        stopped = state.stateful_callbacks.get(_KEPT, {}).get("stopped", False)
        return bool(stopped or state.global_step >= state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the stage when its time is over; puts a save off until the evaluation that is still to come."""
        budget = getattr(self.stage, "max_seconds", None)
        if budget is not None and state.global_step < state.max_steps and self._is_over(budget):
            self.timed_out = control.should_training_stop = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy == IntervalStrategy.STEPS
            control.should_save = args.save_strategy != SaveStrategy.NO
        self._at_boundary = control.should_training_stop or control.should_epoch_stop or float(state.epoch).is_integer()
        if self._at_boundary:
            self._save_due, control.should_save = control.should_save, False

    def _is_over(self, budget: float) -> bool:
        """Whether the stage's time is over; all processes say what the first one says."""
        over = self.seconds >= budget
        if self.trainer.args.world_size > 1:
            over = bool(broadcast(torch.tensor(float(over), device=self.trainer.args.device)))
        return over

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What was evaluated is saved: it may be the best."""
        if args.load_best_model_at_end:
            if self._at_boundary:
                self._save_due = True
            else:
                control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The save that was put off."""
        control.should_save = control.should_save or self._save_due
        self._at_boundary = self._save_due = False

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
            "stopped": self._why(args, state),
            "seconds": round(self.seconds, 3),
            "trainable": sum(assembly.parameter(name).numel() for name in composition.names),
            "best_step": state.best_global_step,
            "best_metric": state.best_metric,
            "micro_batch_halvings": self.trainer.micro_batch_halvings,
            "engine": self._engine,
            "evaluations": [_evaluation(logged) for logged in state.log_history if _evaluation(logged)],
        }

    @property
    def _engine(self) -> str:
        """How rows were run; where a training that was over is ended, as it was."""
        return str(self.trainer.engine or self.engine or "rows of one length")

    def _why(self, args: TrainingArguments, state: TrainerState) -> str:
        """Why the stage ended after this step."""
        if self.timed_out:
            return "max_seconds"
        if state.global_step >= state.max_steps:
            return "max_steps" if state.max_steps == args.max_steps else "epochs"
        counters = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        patient = all(c.early_stopping_patience_counter < c.early_stopping_patience for c in counters)
        return "callback" if patient else "early_stopping"

    @property
    def seconds(self) -> float:
        """Since the stage began, without what was lost to interruptions."""
        return time.perf_counter() - self.started

    def write_metrics(self) -> None:
        """Writes metrics.json."""
        write_json(self.folder / METRICS, _finite(self.metrics))


def _whole_lines(path: Path) -> list[str]:
    """The lines of a log but for one that a killed process has not written to its end."""
    return [line for line in path.read_text("utf-8", errors="replace").splitlines() if line.endswith("}")]


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
