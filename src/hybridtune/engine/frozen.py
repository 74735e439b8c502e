"""What lies below the lowest trained layer gives a row the same hidden states every time: they are computed once.

Rows are known by all that a batch has for them but labels, so that an epoch, an evaluation and every other trial on the
same data find what any of them has computed; `Caches` keeps apart what other weights have given. Dropout is off below
that layer: what is kept knows none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..model import digest_of
from .batches import is_row
from .casts import written
from .store import Limits, Store, of_process

TRIED = (64, 256, 512)  # tokens that frozen layers are given at once, at least


@dataclass
class Caches:
    """What trainings in one process keep, by what it was computed with.

    Attributes:
        limits: of all together; those of the process, unless others are given.
    """

    limits: Limits = field(default_factory=of_process)
    _stores: dict[str, Store] = field(default_factory=dict)

    def of(self, fingerprint: str) -> Store:
        """The rows that were computed with the weights of this fingerprint."""
        store = self._stores.setdefault(fingerprint, Store(self.limits))
        store.full = False  # others may have given room back
        self.limits.use(store)
        return store


class Weights:
    """Tensors of a model that are to stay as they are, watched.

    Args:
        model: that has them.
        names: theirs.
        layers: those of PEFT that compute with them.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = (), layers: Sequence[BaseTunerLayer] = ()) -> None:
        self._places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        self._tensors: dict[str, torch.Tensor] = {name: getattr(*place) for name, place in self._places.items()}
        self._written = {name: written(tensor) for name, tensor in self._tensors.items()}
        self._digests = {name: digest_of([(name, tensor)]) for name, tensor in self._tensors.items()}
        self._layers = layers
        self._states = self._of_layers()

    @property
    def fingerprint(self) -> str:
        """Equal only for equal tensors of equal types, and layers that do the same with them."""
        told = [f"{self._tensors[name].dtype} {digest}" for name, digest in self._digests.items()]
        return "\n".join([*told, *map(str, self._states)])

    @property
    def hold(self) -> bool:
        """Whether they are what they were, and none is trained.

        What was written since is compared: a checkpoint that is loaded writes the same numbers once more. Writes
        through `.data` are not seen, but for those of PEFT's own merges.
        """
        if self._of_layers() != self._states:
            return False
        for name, place in self._places.items():
            tensor = getattr(*place, None)
            if not isinstance(tensor, torch.Tensor) or tensor.requires_grad:
                return False
            now = written(tensor)
            if tensor is not self._tensors[name] or now != self._written[name]:
                if tensor.dtype != self._tensors[name].dtype or digest_of([(name, tensor)]) != self._digests[name]:
                    return False
                self._tensors[name], self._written[name] = tensor, now
        return True

    def _of_layers(self) -> list[tuple[Any, ...]]:
        """What they do with the adapters on them."""
        return [
            (
                one.disable_adapters,
                list(one.active_adapters),
                list(one.merged_adapters),
                dict(getattr(one, "scaling", {})),
            )
            for one in self._layers
        ]


@dataclass
class Frozen:
    """The part of a model below its lowest trained layer.

    Attributes:
        depth: how many layers of the first stack lie in it; all of them where only what follows is trained.
        modules: what runs in it, the embeddings too.
        store: hidden states that it has given.
        least: tokens that are computed at once, at least, so that what is beside a row changes nothing in it, to the
            last bit: a training that goes on after an interruption computes rows with others. None: it always does, and
            rows are computed one by one.
        weights: what it is computed with.
    """

    depth: int
    modules: tuple[nn.Module, ...]
    store: Store
    least: int | None = TRIED[-1]  # until it is known
    weights: Weights = field(default_factory=lambda: Weights(nn.Module()))

    def calm(self) -> None:
        """Dropout off: its results are kept."""
        for module in self.modules:
            module.training = False

    def portions(self, keys: Sequence[bytes], mask: torch.Tensor) -> list[list[int]]:
        """Numbers of the rows that have to be computed, in the portions that they are computed in.

        A few short rows are computed several times over.
        """
        missing = [row for row, key in enumerate(keys) if key not in self.store and key not in keys[:row]]
        if self.least is None or not missing:
            return [[row] for row in missing]
        tokens = int(mask[missing].bool().sum())
        return [missing * -(-self.least // max(tokens, 1))]

    def keep(self, rows: dict[bytes, torch.Tensor]) -> dict[bytes, torch.Tensor]:
        """Keeps rows [tokens, width] by their keys; returns those for which there is no room."""
        return {key: row for key, row in rows.items() if key not in self.store and not self.store.put(key, row)}


def depth(layers: Sequence[nn.Module], forward: Any) -> tuple[int, tuple[nn.Module, ...], set[nn.Module]]:
    """How many layers nothing trained reaches, which modules run before the first that it does, and which only later.

    Gradients tell: a layer whose inputs need none has nothing trained below it.

    Args:
        layers: of the first stack.
        forward: runs the model on a few rows.
    """
    called: list[nn.Module] = []
    before: list[int] = []  # how many modules had been called when a layer without trained inputs began
    reached: list[bool] = []

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        reached.append(any(_needs_gradient(value) for value in (*args, *kwargs.values())))
        before.append(len(called))

    def leave(layer: nn.Module, args: Any, output: Any) -> None:
        reached.append(_needs_gradient(output))
        before.append(len(called))

    with ExitStack() as undo, torch.enable_grad():
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        undo.callback(layers[-1].register_forward_hook(leave).remove)
        undo.callback(
            nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.append(module)).remove
        )
        forward()
    if len(reached) != len(layers) + 1:  # one that runs several times
        return 0, (), set()
    count = (reached.index(True) if True in reached else len(reached)) - 1
    if count <= 0:
        return 0, (), set()
    after = {*called[before[count] :], *layers[count : count + 1]}
    whole = tuple(module for module in called[: before[count]] if not after & set(module.modules()))
    later = after | {module for layer in layers[count:] for module in layer.modules()}
    return count, whole, later - set(called[: before[count]])


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_needs_gradient, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def keys_of(batch: dict[str, Any]) -> list[bytes]:
    """What tells the rows of a batch apart: all that it has for each of them, without padding.

    But for labels, and what a decoder is given: it comes after the first stack.
    """
    mask = batch["attention_mask"].bool().cpu().numpy()
    tables = {
        name: (value.shape[:2] == mask.shape, _bytes(value.detach().cpu(), value.shape[:2] == mask.shape))
        for name, value in sorted(batch.items())
        if name != "labels" and not name.startswith("decoder_") and is_row(value, len(mask))
    }
    keys = []
    for row, (seen, count) in enumerate(zip(mask, mask.sum(1).tolist(), strict=True)):
        begins = bool(seen[:count].all())
        own = [
            name.encode() + (table[row] if not each else table[row, :count] if begins else table[row, seen]).tobytes()
            for name, (each, table) in tables.items()
        ]
        if not begins:  # padding on the left: positions may depend on how much
            own.append(seen.nonzero()[0].tobytes())
        keys.append(b"".join(own))
    return keys


def _bytes(table: torch.Tensor, each: bool) -> np.ndarray:
    """A tensor's bytes, [rows, bytes]; [rows, tokens, bytes] of what has a place for each token."""
    flat = table.contiguous().view(*table.shape[: 1 + each], -1)
    return flat.view(torch.uint8).numpy()
