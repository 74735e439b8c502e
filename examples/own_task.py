"""A task of one's own: classification with the focal loss (arXiv 1708.02002), which cares less for what is easy.

    hybridtune tune --task examples/own_task.py --set metrics=examples/own_metrics.py --maximize worst_class ...

The file offers a class `Task`. It inherits what it does not change; the whole contract stands in
`hybridtune/tasks/__init__.py`. Methods of one's own work likewise (`method: ./mine.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from hybridtune.tasks import classification

GAMMA = 2.0


class Task(classification.Task):
    """Classification with focal loss."""

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The sum of (1 - p)^gamma (-log p) over the rows, divided by the rows of the whole global batch."""
        losses = cross_entropy(outputs["logits"].float(), labels, reduction="none")
        total = ((1 - torch.exp(-losses)) ** GAMMA * losses).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
