"""What a training does when a loss is no number, or when memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from . import staging
from .checkpoint import DELTA
from .engine.batches import is_rows
from .errors import TrainingError

_SHOWN = 5  # rows that a message names
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"

Batch = dict[str, Any]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's or the CPU's allocator had no memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )


def rows_in(batch: Batch) -> int:
    """How many rows a batch can be cut into; 1 where it cannot be cut."""
    return len(next(iter(batch.values()))) if batch and is_rows(batch) else 1


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Cuts a batch into pieces of equal size, the last one may be smaller; at most one for each row."""
    rows = rows_in(batch)
    size = -(-rows // parts)
    if size >= rows:
        return [batch]
    return [{key: value[at : at + size] for key, value in batch.items()} for at in range(0, rows, size)]


def not_a_number(
    stage: str, step: int, what: str, rows: Sequence[str], bad: Sequence[int], weights: bool, kept: Path | None
) -> TrainingError:
    """The error for a loss or gradient that is no number.

    Args:
        stage: its name.
        step: that was being made.
        what: "loss" or "gradient".
        rows: how each row of the global batch is named.
        bad: which of them give a loss that is no number by themselves.
        weights: whether all weights are numbers still.
        kept: the last good checkpoint.
    """
    named = [rows[number] for number in (bad or range(len(rows)))]
    listed = "; ".join(named[:_SHOWN]) + (f"; and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")
    every = len(bad) == len(rows) and (len(rows) > 1 or not weights)
    if every:
        why = "have grown too large" if weights else "are no numbers any more"
        found = f"every row of the batch gives such a loss: the weights {why}; the rows are {listed}"
    else:
        found = listed if bad else f"no row gives such a loss by itself; those of the batch are {listed}"
    look = "look at these rows, or lower" if bad and not every else "lower"
    last = f"the last good checkpoint is kept: {kept}" if kept else "there was no checkpoint yet"
    return TrainingError(
        f"stage {stage}: the {what} is not a number at step {step}",
        found=found,
        mend=f"{look} the learning rate; {last}",
    )


def culprits(batches: Iterable[Batch], loss: Any) -> list[int]:
    """Which rows give a loss that is no number by themselves, counted over all batches.

    Args:
        batches: the micro-batches of one update.
        loss: a function of a batch, called without gradients.
    """
    found, number = [], 0
    with torch.no_grad():
        for batch in batches:
            for row in cut(batch, rows_in(batch)):
                if not bool(torch.isfinite(loss(row)).all()):
                    found.append(number)
                number += 1
    return found


def are_numbers(model: nn.Module) -> bool:
    """Whether all weights are finite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def last_good(folders: Sequence[Path]) -> Path | None:
    """The last checkpoint, or finished stage, whose weights are all numbers.

    Args:
        folders: of the stages so far, the one that runs last.
    """
    for number, folder in enumerate(reversed(folders)):
        finished = [folder] if number and (folder / DELTA).is_file() else []
        for kept in (*finished, *reversed(staging.checkpoints(folder))):
            with safe_open(str(kept / DELTA), framework="pt") as file:
                if all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in file.keys()):  # noqa: SIM118
                    return kept
    return None


def name_rows(batches: Iterable[Batch], table: Any, tokenizer: Any) -> list[str]:
    """Names rows by their position in the train table and the beginning of their text.

    Args:
        batches: the micro-batches of one update, padded.
        table: the train dataset.
        tokenizer: to read them by; None leaves the text out.
    """
    keys = [key for batch in batches for row in cut(batch, rows_in(batch)) for key in [_key(row)]]
    wanted, at = set(keys), dict[Any, int]()
    if wanted != {None} and hasattr(table, "__len__"):
        for number in range(len(table)):
            key = _key({name: [value] for name, value in dict(table[number]).items()})
            if key in wanted:
                at.setdefault(key, number)
            if len(at) == len(wanted):
                break
    return [_name(number, key, at.get(key), tokenizer) for number, key in enumerate(keys)]


def _key(row: Batch) -> tuple[Any, ...] | None:
    """The tokens of a batch of one row, without padding, and its label."""
    if "input_ids" not in row:
        return None
    ids, mask = _plain(row["input_ids"][0]), _plain(row.get("attention_mask", [None])[0])
    if isinstance(mask, list):
        ids = [token for token, seen in zip(ids, mask, strict=True) if seen]
    label = _plain(row["labels"][0]) if "labels" in row else _plain(row["label"][0]) if "label" in row else None
    return tuple(ids), tuple(label) if isinstance(label, list) else label


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _name(number: int, key: tuple[Any, ...] | None, at: int | None, tokenizer: Any) -> str:
    name = f"row {number} of the batch" if at is None else f"train[{at}]"
    if key is None or tokenizer is None:
        return name
    text = " ".join(str(tokenizer.decode(list(key[0]), skip_special_tokens=True)).split())
    return f'{name} "{text[:60]}{"..." if len(text) > 60 else ""}"'
