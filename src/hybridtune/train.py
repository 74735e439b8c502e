"""HybridTrainer: a transformers.Trainer whose train() runs the stages of a strategy.

Every override of Trainer is in this file. It is the only place that sets `requires_grad`, at the start of every stage,
from the names that the methods returned.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, has_length
from transformers.utils import PushInProgress

from . import checkpoint, engine, guard, staging, tasks
from . import model as models
from . import stage as stages
from .active import Turns
from .anatomy import Anatomy
from .checkpoint import Base
from .compose import Assembly, Composition
from .engine import Caches, Engine, proof, vocabulary
from .engine.batches import is_rows
from .engine.casts import Casts
from .engine.microbatch import by_length, by_tokens
from .engine.noise import Noise
from .engine.vocabulary import Vocabulary
from .errors import RecipeError, RunError, TrainingError
from .files import read_json
from .origin import base_of, new_of
from .recipe import Stage, Strategy, Training, read_strategy
from .refusals import refuse
from .resolve import resolve
from .stage import METRICS, StageLog
from .tuned import Tuned, save_pretrained

_NOT_GIVEN = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}


class HybridTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that takes `strategy=`.

    Without a strategy it is Trainer, with one difference: the loss is that of the whole global batch, however it is
    split (Trainer's own is too large by the number of micro-batches for sequence classification). Rows that Accelerate
    repeats to fill the last batch of several processes do not count.

    Args:
        *args: as Trainer takes them.
        strategy: name of a built-in strategy, a YAML file, a `Strategy`, or a list of stages. Its stages run one
            after the other in `train()`, each with its own optimizer and schedule, into `output_dir/stages/`.
            Learning rate and weight decay of TrainingArguments that are not the library's defaults count as given;
            otherwise every method takes its own.
        base: what the model was loaded from; found out from the model where not given.
        manifest: what the manifests of checkpoints should say besides.
        engine: "auto" runs rows without padding, layers below all that is trained once a row, and a language model's
            head on labelled tokens alone, where the model proves to give the same so; "off" as Trainer does.
        caches: what frozen layers give, kept beyond this training for others on the same data.
        measure: metrics of the model that need more than a forward of each batch, such as those of texts that it
            writes; taken at every evaluation, beside the loss.
        max_tokens_per_micro_batch: how many tokens of a batch, padding not counted, are computed at a time; a stage's
            own comes first. The batch of an update, and its loss, stay what they are.
        **kwargs: as Trainer takes them.

    Raises:
        RecipeError, PartError, MethodError: the strategy does not fit the model, or other arguments not the strategy.
    """

    args: TrainingArguments
    compute_loss_func: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        strategy: str | Strategy | Sequence[Stage | dict[str, Any]] | None = None,
        base: Base | None = None,
        manifest: dict[str, Any] | None = None,
        engine: Literal["auto", "off"] = "auto",
        caches: Caches | None = None,
        max_tokens_per_micro_batch: int | None = None,
        measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.neftune_noise_alpha = (
            None  # Trainer's hook takes the batch's width for a row's length: see engine/noise.py
        )
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self._measure = measure
        self._forget_engine()
        self._engine_asked = engine
        self._caches = caches or Caches()
        self._casts: Casts | None = None  # of the stage that runs under autocast
        self.base, self.manifest = base, manifest or {}
        self.assembly: Assembly | None = None
        self.composition: Composition | None = None
        self.strategy: Strategy | None = None
        self.in_place = False
        self.restored_step: int | None = None  # of the last stage: the step whose weights were kept as the best
        self.micro_batch_halvings = 0
        self._asked = self.args
        self._filler: Any = None
        self._log: StageLog | None = None  # of the stage that runs
        self._limit: int | None = None  # of its checkpoints
        self._aside: Path | None = None  # where a checkpoint is being built
        self._update: list[Any] = []  # micro-batches of the update that is being computed
        self._added: list[Any] = []  # those of them whose gradients are there
        self._update_loss = torch.tensor(0.0)
        self._logits_wanted = False
        writes = getattr(getattr(self.compute_loss_func, "__self__", None), "writes", False)
        self._whole_loss = self.compute_loss_func if writes else None  # where it cannot be computed in chunks
        if writes:
            self.compute_loss_func = self._loss_in_chunks() or self._whole_loss
        elif self.compute_loss_func is None and self.label_smoother is None:
            self.compute_loss_func = _exact_loss(self.model) or self._loss_in_chunks()
        self._loss_asked = self.compute_loss_func
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
            self._forget_engine()
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
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
            self._log = self._casts = None

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
        # DataParallel's replicas have weights of their own, and compiled code its own casts
        if self.accelerator.native_amp and not self._sharded:
            self._casts = Casts(self.model)
        if self.composition.rotations:
            self.add_callback(Turns(self.composition.rotations, self._asked.seed + number, self._rest))
        self._train_batch_size = self.args.train_batch_size
        self.restored_step = None
        self._forget_engine()
        self.compute_loss_func = self._loss_asked
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
    def _tokenizer(self) -> Any:
        found = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        there: Tuned | None = getattr(self.model, "_hybridtune", None)
        return found or (there.tokenizer if there else None)

    @property
    def _task(self) -> tasks.Task | None:
        """The task whose loss is computed."""
        task = getattr(self.compute_loss_func, "__self__", None)
        return task if isinstance(task, tasks.Task) else None

    @property
    def _exact(self) -> bool:
        """Whether the loss is ours: a sum over rows, over the items of the global batch. Rows can be cut from it."""
        return self.compute_loss_func == self._token_loss or self._task is not None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Leaves out the rows that Accelerate repeats to fill the epoch's last batch of several processes."""
        batches, items = self._own_batches(epoch_iterator, num_batches, device)
        self._update, self._added, self._update_loss = batches, [], torch.zeros((), device=device)
        return batches, items

    def _own_batches(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self._task is not None and "labels" not in batches[0]:
            batches = [self._task.with_labels(batch) for batch in batches]
            items = self._get_num_items_in_batch(batches, device)
        rows = self._own_rows()
        if not batches or rows is None or not self._exact or not is_rows(batches[-1]):
            return batches, items
        own = {key: value[:rows] for key, value in batches[-1].items()}
        items = self._get_num_items_in_batch([*batches[:-1], own], device)
        if rows == 0:  # the others wait for this process's gradient
            own = self._filler = {key: value[:1] for key, value in batches[-1].items()}
        return [*batches[:-1], own], items

    def _own_rows(self) -> int | None:
        """How many rows of the epoch's last batch are this process's own; None for other batches."""
        loader = self.callback_handler.train_dataloader
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, BatchSamplerShard) or sampler.num_processes == 1 or sampler.batch_size is None:
            return None
        if not sampler.even_batches or sampler.drop_last or not self.accelerator.gradient_state.end_of_dataloader:
            return None
        share = loader.total_batch_size // sampler.num_processes
        left = len(loader.dataset) % loader.total_batch_size
        return min(max(left - sampler.process_index * share, 0), share) if left else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Computes a batch in pieces where that saves time or where memory does not suffice for the whole.

        No piece has more than `max_tokens_per_micro_batch`. On the CPU padding costs as much as tokens do: there the
        pieces are rows of similar length. Out of memory, a micro-batch is halved, and what it and those before it in
        the same update have added is computed again. All need the exact loss: where Trainer's or the user's own is
        used, a batch stays whole.

        Raises:
            RuntimeError: out of memory, with no way to halve the micro-batch.
        """
        if inputs is self._filler:
            num_items_in_batch = torch.tensor(float("inf"))  # adds nothing
        with self._fast(model, inputs), self._noise():
            return self._step(model, inputs, num_items_in_batch)

    def _step(self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        again: list[Any] = []
        while True:
            pieces = self._pieces(inputs, num_items_in_batch)
            try:
                for before in again:
                    self._add(model, self._pieces(before, num_items_in_batch), num_items_in_batch)
                loss = self._add(model, pieces, num_items_in_batch)
                break
            except RuntimeError as error:
                largest = max(map(guard.rows_in, pieces))
                alone = self.args.world_size == 1  # several processes would have to halve together
                possible = alone and largest > 1 and self._can_cut(num_items_in_batch)
                if not guard.is_out_of_memory(error) or not possible:
                    raise
            again = list(self._added)
            self._halve(model, largest)
        self._added.append(inputs)
        self._update_loss = self._update_loss + loss
        return loss

    @property
    def _kept(self) -> Caches | None:
        """Where hidden states are kept: nowhere while layers take turns or noise is added to the embeddings."""
        same = self.composition and not self.composition.rotations and not self.args.neftune_noise_alpha
        return self._caches if same else None

    @property
    def _not_kept(self) -> str:
        """Why what frozen layers give is not the same every time, where a user might expect it to be kept."""
        return "neftune_noise_alpha adds noise below them" if self.args.neftune_noise_alpha else ""

    def _noise(self) -> AbstractContextManager[None]:
        """NEFTune's, while a step is computed: evaluations know none.

        Raises:
            RecipeError: the model runs in copies in one process.
        """
        alpha = self.args.neftune_noise_alpha
        if alpha and self.args.n_gpu > 1:
            raise RecipeError(
                "neftune_noise_alpha: not under DataParallel, whose copies of a model share their hooks",
                mend="start a process for each GPU with torchrun, or show the process one of them",
            )
        return Noise(self.accelerator.unwrap_model(self.model), alpha).open() if alpha else nullcontext()

    @property
    def _sharded(self) -> str:
        """Why this trainer's models run in copies or pieces of their own, which hooks on the model do not reach."""
        found = {
            "DataParallel": self.args.n_gpu > 1,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "torch_compile": self.args.torch_compile,
            "reentrant gradient checkpointing": (getattr(self.args, f"{stages.CHECKPOINTING}_kwargs") or {}).get(
                "use_reentrant"
            ),
        }
        return next((name for name, here in found.items() if here), "")

    def _loss_in_chunks(self) -> Any:
        """The loss of language models, until a batch shows that a model's own differs; None where it cannot be."""
        possible = not self._sharded and self._engine_asked == "auto" and vocabulary.head_of(self.model) is not None
        return self._token_loss if possible else None

    def _token_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        assert self.vocabulary is not None
        return self.vocabulary.loss(outputs, labels, num_items_in_batch)

    def _forget_engine(self) -> None:
        """Nothing has been tried on the model as it is now."""
        self.engine: Engine | None = None
        self.vocabulary: Vocabulary | None = None
        self._tried_on_data = False

    def _try_on_data(self) -> None:
        """Tries engine and loss on rows of the training data, before a checkpoint is loaded or a batch is seen.

        What comes of it is then the same wherever a training goes on. Rows that cannot be had by number are left to the
        first batch.
        """
        if self._tried_on_data:
            return
        self._tried_on_data = True
        checkpointing = getattr(self.args, stages.CHECKPOINTING) and not self._sharded
        if checkpointing and hasattr(self.model, "_require_grads_hook"):
            # a gradient of the embeddings is only for reentrant checkpoints, and would lead through all frozen layers
            self.model.disable_input_require_grads()
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        rows = proof.rows_of_dataset(self.train_dataset, collate)
        if rows is not None:
            self._try_on(rows)
        self._refuse_to_cut(self._exact)

    def _refuse_to_cut(self, possible: bool) -> None:
        """Says where a limit of tokens cannot be kept: the losses of micro-batches would not add up to the batch's.

        Raises:
            RecipeError: there is such a limit.
        """
        if self.max_tokens_per_micro_batch is None or possible:
            return
        reason = self.vocabulary.reason if self.vocabulary else ""
        raise RecipeError(
            "max_tokens_per_micro_batch: a batch can only be cut where its loss is a sum that hybridtune knows",
            found=f"the model's own loss ({reason})" if reason else "another loss (your own, or Trainer's)",
            mend="leave it out, and lower per_device_train_batch_size instead",
        )

    def _try_on(self, rows: Any) -> None:
        """Tries what has not been tried yet. The loss comes first: whether a batch may be cut depends on it."""
        if self.vocabulary is None and rows.get("labels") is not None:
            self._try_vocabulary(rows)
        if self.engine is None:
            self._try_engine(rows)

    def _try_vocabulary(self, inputs: Any) -> None:
        """Goes back to Trainer's loss (or the task's), and says so, where a few rows show that a model's is another."""
        head = vocabulary.head_of(self.model) if self.compute_loss_func == self._token_loss else None
        if head is None:
            return
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            self.vocabulary = vocabulary.start(self.model, head, self._prepare_inputs(dict(inputs)))
        if not self.vocabulary.on:
            self.compute_loss_func = self._whole_loss
            warnings.warn(f"engine: logits of all tokens at once: {self.vocabulary.reason}", stacklevel=2)

    def _try_engine(self, inputs: Any) -> None:
        """Has a few rows of different lengths show whether the model can run without padding."""
        if self._engine_asked == "off":
            self.engine = Engine(None, "engine: off")
            return
        if self._sharded:
            self.engine = Engine(None, f"not under {self._sharded} yet")
            warnings.warn(f"engine: {self.engine}", stacklevel=2)
            return
        rows = proof.rows_of_batch(dict(inputs))
        if rows is None:
            return
        try:
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                self.engine = engine.start(self.model, self._prepare_inputs(rows), self._kept, self._not_kept)
        except RuntimeError as error:
            if not guard.is_out_of_memory(error):
                raise
            self.engine = Engine(None, "memory does not suffice to try it")
        if self.engine.reason:
            warnings.warn(f"engine: {self.engine}", stacklevel=2)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Trainer's; a language model's head is run on labelled tokens alone, unless somebody wants its logits."""
        if self.vocabulary is None:  # outside of a step
            self._try_vocabulary(inputs)
        if self._task is not None:
            inputs = self._task.with_labels(inputs)
        if self._whole_loss is not None and self.compute_loss_func == self._whole_loss:
            inputs = vocabulary.complete(self.model, inputs)
        if self.vocabulary is None or self.compute_loss_func != self._token_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = vocabulary.complete(self.model, inputs)
        with nullcontext() if self._logits_wanted else self.vocabulary.open(inputs["labels"]):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @contextmanager
    def _fast(self, model: nn.Module, inputs: Any) -> Iterator[None]:
        """Runs rows without padding, where the model has shown, at the latest on these, that it gives the same so."""
        self._try_on(inputs)
        with (
            self.engine.open(self._casts) if self.engine and self._engine_asked == "auto" else nullcontext(),
            self._casts.open() if self._casts else nullcontext(),
        ):
            yield

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Trainer's, without padding."""
        self._logits_wanted = not prediction_loss_only
        try:
            with self._fast(model, inputs):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._logits_wanted = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, and what `measure` measures beside it."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._measure is not None and metric_key_prefix == "eval":
            output.metrics.update({f"eval_{key}": value for key, value in self._measure(self.model).items()})
        return output

    def _can_cut(self, items: torch.Tensor | int | None) -> bool:
        """Whether rows can be computed apart."""
        return self._exact and items is not None

    def _pieces(self, inputs: Any, items: torch.Tensor | int | None) -> list[Any]:
        if not self._can_cut(items):
            self._refuse_to_cut(False)
            return [inputs]
        pieces, limit = [inputs], self.max_tokens_per_micro_batch
        if limit is not None:
            pieces = by_tokens(dict(inputs), limit)
        if self.args.device.type == "cpu" and not (self.engine and self.engine.on):
            pieces = [part for piece in pieces for part in by_length(dict(piece))]
        return [part for piece in pieces for part in guard.cut(piece, 2**self.micro_batch_halvings)]

    def _add(self, model: nn.Module, pieces: list[Any], items: torch.Tensor | int | None) -> torch.Tensor:
        """Adds the gradients of all pieces of a micro-batch to those that are there; returns its loss."""
        losses = []
        for number, piece in enumerate(pieces, 1):
            with nullcontext() if number == len(pieces) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece, items))
        return torch.stack(losses).sum()

    def _halve(self, model: nn.Module, rows: int) -> None:
        """Halves the micro-batch from now on and takes back the gradients of this update."""
        self.micro_batch_halvings += 1
        model.zero_grad()
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        stage = f"stage {self._log.stage.name}: " if self._log else ""
        warnings.warn(
            f"{stage}out of memory at step {self.state.global_step + 1}: {rows} rows at a time are halved to "
            f"{-(-rows // 2)}. The batch of an update stays what it was.",
            stacklevel=2,
        )

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
        optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, self.model
        )
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
        self._try_on_data()
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
        self._try_on_data()
        if self.assembly is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
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


def _exact_loss(model: nn.Module) -> Any:
    """The loss of the whole global batch for a model whose task we know, or None: Trainer's own."""
    found = tasks.for_model(model)
    if found is None:
        return None
    task = found()
    task.ready(model)
    return task.loss
