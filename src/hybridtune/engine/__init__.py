"""The fast way through a model: without padding, and checked on the model that it is for before it is used."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import PartError, first_line
from ..layers import find_stacks
from . import decoder, dropout, lora, norms, proof, vocabulary
from .batches import without_labels
from .casts import Casts, autocast_type, compute_type
from .embedding import Tables
from .frozen import Caches as Caches
from .frozen import Frozen, Weights
from .frozen import depth as lowest_trained
from .patch import in_evaluation
from .seam import Seam

# Of logits and hidden states. In half precision roundings add up over the layers as a random walk, to a few of them; a
# wrong mask changes a good part of what a trained body gives.
WHOLE, ROUNDINGS = 1e-4, 10
Ask = Callable[[], torch.Tensor]
OFF = "engine: off"  # the reason where it was asked for
OURS = ("hybridtune", "transformers", "peft", "accelerate", "torch")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Engine:
    """How a model is run.

    Attributes:
        seam: through which it runs without padding; None where it runs as it is.
        reason: why there is none, or why what frozen layers give is not kept.
        modules: LoRA's layers, computed in a faster way where their state allows it when the engine is opened.
        draws: whether dropout on a CPU draws faster.
        tables: embeddings whose gradients are added in place.
        norms: modules that one of torch's kernels stands for, on a GPU.
    """

    seam: Seam | None
    reason: str = ""
    modules: tuple[nn.Module, ...] = ()
    draws: bool = False
    tables: Tables | None = None
    norms: tuple[nn.Module, ...] = ()

    @contextmanager
    def open(self, casts: Casts | None = None) -> Iterator[None]:
        """For forwards and their backwards.

        Args:
            casts: of linear layers, where they are computed in another type than they have.
        """
        with ExitStack() as undo:
            if self.seam:
                undo.enter_context(self.seam.open())
            lora.speed_up(self.modules, undo, casts)
            norms.speed_up(self.norms, undo)
            if torch.is_grad_enabled():
                if self.draws:
                    undo.enter_context(dropout.fast())
                if self.tables:
                    self.tables.open(undo)
            yield

    def scoring(self, labels: torch.Tensor | None) -> AbstractContextManager[None]:
        """For forwards that are not given the labels that a loss will be computed with."""
        return self.seam.scoring(labels) if self.seam else nullcontext()

    def __str__(self) -> str:
        if self.seam is None:
            return f"rows with padding: {self.reason}"
        kept = self.seam.frozen
        more = f"; {kept.depth} frozen layers computed once a row, without dropout" if kept else ""
        return f"rows without padding{more}" + (f"; {self.reason}" if self.reason else "")

    @property
    def on(self) -> bool:
        """Whether rows run without padding."""
        return self.seam is not None


def start(model: nn.Module, batch: dict[str, Any], caches: Caches | None = None, changing: str = "") -> Engine:
    """Builds the engine of a model, and has it prove itself: logits of a few rows, packed against padded.

    Args:
        model: with all that is on it, and with gradients required where it is trained.
        batch: a few rows of several lengths (see `proof`), on the model's device.
        caches: where hidden states below the lowest trained layer are kept; None where they are not.
        changing: why they are not the same every time, which is said where there are such layers.
    """
    modules = tuple(module for module in model.modules() if lora.knows(module))
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    engine = Engine(
        None,
        modules=modules,
        draws=on_cpu,
        tables=Tables(model) if on_cpu and not several else None,
        norms=norms.find(model) if norms.pays(device) else (),
    )
    config = getattr(model, "config", None)
    skips = [name for name in LAYERDROP if getattr(config, name, 0)]
    if skips:
        return replace(engine, reason=f"it leaves out layers at random ({skips[0]})")
    try:
        seam = Seam(model, find_stacks(dict(model.named_modules())))
    except PartError as error:
        return replace(engine, reason=error.problem)
    hook = _foreign_hook(seam)
    if hook:
        return replace(engine, reason=f"a hook would see rows without padding: {hook}")
    engine = replace(engine, seam=seam)
    with in_evaluation(model):
        with torch.no_grad():
            ask = _question(model, seam, batch)
            padded = ask()
            problem = _check(engine, ask, padded)
            if problem and engine.norms:
                engine = replace(engine, norms=())
                problem = _check(engine, ask, padded)
        if problem:
            return replace(engine, seam=None, reason=problem)
        if changing and _lowest_trained(seam, ask)[0]:
            return replace(engine, reason=f"hidden states of frozen layers are not kept: {changing}")
        seam.frozen = _frozen(model, ask, seam, caches) if caches else None
        if seam.frozen is None:
            return engine
        with torch.no_grad():
            problem = _check(engine, ask, padded)
            if not problem:
                with seam.open():
                    seam.frozen.least = seam.least(batch)
                return engine
    seam.frozen = None
    return replace(engine, reason=f"hidden states of frozen layers are not kept: {problem}")


def _foreign_hook(seam: Seam) -> str:
    """A hook on a layer, or in one, that comes neither from us nor from what we are built on.

    A user's own method says with PER_TOKEN that its hooks look at one token at a time.
    """
    for layer in (layer for stack in seam.stacks for layer in stack.layers):
        for module in layer.modules():
            tables = (getattr(module, name) for name in HOOKS)
            for hook in (hook for table in tables for hook in table.values()):
                function = getattr(hook, "func", hook)  # of a partial
                where = getattr(function, "__module__", None) or ""
                if where.partition(".")[0] not in OURS and not getattr(sys.modules.get(where), "PER_TOKEN", False):
                    return f"{getattr(function, '__qualname__', function)} on {type(module).__name__}"
    return ""


def _frozen(model: nn.Module, ask: Ask, seam: Seam, caches: Caches) -> Frozen | None:
    """The layers below all that is trained, where there are any, and what is kept of them."""
    depth, modules, later = _lowest_trained(seam, ask)
    if not depth:
        return None
    above = {id(one) for module in later for one in (*module._parameters.values(), *module._buffers.values())}
    names = [
        name
        for name, one in itertools.chain(model.named_parameters(), model.named_buffers())
        if id(one) not in above and not one.requires_grad
    ]
    below = [(name, module) for name, module in model.named_modules() if module not in later]
    weights = Weights(model, names, [module for _, module in below if isinstance(module, BaseTunerLayer)])
    told = [
        weights.fingerprint,
        *(
            f"{name} {module.scaling}"
            for name, module in below
            if hasattr(module, "scaling") and not isinstance(module, BaseTunerLayer)
        ),
        f"{depth} {autocast_type(next(model.parameters()).device)}",
    ]
    return Frozen(depth, modules, caches.of("\n".join(told)), weights=weights)


def _lowest_trained(seam: Seam, ask: Ask) -> tuple[int, tuple[nn.Module, ...], set[nn.Module]]:
    torch.clear_autocast_cache()  # casts that were made without gradients would hide what is trained
    with seam.open():
        return lowest_trained(seam.stacks[0].layers, ask)


def _check(engine: Engine, ask: Ask, padded: torch.Tensor) -> str:
    """Why a model cannot be run so: what it says, or by how much its logits differ."""
    assert engine.seam is not None
    try:
        with engine.open():
            packed = ask()
            if not engine.seam.reached:
                return "its attention does not go through transformers' interfaces"
    except proof.WRONG as error:
        return f"its layers cannot run packed ({first_line(error, 120)})"
    difference = proof.difference(packed, padded)
    dtype = compute_type(padded)  # accelerate gives logits back in fp32
    allowed = proof.allowed(dtype, WHOLE, ROUNDINGS)
    return "" if difference <= allowed else f"its logits would be others (by {difference:.1%}, {allowed:.1%} allowed)"


def _question(model: nn.Module, seam: Seam, batch: dict[str, Any]) -> Ask:
    """What is compared: what goes into a language model's head, whose logits may be larger than memory; else logits."""
    head = decoder.head_of(model)
    if head is not None:
        with suppress(*proof.WRONG):
            _into_head(model, seam, head, batch)
            return lambda: _into_head(model, seam, head, batch)
    return lambda: _logits(model, batch)


def _into_head(model: nn.Module, seam: Seam, head: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    batch = decoder.complete(model, batch)
    with vocabulary.without_logits(head) as hidden, seam.scoring(batch.get("labels")):
        model(**without_labels(batch))
    (answers,) = hidden
    return _counted(answers, batch)


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """With labels only where the model knows them: a task's own loss may take others than the model's."""
    known = "labels" in inspect.signature(model.forward).parameters
    output = model(**(batch if known else without_labels(batch)))
    if "start_logits" in output:
        return _counted(torch.stack([output["start_logits"], output["end_logits"]], -1), batch)
    return _counted(output["logits"] if "logits" in output else output[0], batch)


def _counted(answers: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Those of rows, or of those of their tokens that are no padding."""
    labels = batch.get("labels")
    masks: Sequence[Any] = (batch.get(decoder.MASK), batch.get("attention_mask"))
    masks = masks if labels is None else (labels.ne(decoder.IGNORED), *masks)
    for mask in masks:
        if mask is not None and answers.dim() == 3 and mask.shape == answers.shape[:2] and mask.any():
            return answers[mask.bool()]
    return answers
