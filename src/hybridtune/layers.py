"""The layers of any Hugging Face model, found by structure: stacks of equal layers, and the blocks of each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import PartError

BLOCKS = ("attention", "cross_attention", "mlp")
MATRIX = (nn.Linear, Conv1D)
Modules = Mapping[str, nn.Module]


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


@dataclass
class Stack:
    """One stack of layers: its role (encoder, decoder, or "" where there is one), its path, and its layers' names."""

    role: str
    path: str
    layers: list[str]
    blocks: list[Block] = field(default_factory=list)


def find_stacks(modules: Modules) -> list[Stack]:
    """Finds the stacks: the outermost ModuleLists of layers of one class with attention in them.

    Args:
        modules: all modules of a model by their names.

    Raises:
        PartError: there is none.
    """
    paths: list[str] = []
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or below(path, tuple(paths)):
            continue
        if len({type(layer) for layer in module}) == 1 and _has_attention(module[0]):
            paths.append(path)
    if not paths:
        raise PartError(
            f"{type(modules['']).__name__}: no stack of layers was found",
            expected="a torch.nn.ModuleList of equal layers with an attention module in each",
        )
    stacks = []
    for path in paths:
        roles = [step for step in path.split(".") if step in ("encoder", "decoder")]
        role = roles[0] if len(paths) > 1 and roles else ""
        stack = Stack(role, path, [f"{path}.{number}" for number in range(len(modules[path]))])  # type: ignore[arg-type]
        stack.blocks = [
            block for number, layer in enumerate(stack.layers) for block in _blocks(modules, stack, number, layer)
        ]
        stacks.append(stack)
    return stacks


def _blocks(modules: Modules, stack: Stack, number: int, layer: str) -> list[Block]:
    roots: dict[str, list[str]] = {kind: [] for kind in BLOCKS}
    for child in _children(modules, layer):
        if any(isinstance(module, MATRIX) for module in modules[child].modules()):
            roots[_kind(child[len(layer) :], type(modules[child]).__name__)].append(child)
    found = []
    for kind, own in roots.items():
        matrices = [m for m in modules if below(m, tuple(own)) and isinstance(modules[m], MATRIX)]
        if matrices:
            roles = {matrix: _projection(kind, matrix, matrix == matrices[-1]) for matrix in matrices}
            found.append(Block(stack.role, number, layer, kind, tuple(own), roles))
    return found


def _children(modules: Modules, layer: str) -> list[str]:
    """The layer's own submodules; T5 keeps them in a list of its own."""
    names = [f"{layer}.{name}" for name, _ in modules[layer].named_children()]
    lists = [name for name in names if isinstance(modules[name], nn.ModuleList)]
    return [n for n in names if n not in lists] + [f"{n}.{i}" for n in lists for i, _ in modules[n].named_children()]


def outside(modules: Modules, stacks: list[Stack]) -> tuple[list[str], list[str]]:
    """Sorts what is outside the stacks: embeddings, final norms (of neither) and head (all the rest)."""
    paths = {stack.path for stack in stacks}
    above = {""} | {path.rsplit(".", cut)[0] for path in paths for cut in range(1, path.count(".") + 1)}
    embeddings, head = [], []
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if not name or name in above or name in paths or parent not in above or not list(module.parameters()):
            continue
        if "embed" in name.rpartition(".")[2].lower() or any(isinstance(m, nn.Embedding) for m in module.modules()):
            embeddings.append(name)
        elif "norm" not in type(module).__name__.lower():
            head.append(name)
    return embeddings, head


def below(name: str, roots: tuple[str, ...]) -> bool:
    """Whether a module or parameter is one of the roots or lies in one."""
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
