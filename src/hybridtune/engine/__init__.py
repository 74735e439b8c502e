"""The fast way through a model: without padding, and checked on the model that it is for before it is used."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..layers import find_stacks
from . import dropout, lora
from .frozen import Caches as Caches
from .frozen import Frozen, Weights, in_evaluation
from .frozen import depth as lowest_trained
from .precision import Casts, autocast_type
from .seam import Seam

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2  # of half precision
LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Engine:
    """How a model is run.

    Attributes:
        seam: through which it runs without padding; None where it runs as it is.
        reason: why there is none, or why what frozen layers give is not kept.
        modules: LoRA and dropout, computed in a faster way where their state allows it when the engine is opened.
    """

    seam: Seam | None
    reason: str = ""
    modules: tuple[nn.Module, ...] = ()

    @contextmanager
    def open(self, casts: Casts | None = None) -> Iterator[None]:
        """For forwards and their backwards.

        Args:
            casts: of frozen weights, where they are computed in another type than they have.
        """
        with ExitStack() as undo:
            if self.seam:
                undo.enter_context(self.seam.open())
            lora.speed_up(self.modules, undo, casts)
            dropout.speed_up(self.modules, undo)
            yield

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


def start(model: nn.Module, batch: dict[str, Any], caches: Caches | None = None) -> Engine:
    """Builds the engine of a model, and has it prove itself: logits of a few rows, packed against padded.

    Args:
        model: with all that is on it, and with gradients required where it is trained.
        batch: a few rows of several lengths (see `sample`), on the model's device.
        caches: where hidden states below the lowest trained layer are kept; None where they are not.
    """
    modules = tuple(module for module in model.modules() if lora.knows(module) or dropout.knows(module))
    config = getattr(model, "config", None)
    skips = [name for name in LAYERDROP if getattr(config, name, 0)]
    if skips:
        return Engine(None, f"it leaves out layers at random ({skips[0]})", modules)
    seam = Seam(model, find_stacks(dict(model.named_modules())))
    engine = Engine(seam, modules=modules)
    with in_evaluation(model):
        with torch.no_grad():
            padded = _answers(model, batch)
            problem = _check(engine, batch, padded)
        if problem:
            return replace(engine, seam=None, reason=problem)
        seam.frozen = _frozen(model, batch, seam, caches) if caches else None
        if seam.frozen is None:
            return engine
        with torch.no_grad():
            problem = _check(engine, batch, padded)
            if not problem:
                with seam.open():
                    seam.frozen.steady = seam.steady(batch)
                return engine
    seam.frozen = None
    return replace(engine, reason=f"hidden states of frozen layers are not kept: {problem}")


def _frozen(model: nn.Module, batch: dict[str, Any], seam: Seam, caches: Caches) -> Frozen | None:
    """The layers below all that is trained, where there are any, and what is kept of them."""
    torch.clear_autocast_cache()  # casts that were made without gradients would hide what is trained
    with seam.open():
        depth, modules, later = lowest_trained(seam.stacks[0].layers, lambda: _run(model, batch))
    if not depth:
        return None
    above = {id(one) for module in later for one in (*module._parameters.values(), *module._buffers.values())}
    weights = Weights(
        {
            name: one
            for name, one in itertools.chain(model.named_parameters(), model.named_buffers())
            if id(one) not in above and not one.requires_grad
        }
    )
    told = [
        weights.fingerprint,
        *(
            f"{name} {module.scaling}"
            for name, module in model.named_modules()
            if hasattr(module, "scaling") and module not in later
        ),
        f"{depth} {autocast_type(batch['attention_mask'].device)}",
    ]
    return Frozen(depth, modules, caches.of("\n".join(told)), weights=weights)


def _check(engine: Engine, batch: dict[str, Any], padded: torch.Tensor) -> str:
    """Why a model cannot be run so: what it says, or by how much its logits differ."""
    assert engine.seam is not None
    try:
        with engine.open():
            packed = _answers(engine.seam.model, batch)
            if not engine.seam.reached:
                return "its attention does not go through transformers' interfaces"
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        # what a model's own code raises when its layers are given other shapes
        said = (str(error) or type(error).__name__).splitlines()[0]
        return f"its layers cannot run packed ({said[:120]})"
    difference = float((packed - padded).abs().max())
    dtype = autocast_type(padded.device) or padded.dtype  # accelerate gives logits back in fp32
    allowed = TOLERANCE.get(dtype, COARSE) * max(1.0, float(padded.abs().max()))
    return "" if difference <= allowed else f"its logits would be others (by {difference:.2g}, {allowed:.2g} allowed)"


def _run(model: nn.Module, batch: dict[str, Any]) -> Any:
    """The model's output; labels only where it knows them: a task's own loss may take others than the model's."""
    known = "labels" in inspect.signature(model.forward).parameters
    return model(**(batch if known else {key: value for key, value in batch.items() if key != "labels"}))


def _answers(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits where they count: of the rows, or of those of their tokens that are no padding."""
    output = _run(model, batch)
    if "start_logits" in output:
        logits = torch.stack([output["start_logits"], output["end_logits"]], -1)
    else:
        logits = output["logits"] if "logits" in output else output[0]
    masks: Sequence[Any] = (batch.get("decoder_attention_mask"), batch.get("attention_mask"))
    if batch.get("labels") is not None and logits.dim() == 3 and batch["labels"].shape == logits.shape[:2]:
        masks = (batch["labels"].ne(-100), *masks)
    for mask in masks:
        if mask is not None and logits.dim() == 3 and mask.shape == logits.shape[:2]:
            return logits[mask.bool()]
    return logits
