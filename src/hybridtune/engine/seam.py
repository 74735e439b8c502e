"""The seam: padding is taken out just before a stack's first layer and put back after its last.

Between the two, hidden states are one packed row [1, tokens, width], so that no layer computes padding; embeddings,
poolers, heads and the search for the last token see padded batches as ever. It works on any transformers model whose
masks and attention go through transformers' interfaces, and knows none by name (but for T5's bias by distance, which
comes beside the mask): hooks pack what a layer is given, and `attention.attention` keeps rows apart. What a model's
masks look like is not seen before it runs: `engine.start` tries whether all this holds for a model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import interface
from ..errors import HybridtuneWarning
from ..layers import Stack
from .attention import MARK, Mask, attention, carry, is_plain, of
from .batches import is_row
from .casts import autocast_type
from .decoder import MASK, hides, mask_of
from .frozen import TRIED, Frozen, keys_of
from .layout import Layout
from .patch import in_evaluation, patch


class Seam:
    """Runs a model without padding while `open()` is entered; outside, the model is as it was.

    Args:
        model: any transformers model.
        stacks: its stacks of layers.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        self.model = model
        self.frozen: Frozen | None = None  # of the first stack
        self._writes = False  # the model is generating
        self._labels: torch.Tensor | None = None  # see `scoring`
        self.stacks = [_Stack([model.get_submodule(name) for name in stack.layers]) for stack in stacks]
        self._configs = interface.configs(model.modules())
        paths = [stack.layers[0].rpartition(".")[0] for stack in stacks]
        self._bodies = [
            module
            for name, module in model.named_modules()
            if name and isinstance(module, PreTrainedModel) and any(f"{path}.".startswith(f"{name}.") for path in paths)
        ]
        self._inside = 0  # forwards of the model: one of frozen layers runs within another

    @contextmanager
    def open(self) -> Iterator[None]:
        """Switches the model over: for forwards and, where layers are computed again in them, their backwards.

        Where it is switched over already, as in a step that evaluates the model, it stays as it is.
        """
        with ExitStack() as undo:
            names = [config._attn_implementation for config in self._configs]
            if any(str(name).startswith(MARK) for name in names):
                yield
                return
            caches = [getattr(config, "use_cache", None) for config in self._configs]
            self._inside = 0
            undo.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            undo.callback(self.model.register_forward_hook(self._end, always_call=True).remove)
            for body in self._bodies:
                undo.callback(body.register_forward_pre_hook(self._begin_body, with_kwargs=True).remove)
            if hasattr(self.model, "generate"):
                patch(self.model, "generate", partial(self._generate, self.model.generate), undo)
            for number, stack in enumerate(self.stacks):
                stack.hook(undo, self.frozen.depth if self.frozen and number == 0 else 0)
            for config, name, cache in zip(self._configs, names, caches, strict=True):
                undo.callback(_set, config, name, cache)
                interface.register(f"{MARK}{name or 'eager'}", attention, _mask)
                _set(config, f"{MARK}{name or 'eager'}", None if cache is None else False)  # no keys of packed rows
            yield

    @contextmanager
    def scoring(self, labels: torch.Tensor | None) -> Iterator[None]:
        """For forwards that are not given the labels that a loss will be computed with."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def _generate(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Generates padded: a cache has a place for every row, and an encoder is called past `_begin`."""
        self._writes = True
        self._be(padded=True)
        try:
            return own(*args, **kwargs)
        finally:
            self._writes = False

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Layers that are to be looked into are run padded, as what looks at them expects; no decoder reads padding.

        Padded, too, where a mask leaves out a place that has a label.
        """
        self._inside += 1
        known = self._labels is not None and not self.stacks[0].stops
        batch = {**kwargs, "labels": self._labels} if known else kwargs
        padded = self._writes or _looked_into(model, kwargs) or hides(model, batch)
        self._be(padded)
        if self.frozen and not self.frozen.weights.hold:
            warnings.warn(
                "engine: frozen layers were changed: what was kept of them is not used any more",
                category=HybridtuneWarning,
                stacklevel=2,
            )
            self.frozen = None
        if self.frozen and not padded and not self.stacks[0].stops and kwargs.get("attention_mask") is not None:
            self.frozen.calm()
            self.stacks[0].known = self._known(self.frozen, kwargs)
        mask = None if args or padded else mask_of(model, batch)
        return None if mask is None else (args, {**kwargs, MASK: mask})

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

    def _begin_body(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A part of the model that is called by itself: nothing is known of its rows."""
        if self._inside <= 0 and not self._writes:
            self._be(padded=_looked_into(body, kwargs))

    def _be(self, padded: bool) -> None:
        for stack in self.stacks:
            stack.layout, stack.off, stack.known = None, padded, None

    def _known(self, frozen: Frozen, batch: dict[str, Any]) -> list[torch.Tensor]:
        """For every row of a batch what the frozen layers give it; what is not kept yet is computed and kept."""
        keys = keys_of(batch)
        left: dict[bytes, torch.Tensor] = {}
        for rows in frozen.portions(keys, batch["attention_mask"]):
            computed = zip(rows, self._compute(batch, rows), strict=True)
            left |= frozen.keep({keys[row]: hidden for row, hidden in computed})
        return [left[key] if key in left else frozen.store.get(key) for key in keys]

    def least(self, batch: dict[str, Any]) -> int | None:
        """How many tokens frozen layers are to be given at once, so that what is beside a row changes nothing in it.

        To the last bit: matrix products of few tokens may round in another way than those of many. On a GPU it does not
        matter, where gradients are added up in any order, unless torch is to be deterministic.

        Args:
            batch: a few rows.

        Returns:
            The first of a few numbers from which on a row was seen to stay the same; None: from none of them.
        """
        mask = batch["attention_mask"].bool()
        if mask.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            return 1
        lengths = [max(int(length), 1) for length in mask.sum(1)]
        rows, short = list(range(len(lengths))), lengths.index(min(lengths))
        many = [short, *rows * -(-2 * TRIED[-1] // sum(lengths))]
        expected = dict(zip(many, states := self._compute(batch, many), strict=True))

        def same(portion: list[int], states: list[torch.Tensor]) -> bool:
            return all(torch.equal(state, expected[row]) for row, state in zip(portion, states, strict=True))

        if not same(many, states):
            return None
        for least in dict.fromkeys(max(one, lengths[short]) for one in TRIED):
            portions = [[short] * -(-size // lengths[short]) for size in (least, 3 * least // 2)]
            portions.append(rows[::-1] * -(-2 * least // sum(lengths)))
            if all(same(portion, self._compute(batch, portion)) for portion in portions):
                return least
        return None

    def _compute(self, batch: dict[str, Any], rows: list[int]) -> list[torch.Tensor]:
        """Runs the frozen layers, and no further, on rows of a batch; gives each its hidden states."""
        stack, count = self.stacks[0], len(batch["attention_mask"])
        chosen = {key: value[rows] if is_row(value, count) else value for key, value in batch.items()}
        stack.stops = True
        try:
            with in_evaluation(self.model), torch.no_grad():
                self.model(**chosen)
        except _Stopped as stopped:
            found = stopped.layout.rows(stopped.hidden)
            return [found[at] for at in range(len(rows))]
        finally:
            stack.stops = False
        raise RuntimeError("the model does not come to its frozen layers")

    @property
    def reached(self) -> bool:
        """Whether the last forward was packed, in every stack."""
        return all(stack.layout is not None for stack in self.stacks)


def _set(config: Any, name: str | None, cache: bool | None) -> None:
    config._attn_implementation_internal = name  # its setter would change the configs inside it too
    if hasattr(config, "use_cache"):
        config.use_cache = cache


class _Stack:
    """The layers of one stack, and where the tokens of the batch that is in it lie (None: it is not packed)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.names = list(inspect.signature(layers[0].forward).parameters)
        self.biases: list[Any] = [
            module for layer in layers for module in layer.modules() if hasattr(module, "compute_bias")
        ]
        self.layout: Layout | None = None
        self.off = False  # this forward runs padded
        self.stops = False  # this forward ends where the frozen layers do
        self.known: list[torch.Tensor] | None = None  # what they give each row of the batch
        self.frozen = 0  # their number
        self.beside: tuple[Any, ...] | None = None  # what layers give beside hidden states; None: no tuple

    def hook(self, undo: ExitStack, frozen: int) -> None:
        self.frozen = frozen
        for layer in self.layers:
            undo.callback(layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        undo.callback(self.layers[-1].register_forward_hook(self._leave).remove)
        for module in self.biases:
            patch(module, "compute_bias", partial(self._bias, module.compute_bias), undo)
        for layer in self.layers[:frozen]:
            patch(layer, "forward", partial(self._pass, layer.forward), undo)

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states among a layer's arguments."""
        return args[0] if args else kwargs[self.names[0]]

    def _pass(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        """A frozen layer whose results are known: hands on what it is given, and what else it gives those above."""
        if self.known is None:
            return own(*args, **kwargs)
        hidden = self._hidden(args, kwargs)
        if self.beside is None:
            return hidden
        return (hidden, *(None if value is None else self._handed_on() for value in self.beside))

    def _handed_on(self) -> torch.Tensor:
        """The bias by distance, which T5's first layer computes for all."""
        assert self.layout is not None
        bias: torch.Tensor = self.biases[0].compute_bias(self.layout.longest, self.layout.longest)
        return bias

    def _recall(self, layout: Layout) -> torch.Tensor:
        """The known hidden states as a packed row."""
        assert self.known is not None
        return layout.fill([self.known[row].to(layout.index.device).unsqueeze(0) for row in layout.lengths])

    def _bias(self, own: Any, query_length: int, key_length: int, **kwargs: Any) -> Any:
        """T5's bias by distance: for the longest row instead of the packed one, of which attention takes corners."""
        if self.layout is not None:
            query_length = key_length = self.layout.widest if self.stops else self.layout.longest
        return own(query_length, key_length, **kwargs)

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Packs what a layer is given."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        masks = {name: found for name, value in given.items() if (found := of(value))}
        own = next((mask for name, mask in masks.items() if not _from_encoder(name)), None)
        other = next((mask for name, mask in masks.items() if _from_encoder(name)), None)
        if self.off:
            return tuple(_whole(value) for value in args), {name: _whole(value) for name, value in kwargs.items()}
        if own is None:
            return None
        self.layout = own.keys
        at = self.layers.index(layer)
        if self.known is not None and at < self.frozen:
            return None
        if self.stops and at == self.frozen:
            raise _Stopped(self._hidden(args, kwargs), own.keys)

        def packed(name: str, value: Any) -> Any:
            if name == self.names[0] and at:  # the layer before has given it
                return value if self.known is None or at > self.frozen else self._recall(own.keys)
            if name == "encoder_decoder_position_bias" and value is None:
                # T5 would make zeros for every packed query over every packed key; attention does without them
                return self._hidden(args, kwargs).new_zeros(1, 1, 1, 1)
            if of(value):
                crossed = other is not None and _from_encoder(name)
                if crossed:
                    return carry(other.with_queries(own.keys), value.detach())  # type: ignore[union-attr]
                return carry(own.apart, value.detach()) if self.stops else value
            layout = (other.keys if other else None) if _from_encoder(name) else own.keys
            return layout.pack(value) if layout else value

        return (
            tuple(packed(name, value) for name, value in zip(self.names, args, strict=False)),
            {name: packed(name, value) for name, value in kwargs.items()},
        )

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Pads what the last layer gives."""
        if self.layout is None:
            return output
        hidden, *beside = output if isinstance(output, tuple) else (output,)
        if self.known is None:
            self.beside = tuple(beside) if isinstance(output, tuple) else None
        if self.stops:
            raise _Stopped(hidden, self.layout)
        if self.known is not None and self.frozen == len(self.layers):
            hidden = self._recall(self.layout)
        padded = self.layout.unpack(hidden)
        return (padded, *beside) if isinstance(output, tuple) else padded


class _Stopped(Exception):
    """Carries hidden states out of a forward, and how they are packed."""

    def __init__(self, hidden: torch.Tensor, layout: Layout) -> None:
        super().__init__()
        self.hidden, self.layout = hidden, layout


def _looked_into(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a forward gives what its layers have seen, or keeps keys and values for the next one."""
    config = getattr(model, "config", None)
    looks = ("output_hidden_states", "output_attentions")
    asked = any(getattr(config, look, False) if kwargs.get(look) is None else kwargs[look] for look in looks)
    return asked or bool(kwargs.get("use_cache"))


def _from_encoder(name: str) -> bool:
    """Whether a decoder layer's argument is about the encoder's tokens, by transformers' names."""
    return name.startswith("encoder_")


def _whole(value: Any) -> Any:
    """A layer's argument as it is without a seam."""
    mask = of(value)
    return mask.whole() if mask else value


def _mask(**asked: Any) -> torch.Tensor | None:
    """A mask function: keeps what is asked for; where keys come from a cache, the model's own answers."""
    mask = asked.get("attention_mask")
    if asked.get("q_offset") or asked.get("kv_offset") or (mask is not None and mask.shape[1] != asked["kv_length"]):
        return Mask.build(asked)
    if mask is None:
        mask = torch.ones(asked["batch_size"], asked["kv_length"], dtype=torch.bool, device=asked["device"])
    half = (autocast_type(mask.device) or asked["dtype"]).itemsize == 2
    layout = Layout.of(mask, merge=is_plain(asked["mask_function"]), fill=half and mask.device.type == "cpu")
    return carry(Mask(layout, asked, layout), mask.detach())
