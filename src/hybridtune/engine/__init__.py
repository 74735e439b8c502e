"""The fast way through a model: without padding, and checked on the model that it is for before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers import find_stacks
from .microbatch import is_rows
from .seam import Seam

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2  # of half precision
SAMPLE = 4  # rows
LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Engine:
    """How a model is run.

    Attributes:
        seam: through which it runs without padding; None where it runs as it is.
        reason: why there is none.
    """

    seam: Seam | None
    reason: str = ""

    @contextmanager
    def open(self) -> Iterator[None]:
        """For forwards and their backwards."""
        with self.seam.open() if self.seam else nullcontext():
            yield

    def __str__(self) -> str:
        return "rows without padding" if self.on else f"rows with padding: {self.reason}"

    @property
    def on(self) -> bool:
        """Whether rows run without padding."""
        return self.seam is not None


def sample(batch: dict[str, Any]) -> dict[str, Any] | None:
    """A few rows of a batch, the shortest and the longest among them; None where all have one length or are no rows."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()) or not is_rows(batch):
        return None
    ranked = mask.sum(1).argsort(stable=True)
    chosen = ranked[torch.linspace(0, len(ranked) - 1, min(SAMPLE, len(ranked))).long().to(ranked.device)]
    return {key: value[chosen] for key, value in batch.items()}


def start(model: nn.Module, batch: dict[str, Any]) -> Engine:
    """Builds the engine of a model, and has it prove itself: logits of a few rows, packed against padded.

    Args:
        model: with all that is on it.
        batch: a `sample` of the user's rows, on the model's device.
    """
    config = getattr(model, "config", None)
    skips = [name for name in LAYERDROP if getattr(config, name, 0)]
    if skips:
        return Engine(None, f"it leaves out layers at random ({skips[0]})")
    seam = Seam(model, find_stacks(dict(model.named_modules())))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            padded = _answers(model, batch)
            packed, problem = _packed(model, batch, seam)
    finally:
        model.train(training)
    if packed is None:
        return Engine(None, problem)
    difference = float((padded - packed).abs().max())
    allowed = TOLERANCE.get(padded.dtype, COARSE) * max(1.0, float(padded.abs().max()))
    if not difference <= allowed:
        return Engine(None, f"packed rows give other logits (by {difference:.2g}, {allowed:.2g} allowed)")
    return Engine(seam)


def _packed(model: nn.Module, batch: dict[str, Any], seam: Seam) -> tuple[torch.Tensor | None, str]:
    """The answers of packed rows, or why there are none."""
    try:
        with seam.open():
            packed = _answers(model, batch)
            if seam.reached:
                return packed, ""
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        # what a model's own code raises when its layers are given other shapes
        said = (str(error) or type(error).__name__).splitlines()[0]
        return None, f"its layers cannot run packed ({said[:120]})"
    return None, "its attention does not go through transformers' interfaces"


def _answers(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits where they count: of the rows, or of those of their tokens that are no padding."""
    output = model(**batch)
    logits: torch.Tensor = output["logits"] if "logits" in output else output[0]
    masks: Sequence[Any] = (batch.get("decoder_attention_mask"), batch.get("attention_mask"))
    if batch.get("labels") is not None and logits.dim() == 3 and batch["labels"].shape == logits.shape[:2]:
        masks = (batch["labels"].ne(-100), *masks)
    for mask in masks:
        if mask is not None and logits.dim() == 3 and mask.shape == logits.shape[:2]:
            return logits[mask.bool()]
    return logits
