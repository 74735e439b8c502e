"""HybridTrainer: a transformers.Trainer whose train() runs the stages of a strategy.

Every override of Trainer is in this file. It is the only place that sets `requires_grad`, at the start of every stage,
from the names that the methods returned.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import TrainOutput

from . import checkpoint, tasks
from . import model as models
from .anatomy import Anatomy
from .checkpoint import Base
from .compose import Assembly, Composition, resolve
from .engine.microbatch import by_length
from .errors import RecipeError
from .files import write_json
from .recipe import Stage, Strategy, Training, load_strategy

# Keys of a stage that are TrainingArguments' own.
_ARGUMENTS = frozenset(Training.model_fields) - {"early_stopping_patience", "early_stopping_threshold"}
_NOT_GIVEN = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}


class HybridTrainer(Trainer):
    """A `transformers.Trainer` that takes `strategy=`.

    Without a strategy it is Trainer, with one difference: the loss is that of the whole global batch, however it is
    split (Trainer's own is too large by the number of micro-batches for sequence classification).

    Args:
        *args: as Trainer takes them.
        strategy: name of a built-in strategy, a YAML file, a `Strategy`, or a list of stages. Its stages run one
            after the other in `train()`, each with its own optimizer and schedule, into `output_dir/stages/`.
            Learning rate and weight decay of TrainingArguments that are not the library's defaults count as given;
            otherwise every method takes its own.
        base: what the model was loaded from; found out from the model where not given.
        manifest: what the manifests of checkpoints should say besides.
        **kwargs: as Trainer takes them.

    Raises:
        RecipeError, PartError, MethodError: the strategy does not fit the model.
    """

    def __init__(
        self,
        *args: Any,
        strategy: str | Strategy | Sequence[Stage | dict[str, Any]] | None = None,
        base: Base | None = None,
        manifest: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.base, self.manifest = base, manifest or {}
        self.assembly: Assembly | None = None
        self.composition: Composition | None = None
        self.strategy: Strategy | None = None
        self._asked = self.args
        if self.compute_loss_func is None and self.label_smoother is None:
            task = tasks.for_model(type(self.model).__name__)
            if task is not None:
                self.compute_loss_func = task().loss
        self._take_up(strategy)

    def _take_up(self, strategy: Any) -> None:
        """Finds what is on the model already, resolves the strategy and remembers the base it starts from."""
        there = getattr(self.model, "_hybridtune", None)
        if strategy is None and there is None:
            return
        self.assembly = there.assembly if there else Assembly(self.model, Anatomy(self.model, outside_base(self.model)))
        if self.base is None:
            self.base = there.base if there else base_of(self.model, self.assembly.anatomy.new)
        asked = there.strategy if strategy is None and there else _read(strategy)
        given = {
            key: getattr(self.args, key)
            for key in ("learning_rate", "weight_decay")
            if getattr(self.args, key) != _NOT_GIVEN[key]
        }
        self.strategy, _ = resolve(
            asked, Training(**given), self.assembly.anatomy, models.width(self.model), stage_defaults={}
        )
        self.in_place = strategy is None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs the stages of the strategy one after the other; without a strategy, trains as Trainer does."""
        if self.strategy is None:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        for number, stage in enumerate(self.strategy.stages):
            with _StageLog(self, number, stage) as log:
                self._begin(number, stage, log)
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self._end(stage, log)
        return output

    def folder_of(self, number: int, stage: Stage) -> Path:
        """Where a stage writes: `output_dir` itself for a model that came with its adapter, else `stages/` in it."""
        root = Path(self._asked.output_dir)
        return root if self.in_place else root / "stages" / f"{number + 1}-{stage.name}"

    @property
    def stage_folders(self) -> list[Path]:
        """The folders of all stages, in order."""
        assert self.strategy is not None
        return [self.folder_of(number, stage) for number, stage in enumerate(self.strategy.stages)]

    def _begin(self, number: int, stage: Stage, log: _StageLog) -> None:
        """Puts the stage on the model and gives Trainer its arguments. The seed is set before anything is attached."""
        assert self.assembly is not None
        set_seed(self._asked.seed + number)
        if self.accelerator.mixed_precision != "no":  # a stage before has wrapped forward in autocast
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.composition = self.assembly.begin(stage)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for name in self.composition.names:
            self.assembly.parameter(name).requires_grad_(True)
        self.args = _stage_arguments(self._asked, stage, self.folder_of(number, stage), self.eval_dataset is not None)
        self._train_batch_size = self.args.train_batch_size
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.add_callback(log)
        if stage.early_stopping_patience is not None:
            self.add_callback(
                EarlyStoppingCallback(stage.early_stopping_patience, stage.early_stopping_threshold or 0.0)
            )

    def _end(self, stage: Stage, log: _StageLog) -> None:
        """Takes the stage's callbacks off, writes its delta, and removes checkpoints that nobody asked to keep."""
        self.remove_callback(log)
        if stage.early_stopping_patience is not None:
            self.remove_callback(EarlyStoppingCallback)
        if not self.is_world_process_zero():
            return
        if not self.in_place:
            self._write(log.folder, stage=stage.name)
            if stage.save_total_limit is None and self._asked.save_total_limit is None:
                for old in log.folder.glob("checkpoint-*"):
                    shutil.rmtree(old)
        log.write_metrics()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """On the CPU, where padding costs as much as tokens do, computes a batch in pieces of similar length.

        Needs the exact loss: where Trainer's own is used, a batch stays whole.
        """
        cut = self.args.device.type == "cpu" and self.compute_loss_func is not None and num_items_in_batch is not None
        pieces = by_length(dict(inputs)) if cut else [inputs]
        losses = []
        for number, piece in enumerate(pieces, 1):
            with nullcontext() if number == len(pieces) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each learning rate and weight decay of the stage's rules."""
        if self.composition is None or self.optimizer is not None:
            return super().create_optimizer(model)
        assert self.assembly is not None
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(options):
            raise RecipeError(
                f"optim: {self.args.optim} chooses its parameters itself and cannot train rules with rates of their own",
                expected="an optimizer such as adamw_torch, adamw_torch_fused, sgd or adafactor",
            )
        groups = [
            {
                "params": [self.assembly.parameter(name) for name in group.names],
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in self.composition.groups
        ]
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _write(self, folder: Path, **more: Any) -> None:
        assert self.assembly is not None and self.base is not None
        checkpoint.write(folder, self.assembly, self.base, **self.manifest, **more)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves what was trained or changed, where a strategy runs; checkpoints in a stage do without the tokenizer."""
        if self.assembly is None:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return None
        folder = Path(output_dir or self._asked.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        if not folder.name.startswith("checkpoint-"):
            self.model.config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads what `_save` has written."""
        if self.assembly is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return checkpoint.load_tensors(Path(resume_from_checkpoint), self.assembly)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint of the stage."""
        if self.assembly is None:
            return super()._load_best_model()
        return checkpoint.load_tensors(Path(str(self.state.best_model_checkpoint)), self.assembly)


class _StageLog(TrainerCallback):
    """Writes log.jsonl, one object a logged step, and keeps what was evaluated, for metrics.json."""

    def __init__(self, trainer: HybridTrainer, number: int, stage: Stage) -> None:
        self.trainer, self.stage, self.folder = trainer, stage, trainer.folder_of(number, stage)
        self.evaluations: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {}

    def __enter__(self) -> _StageLog:
        self.started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A logged step, or an evaluation."""
        logs = logs or {}
        if "loss" in logs and state.is_world_process_zero:
            line = {
                "stage": self.stage.name,
                "step": state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "seconds": round(self.seconds, 3),
            }
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        values = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if values:
            speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
            self.evaluations.append(
                {"step": state.global_step, "epoch": state.epoch, **{k: v for k, v in values.items() if k not in speed}}
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sums the stage up."""
        composition, assembly = self.trainer.composition, self.trainer.assembly
        assert composition is not None and assembly is not None
        self.metrics = {
            "name": self.stage.name,
            "rules": [str(rule) for rule in self.stage.rules],
            "steps": state.global_step,
            "seconds": round(self.seconds, 3),
            "trainable": sum(assembly.parameter(name).numel() for name in composition.names),
            "best_step": state.best_global_step,
            "best_metric": state.best_metric,
            "evaluations": self.evaluations,
        }

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.perf_counter() - self.started

    def write_metrics(self) -> None:
        """Writes metrics.json."""
        write_json(self.folder / "metrics.json", self.metrics)


def _read(strategy: Any) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str):
        return load_strategy(strategy)
    return Strategy(name="custom", stages=list(strategy))


def _stage_arguments(asked: TrainingArguments, stage: Stage, folder: Path, evaluates: bool) -> TrainingArguments:
    """The arguments of one stage: those asked for, with the stage's own in their place."""
    changes: dict[str, Any] = {key: value for key in _ARGUMENTS if (value := getattr(stage, key)) is not None}
    changes["output_dir"] = str(folder)
    changes["learning_rate"] = max(rule.learning_rate or 0.0 for rule in stage.rules)
    if not evaluates:
        changes |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if changes.get("save_strategy") == "no" or changes.get("eval_strategy") == "no":
        changes["load_best_model_at_end"] = False
    elif changes.get("load_best_model_at_end") and changes.get("eval_strategy") in ("steps", "epoch"):
        changes |= {
            "save_strategy": changes["eval_strategy"],
            "save_steps": changes.get("eval_steps", asked.save_steps),
        }
    if "save_total_limit" not in changes and asked.save_total_limit is None and changes.get("load_best_model_at_end"):
        changes["save_total_limit"] = 1  # the best and the last
    if changes.get("max_steps"):
        changes.setdefault("num_train_epochs", asked.num_train_epochs)
    arguments = copy.copy(asked)  # dataclasses.replace would reset the accelerator's state
    for key, value in changes.items():
        old = getattr(asked, key)
        setattr(arguments, key, type(old)(value) if isinstance(old, Enum) else value)
    return arguments


def outside_base(model: PreTrainedModel) -> list[str]:
    """Names of the parameters outside the base model: taken for new where it is not known what the checkpoint had."""
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(prefix)] if any(n.startswith(prefix) for n in names) else []


def base_of(model: PreTrainedModel, new: Sequence[str], name: str | None = None) -> Base:
    """Describes the model that a user has loaded by himself, so that a checkpoint can name it."""
    task = tasks.for_model(type(model).__name__)
    config = {
        key: getattr(model.config, key)
        for key in ("num_labels", "id2label", "label2id", "problem_type")
        if getattr(model.config, key, None) is not None
    }
    return Base(
        model.name_or_path, None, models.fingerprint(model, new), task.auto_class if task else "AutoModel", config
    )
