"""Prefixes: learned keys and values in front of those that an attention block computes.

    a(x) = softmax(s Q [P_k; K]^T + m) [P_v; V]        P_k, P_v [n, width of the keys], learned, of this block alone
                                                       m: mask and position bias, 0 for the prefix

They join behind position rotation and cache: positions do not shift, and a cache never holds them. Every token sees
them, in causal and windowed attention too. Plain parameters, without the network that the first paper trains them by.

They work through transformers' AttentionInterface: the model is told to call `attention` below, which adds the prefix
of the block that calls it and goes on to the implementation that the model had.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .. import interface
from ..anatomy import Part
from ..errors import MethodError
from ..layers import Block
from ..model import quiet
from ._modules import unhook, width_of

SUMMARY = "learned keys and values in front of an attention block's own"
FORMULA = "a(x) = softmax(Q [P_k; K]^T) [P_v; V]"
SOURCE = (
    "Li and Liang 2021, Prefix-Tuning, arXiv 2101.00190; in every layer and without a reparametrisation: "
    "Liu et al. 2021, P-Tuning v2, arXiv 2110.07602"
)
MERGES = "its keys and values depend on no input, and weights cannot hold them"

CHILD = "prefix"
MARK = "hybridtune_prefix_"  # and the implementation that the model had: its name says where to go on


class Options(BaseModel):
    """Length and start of the prefixes.

    Attributes:
        num_virtual_tokens: n above.
        init_std: spread of the random numbers that keys and values start from.
    """

    model_config = ConfigDict(extra="forbid")

    num_virtual_tokens: int = Field(20, gt=0)
    init_std: float = Field(0.02, ge=0)


class Prefix(nn.Module):
    """Keys and values of one attention module.

    Args:
        widths: of its keys and of its values, all heads together.
        options: of the method.
    """

    def __init__(self, widths: tuple[int, int], options: Options) -> None:
        super().__init__()
        self.key, self.value = (nn.Parameter(torch.empty(options.num_virtual_tokens, width)) for width in widths)
        for tensor in (self.key, self.value):
            nn.init.normal_(tensor, std=options.init_std)
        self.reached = False

    def join(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix in front of keys and values, both [batch, heads, length, head width]."""
        self.reached = True
        return _in_front(self.key, key), _in_front(self.value, value)

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the attention module: without this, a prefix that is never asked for would go unseen."""
        if not self.reached:
            raise _no_interface(f"prefix on {type(module).__name__}")
        self.reached = False


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention implementation: what the model had, over the block's prefix too, where it has one.

    Args:
        module: the attention module that calls.
        query: [batch, heads, queries, head width].
        key, value: [batch, key heads, keys, head width].
        attention_mask: [batch or 1, heads or 1, queries, keys], True or 0 where a key is seen; None where all are.
    """
    inner = interface.inner(module, MARK)
    prefix = getattr(module, CHILD, None)
    if not isinstance(prefix, Prefix):
        return inner(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None and _causal(module, query, kwargs):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[
            None, None
        ]
    more = len(prefix.key)
    key, value = prefix.join(key, value)
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (more, 0), value=attention_mask.dtype == torch.bool)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = pad(kwargs["position_bias"], (more, 0))
    return inner(module, query, key, value, attention_mask, **kwargs | {"is_causal": False})


def _mask(**asked: Any) -> torch.Tensor | None:
    """A mask function for the interface: a causal mask is always built, since scores are no square any more."""
    asked["allow_is_causal_skip"] = False
    return interface.inner_mask(asked["config"]._attn_implementation, MARK)(**asked)


for _name in ("sdpa", "eager"):
    interface.register(MARK + _name, attention, _mask)


def learning_rate(part: Part, width: int) -> float:
    """Prefixes start near zero and have far to go: their rate is much larger than that of weights."""
    return max(1e-1 * min(1.0, 384 / width), 1e-2)


def attach(model: PreTrainedModel, part: Part, options: Options) -> list[str]:
    """Gives every self-attention block of the part a prefix; cross-attention only where the part is nothing else.

    Raises:
        MethodError: the part has no such block, one has a prefix already, or the model's attention cannot take one.
    """
    blocks = [block for kind in ("attention", "cross_attention") for block in part.blocks if block.kind == kind]
    if not blocks:
        raise MethodError(
            f"prefix on {part}: the part has no whole attention block",
            expected="layers, layers[...], layers.attention or layers.cross_attention",
        )
    owners = {_owner(block): block for block in blocks if block.kind == blocks[0].kind}
    for path in owners:
        if hasattr(model.get_submodule(path), CHILD):
            raise MethodError(f"prefix on {path}: it has one already", mend="use previous: drop, or one prefix rule")
    _switch_on(model, part, owners)
    return [name for path, block in owners.items() for name in _attach(model, path, block, options)]


def _attach(model: nn.Module, path: str, block: Block, options: Options) -> list[str]:
    module = model.get_submodule(path)
    weight = next(model.get_submodule(block.input).parameters())
    prefix = Prefix(_widths(model, path, block), options).to(weight.device, weight.dtype)
    module.add_module(CHILD, prefix)
    module.register_forward_hook(prefix.check)
    return [f"{path}.{CHILD}.{inner}" for inner, _ in prefix.named_parameters()]


def detach(model: PreTrainedModel, names: list[str]) -> None:
    """Takes prefixes off again; the model's own attention implementation comes back with the last."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        prefix, owner = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
        unhook([owner], prefix)
        delattr(owner, CHILD)
    if not any(isinstance(module, Prefix) for module in model.modules()):
        _switch_off(model)


def _owner(block: Block) -> str:
    """Name of the module that computes the block's keys: the one that calls the attention interface."""
    for wanted in ("k", "qkv"):
        for matrix, role in block.matrices.items():
            if role == wanted:
                return matrix.rpartition(".")[0]
    raise MethodError(
        f"prefix on {block.path}: none of its matrices is known to make keys", found=", ".join(block.matrices)
    )


def _widths(model: nn.Module, path: str, block: Block) -> tuple[int, int]:
    """Widths of the keys and of the values, all heads together."""
    sizes = {role: width_of(model.get_submodule(matrix), "out") for matrix, role in block.matrices.items()}
    if "k" in sizes:
        return sizes["k"], sizes.get("v", sizes["k"])
    if "q" in sizes:  # GPT-2's cross-attention: one matrix for keys and values
        return sizes["qkv"] // 2, sizes["qkv"] // 2
    groups = getattr(model.get_submodule(path), "num_key_value_groups", 1)  # queries to one key
    return sizes["qkv"] // (groups + 2), sizes["qkv"] // (groups + 2)


def _in_front(learned: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    batch, heads, _, width = own.shape
    if learned.shape[1] != heads * width:
        raise MethodError(
            "prefix: the keys have another width than their matrix",
            found=f"{heads} heads of {width}",
            expected=f"{learned.shape[1]} in all",
        )
    split = learned.to(own.dtype).view(-1, heads, width).transpose(0, 1)
    return torch.cat([split.expand(batch, -1, -1, -1), own], dim=2)


def _causal(module: nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether no mask means a causal one, as transformers' sdpa has it."""
    if not interface.name_of(module).endswith(f"{MARK}sdpa") or query.shape[2] == 1:
        return False
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _switch_on(model: PreTrainedModel, part: Part, owners: Iterable[str]) -> None:
    """Has the model call `attention`.

    Raises:
        MethodError: an owner does not use the interface, or its implementation is none that can be built upon.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(module.config, interface.name_of(module).removeprefix(MARK)) for module in models]
    for _, name in before:
        if name not in ("sdpa", "eager"):
            raise MethodError(
                f"prefix on {part}: the model's attention is {name}",
                expected="sdpa or eager",
                mend="load the model with attn_implementation='sdpa'",
            )
    with quiet():  # where a model cannot be switched, transformers only warns
        model.set_attn_implementation(MARK + before[0][1])
    for config, name in before:  # encoder and decoder may have had different ones
        if str(config._attn_implementation).startswith(MARK):
            config._attn_implementation = MARK + name
    for path in owners:
        owner, around = model.get_submodule(path), _around(model, path)
        if hasattr(owner, "config") and interface.name_of(around).startswith(MARK):
            # one of its own, where EncoderDecoderModel has swapped its models' configs
            owner.config._attn_implementation = MARK + interface.name_of(owner).removeprefix(MARK)
        else:
            if not any(isinstance(module, Prefix) for module in model.modules()):
                _switch_off(model)
            raise _no_interface(f"prefix on {part}: {type(owner).__name__}")


def _switch_off(model: PreTrainedModel) -> None:
    """Gives every config the implementation back that it had."""
    own = [module.config for module in model.modules() if interface.name_of(module).startswith(MARK)]
    for config, name in [(config, config._attn_implementation.removeprefix(MARK)) for config in own]:
        config._attn_implementation = name


def _around(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost transformers model that a module is in: the one that says whether its attention can be switched."""
    steps = path.split(".")
    above = (model.get_submodule(".".join(steps[:count])) for count in range(len(steps) - 1, -1, -1))
    return next(module for module in above if isinstance(module, PreTrainedModel))


def _no_interface(what: str) -> MethodError:
    return MethodError(
        f"{what} does not call transformers' AttentionInterface, through which prefixes come",
        mend="use prompt, lora or adapter on this model",
    )
