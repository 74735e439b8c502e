"""Texts that stand there more than once: in train, with other targets, or in two splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from .findings import Finding, drop, finding
from .rows import Rows

R = TypeVar("R", bound=Rows)

_COUNTED = {
    "validation": "kept: each counts where strategies and checkpoints are compared",
    "test": "kept: each counts in the score, whose interval is narrower than that of as many different rows",
}
_ODD = np.uint64(0x9E3779B97F4A7C15)  # any odd number maps eight bytes to eight bytes one to one


def first_of(values: np.ndarray) -> np.ndarray:
    """Returns for each value the position where it stands for the first time."""
    order = np.argsort(values, kind="stable").astype(np.int32)
    starts = _starts(values[order])
    first = np.empty(len(values), np.int32)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(values))))
    return first


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Returns where another value begins."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])


def mixed(values: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Returns eight bytes for each pair of eight bytes."""
    return np.asarray(values + more.astype(np.uint64) * _ODD)


def duplicates(splits: dict[str, R], found: list[Finding]) -> dict[str, R]:
    """Drops rows of train that repeat an earlier row, text and target."""
    again = _again(splits["train"], "dropped after the first", found)
    return drop(splits, "train", again, found) if len(again) else splits


def repeats(splits: dict[str, R], found: list[Finding]) -> None:
    """Reports the same of the other splits, once leaks are out of them: there all rows count."""
    for split, rows in splits.items():
        if split != "train":
            _again(rows, _COUNTED[split], found)


def _again(rows: Rows, did: str, found: list[Finding]) -> np.ndarray:
    """The positions of rows that repeat an earlier one, which are reported; rows that say nothing do not."""
    first = first_of(mixed(rows.keys, rows.same))
    again = np.flatnonzero((first != np.arange(len(rows))) & ~rows.empty)

    def details(rows: Rows, at: int) -> dict[str, Any]:
        return {**rows.target(at), "other_row": int(rows.number[first[at]])}

    if len(again):
        found.append(finding("duplicate", rows, again, did, "info", details))
    return again


def conflicts(rows: Rows, found: list[Finding], more: Callable[[np.ndarray], str] = lambda first: "") -> None:
    """Reports texts of train that stand there with different targets. Which is right, only the user can say.

    Args:
        rows: of train, without duplicates: what has the same text has another target.
        found: gets the finding.
        more: words for the end of it, given for each row the first row with its text.
    """
    first = first_of(rows.keys)
    others = np.flatnonzero(first != np.arange(len(rows)))
    if not len(others):
        return

    def details(rows: Rows, at: int) -> dict[str, Any]:
        before = int(first[at])
        other = {f"other_{name}": value for name, value in rows.target(before).items()}
        return {**rows.target(at), "other_row": int(rows.number[before]), **other}

    count = len(others) + len(np.unique(first[others]))
    name = next(iter(rows.target(0)))
    did = f"kept: the same text stands there with {'another label' if name == 'label' else f'other {name}'}"
    found.append(finding("conflict", rows, others, did + more(first), "warning", details, count))


def leaks(splits: dict[str, R], found: list[Finding]) -> dict[str, R]:
    """Takes out of train what also stands in validation or test, and out of validation what stands in test."""
    before = splits
    for split, names in (("train", ("test", "validation")), ("validation", ("test",))):
        others = [before[name].keep(~before[name].empty) for name in names if name in before]
        if split in splits and others:
            splits = _without(splits, split, others, found)
    return splits


def _without(splits: dict[str, R], split: str, others: list[R], found: list[Finding]) -> dict[str, R]:
    number = np.concatenate([other.number for other in others])
    owner = np.repeat(np.arange(len(others)), [len(other) for other in others])
    match = _found_in(splits[split].keys, np.concatenate([other.keys for other in others]))
    leaked = np.flatnonzero(match >= 0)
    if not len(leaked):
        return splits
    counts = np.bincount(owner[match[leaked]], minlength=len(others))
    where = [f"{other.split} ({count})" for other, count in zip(others, counts, strict=True) if count]

    def details(rows: R, at: int) -> dict[str, Any]:
        there = match[at]
        return {**rows.target(at), "other_row": int(number[there]), "other_split": others[owner[there]].split}

    found.append(finding("leak", splits[split], leaked, "dropped: also in " + " and ".join(where), "warning", details))
    return drop(splits, split, leaked, found)


def _found_in(keys: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Returns for each key where it stands first in `seen`, or -1."""
    if not len(seen):
        return np.full(len(keys), -1)
    order = np.argsort(seen, kind="stable")
    spot = order[np.minimum(np.searchsorted(seen, keys, sorter=order), len(seen) - 1)]
    return np.where(seen[spot] == keys, spot, -1)
