"""The loss of a language model without the logits of all its tokens.

Logits of all tokens over a large vocabulary are often the largest thing in memory. Here only the hidden states of
labelled tokens go through the model's output embeddings, chunk by chunk; a chunk's gradients are computed while its
logits are there, and the logits are forgotten. What else a model does to its logits would be lost: `start` looks for
it, and tells by the model's own loss whether labels are shifted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..errors import first_line
from . import proof
from .batches import is_rows, without_labels
from .decoder import IGNORED, complete
from .patch import in_evaluation

# Bytes of a chunk's logits, in 32-bit floats. A trained head's gradient is added to once a chunk, which on a GPU costs
# more than small chunks save.
CHUNK = {"cpu": 2**26, "cuda": 2**30}
WINDOW = 32  # columns that the proof is made on
SPREAD = 10.0  # of made-up logits: what caps or scales logits shows there
WHOLE, ROUNDINGS = 1e-5, 1  # by which losses may differ, which are means: see `proof.allowed`


class Vocabulary:
    """Computes the loss of a model with a head over a vocabulary.

    Args:
        model: the model.
        head: its output embeddings, with what is on them.

    Attributes:
        shift: how many places before a label the hidden state lies that it is about.
        reason: why the model's own loss has to be used.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self.model, self.head = model, head
        self.shift = 0
        self.reason = ""

    @property
    def on(self) -> bool:
        """Whether the loss may be computed here."""
        return not self.reason

    @contextmanager
    def open(self, labels: torch.Tensor) -> Iterator[None]:
        """For one forward without labels: its loss is the sum over its labelled tokens, its logits are left out."""
        places, targets = self._labelled(labels)
        sums: list[torch.Tensor] = []
        busy = False

        def enter(head: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            nonlocal busy
            if busy:
                return None
            (hidden,) = args
            if hidden.shape[:-1] != labels.shape:
                raise ValueError(f"hidden states {list(hidden.shape)} for labels {list(labels.shape)}")
            busy = True
            sums.append(self._sum(hidden.flatten(0, -2).index_select(0, places), targets))
            busy = False
            return (hidden[:, :0],)

        def leave(model: nn.Module, args: Any, output: Any) -> Any:
            (output["loss"],) = sums
            return output

        # hooks that are on the head see chunks; the loss goes out with the output, where DDP looks for what was used
        handles = self.head.register_forward_pre_hook(enter, prepend=True), self.model.register_forward_hook(leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The sum over labelled tokens, divided by their number in the whole global batch (or here).

        Args:
            outputs: of a forward without labels, within `open` or not.
            labels: which it was not given.
            num_items_in_batch: labelled tokens of the global batch.
        """
        items, total = num_items_in_batch, outputs.get("loss")
        if total is None:
            places, targets = self._labelled(labels)
            total = summed(outputs["logits"].flatten(0, -2).index_select(0, places), targets)
        if items is None:
            items = labels[:, self.shift :].ne(IGNORED).sum()
        loss: torch.Tensor = total / torch.as_tensor(items).clamp(min=1)
        return loss

    def _labelled(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the hidden states that labels are about, counted row by row, and these labels."""
        flat = functional.pad(labels[:, self.shift :], (0, self.shift), value=IGNORED).flatten()
        places = flat.ne(IGNORED).nonzero().squeeze(1)
        return places, flat[places]

    def _sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        empty = self.head(hidden[:0].detach())  # costs nothing, and tells the width and what is trained
        rows = max(1, CHUNK.get(hidden.device.type, CHUNK["cpu"]) // (4 * empty.shape[-1]))
        total: torch.Tensor = _Sum.apply(self.head, targets, rows, hidden, *_leaves(empty))  # type: ignore[no-untyped-call]
        return total

    def prove(self, batch: dict[str, Any]) -> str:
        """Compares with the model's own loss; says what differs, and finds the shift.

        The first comparison is on made-up logits, so that it shows what a model does after its head, whatever its
        weights are now; the second on its own.

        Args:
            batch: a few rows with labels.
        """
        own, made_up = self._of_made_up_logits(batch)
        if own.requires_grad:
            return "its loss depends on more that is trained than its head gives"
        for self.shift in (1, 0):
            if _close(self.loss({"logits": made_up}, batch["labels"]), own, made_up.dtype):
                break
        else:
            return "its own loss is not the cross-entropy of what its head gives"
        with torch.no_grad():
            own = self.model(**batch)["loss"]
            rest = complete(self.model, batch)
            labels = rest["labels"]
            with self.open(labels):
                outputs = self.model(**without_labels(rest))
        found = self.loss(outputs, labels)
        return "" if _close(found, own, made_up.dtype) else f"a loss of {found:.6g} instead of {own:.6g}"

    def _of_made_up_logits(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own loss where its head gives random numbers, and these."""
        given: list[torch.Tensor] = []

        def replace(head: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            numbers = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(given)))
            given.append((SPREAD * numbers).to(output))
            return given[-1]

        handle = self.head.register_forward_hook(replace)
        try:
            with torch.enable_grad():
                own = self.model(**batch)["loss"]
        finally:
            handle.remove()
        (made_up,) = given
        return own, made_up


@contextmanager
def without_logits(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Has a head run on no token; what it would have run on is put into the list."""
    hidden: list[torch.Tensor] = []

    def take(head: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hidden.append(args[0])
        return (args[0][:, :0],)

    handle = head.register_forward_pre_hook(take, prepend=True)
    try:
        yield hidden
    finally:
        handle.remove()


def start(model: nn.Module, head: nn.Module, batch: dict[str, Any]) -> Vocabulary:
    """The loss of a model in chunks, proven on a few rows; `reason` says where it cannot be.

    Args:
        model: with all that is on it, and with gradients required where it is trained.
        head: its output embeddings.
        batch: the user's rows, on the model's device.
    """
    found = Vocabulary(model, head)
    if not is_rows(batch) or "labels" not in batch or batch["labels"].dim() != 2:
        found.reason = "its batches are no rows with a label for each token"
        return found
    try:
        with in_evaluation(model):
            found.reason = found.prove(_labelled(proof.window(batch, WINDOW)))
    except proof.WRONG as error:
        found.reason = f"it cannot run without logits ({first_line(error, 120)})"
    return found


def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropy, in 32-bit floats at least."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(exact, targets, reduction="sum")


def scored(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sum, and its gradient at the logits.

        sum over rows of log Z - x_t,    Z = sum_j exp(x_j);    d / dx_j = p_j - [j = t],    p = softmax(x)

    By fewer passes over what is as large as a vocabulary than autograd makes: log Z comes from the largest p and its x,
    and p_t - 1 from log Z, since in half precision a p_t of nearly 1 is 1.

    Args:
        logits: [rows, vocabulary].
        targets: [rows].
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    gradient = logits.softmax(-1, dtype=exact)
    largest, at = gradient.max(-1, keepdim=True)
    log_z = logits.gather(-1, at).to(exact) - largest.log()
    off = log_z - logits.gather(-1, targets[:, None]).to(exact)
    gradient = gradient.to(logits.dtype).scatter_(-1, targets[:, None], (-off).expm1().to(logits.dtype))
    return off.sum(), gradient


class _Sum(torch.autograd.Function):
    """The sum of the cross-entropy of all chunks, with the gradients of what went into it."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets: torch.Tensor, rows: int, hidden: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        total, below = torch.zeros((), device=hidden.device), ctx.needs_input_grad[3]
        pieces: list[torch.Tensor] = []
        # many small numbers would be lost in a sum in half precision
        sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in trained]
        for piece, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            piece = piece.detach().requires_grad_(below)
            with torch.set_grad_enabled(below or bool(trained)):
                logits = head(piece)
            if not logits.requires_grad:
                total = total + summed(logits, target)
                continue
            loss, along = scored(logits.detach(), target)
            total = total + loss
            found = list(torch.autograd.grad(logits, [piece, *trained] if below else trained, along))
            if below:
                pieces.append(found.pop(0))
            for gradient, more in zip(sums, found, strict=True):
                gradient.add_(more)
        ctx.below, ctx.types = below, [tensor.dtype for tensor in trained]
        ctx.save_for_backward(*([torch.cat(pieces)] if pieces else []), *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept = [tensor * gradient for tensor in ctx.saved_tensors]
        below = kept.pop(0) if ctx.below else None
        return None, None, None, below, *map(torch.Tensor.to, kept, ctx.types)


def _leaves(result: torch.Tensor) -> list[torch.Tensor]:
    """What is trained and went into a result: a head may hold more, or less, than what it computes with."""
    seen, nodes = set(), [result.grad_fn]
    found = []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.append(node.variable)
    return found


def _labelled(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows with made-up labels, where nothing in them is labelled."""
    if not bool(rows["labels"][:, 1:].ne(IGNORED).any()):
        rows["labels"] = torch.ones_like(rows["labels"])
    return rows


def _close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return proof.difference(found, expected) <= proof.allowed(dtype, WHOLE, ROUNDINGS)
