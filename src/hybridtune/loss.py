"""The loss of an update: Trainer's, or one of the whole global batch in its place, where a model computes the same.

A model is known by the name of its class, and a class of that name may do something else with its labels: weigh them,
smooth them, run them through a CRF. A few made-up labels show it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from . import tasks
from .engine import proof, vocabulary
from .engine.decoder import complete, head_of
from .engine.patch import in_evaluation
from .engine.vocabulary import Vocabulary
from .tasks import Task

ROWS = 4
WHOLE, ROUNDINGS = 1e-5, 4  # by which losses and their gradients may differ: see `proof.allowed`
LABELS = ("labels", "start_positions", "end_positions")
LOGITS = ("logits", "start_logits", "end_logits")


class Loss:
    """What is computed where a trainer is given a `compute_loss_func`, or none.

    That of a task is; without one, the loss of the task that the model's class is named for, or of a language model
    without all its logits, until a few rows show that the model's own is another. Else it is Trainer's business.

    Args:
        model: with all that is on it.
        given: what the trainer was given.
        chunks: whether the logits of some tokens at a time may be computed.
        guess: whether another loss may stand for the model's own.

    Attributes:
        task: whose loss it is, where that is known.
        chunked: whether it is computed without the logits of all tokens.
        proven: whether `prove` has nothing more to try.
        reason: why the model's own is used after all; "" where it is not, or was not to be replaced.
    """

    def __init__(self, model: nn.Module, given: Any, *, chunks: bool, guess: bool) -> None:
        self.model, self.given = model, given
        self.reason = ""
        owner = getattr(given, "__self__", None)
        self.task: Task | None = owner if isinstance(owner, Task) else None
        guess = guess and given is None
        if guess:
            self.task = _task_of(model)
        writes = guess if self.task is None else self.task.writes
        self.chunked = chunks and writes and head_of(model) is not None
        self._vocabulary: Vocabulary | None = None
        self.proven = not self.chunked and not (guess and self.task)

    @property
    def function(self) -> Any:
        """What Trainer is to call: its `compute_loss_func`."""
        if self.chunked:
            return self._in_chunks
        return self.task.loss if self.task else self.given

    @property
    def exact(self) -> bool:
        """Whether it is a sum over rows, divided by the items of the global batch: rows can be cut from it."""
        return self.chunked or self.task is not None

    @property
    def of_labels(self) -> bool:
        """Whether it looks at labelled places alone: one of the user's own may look at all."""
        return self.chunked or (self.task.writes if self.task else self.given is None)

    def prove(self, batch: dict[str, Any]) -> str:
        """Goes back to the task's or the model's own loss where a few rows show that it is another; says so and why.

        Args:
            batch: the user's rows with their labels, on the model's device.
        """
        if self.chunked:
            head = head_of(self.model)
            assert head is not None
            self._vocabulary = vocabulary.start(self.model, head, batch)
            self.reason, self.chunked, self.proven = self._vocabulary.reason, self._vocabulary.on, True
            return f"logits of all tokens at once: {self.reason}" if self.reason else ""
        assert self.task is not None
        task, self.reason = self.task, differs(self.model, self.task, batch)
        self.proven = True
        if not self.reason:
            return ""
        self.task = None
        of = f"{task.name} over the whole batch"
        return f"the model's own loss is used, as Trainer does, not that of {of}: {self.reason}"

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with labels as they are called here, and what a model would have made of them."""
        if self.task is not None:
            batch = self.task.with_labels(batch)
        return complete(self.model, batch) if self.chunked or (self.task and self.task.writes) else batch

    def open(self, labels: Any) -> AbstractContextManager[None]:
        """For one forward without labels whose logits nobody wants."""
        return self._vocabulary.open(labels) if self.chunked and self._vocabulary else nullcontext()

    def _in_chunks(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        assert self._vocabulary is not None
        return self._vocabulary.loss(outputs, labels, num_items_in_batch)


def _task_of(model: nn.Module) -> Task | None:
    """The task that a model's class is named for."""
    found = tasks.for_model(model)
    if found is None:
        return None
    task = found()
    task.ready(model)
    return task


def differs(model: nn.Module, task: Task, batch: dict[str, Any]) -> str:
    """Why the loss of a task is not a model's own; "" where it is, or where the model has none to compare with.

    Compared is the loss of one row with several labels, which leaves no padding to differ about, and its gradient at
    the logits, which shows weights of classes and smoothed labels where a fresh head makes all losses alike.

    Args:
        model: with the names that transformers has for inputs and outputs.
        task: one that it seems to be made for.
        batch: the user's rows with their labels, on the model's device.
    """
    config = getattr(model, "config", None)
    rows = proof.repeated(batch, ROWS)
    if rows is None:
        return ""
    rows |= {name: _made_up(rows[name], config) for name in LABELS if name in rows}
    kind = getattr(config, "problem_type", None)
    try:
        with in_evaluation(model), torch.enable_grad():
            output = model(**rows)
    except proof.WRONG:
        return ""  # it says itself what is wrong, or has another way to be given labels
    finally:
        if config is not None and hasattr(config, "problem_type"):
            config.problem_type = kind  # transformers' models write there what they take labels for
    if not hasattr(output, "get"):
        return "its outputs have no names"
    own = output.get("loss")
    if own is None:
        return ""
    if not torch.is_tensor(own) or own.dim() != 0:
        return "it is no single number"
    without = type(output)({name: value for name, value in output.items() if name != "loss"})
    logits = [output[name] for name in LOGITS if name in output and output[name].requires_grad]
    try:
        labels = task.with_labels(rows).get("labels")
        if labels is None:
            return "its labels are called otherwise"
        ours = task.loss(without, labels)
        compared = [("the loss", ours, own)]
        if logits and own.requires_grad:
            at_logits = zip(_gradients(ours, logits), _gradients(own, logits), strict=True)
            compared += [("its gradient", found, expected) for found, expected in at_logits if expected is not None]
    except proof.WRONG as error:
        return f"its labels or logits are of another kind ({error})"
    allowed = proof.allowed(own.dtype, WHOLE, ROUNDINGS)  # both of the same logits, of whatever type these are
    for what, found, expected in compared:
        by = proof.difference(found.detach(), expected.detach())
        if not by <= allowed:  # neither where it is no number
            return f"{what} would be another (by {by:.2g} of it)"
    return ""


def _made_up(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Labels of the same shape and type, of all classes."""
    numbers = torch.arange(labels.numel(), device=labels.device).view_as(labels)
    classes = getattr(config, "num_labels", 2)
    if not labels.is_floating_point():
        return (numbers % classes).to(labels.dtype)
    several = classes > 1 and getattr(config, "problem_type", None) != "regression"
    return ((numbers + numbers // classes) % 2 if several else numbers).to(labels.dtype)


def _gradients(loss: torch.Tensor, at: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
