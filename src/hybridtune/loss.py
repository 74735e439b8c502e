"""Whether a task's loss is the one that a model computes by itself.

A model is known by the name of its class, and a class of that name may do something else with its labels: weigh them,
smooth them, run them through a CRF. A few made-up labels show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .engine import proof
from .engine.patch import in_evaluation
from .tasks import Task

ROWS = 4
WHOLE, ROUNDINGS = 1e-5, 4  # by which losses and their gradients may differ: see `proof.allowed`
LABELS = ("labels", "start_positions", "end_positions")
LOGITS = ("logits", "start_logits", "end_logits")


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
        ours = task.loss(without, task.with_labels(rows)["labels"])
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
