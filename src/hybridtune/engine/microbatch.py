"""Cuts a padded batch into micro-batches: of rows of similar length, or of no more than so many tokens.

The rows of a batch, and with them the update, stay those that the user asked for: with a loss that is a sum over rows
divided by the number of items of the global batch, the micro-batches' gradients add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..errors import RecipeError
from .batches import is_row, is_rows
from .decoder import IGNORED

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
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


def by_tokens(batch: dict[str, torch.Tensor], limit: int, writes: bool = False) -> list[dict[str, torch.Tensor]]:
    """Cuts a batch, its rows sorted by length, before each row that would exceed the limit.

    Args:
        batch: as above, padded on any side; without a mask all its places are tokens.
        limit: tokens of a micro-batch, padding not counted. A row with more is a micro-batch of its own.
        writes: whether labels are texts for a decoder, whose tokens count too.

    Raises:
        RecipeError: tokens cannot be counted, or rows not told apart.
    """
    given = batch.get("input_ids", batch.get("inputs_embeds"))
    mask = batch.get("attention_mask")
    if mask is None and torch.is_tensor(given):
        mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    if mask is None or mask.dim() != 2:
        raise RecipeError(
            "max_tokens_per_micro_batch: the tokens of a batch cannot be counted",
            found=", ".join(batch),
            expected="attention_mask, input_ids or inputs_embeds, a place for each token of each row",
            mend="leave it out, and lower per_device_train_batch_size instead",
        )
    tokens, labels = mask.sum(1), batch.get("labels")
    if writes and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        tokens = tokens + labels.ne(IGNORED).sum(1)
    if int(tokens.sum()) <= limit:
        return [batch]
    shared = [name for name, value in batch.items() if not is_row(value, len(mask))]
    if shared:
        raise RecipeError(
            f"max_tokens_per_micro_batch: {', '.join(shared)}: has no entry for each row of a batch",
            expected=f"{len(mask)} entries, as the other columns have",
            mend="have the collator give it once a row, or leave max_tokens_per_micro_batch out",
        )
    return _cut(batch, mask, partial(_where_full, limit=limit), tokens)


def _cut(
    batch: dict[str, torch.Tensor],
    mask: torch.Tensor,
    where: Callable[[list[int]], list[tuple[int, int]]],
    tokens: torch.Tensor | None = None,
) -> list[dict[str, torch.Tensor]]:
    own = mask.sum(1)
    lengths, order = (own if tokens is None else tokens).sort(stable=True)
    cuts, narrow = where(lengths.tolist()), _ends_padded(mask)
    if len(cuts) == 1 and not narrow:
        return [batch]
    apart = ("decoder_", "labels") if "decoder_input_ids" in batch else ("decoder_",)  # of another text's width
    pieces = []
    for start, stop in cuts:
        rows = order[start:stop]
        longest = int(own[rows].max()) if narrow else mask.shape[1]
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

    Others may be as wide by chance (labels for each class, a target text, features of a row): of numbers with a point
    nothing is cut, of whole ones only what is the same everywhere, and of labels only what no loss looks at.
    """
    if value.dim() < 2 or value.shape[1] != width or longest == width:
        return value
    behind = value[:, longest:]
    if key == "labels" and not bool((behind == IGNORED).all()):
        return value
    each = key in PER_TOKEN or (not value.is_floating_point() and bool((behind == behind[0, 0]).all()))
    return value[:, :longest] if each else value


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
