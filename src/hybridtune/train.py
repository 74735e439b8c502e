"""HybridTrainer: a transformers.Trainer whose train() runs the stages of a strategy.

Every override of Trainer is in this file or, where it is about how a batch is computed, in `update.py`. This is the
only place that sets `requires_grad`, at the start of every stage, from the names that the methods returned.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, has_length
from transformers.utils import PushInProgress

from . import checkpoint, guard, staging
from . import model as models
from . import stage as stages
from .active import Turns
from .anatomy import Anatomy
from .checkpoint import Base
from .compose import Assembly, Composition
from .engine import Caches
from .engine.patch import patch
from .errors import RecipeError, RunError, TrainingError
from .files import read_json
from .origin import base_of, new_of
from .recipe import Stage, Strategy, Training, read_strategy
from .refusals import refuse
from .resolve import resolve
from .stage import METRICS, StageLog
from .tuned import Tuned, save_pretrained
from .update import UpdateTrainer

_NOT_GIVEN = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}


class HybridTrainer(UpdateTrainer):
    """A `transformers.Trainer` that takes `strategy=`.

    Without a strategy it is Trainer, but for how it comes to the gradients of an update (see `UpdateTrainer`).

    Args:
        *args: as Trainer takes them.
        strategy: name of a built-in strategy, a YAML file, a `Strategy`, or a list of stages. Its stages run one
            after the other in `train()`, each with its own optimizer and schedule, into `output_dir/stages/`.
            Learning rate and weight decay of TrainingArguments that are not the library's defaults count as given;
            otherwise every method takes its own.
        base: what the model was loaded from; found out from the model where not given.
        manifest: what the manifests of checkpoints should say besides.
        measure: metrics of the model that need more than a forward of each batch, such as those of texts that it
            writes; taken at every evaluation, beside the loss.
        **kwargs: as UpdateTrainer and Trainer take them; a stage's own `max_tokens_per_micro_batch` comes first.

    Raises:
        RecipeError, PartError, MethodError: the strategy does not fit the model, or other arguments not the strategy.
    """

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        strategy: str | Strategy | Sequence[Stage | dict[str, Any]] | None = None,
        base: Base | None = None,
        manifest: dict[str, Any] | None = None,
        measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._measure = measure
        self.base, self.manifest = base, manifest or {}
        self.assembly: Assembly | None = None
        self.composition: Composition | None = None
        self.strategy: Strategy | None = None
        self.in_place = False
        self.restored_step: int | None = None  # of the last stage: the step whose weights were kept as the best
        self._asked = self.args
        self._log: StageLog | None = None  # of the stage that runs
        self._limit: int | None = None  # of its checkpoints
        self._aside: Path | None = None  # where a checkpoint is being built
        self._take_up(strategy)

    def _take_up(self, strategy: Any) -> None:
        """Finds what is on the model already, resolves the strategy and remembers the base it starts from."""
        there: Tuned | None = getattr(self.model, "_hybridtune", None)
        if strategy is None and there is None:
            return
        asked = there.strategy if strategy is None and there else _read(strategy)
        refuse(self, there, asked)
        if there is not None:
            self.assembly, self.base = there.assembly, self.base or there.base
        else:
            new = new_of(self.model)
            self.assembly, self.base = (
                Assembly(self.model, Anatomy(self.model, new)),
                self.base or base_of(self.model, new),
            )
        given = {
            key: getattr(self.args, key)
            for key in ("learning_rate", "weight_decay")
            if getattr(self.args, key) != _NOT_GIVEN[key]
        } | {"max_tokens_per_micro_batch": self.max_tokens_per_micro_batch}
        self.strategy, _ = resolve(asked, Training(**given), self.assembly, models.width(self.model), {})
        self.in_place = strategy is None
        written = asked if self.in_place else self.strategy
        self.manifest = {"strategy": written.model_dump(mode="json", exclude_none=True)} | self.manifest

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs the stages of the strategy one after the other; without a strategy, trains as Trainer does."""
        if self.strategy is None:
            self._begin_anew()
            try:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            finally:
                self._let_go()
        assert self.assembly is not None
        first, begun = self._resume_at(resume_from_checkpoint)
        self._forget(first, begun)
        output = TrainOutput(0, 0.0, {})
        for number, stage in enumerate(self.strategy.stages):
            log = StageLog(self, number, stage)
            with self._as(stage, log):
                self._begin(number, stage)
                if number < first:
                    checkpoint.read_manifest(log.folder)
                    checkpoint.load_tensors(log.folder, self.assembly)
                    self._tidy(stage, log.folder)
                    continue
                output = super().train(begun if number == first else None, trial, ignore_keys_for_eval)
            self._end(stage, log)
        return output

    def _resume_at(self, asked: str | bool | None) -> tuple[int, str | None]:
        """The stage to go on with and its checkpoint (None: from its start); the stages before it are finished.

        Raises:
            RunError: there is nothing to go on with.
        """
        if not asked:
            return 0, None
        folders = self.stage_folders
        if isinstance(asked, (str, Path)):
            home = Path(asked).resolve().parent
            at = [number for number, folder in enumerate(folders) if folder.resolve() == home]
            if not at and not self.in_place:
                raise RunError(
                    f"resume_from_checkpoint: {asked} is no checkpoint of this strategy",
                    expected=f"a checkpoint-N in {' or '.join(map(str, folders))}",
                )
            return (at or [0])[0], str(asked)
        if not self.can_resume:
            raise RunError(f"resume_from_checkpoint: {folders[0]} has no checkpoint", mend="train from the start")
        for number, folder in enumerate(folders):
            if self.in_place or not stages.is_finished(folder):
                whole = staging.checkpoints(folder)
                return number, str(whole[-1]) if whole else None
        return len(folders), None

    @property
    def can_resume(self) -> bool:
        """Whether an earlier, interrupted training of this strategy has left a finished stage or a whole checkpoint."""
        first = self.stage_folders[0]
        return bool(staging.checkpoints(first)) or (stages.is_finished(first) and not self.in_place)

    def _forget(self, first: int, begun: str | None) -> None:
        """Removes what would be taken for a part of this training if it were interrupted and resumed."""
        if self.is_world_process_zero():
            for number, folder in enumerate(self.stage_folders):
                staging.sweep(folder)
                if number >= first and not self.in_place:
                    (folder / METRICS).unlink(missing_ok=True)
                    staging.forget(folder, staging.saved_at(Path(begun)) if begun and number == first else -1)
        self.accelerator.wait_for_everyone()

    def folder_of(self, number: int, stage: Stage) -> Path:
        """Where a stage writes: `output_dir` itself for a model that came with its adapter, else `stages/` in it."""
        root = Path(self._asked.output_dir)
        return root if self.in_place else root / "stages" / f"{number + 1}-{stage.name}"

    @property
    def stage_folders(self) -> list[Path]:
        """The folders of all stages, in order."""
        assert self.strategy is not None
        return [self.folder_of(number, stage) for number, stage in enumerate(self.strategy.stages)]

    @contextmanager
    def _as(self, stage: Stage, log: StageLog) -> Iterator[None]:
        """Takes the stage's callbacks, and its arguments, off again, also when it is interrupted."""
        before = list(self.callback_handler.callbacks)
        self._log = log
        self.add_callback(log)
        if stage.early_stopping_patience is not None:
            self.add_callback(
                EarlyStoppingCallback(stage.early_stopping_patience, stage.early_stopping_threshold or 0.0)
            )
        try:
            yield
        finally:
            self.callback_handler.callbacks = before
            if getattr(self.args, stages.CHECKPOINTING) and not getattr(self._asked, stages.CHECKPOINTING):
                getattr(self.model, f"{stages.CHECKPOINTING}_disable")()
            self.args = self._asked
            self._log = None
            self._let_go()

    def _begin(self, number: int, stage: Stage) -> None:
        """Puts the stage on the model and gives Trainer its arguments. The seed is set before anything is attached."""
        assert self.assembly is not None
        assert self.base is not None
        self.args = stages.arguments_of(
            self._asked, stage, self.folder_of(number, stage), self.eval_dataset is not None
        )
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None  # see _save_checkpoint
        if self._limit is None and self.args.load_best_model_at_end and not self.in_place:
            self._limit = 1  # the best and the last: _tidy removes what nobody asked to keep
        self.micro_batch_halvings = 0
        self.max_tokens_per_micro_batch = stage.max_tokens_per_micro_batch
        set_seed(self._asked.seed + number)
        self.composition = self.assembly.begin(stage)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._rest(frozenset())
        if self.composition.rotations:
            self.add_callback(Turns(self.composition.rotations, self._asked.seed + number, self._rest))
        self._train_batch_size = self.args.train_batch_size
        self.restored_step = None
        self._begin_anew()
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        if not self.in_place:
            self.model._hybridtune = Tuned.by(str(stage.name), stage, self.assembly, self.base, self._tokenizer)
            self.model.save_pretrained = MethodType(save_pretrained, self.model)
        for callback in self.callback_handler.callbacks:  # else all stages' curves lie over one another
            if isinstance(callback, TensorBoardCallback) and not self.in_place:
                root = os.environ.get("TENSORBOARD_LOGGING_DIR")
                callback.logging_dir = str(Path(root) / f"{number + 1}-{stage.name}") if root else None

    def _rest(self, resting: frozenset[str]) -> None:
        """Trains the stage's parameters but those that rest, which keep neither gradients nor optimizer states."""
        assert self.assembly is not None
        assert self.composition is not None
        states = getattr(self.optimizer, "state", {})
        for name in self.composition.names:
            parameter = self.assembly.parameter(name)
            parameter.requires_grad_(name not in resting)
            if name in resting:
                parameter.grad = None
                states.pop(parameter, None)

    def _end(self, stage: Stage, log: StageLog) -> None:
        """Writes the stage's delta and metrics, and removes checkpoints that nobody asked to keep."""
        self.accelerator.wait_for_everyone()  # another process may still be reading the best checkpoint
        if not self.is_world_process_zero():
            return
        if not self.in_place:
            self._write(log.folder, stage=stage.name)
        log.write_metrics()
        self._tidy(stage, log.folder)

    def _tidy(self, stage: Stage, folder: Path) -> None:
        """Removes the checkpoints of a finished stage that nobody asked to keep: of a single one, all but the best."""
        if not self.is_world_process_zero():
            return
        limit = stage.save_total_limit or self._asked.save_total_limit
        best = f"checkpoint-{read_json(folder / METRICS)['best_step']}"
        if limit is None and not self.in_place:
            staging.forget(folder)
        elif limit == 1 and (folder / best).is_dir():
            staging.thin_out(folder, 1, {best})

    @property
    def _where(self) -> str:
        return f"stage {self._log.stage.name}: " if self._log else ""

    @property
    def _kept(self) -> Caches | None:
        """Nowhere while layers take turns, either, nor without a strategy: who unfreezes what is not known then."""
        return super()._kept if self.composition and not self.composition.rotations else None

    @property
    def _tokenizer(self) -> Any:
        found = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        there: Tuned | None = getattr(self.model, "_hybridtune", None)
        return found or (there.tokenizer if there else None)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, and what `measure` measures beside it: with the model as it will be used, not under autocast."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._measure is not None and metric_key_prefix == "eval":
            with ExitStack() as undo:
                plain = vars(self.model).get("_original_forward")
                if plain is not None:  # accelerate's own computes under autocast
                    patch(self.model, "forward", plain, undo)
                measured = self._measure(self.model)
            output.metrics.update({f"eval_{key}": value for key, value in measured.items()})
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's; of a stage's checkpoints with the same score, as many have on few rows, the one of lower loss."""
        if super()._determine_best_metric(metrics, trial):
            return True
        score = self.args.metric_for_best_model
        if self.in_place or score is None or not self.state.best_global_step:
            return False
        key = score if score.startswith("eval_") else f"eval_{score}"
        logged = [
            one for one in self.state.log_history if one.get("step") == self.state.best_global_step and key in one
        ]
        if not logged or metrics[key] != logged[-1][key]:
            return False
        loss, known = metrics.get("eval_loss"), logged[-1].get("eval_loss")
        if loss is None or known is None or not loss < known:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, before the weights change by it; looks once an update whether it and the loss are numbers.

        Raises:
            TrainingError: they are not.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self._log is not None:
            # fp16 looks for gradients that overflow itself, and skips their update
            scaled = getattr(self.accelerator, "scaler", None) is not None
            checked = self._update_loss if scaled else self._update_loss + torch.as_tensor(norm).to(self._update_loss)
            if not bool(torch.isfinite(checked)):
                raise self._not_a_number()
        return norm

    def _not_a_number(self) -> TrainingError:
        assert self._log is not None
        self.model.eval()
        return guard.not_a_number(
            str(self._log.stage.name),
            self.state.global_step + 1,
            "gradient" if bool(torch.isfinite(self._update_loss)) else "loss",
            guard.name_rows(self._update, self.train_dataset, self._tokenizer),
            guard.culprits(self._update, lambda row: self.compute_loss(self.model, self._prepare_inputs(row))),
            guard.are_numbers(self.model),
            guard.last_good(self.stage_folders[: self.stage_folders.index(self._log.folder) + 1]),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each learning rate and weight decay of the stage's rules."""
        if self.composition is None or self.optimizer is not None:
            return super().create_optimizer(model)  # type: ignore[no-any-return]
        assert self.assembly is not None
        optimizer_class, options = self._optimizer_choice(model)
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(options):
            raise RecipeError(
                f"optim: {self.args.optim} chooses its parameters itself and cannot give rules rates of their own",
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
        optimizer: torch.optim.Optimizer = optimizer_class(groups, **{"lr": self.args.learning_rate, **options})
        self.optimizer = optimizer
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        """The stage's folder; while a checkpoint is being built, the one beside it."""
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Builds a checkpoint aside and renames it whole; only then older ones make way, never the best."""
        if self._log is None:
            super()._save_checkpoint(model, trial)
            return
        folder, step, best = Path(self.args.output_dir), self.state.global_step, self.state.best_global_step
        self._log.keep_in(self.state)
        target = folder / f"checkpoint-{step}"
        with staging.aside(folder, step, first=self.is_world_process_zero()) as self._aside:
            self.accelerator.wait_for_everyone()
            try:
                super()._save_checkpoint(model, trial)
                temporary = self._aside
            finally:
                self._aside = None
            if best is not None and (best == step or (folder / f"checkpoint-{best}").is_dir()):
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.state.save_to_json(str(temporary / target.name / staging.STATE))
                staging.put(temporary)
                staging.thin_out(folder, self._limit, {target.name, f"checkpoint-{best}"})
        self.accelerator.wait_for_everyone()  # another process may want to read it

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:
        """How long the training is: of epochs and steps that a stage has both, what comes first ends it."""
        by_steps: tuple[Any, ...] = super().set_initial_training_values(args, dataloader)
        stage = self._log.stage if self._log else None
        if stage is None or stage.num_train_epochs is None or stage.max_steps is None or not has_length(dataloader):
            return by_steps
        without = copy.copy(args)
        without.max_steps = -1
        *_, steps = by_epochs = super().set_initial_training_values(without, dataloader)
        return by_epochs if steps < stage.max_steps else by_steps

    def _init_training_state(
        self,
        max_steps: Any,
        num_update_steps_per_epoch: Any,
        num_train_epochs: Any,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Finds the best checkpoint also where the folder was moved, and trains no more where training had ended."""
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self._log is None or resume_from_checkpoint is None:
            return epochs, steps
        best = Path(resume_from_checkpoint).with_name(f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return (num_train_epochs, 0) if self._log.has_ended(self.state) else (epochs, steps)

    def _write(self, folder: Path, **more: Any) -> None:
        assert self.assembly is not None
        assert self.base is not None
        checkpoint.write(folder, self.assembly, self.base, **self.manifest, **more)
        if self.base.vocabulary:  # without it the delta cannot be loaded
            self._tokenizer.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves what was trained or changed, where a strategy runs; in a stage no tokenizer that is the base's."""
        if self.assembly is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._asked.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        if folder.parent != self._aside:
            self.model.config.save_pretrained(folder)
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads what `_save` has written."""
        if self.assembly is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._try_on_data()
            checkpoint.load_tensors(Path(resume_from_checkpoint), self.assembly)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint of the stage."""
        if self.assembly is None:
            super()._load_best_model()
        else:
            checkpoint.load_tensors(Path(str(self.state.best_model_checkpoint)), self.assembly)
            self.restored_step = self.state.best_global_step

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads the model as `save_model` writes it; where a strategy runs, from `output_dir/model`, and no more."""
        if self.assembly is None:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        before, self.args = self.args, copy.copy(self._asked)
        self.args.output_dir = str(Path(self._asked.output_dir) / "model")
        kwargs = {"model_name": str(self.hub_model_id).split("/")[-1], "tags": ["hybridtune"], **kwargs}
        try:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        finally:
            self.args = before

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads the model as it is now, in the background; optimizer states stay here."""
        if self.assembly is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        going_on = getattr(self, "push_in_progress", None)
        if self.args.hub_strategy == HubStrategy.END or (
            going_on is not None and not going_on.is_done() and not self.args.hub_always_push
        ):
            return
        self._finish_current_push()
        job = self.push_to_hub(f"Training in progress, step {self.state.global_step}", blocking=False)
        if job is not None:
            self.push_in_progress = PushInProgress([job])


def _read(strategy: Any) -> Strategy:
    stages = isinstance(strategy, Sequence) and not isinstance(strategy, str)
    return read_strategy({"stages": list(strategy)} if stages else strategy)
