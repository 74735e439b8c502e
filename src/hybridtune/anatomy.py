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
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import PartError, unknown

PLAIN = ("all", "embeddings", "head", "new", "norms", "biases")
BLOCKS = ("attention", "cross_attention", "mlp")
PROJECTIONS = ("q", "k", "v", "qkv", "o", "up", "gate", "down")
_LAYERS = re.compile(r"(?:(encoder|decoder)\.)?layers(?:\[([^\]]*)\])?((?:\.\w+)*)")
_MATRIX = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Block:
    """The attention, cross-attention or feed-forward part of one layer.

    Attributes:
        stack: "encoder", "decoder", or "" where the model has one stack.
        layer: index of the layer in its stack.
        path: name of the layer's module.
        kind: one of BLOCKS.
        modules: names of the model's own submodules that make up the block.
        matrices: name of every matrix in it -> its projection (or "" for another), in the model's order.
    """

    stack: str
    layer: int
    path: str
    kind: str
    modules: tuple[str, ...]
    matrices: dict[str, str]

    @property
    def input(self) -> str:
        """Name of the matrix whose input is the block's.

        In self-attention the value's (DeBERTa calls query and key on positions too), in cross-attention the query's
        (keys and values come from the encoder).
        """
        wanted = ("v", "qkv") if self.kind == "attention" else ("q", "qkv")
        return next((name for name, role in self.matrices.items() if role in wanted), next(iter(self.matrices)))

    @property
    def output(self) -> str:
        """Name of the matrix that projects back to the hidden width: its output is the block's, before the residual."""
        return next(reversed(self.matrices))


@dataclass(frozen=True)
class Part:
    """What a part's name means in one model: names of modules, of parameters, of matrices, and its blocks."""

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()

    def __str__(self) -> str:
        return self.name

    def without(self, lost: Collection[str]) -> Part:
        """The part less the parameters that another rule has claimed, and the matrices whose weight is among them."""
        if not lost:
            return self
        return replace(
            self,
            parameters=tuple(name for name in self.parameters if name not in lost),
            matrices=tuple(name for name in self.matrices if f"{name}.weight" not in lost),
        )


@dataclass
class _Stack:
    role: str
    path: str
    layers: list[str]
    blocks: list[Block] = field(default_factory=list)


class Anatomy:
    """The parts of one model.

    Built from the model as it was loaded: names stay those of the loaded model while methods add modules to it.

    Args:
        model: any transformers model, on any device, meta too.
        new: names of the parameters that the checkpoint did not have.

    Raises:
        PartError: no stack of layers is found.
    """

    def __init__(self, model: nn.Module, new: Iterable[str] = ()) -> None:
        self.model_class = type(model).__name__
        self._modules = dict(model.named_modules())
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        self._canonical = {
            name: canonical[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.parameters = tuple(canonical.values())
        self.new = tuple(self._canonical[name] for name in new if name in self._canonical)
        names = list(self._canonical.values())
        self.tied = {name for name in self.parameters if names.count(name) > 1}
        self._norms = [
            name for name, module in self._modules.items() if "norm" in type(module).__name__.lower() and _own(module)
        ]
        self._stacks = self._find_stacks()
        self._embeddings, self._head = self._outside()

    @property
    def depth(self) -> dict[str, int]:
        """Number of layers of each stack; the key is "" where there is one stack."""
        return {stack.role: len(stack.layers) for stack in self._stacks}

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
        blocks = tuple(block for stack in self._stacks for block in stack.blocks)
        if name == "all":
            return self._make(name, [""], blocks=blocks)
        if name == "new":
            if not self.new:
                raise PartError(
                    "part new: the checkpoint had every weight of this model", mend="name the part itself, such as head"
                )
            owners = dict.fromkeys(parameter.rpartition(".")[0] for parameter in self.new)
            return Part(name, tuple(owners), self.new)
        if name == "norms":
            return self._make(name, self._norms, matrices=False)
        if name == "biases":
            return Part(name, (), self._biases(self._canonical))
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
            for stack in self._stacks
            for block in stack.blocks
            if all(_below(module, tuple(found)) for module in block.modules)
        ]
        return self._make(name, found, blocks=tuple(inside))

    def _of_layers(self, name: str, role: str | None, index: str | None, suffix: str) -> Part:
        stacks = [stack for stack in self._stacks if role is None or stack.role == role]
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
            return self._filtered(name, [stack.layers[number] for stack, number in chosen], steps[0])
        return self._of_blocks(name, chosen, steps)

    def _of_blocks(self, name: str, chosen: list[tuple[_Stack, int]], steps: list[str]) -> Part:
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
        inside = [module for module in self._modules if _below(module, roots)]
        parameters = [self._canonical[full] for full in self._canonical if _below(full.rpartition(".")[0], roots)]
        found = [module for module in inside if self._is_matrix(module)] if matrices else []
        return Part(name, roots, tuple(dict.fromkeys(parameters)), tuple(found), blocks)

    def _is_matrix(self, module: str) -> bool:
        """Whether it can have an update of its own: a tied matrix is also another's, which would not get it."""
        return isinstance(self._modules[module], _MATRIX) and self._canonical[f"{module}.weight"] not in self.tied

    def _filtered(self, name: str, roots: list[str], what: str) -> Part:
        if what == "norms":
            return self._make(name, [norm for norm in self._norms if _below(norm, tuple(roots))], matrices=False)
        return Part(name, (), self._biases(full for full in self._canonical if _below(full, tuple(roots))))

    def _biases(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._canonical[name] for name in names if name.rpartition(".")[2] == "bias"))

    def norm_parameters(self) -> frozenset[str]:
        """Names of the parameters of all normalisation layers."""
        return frozenset(self._plain("norms").parameters)

    def _find_stacks(self) -> list[_Stack]:
        """Stacks are the outermost ModuleLists of at least one layer with matrices in it, all of one class."""
        paths: list[str] = []
        for path, module in self._modules.items():
            if not isinstance(module, nn.ModuleList) or len(module) == 0 or _below(path, tuple(paths)):
                continue
            if len({type(layer) for layer in module}) == 1 and _has_attention(module[0]):
                paths.append(path)
        if not paths:
            raise PartError(
                f"{self.model_class}: no stack of layers was found",
                expected="a torch.nn.ModuleList of equal layers with an attention module in each",
            )
        stacks = []
        for path in paths:
            roles = [step for step in path.split(".") if step in ("encoder", "decoder")]
            role = roles[0] if len(paths) > 1 and roles else ""
            stack = _Stack(role, path, [f"{path}.{number}" for number in range(len(self._modules[path]))])  # type: ignore[arg-type]
            stack.blocks = [
                block for number, layer in enumerate(stack.layers) for block in self._blocks(stack, number, layer)
            ]
            stacks.append(stack)
        return stacks

    def _blocks(self, stack: _Stack, number: int, layer: str) -> list[Block]:
        modules: dict[str, list[str]] = {kind: [] for kind in BLOCKS}
        for child in self._children(layer):
            if any(isinstance(module, _MATRIX) for module in self._modules[child].modules()):
                modules[_kind(child[len(layer) :], type(self._modules[child]).__name__)].append(child)
        found = []
        for kind, roots in modules.items():
            matrices = [m for m in self._modules if _below(m, tuple(roots)) and isinstance(self._modules[m], _MATRIX)]
            if matrices:
                roles = {matrix: _projection(kind, matrix, matrix == matrices[-1]) for matrix in matrices}
                found.append(Block(stack.role, number, layer, kind, tuple(roots), roles))
        return found

    def _children(self, layer: str) -> list[str]:
        """The layer's own submodules; T5 keeps them in a list of its own."""
        names = [f"{layer}.{name}" for name, _ in self._modules[layer].named_children()]
        lists = [name for name in names if isinstance(self._modules[name], nn.ModuleList)]
        return [n for n in names if n not in lists] + [
            f"{n}.{i}" for n in lists for i, _ in self._modules[n].named_children()
        ]

    def _outside(self) -> tuple[list[str], list[str]]:
        """Sorts what is outside the stacks: embeddings, final norms (of neither) and head (all the rest)."""
        above = {""} | {
            path.rsplit(".", cut)[0] for path in (s.path for s in self._stacks) for cut in range(1, path.count(".") + 1)
        }
        stacks = {stack.path for stack in self._stacks}
        embeddings, head = [], []
        for name, module in self._modules.items():
            parent = name.rpartition(".")[0]
            if not name or name in above or name in stacks or parent not in above or not list(module.parameters()):
                continue
            if "embed" in name.rpartition(".")[2].lower() or any(isinstance(m, nn.Embedding) for m in module.modules()):
                embeddings.append(name)
            elif "norm" not in type(module).__name__.lower():
                head.append(name)
        return embeddings, head


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _below(name: str, roots: tuple[str, ...]) -> bool:
    return any(root == "" or name == root or name.startswith(root + ".") for root in roots)


def _has_attention(layer: nn.Module) -> bool:
    names = [f"{name} {type(module).__name__}".lower() for name, module in layer.named_modules()]
    return any("attention" in name or "attn" in name for name in names)


def _kind(name: str, class_name: str) -> str:
    text = f"{name} {class_name}".lower()
    if "attn" not in text and "attention" not in text:
        return "mlp"
    return "cross_attention" if "cross" in text or "encoder_attn" in text or "encdec" in text else "attention"


def _projection(kind: str, matrix: str, last: bool) -> str:
    """The projection that a matrix is, from its last name; the last of a block leads back to the hidden width."""
    if last:
        return "down" if kind == "mlp" else "o"
    word = matrix.rpartition(".")[2].lower()
    if kind == "mlp":
        return "gate" if "gate" in word or word == "wi_0" else "up"
    if "qkv" in word or word in ("c_attn", "query_key_value"):
        return "qkv"
    return word[0] if re.fullmatch(r"(q|k|v|query|key|value)(_?(proj|lin|attn))?", word) else ""


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
