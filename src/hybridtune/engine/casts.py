"""What autocast would cast again and again: weights that do not change, once; on a GPU others, many in a call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from .decoder import head_of
from .patch import patch

# Weights that are cast in one call, unless one has more: their gradients wait for each other, in 2 and then 4 bytes.
GROUP = 2**24


def autocast_type(device: torch.device) -> torch.dtype | None:
    """What autocast computes in here; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def compute_type(tensor: torch.Tensor) -> torch.dtype:
    """What a tensor is computed with in here: autocast's type, or its own."""
    return autocast_type(tensor.device) or tensor.dtype


def written(tensor: torch.Tensor) -> tuple[int, int]:
    """Another pair after every write, but for those through `.data`, which nothing tells."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Casts:
    """Copies of a model's linear weights in the type that autocast would cast them to in every forward.

    The weights themselves stay as they are: while `open()` is entered, forwards compute with the copies, and nothing
    else sees them. A checkpoint in the middle of a stage, a fingerprint, a merge and the user's callbacks find the fp32
    originals, of which nothing has to be given back. A copy of what was loaded anew, or trained for a while, is made
    again.

    Copies of frozen weights take half the bytes of the fp32 ones, beside them, for as long as this object lives. Plain
    autocast has as much from every forward to its backward, which needs the cast weights.

    Args:
        model: as a stage has it.
        still: whether nothing is trained meanwhile: then weights that could be are copied as frozen ones are. Not every
            optimizer lets a write be seen.
        together: whether trained weights are cast many in a call, and what several layers are given, as those of
            queries, keys and values are, once. For a GPU, where to start an operation takes longer than most of them,
            and a quarter of all were such casts. The same is computed, to the last bit, but that the gradient of what
            layers share is summed in half precision, and not in fp32.
    """

    def __init__(self, model: nn.Module, still: bool = False, together: bool = False) -> None:
        self._model = model
        self._still, self._together = still, together
        self._keeps = True
        self._linear = [
            module
            for module in model.modules()
            if type(module).forward is nn.Linear.forward and "weight" in module._parameters  # no parametrization
        ]
        # PEFT merges through `.data`
        self._adapted = {layer.base_layer: layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
        self._copies: dict[nn.Module, tuple[Any, Any, list[Any]]] = {}  # with what they were made from
        head = head_of(model)
        self._apart = frozenset(head.parameters()) if head is not None else frozenset()  # autocast's: see `vocabulary`
        self._groups: dict[nn.Parameter, list[nn.Parameter]] = {}  # of trained weights, those that are cast with each
        self._trained: dict[nn.Parameter, tuple[Any, torch.Tensor]] = {}  # of the last group
        self._shared: tuple[Any, Any, torch.Tensor] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """For forwards and, where layers are computed again in them, their backwards."""
        with ExitStack() as undo:
            for module in self._linear:
                if "forward" not in vars(module):
                    patch(module, "forward", partial(self._run, module), undo)
            if self._together:
                self._groups = self._grouped()
                undo.callback(self._forget)
                # autograd has what of them is needed afterwards
                undo.callback(self._model.register_forward_pre_hook(self._forget).remove)
                undo.callback(self._model.register_forward_hook(self._forget, always_call=True).remove)
            yield

    def _forget(self, *_: Any) -> None:
        self._trained, self._shared = {}, None

    def _grouped(self) -> dict[nn.Parameter, list[nn.Parameter]]:
        """Trained weights, but for a head's, in groups of those that lie side by side."""
        found, group, numbers = dict[nn.Parameter, list[nn.Parameter]](), list[nn.Parameter](), 0
        every: Iterator[Any] = (one for module in self._linear for one in (module.weight, module.bias))
        for one in every:
            if self._trains(one) and one.dtype == torch.float32 and one not in self._apart and one not in found:
                if numbers + one.numel() > GROUP:
                    group, numbers = [], 0
                group.append(one)
                found[one], numbers = group, numbers + one.numel()
        return found

    def trained(self, weight: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        """A trained weight in the type that autocast computes in, with its gradient; itself where it is left alone."""
        group = self._groups.get(weight)
        if group is None or not torch.is_grad_enabled() or _transformed():
            return weight
        known = self._trained.get(weight)
        if known is None or known[0] != (written(weight), dtype):
            copies = _Joined.apply(dtype, *group)  # type: ignore[no-untyped-call]
            made = {one: ((written(one), dtype), copy) for one, copy in zip(group, copies, strict=True)}
            self._trained, known = made, made[weight]
        return known[1]

    def given(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What a layer is given in the type that autocast computes in; itself where it is left alone."""
        # what is written to inference's tensors is not counted
        if not self._together or inputs.dtype != torch.float32 or inputs.is_inference() or _transformed():
            return inputs
        state = written(inputs), inputs.requires_grad, dtype, torch.is_grad_enabled()
        shared = self._shared
        if shared is None or shared[0]() is not inputs or shared[1] != state:
            shared = self._shared = weakref.ref(inputs), state, inputs.to(dtype)
        return shared[2]

    def give_up(self) -> bool:
        """Drops all copies and keeps none from now on, where memory is short; whether there were any."""
        had, self._keeps = bool(self._copies), False
        self._copies.clear()
        return had

    def frozen(self, linear: nn.Linear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A layer's weight, and its bias unless that is trained, in the type that autocast computes in."""
        held: list[Any] = [linear.weight, None if self._trains(linear.bias) else linear.bias]
        adapted = self._adapted.get(linear)
        states = [None if one is None else written(one) for one in held]
        state = *states, tuple(adapted.merged_adapters) if adapted else ()
        known = self._copies.get(linear)
        if known is None or known[0] != state or known[-1][0].dtype != dtype:
            originals = [None if one is None else one.detach() for one in held]
            copies = [None if one is None else one.to(dtype) for one in originals]
            known = state, originals, copies  # the originals, so that no other tensor gets their place in memory
            if self._keeps:
                self._copies[linear] = known
        weight, bias = known[-1]
        return weight, bias

    def _run(self, linear: Any, inputs: torch.Tensor) -> torch.Tensor:
        dtype = autocast_type(inputs.device)
        if dtype is None or linear.weight.dtype != torch.float32:
            self._copies.pop(linear, None)
            return nn.Linear.forward(linear, inputs)
        weight, bias = linear.weight, linear.bias
        if self._trains(weight):
            self._copies.pop(linear, None)
            cast, kept = self.trained(weight, dtype), bias
        else:
            cast, kept = self.frozen(linear, dtype)
        if self._trains(bias):
            kept = self.trained(bias, dtype)
        return F.linear(self.given(inputs, dtype), cast, kept)

    def _trains(self, parameter: nn.Parameter | None) -> bool:
        return parameter is not None and parameter.requires_grad and not self._still


def _transformed() -> bool:
    """Whether torch.func computes something else of a function, to which custom ones would have to say how."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Joined(torch.autograd.Function):
    """Copies of weights in another type, all in one call, and their gradients in another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_cast(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        there = [one for one in gradients if one is not None]
        again = torch.is_grad_enabled()  # their own gradients are asked for
        found = iter([one.float() for one in there] if again else _cast(there, torch.float32))
        return None, *(None if one is None else next(found) for one in gradients)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made
