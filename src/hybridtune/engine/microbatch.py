"""Cuts a padded batch into micro-batches of rows of similar length, so that less padding is computed.

The rows of a batch, and with them the update, stay those that the user asked for: with a loss that is a sum over rows
divided by the number of items of the global batch, the micro-batches' gradients add up to the batch's.
"""

from __future__ import annotations

from typing import Any

import torch

MIN_ROWS = 8
WASTE = 0.1


def by_length(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Cuts a right-padded batch.

    Args:
        batch: tensors of shape [rows, length] or [rows, ...], with `attention_mask` [rows, length].

    Returns:
        Micro-batches of at least MIN_ROWS rows (where the batch has as many), sorted by length, each without the
        padding that all its rows share; the batch itself where it cannot be cut.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or len(mask) < 2 * MIN_ROWS or not is_rows(batch):
        return [batch]
    if not bool((mask.cumprod(1) == mask).all()):  # padded on the left, or with holes
        return [batch]
    lengths, order = mask.sum(1).sort()
    pieces = []
    for start, stop in _cuts(lengths.tolist()):
        rows, longest = order[start:stop], int(lengths[stop - 1])
        pieces.append({key: _narrow(key, value[rows], mask.shape[1], longest) for key, value in batch.items()})
    return pieces


def is_rows(batch: Any) -> bool:
    """Whether every entry of a batch has one row for each example."""
    values = list(batch.values())
    rows = len(values[0]) if torch.is_tensor(values[0]) and values[0].dim() else 0
    return all(is_row(value, rows) for value in values)


def is_row(value: Any, rows: int) -> bool:
    """Whether something has an entry for each of so many examples."""
    return torch.is_tensor(value) and value.dim() > 0 and len(value) == rows


def _narrow(key: str, value: torch.Tensor, width: int, longest: int) -> torch.Tensor:
    """Leaves the shared padding out of what has a column for each token.

    Labels may be as wide by chance (one for each class, or a target text): they lose only what no loss looks at.
    """
    if value.dim() < 2 or value.shape[1] != width or key.startswith("decoder_"):
        return value
    if key == "labels" and not bool((value[:, longest:] == -100).all()):
        return value
    return value[:, :longest]


def _cuts(lengths: list[int]) -> list[tuple[int, int]]:
    """Cuts sorted lengths where the padding of the piece so far would grow beyond WASTE of its tokens."""
    cuts, start = [], 0
    for stop in range(MIN_ROWS, len(lengths) - MIN_ROWS + 1):
        if stop - start < MIN_ROWS:
            continue
        tokens = sum(lengths[start : stop + 1])
        if lengths[stop] * (stop + 1 - start) > (1 + WASTE) * tokens:
            cuts.append((start, stop))
            start = stop
    return [*cuts, (start, len(lengths))]
