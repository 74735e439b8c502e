"""Cuts a padded batch into micro-batches of rows of similar length, so that less padding is computed.

The rows of a batch, and with them the update, stay those that the user asked for: with a loss that is a sum over rows
divided by the number of items of the global batch, the micro-batches' gradients add up to the batch's.
"""

from __future__ import annotations

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
    if mask is None or mask.dim() != 2 or len(mask) < 2 * MIN_ROWS or not bool(mask[:, 0].all()):
        return [batch]
    lengths, order = mask.sum(1).sort()
    width = mask.shape[1]
    pieces = []
    for start, stop in _cuts(lengths.tolist()):
        rows, longest = order[start:stop], int(lengths[stop - 1])
        pieces.append(
            {
                key: value[rows][:, :longest] if value.dim() > 1 and value.shape[1] == width else value[rows]
                for key, value in batch.items()
            }
        )
    return pieces


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
