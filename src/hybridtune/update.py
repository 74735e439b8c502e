"""UpdateTrainer: a transformers.Trainer whose updates the engine computes, with the exact loss of their batch."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from . import engine, guard, heap
from . import stage as stages
from .engine import Caches, Engine, proof
from .engine.adamw import AdamW
from .engine.batches import is_rows
from .engine.casts import Casts
from .engine.embedding import Tables
from .engine.microbatch import by_length, by_tokens
from .engine.noise import Noise
from .engine.patch import alone
from .errors import HybridtuneWarning, RecipeError
from .loss import LABELS, Loss


class UpdateTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` with another way to the gradients of an update; what an update is stays the user's.

    The loss is that of the whole global batch, however it is split (Trainer's own is too large by the number of
    micro-batches for sequence classification). Rows that Accelerate repeats to fill the last batch of several processes
    do not count. A batch is computed without padding, in pieces where that saves time or memory.

    Args:
        *args: as Trainer takes them.
        engine: "auto" runs rows without padding, and a language model's head on labelled tokens alone, where the model
            proves to give the same so; with a strategy, layers below all that is trained run once a row. On a CPU
            embedding tables get their gradients from `backward` alone, not from `torch.autograd.grad`, and AdamW
            leaves rows alone that never had any; what is written to the gradients of other rows through `.data` is
            not seen, and stays. "off" does as Trainer does.
        caches: what frozen layers give, kept beyond this training for others on the same data.
        max_tokens_per_micro_batch: how many tokens of a batch, padding not counted, are computed at a time. The batch
            of an update, and its loss, stay what they are.
        **kwargs: as Trainer takes them.
    """

    args: TrainingArguments
    compute_loss_func: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None

    def __init__(
        self,
        *args: Any,
        engine: Literal["auto", "off"] = "auto",
        caches: Caches | None = None,
        max_tokens_per_micro_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_odd(engine, max_tokens_per_micro_batch)
        super().__init__(*args, **kwargs)
        # Trainer's hook takes the batch's width for a row's length: see engine/noise.py
        self.neftune_noise_alpha = None
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.micro_batch_halvings = 0
        self._engine_asked = engine
        self._caches = caches or Caches()
        self._filler: Any = None
        self._update: list[Any] = []  # micro-batches of the update that is being computed
        self._added: list[Any] = []  # those of them whose gradients are there
        self._update_loss = torch.tensor(0.0)
        self._logits_wanted = False
        self._chosen_loss: Loss | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing has been tried on the model as it is now, with the weights that are trained now."""
        self.engine: Engine | None = None
        self._tried_on_data = False
        self._choose_loss()
        # DataParallel's replicas have weights of their own, and compiled code its own casts.
        on_gpu = self._engine_asked == "auto" and self.args.device.type != "cpu"
        together = on_gpu and self.args.world_size == 1  # several processes add up gradients as they come, one by one
        mixed = self.accelerator.native_amp and not self._sharded
        self._casts = Casts(self.model, together=together) if mixed else None

    @property
    def _loss(self) -> Loss:
        """What `compute_loss_func` is now, whoever has assigned it."""
        chosen = self._chosen_loss
        return chosen if chosen and self.compute_loss_func == chosen.function else self._choose_loss()

    def _choose_loss(self) -> Loss:
        """Puts what is computed in the place of what was given."""
        chosen, given = self._chosen_loss, self.compute_loss_func
        if chosen and given == chosen.function:
            given = chosen.given
        ours = not self._computes_its_own
        chunks = ours and not self._sharded and self._engine_asked == "auto"
        chosen = Loss(self.model, given, chunks=chunks, guess=ours and self.label_smoother is None)
        self._chosen_loss, self.compute_loss_func = chosen, chosen.function
        return chosen

    def call_model_init(self, trial: Any = None) -> Any:
        """Trainer's; on another model nothing has been tried."""
        made = super().call_model_init(trial)
        if "_chosen_loss" in vars(self):  # Trainer itself is made with a first one
            self.model = made
            self._begin_anew()
        return made

    @property
    def _computes_its_own(self) -> bool:
        """Whether `compute_loss` is a user's: what that gives of two parts of a batch may not be of the whole."""
        return getattr(self.compute_loss, "__func__", None) is not UpdateTrainer.compute_loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; on a CPU with memory that is not given back between steps."""
        fast = self._engine_asked == "auto" and self.args.device.type == "cpu"
        with heap.kept() if fast else nullcontext():
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's; AdamW on a CPU by rows of tables."""
        given = self.optimizer_cls_and_kwargs
        self.optimizer_cls_and_kwargs = given if self.optimizer else self._optimizer_choice(model)
        try:
            made: torch.optim.Optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
        return made

    def _optimizer_choice(self, model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
        """The class of the optimizer, and what it is made with."""
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        found, options = self.get_optimizer_cls_and_kwargs(self.args, self.model if model is None else model)
        by_rows = found is torch.optim.AdamW and self._engine_asked == "auto" and self.args.device.type == "cpu"
        return (AdamW, {**options, "rows": self._rows}) if by_rows and not self._sharded else (found, options)

    @property
    def _tables(self) -> Tables | None:
        """The embedding tables whose gradients are added by rows."""
        return self.engine.tables if self.engine else None

    def _rows(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The rows of a parameter that have a gradient, where this is known."""
        return self._tables.rows(parameter) if self._tables else None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's; of tables only the rows that have a gradient."""
        if self._tables is None:
            return super()._clip_grad_norm(model)
        return self._clipped(self._tables, model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's; of tables only the rows that have a gradient."""
        if grad_norm is None and self._tables is not None:
            grad_norm = self._clipped(self._tables, model, float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def _clipped(self, tables: Tables, model: nn.Module, most: float) -> Any:
        with tables.compact(model.parameters()) as parameters:
            return self.accelerator.clip_grad_norm_(parameters, most)

    def _let_go(self) -> None:
        """Gives back what was kept in memory for a training."""
        self._casts = None
        if self._tables:
            self._tables.forget()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's, after engine and loss have been tried."""
        self._try_on_data()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Trainer's, after engine and loss have been tried."""
        self._try_on_data()
        begun: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        return begun

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
        if batches and "labels" not in batches[0]:
            self._try_loss(batches[0])  # while a model's own names are there
            if self._loss.task is not None:
                batches = [self._loss.task.with_labels(batch) for batch in batches]
                items = self._get_num_items_in_batch(batches, device)
        rows = self._own_rows()
        if not batches or rows is None or not self._exact or not is_rows(batches[-1]):
            return batches, items
        own = {key: value[:rows] for key, value in batches[-1].items()}
        items = self._get_num_items_in_batch([*batches[:-1], own], device)
        if rows == 0:  # the others wait for this process's gradient
            own = self._filler = {key: value[:1] for key, value in batches[-1].items()}
        return [*batches[:-1], own], items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        """Trainer's, as the task counts."""
        if self._loss.task is not None and batch_samples and "labels" in batch_samples[0]:
            counted = self._loss.task.counted
            batch_samples = [{**batch, "labels": counted(batch["labels"])} for batch in batch_samples]
        items: torch.Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
        return items

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

    def _pieces(self, inputs: Any, items: torch.Tensor | int | None) -> list[Any]:
        if not self._can_cut(items):
            self._refuse_to_cut(False)
            return [inputs]
        pieces, limit = [inputs], self.max_tokens_per_micro_batch
        if limit is not None:
            config = getattr(self.model, "config", None)
            pieces = by_tokens(dict(inputs), limit, getattr(config, "is_encoder_decoder", False))
        if self.args.device.type == "cpu" and not (self.engine and self.engine.on):
            pieces = [part for piece in pieces for part in by_length(dict(piece))]
        return [part for piece in pieces for part in guard.cut(piece, 2**self.micro_batch_halvings)]

    def _can_cut(self, items: torch.Tensor | int | None) -> bool:
        """Whether rows can be computed apart."""
        return self._exact and items is not None

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
        warnings.warn(
            f"{self._where}out of memory at step {self.state.global_step + 1}: {rows} rows at a time are halved to "
            f"{-(-rows // 2)}. The batch of an update stays what it was.",
            category=HybridtuneWarning,
            stacklevel=2,
        )

    def _refuse_to_cut(self, possible: bool) -> None:
        """Says where a limit of tokens cannot be kept: the losses of micro-batches would not add up to the batch's.

        Raises:
            RecipeError: there is such a limit.
        """
        if self.max_tokens_per_micro_batch is None or possible:
            return
        reason = self._loss.reason
        raise RecipeError(
            "max_tokens_per_micro_batch: a batch can only be cut where its loss is a sum that hybridtune knows",
            found=f"the model's own loss ({reason})" if reason else "another loss (your own, or Trainer's)",
            mend="leave it out, and lower per_device_train_batch_size instead",
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Trainer's; a language model's head is run on labelled tokens alone, unless somebody wants its logits."""
        if not self._loss.proven:  # outside of a step
            self._try_loss(inputs)
        inputs = self._loss.inputs(inputs)
        with self._scoring(inputs), nullcontext() if self._logits_wanted else self._loss.open(inputs.get("labels")):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _scoring(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Tells the engine which labels the loss is about."""
        return self.engine.scoring(inputs.get("labels")) if self.engine and self._loss.of_labels else nullcontext()

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

    @contextmanager
    def _fast(self, model: nn.Module, inputs: Any) -> Iterator[None]:
        """Runs rows without padding, where the model has shown, at the latest on these, that it gives the same so."""
        with alone(self.model):
            self._try_on(inputs)
            with (
                self.engine.open(self._casts) if self.engine else nullcontext(),
                self._casts.open() if self._casts else nullcontext(),
            ):
                yield

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

    def _try_on(self, rows: Any) -> None:
        """Tries what has not been tried yet. The loss comes first: whether a batch may be cut depends on it."""
        with alone(self.model):
            if any(rows.get(name) is not None for name in LABELS):
                self._try_loss(rows)
            if self.engine is None:
                self._try_engine(rows)

    def _try_loss(self, inputs: Any) -> None:
        """Has a few rows show whether a loss that was not asked for is the model's own."""
        loss = self._loss
        if loss.proven or self._sharded in ("FSDP", "DeepSpeed"):
            return
        with alone(self.model), self.compute_loss_context_manager(), self.accelerator.autocast():
            said = loss.prove(self._prepare_inputs(dict(inputs)))
        self.compute_loss_func = loss.function
        if said:
            warnings.warn(f"engine: {said}", category=HybridtuneWarning, stacklevel=2)

    def _try_engine(self, inputs: Any) -> None:
        """Has a few rows of different lengths show whether the model can run without padding."""
        if self._engine_asked == "off":
            self.engine = Engine(None, engine.OFF)
            return
        if self._sharded:
            self.engine = Engine(None, f"not under {self._sharded} yet")
            warnings.warn(f"engine: {self.engine}", HybridtuneWarning, stacklevel=2)
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
            warnings.warn(f"engine: {self.engine}", HybridtuneWarning, stacklevel=2)

    @property
    def _exact(self) -> bool:
        """Whether rows can be cut from a batch and computed apart."""
        return self._loss.exact and not self._computes_its_own

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

    @property
    def _where(self) -> str:
        """What a warning begins with: the part of the training that it is about."""
        return ""

    @property
    def _kept(self) -> Caches | None:
        """Where hidden states are kept: nowhere while noise is added to the embeddings."""
        return None if self.args.neftune_noise_alpha else self._caches

    @property
    def _not_kept(self) -> str:
        """Why what frozen layers give is not the same every time, where a user might expect it to be kept."""
        return "neftune_noise_alpha adds noise below them" if self.args.neftune_noise_alpha else ""


def _refuse_odd(engine: Any, limit: Any) -> None:
    """What a recipe would refuse.

    Raises:
        RecipeError: arguments that cannot be.
    """
    if engine not in ("auto", "off"):
        raise RecipeError("engine: is not 'auto' or 'off'", found=repr(engine))
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0):
        raise RecipeError(
            "max_tokens_per_micro_batch: is no number of tokens", found=repr(limit), expected="a whole number above 0"
        )
