"""What a proof on a model needs: a few rows, the shortest and the longest of some, and how far numbers may differ.

In a training they come from the training data, in its own order, and not from the batch that happens to be first: a
training that goes on after an interruption comes to the same answer as one that was never interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from .batches import is_rows

ROWS, TOKENS = 4, 2**12  # at most; of rows longer than half of these tokens two: the shortest and the longest
LOOKED_AT = 64  # rows of the training data, evenly spaced

Batch = dict[str, Any]


# What a model's own code raises when it is given something else than it was written for.
WRONG = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def rows_of_batch(batch: Batch) -> Batch | None:
    """A few rows of a batch, the shortest and the longest among them; None where all have one length or are no rows."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()) or not is_rows(batch):
        return None
    ranked = mask.sum(1).argsort(stable=True)
    count = min(ROWS, len(ranked), max(2, TOKENS // mask.shape[1]))
    chosen = ranked[torch.linspace(0, len(ranked) - 1, count).long().to(ranked.device)]
    return {key: value[chosen] for key, value in batch.items()}


def repeated(batch: Batch, count: int) -> Batch | None:
    """The shortest row of a batch so many times, without padding; None where it has no rows of tokens."""
    mask = batch.get("attention_mask", batch.get("input_ids"))
    if not torch.is_tensor(mask) or mask.dim() != 2 or not is_rows(batch):
        return None
    seen = mask.bool() if "attention_mask" in batch else torch.ones_like(mask, dtype=torch.bool)
    counts = seen.sum(1)
    row = int(counts.masked_fill(counts == 0, mask.shape[1] + 1).argmin())
    places = seen[row].nonzero().squeeze(1)

    def cut(name: str, value: torch.Tensor) -> torch.Tensor:
        each = value.dim() > 1 and value.shape[1] == mask.shape[1] and not value.is_floating_point()
        one = value[row : row + 1]
        return (one.index_select(1, places) if each or name == "inputs_embeds" else one).repeat_interleave(count, 0)

    return {name: cut(name, value) for name, value in batch.items()}


def window(batch: Batch, columns: int) -> Batch:
    """The first rows of a batch, and of what has a column for each token so many; the last ones, if padded in front."""
    mask = batch.get("attention_mask")
    left = mask is not None and not bool(mask[:, 0].all())
    kept = slice(-columns, None) if left else slice(columns)
    rows = {key: value[:ROWS] for key, value in batch.items()}
    # contiguous, as models take views of labels
    return {key: value[:, kept].contiguous() if value.dim() == 2 else value for key, value in rows.items()}


def rows_of_dataset(dataset: Any, collate: Callable[[list[Any]], Any]) -> Batch | None:
    """A batch of rows from all over a dataset, of several lengths where that can be; None where rows have no numbers.

    Where all rows have one length a shortened one is added: other data, that of an evaluation, may have other lengths.

    Args:
        dataset: any; one that can only be gone through is left alone.
        collate: makes a batch of rows, as in training.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    last = len(dataset) - 1
    numbers = dict.fromkeys(at * last // (LOOKED_AT - 1) for at in range(LOOKED_AT))
    with _untouched_randomness(), suppress(*WRONG):
        rows = [dataset[number] for number in numbers]
        batch = dict(collate(rows))
        shorter = _shortened(rows[0])
        if rows_of_batch(batch) is None and shorter is not None:
            batch = dict(collate([*rows, shorter]))
        return batch
    return None  # a user's own collator may want other batches; in training it says itself what is wrong


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of a difference over the norm of what is expected."""
    return float((found - expected).float().norm() / expected.float().norm().clamp(min=1e-30))


def allowed(dtype: torch.dtype, whole: float, roundings: float) -> float:
    """How large such a difference may be.

    Rounding errors are relative to what is rounded, so that no size is small or large by itself: logits of a fresh head
    are hundredths, and a wrong mask changes a good part of them. In half precision they are counted in roundings.

    Args:
        dtype: that is computed in.
        whole: in 32 and in 64 bits, of which models compute a part in 32.
        roundings: in half precision.
    """
    return whole if dtype in (torch.float32, torch.float64) else roundings * torch.finfo(dtype).eps


def _shortened(row: Any) -> Any:
    """A row without some tokens of its middle: what ends a text stays. None where it is too short, or no row."""
    length = len(row["input_ids"]) if isinstance(row, dict) and hasattr(row.get("input_ids"), "__len__") else 0
    if length < 3:
        return None
    kept = [*range(length // 2), *range(length - length // 4, length)]
    return {key: _chosen(value, kept, length) for key, value in row.items()}


def _chosen(value: Any, places: list[int], length: int) -> Any:
    """What of a row's entry belongs to some of its tokens."""
    if isinstance(value, (list, tuple)) and len(value) == length:
        return [value[place] for place in places]
    array = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0 and len(value) == length
    return value[places] if array else value


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Collators that mask at random, and datasets that draw, take no number from the training."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
