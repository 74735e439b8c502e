"""Embeddings, ordered layers and head of any Hugging Face model, found by structure; and the names of its parts.

The grammar of a part:

    all | embeddings | head | new | norms | biases | re:<regex over module names>
    [encoder. | decoder.] layers [index] [.attention | .cross_attention | .mlp] [.projection]
    index: [0:4]  [3,7,9]  [-2:]  [2]
    projection: q  k  v  qkv  o  up  gate  down

`layers[...].norms` and `.biases` are those inside the named layers. In an encoder-decoder model `layers[-2:]` means the
last two of each stack. An index outside the model is an error, not a shorter list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from .errors import PartError, unknown
from .layers import BLOCKS, MATRIX, Block, Stack, below, find_stacks, outside

PLAIN = ("all", "embeddings", "head", "new", "norms", "biases")
PROJECTIONS = ("q", "k", "v", "qkv", "o", "up", "gate", "down")
_LAYERS = re.compile(r"(?:(encoder|decoder)\.)?layers(?:\[([^\]]*)\])?((?:\.\w+)*)")


@dataclass(frozen=True)
class Part:
    """What a part's name means in one model.

    Attributes:
        modules, parameters: names of what it holds.
        matrices: names of the modules that hold a matrix of their own.
        blocks: the attention and feed-forward blocks that lie in it whole.
        roles: matrix -> its projection, of those that lie in a block.
        norms: names of the parameters of its normalisation layers.
        depth: layers of the model's deepest stack.
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    depth: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of its bias vectors, those of norms too."""
        return tuple(name for name in self.parameters if name.rpartition(".")[2] == "bias")

    def without(self, lost: Collection[str]) -> Part:
        """The part less the parameters that another rule has claimed, and the matrices whose weight is among them."""
        if not lost:
            return self
        return replace(
            self,
            parameters=tuple(name for name in self.parameters if name not in lost),
            matrices=tuple(name for name in self.matrices if f"{name}.weight" not in lost),
            norms=tuple(name for name in self.norms if name not in lost),
        )


class Anatomy:
    """The parts of one model.

    Built from the model as it was loaded: names stay those of the loaded model while methods add modules to it.

    Args:
        model: any transformers model, on any device, meta too.
        new: names of the parameters that the checkpoint did not have.

    Attributes:
        parameters: names of all parameters; of tied ones the first. Left out is what an architecture fixes, so that
            transformers does not save it, such as Marian's sinusoids: trained, it would be lost.
        new: as given, of tied ones the first name.
        tied: names of parameters that have another name too.
        norm_parameters: names of the parameters of all normalisation layers.
        stacks: the model's layers.

    Raises:
        PartError: no stack of layers is found.
    """

    def __init__(self, model: nn.Module, new: Iterable[str] = ()) -> None:
        self.model_class = type(model).__name__
        self._modules = dict(model.named_modules())
        fixed = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
        canonical = {id(one): name for name, one in model.named_parameters() if name not in fixed}
        self._canonical = {
            name: canonical[id(one)]
            for name, one in model.named_parameters(remove_duplicate=False)
            if id(one) in canonical
        }
        self.parameters = tuple(canonical.values())
        self.new = tuple(self._canonical[name] for name in new if name in self._canonical)
        names = list(self._canonical.values())
        self.tied = {name for name in self.parameters if names.count(name) > 1}
        self._norms = [
            name for name, module in self._modules.items() if "norm" in type(module).__name__.lower() and _own(module)
        ]
        in_norms = (full for full in self._canonical if full.rpartition(".")[0] in set(self._norms))
        self.norm_parameters = frozenset(self._canonical[full] for full in in_norms)
        self.stacks = find_stacks(self._modules)
        self._embeddings, self._head = outside(self._modules, self.stacks)
        self._roles = {m: role for stack in self.stacks for b in stack.blocks for m, role in b.matrices.items()}
        self._layer_of = {layer: (stack.role, at) for stack in self.stacks for at, layer in enumerate(stack.layers)}

    @property
    def depth(self) -> dict[str, int]:
        """Number of layers of each stack; the key is "" where there is one stack."""
        return {stack.role: len(stack.layers) for stack in self.stacks}

    def part(self, name: str) -> Part:
        """Resolves a part's name.

        Raises:
            PartError: the name is not in the grammar, or the model has no such part.
        """
        text = name.replace(" ", "")
        match = _LAYERS.fullmatch(text)
        if text.startswith("re:"):
            part = self._by_regex(name, text[3:])
        elif text in PLAIN:
            part = self._plain(text)
        elif match:
            part = self._of_layers(name, *match.groups())
        else:
            raise PartError(
                unknown("part", name, (*PLAIN, "layers", "layers.attention", "layers.mlp")),
                expected="all, embeddings, layers[...], head, new, norms, biases or re:<regex>; see the docs on parts",
            )
        if not part.parameters:
            raise PartError(
                f"part {name}: {self.model_class} has no parameters there",
                mend="name another part, or leave the rule out",
            )
        return part

    def _plain(self, name: str) -> Part:
        blocks = tuple(block for stack in self.stacks for block in stack.blocks)
        if name == "all":
            return self._make(name, [""], blocks=blocks)
        if name == "new":
            if not self.new:
                raise PartError(
                    "part new: the checkpoint had every weight of this model", mend="name the part itself, such as head"
                )
            owners = dict.fromkeys(parameter.rpartition(".")[0] for parameter in self.new)
            return self._of(name, self.new, owners)
        if name == "norms":
            return self._make(name, self._norms, matrices=False)
        if name == "biases":
            return self._filtered(name, ("",), "biases")
        roots = self._embeddings if name == "embeddings" else self._head
        if not roots:
            raise PartError(f"part {name}: {self.model_class} has none", expected=", ".join(self._modules)[:300])
        return self._make(name, roots)

    def _by_regex(self, name: str, pattern: str) -> Part:
        try:
            found = [module for module in self._modules if module and re.fullmatch(pattern, module)]
        except re.error as error:
            raise PartError(
                f"part {name}: not a regular expression", found=str(error), expected="such as re:.*query"
            ) from None
        if not found:
            raise PartError(
                f"part {name}: no module of {self.model_class} has such a name",
                expected="a pattern that matches whole names, such as re:.*query",
            )
        inside = [
            block
            for stack in self.stacks
            for block in stack.blocks
            if all(below(module, tuple(found)) for module in block.modules)
        ]
        return self._make(name, found, blocks=tuple(inside))

    def _of_layers(self, name: str, role: str | None, index: str | None, suffix: str) -> Part:
        stacks = [stack for stack in self.stacks if role is None or stack.role == role]
        if not stacks:
            raise PartError(
                f"part {name}: {self.model_class} is not an encoder-decoder", mend=f"write {name.partition('.')[2]}"
            )
        steps = suffix.split(".")[1:]
        known: tuple[str, ...] = (*BLOCKS, *PROJECTIONS, "norms", "biases")
        for step in steps:
            if step not in known:
                raise PartError(
                    f"part {name}: {unknown('piece', step, known)}",
                    expected=f"{', '.join(BLOCKS)}, then maybe {', '.join(PROJECTIONS)}; or norms or biases",
                )
            known = PROJECTIONS if step in BLOCKS else ()
        chosen = [(stack, number) for stack in stacks for number in _indices(name, index, len(stack.layers))]
        if not steps:
            blocks = tuple(block for stack, number in chosen for block in stack.blocks if block.layer == number)
            return self._make(name, [stack.layers[number] for stack, number in chosen], blocks=blocks)
        if steps in (["norms"], ["biases"]):
            return self._filtered(name, tuple(stack.layers[number] for stack, number in chosen), steps[0])
        return self._of_blocks(name, chosen, steps)

    def _of_blocks(self, name: str, chosen: list[tuple[Stack, int]], steps: list[str]) -> Part:
        kind = steps[0] if steps[0] in BLOCKS else None
        blocks = [
            block
            for stack, number in chosen
            for block in stack.blocks
            if block.layer == number and (kind is None or block.kind == kind)
        ]
        projection = steps[-1] if steps[-1] in PROJECTIONS else None
        if projection is None:
            found = [module for block in blocks for module in block.modules]
        else:
            found = [matrix for block in blocks for matrix, role in block.matrices.items() if role == projection]
        if not found:
            has = sorted(
                {role for block in blocks for role in block.matrices.values() if role}
                or {b.kind for s, _ in chosen for b in s.blocks}
            )
            raise PartError(f"part {name}: {self.model_class} has none there", expected=" or ".join(has))
        return self._make(name, found, blocks=() if projection else tuple(blocks))

    def _make(self, name: str, roots: Iterable[str], blocks: tuple[Block, ...] = (), matrices: bool = True) -> Part:
        """A part from the modules that contain it."""
        roots = tuple(dict.fromkeys(roots))
        found = [module for module in self._modules if below(module, roots) and self._is_matrix(module)]
        parameters = (full for full in self._canonical if below(full.rpartition(".")[0], roots))
        return self._of(name, parameters, roots, found if matrices else (), blocks)

    def _of(
        self,
        name: str,
        parameters: Iterable[str],
        modules: Iterable[str] = (),
        matrices: Iterable[str] = (),
        blocks: tuple[Block, ...] = (),
    ) -> Part:
        own = tuple(dict.fromkeys(self._canonical[full] for full in parameters))
        norms = tuple(parameter for parameter in own if parameter in self.norm_parameters)
        matrices = tuple(matrices)
        roles = {matrix: self._roles[matrix] for matrix in matrices if matrix in self._roles}
        deepest = max(self.depth.values(), default=1)
        return Part(name, tuple(modules), own, matrices, blocks, roles, norms, deepest)

    def _is_matrix(self, module: str) -> bool:
        """Whether it can have an update of its own: a tied matrix is also another's, which would not get it, and an
        update folded into a table would miss the rows that stand in for its own."""
        found = self._modules[module]
        plain = isinstance(found, MATRIX) and not any(True for _ in found.children())
        return plain and self._canonical[f"{module}.weight"] not in self.tied

    def _filtered(self, name: str, roots: tuple[str, ...], what: str) -> Part:
        """The norms or the biases inside some modules."""
        if what == "norms":
            return self._make(name, [norm for norm in self._norms if below(norm, roots)], matrices=False)
        inside = (full for full in self._canonical if below(full, roots))
        return self._of(name, (full for full in inside if full.rpartition(".")[2] == "bias"))

    def layer_of(self, parameter: str) -> tuple[str, int] | None:
        """The stack's role and the number of the layer that a parameter lies in, of its own or added by a method."""
        steps = parameter.split(".")
        for end in range(len(steps) - 1, 0, -1):
            if found := self._layer_of.get(".".join(steps[:end])):
                return found
        return None

    def depth_of(self, parameter: str) -> int:
        """Distance from the head: 0 in the head and final norms, 1 in a stack's top layer, most in the embeddings."""
        layer = self.layer_of(parameter)
        if layer is not None:
            return self.depth[layer[0]] - layer[1]
        return max(self.depth.values()) + 1 if below(parameter, tuple(self._embeddings)) else 0


def _indices(name: str, index: str | None, depth: int) -> list[int]:
    """Layer numbers that an index means; outside the model is an error."""
    if index is None:
        return list(range(depth))
    if match := re.fullmatch(r"(-?\d+)?:(-?\d+)?", index):
        ends = [depth if end is None and number else int(end or 0) for number, end in enumerate(match.groups())]
        start, stop = (end + depth if end < 0 else end for end in ends)
        found = list(range(start, stop))
        inside = 0 <= start < stop <= depth
    elif re.fullmatch(r"-?\d+(,-?\d+)*", index):
        found = [number + depth if number < 0 else number for number in map(int, index.split(","))]
        inside = all(0 <= number < depth for number in found)
    else:
        raise PartError(f"part {name}: [{index}] is not an index", expected="[2], [0:4], [-2:] or [3,7,9]")
    if not inside:
        raise PartError(
            f"part {name}: outside the model",
            found=f"{depth} layers, numbered 0 to {depth - 1}",
            mend=f"stay within [0:{depth}], or count from the end with [-1]",
        )
    return list(dict.fromkeys(found))


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
