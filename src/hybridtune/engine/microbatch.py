"""Cuts a padded batch into micro-batches: of rows of similar length, or of no more than so many tokens.

The rows of a batch, and with them the update, stay those that the user asked for: with a loss that is a sum over rows
divided by the number of items of the global batch, the micro-batches' gradients add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .batches import is_rows
from .decoder import IGNORED

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
    if mask is None or mask.dim() != 2 or len(mask) < 2 * MIN_ROWS or not is_rows(batch) or not _ends_padded(mask):
        return [batch]
    return _cut(batch, mask, _where_padding_grows)


def by_tokens(batch: dict[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """Cuts a batch, its rows sorted by length, where the next row would be one too many.

    Args:
        batch: as above, padded on any side; without a mask all its places are tokens.
        limit: tokens of a micro-batch, padding not counted. A row with more is a micro-batch of its own.
    """
    mask = batch.get("attention_mask")
    if mask is None and torch.is_tensor(batch.get("input_ids")):
        mask = torch.ones_like(batch["input_ids"])
    if mask is None or mask.dim() != 2 or not is_rows(batch):
        return [batch]
    return _cut(batch, mask, partial(_where_full, limit=limit))


def _cut(
    batch: dict[str, torch.Tensor], mask: torch.Tensor, where: Callable[[list[int]], list[tuple[int, int]]]
) -> list[dict[str, torch.Tensor]]:
    lengths, order = mask.sum(1).sort(stable=True)
    cuts, narrow = where(lengths.tolist()), _ends_padded(mask)
    if len(cuts) == 1 and not narrow:
        return [batch]
    apart = ("decoder_", "labels") if "decoder_input_ids" in batch else ("decoder_",)  # of another text's width
    pieces = []
    for start, stop in cuts:
        rows, longest = order[start:stop], int(lengths[stop - 1]) if narrow else mask.shape[1]
        pieces.append(
            {
                key: value[rows] if key.startswith(apart) else _narrow(key, value[rows], mask.shape[1], longest)
                for key, value in batch.items()
            }
        )
    return pieces


def _ends_padded(mask: torch.Tensor) -> bool:
    """Whether padding is on the right alone, and there are no holes."""
    return bool((mask.cumprod(1) == mask).all())


def _narrow(key: str, value: torch.Tensor, width: int, longest: int) -> torch.Tensor:
    """Leaves the shared padding out of what has a column for each token.

    Labels may be as wide by chance (one for each class, or a target text): they lose only what no loss looks at.
    """
    if value.dim() < 2 or value.shape[1] != width:
        return value
    if key == "labels" and not bool((value[:, longest:] == IGNORED).all()):
        return value
    return value[:, :longest]


def _where_full(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """Cuts sorted lengths before a piece would have more tokens than the limit."""
    cuts, start, tokens = [], 0, 0
    for at, length in enumerate(lengths):
        if at > start and tokens + length > limit:
            cuts.append((start, at))
            start, tokens = at, 0
        tokens += length
    return [*cuts, (start, len(lengths))]


def _where_padding_grows(lengths: list[int]) -> list[tuple[int, int]]:
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
