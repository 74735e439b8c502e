"""Bottleneck adapters: small two-layer networks beside frozen blocks.

    sequential   h' = h + s A(h)        h: what the block's last matrix gives, before the residual is added
    parallel     h' = F(x) + s A(x)     x: what goes into the block F
    A(h) = U f(D h + d) + u             D [bottleneck, width], U [width, bottleneck], U = 0 at the start

They are registered submodules of their layer, called by hooks: a wrapper would rename every key below it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers.activations import ACT2FN

from ..anatomy import Part
from ..errors import MethodError
from ..layers import Block
from ._modules import unhook, width_of

SUMMARY = "small bottleneck networks beside frozen blocks"
FORMULA = "h' = h + A(h)"
SOURCE = (
    "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751; "
    "Pfeiffer et al. 2020, arXiv 2005.00247; parallel: He et al. 2021, arXiv 2110.04366"
)
MERGES = "an adapter is not linear in its input"


class Options(BaseModel):
    """Size and place of the adapters.

    Attributes:
        bottleneck: width of the middle, in units.
        placement: "houlsby" puts one beside every attention and feed-forward block, "pfeiffer" beside the latter only.
        mode: "sequential" (after the block) or "parallel" (around it).
        activation: name of a transformers activation.
        dropout: on what goes into the adapter.
        scaling: s above.
    """

    model_config = ConfigDict(extra="forbid")

    bottleneck: int = Field(64, gt=0)
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    mode: Literal["sequential", "parallel"] = "sequential"
    activation: str = "gelu"
    dropout: float = Field(0.0, ge=0, lt=1)
    scaling: float = 1.0


class Bottleneck(nn.Module):
    """A(h), added to a block's output by hooks that are its own bound methods, so that copies of a model stay whole."""

    def __init__(self, width_in: int, width_out: int, options: Options) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, options.bottleneck)
        self.up = nn.Linear(options.bottleneck, width_out)
        self.activation = ACT2FN[options.activation]
        self.dropout = nn.Dropout(options.dropout)
        self.scaling = options.scaling
        self._input: torch.Tensor | None = None
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """s A(hidden); hidden is [..., width_in], the result [..., width_out]."""
        result: torch.Tensor = self.scaling * self.up(self.activation(self.down(self.dropout(hidden))))
        return result

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the block's last matrix, sequential."""
        changed: torch.Tensor = output + self(output)
        return changed

    def remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the block's first matrix, parallel."""
        self._input = args[0]

    def beside(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the block's last matrix, parallel."""
        hidden, self._input = self._input, None
        changed: torch.Tensor = output + self(hidden)
        return changed


def learning_rate(part: Part, width: int) -> float:
    """Adapters start at zero and take large steps."""
    return max(1e-3 * min(1.0, 384 / width), 1e-4)


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Adds an adapter to every block of the part.

    Raises:
        MethodError: the part has no such block, or a block has one already.
    """
    if options.activation not in ACT2FN:
        raise MethodError(
            f"method adapter: unknown activation {options.activation}", expected=", ".join(sorted(ACT2FN))
        )
    blocks = [block for block in part.blocks if options.placement == "houlsby" or block.kind == "mlp"]
    if not blocks:
        kinds = "attention or feed-forward" if options.placement == "houlsby" else "feed-forward"
        raise MethodError(
            f"adapter on {part}: the part has no whole {kinds} block",
            expected="layers, layers[...], layers.attention or layers.mlp",
        )
    return [name for block in blocks for name in _attach(model, block, options)]


def _attach(model: nn.Module, block: Block, options: Options) -> list[str]:
    layer, name = model.get_submodule(block.path), f"adapter_{block.kind}"
    if hasattr(layer, name):
        raise MethodError(
            f"adapter on {block.path}: its {block.kind} block has one already",
            mend="use previous: drop, or one adapter rule",
        )
    first, last = model.get_submodule(block.input), model.get_submodule(block.output)
    weight = next(last.parameters())
    width_in = width_of(first, "in") if options.mode == "parallel" else width_of(last, "out")
    adapter = Bottleneck(width_in, width_of(last, "out"), options).to(weight.device, weight.dtype)
    layer.add_module(name, adapter)
    if options.mode == "parallel":
        first.register_forward_pre_hook(adapter.remember)
        last.register_forward_hook(adapter.beside)
    else:
        last.register_forward_hook(adapter.after)
    return [f"{block.path}.{name}.{inner}" for inner, _ in adapter.named_parameters()]


def detach(model: nn.Module, names: list[str]) -> None:
    """Takes the adapters off again, hooks included."""
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in names):
        parent, _, child = path.rpartition(".")
        adapter = model.get_submodule(path)
        unhook(model.get_submodule(parent).modules(), adapter)
        delattr(model.get_submodule(parent), child)
