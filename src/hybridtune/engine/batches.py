"""What a batch is: a row in every entry for each example."""

from __future__ import annotations

from typing import Any

import torch


def is_rows(batch: Any) -> bool:
    """Whether every entry of a batch has one row for each example."""
    values = list(batch.values())
    rows = len(values[0]) if torch.is_tensor(values[0]) and values[0].dim() else 0
    return all(is_row(value, rows) for value in values)


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch for a model that is to compute no loss."""
    return {key: value for key, value in batch.items() if key != "labels"}


def is_row(value: Any, rows: int) -> bool:
    """Whether something has an entry for each of so many examples."""
    return torch.is_tensor(value) and value.dim() > 0 and len(value) == rows
