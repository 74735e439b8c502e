"""Holds out a part of the rows, by label, and without a text standing on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import DataError
from .labels import label_lists
from .rows import text_columns, text_key

MIN_ROWS = 10


def hold_out(rows: Dataset, fraction: float, seed: int, *, multi_label: bool) -> tuple[Dataset, Dataset]:
    """Splits rows in two.

    Args:
        rows: with the columns `text`, `label` and perhaps `text_pair`.
        fraction: how many of them are held out, between 0 and 1; of every class as exactly as whole rows allow.
        seed: the same seed holds out the same rows.
        multi_label: whether a row may have several labels; the first of them then stands for all.

    Returns:
        What is kept and what is held out, both in the order of `rows`. Rows with equal texts are on one side, and a
        class of two rows or more keeps at least one.

    Raises:
        DataError: there are too few rows.
    """
    if not 0 < fraction < 1:
        raise DataError("the held-out part is not a fraction", found=fraction, expected="more than 0 and less than 1")
    if len(rows) < MIN_ROWS:
        raise _too_few(rows, fraction)
    labels = label_lists(rows["label"][:], multi_label)
    twins: dict[bytes, list[int]] = {}
    for at, texts in enumerate(text_columns(rows, "rows")):
        twins.setdefault(text_key(*texts), []).append(at)
    groups = list(twins.values())
    held = _choose(groups, [_first(labels[group[0]]) for group in groups], fraction, np.random.default_rng(seed))
    held = _give_back(groups, labels, held)
    out = sorted(at for group in held for at in groups[group])
    kept = sorted(set(range(len(rows))).difference(out))
    if not out or not kept:
        raise _too_few(rows, fraction)
    return rows.select(kept), rows.select(out)


def _first(labels: list[Any]) -> Any:
    return next(iter(labels), None)


def _choose(groups: list[list[int]], classes: list[Any], fraction: float, chance: np.random.Generator) -> list[int]:
    """Returns the groups to hold out, class by class, by the method of largest remainders."""
    of_class: dict[Any, list[int]] = {}
    for group, label in enumerate(classes):
        of_class.setdefault(label, []).append(group)
    sizes = np.array([sum(len(groups[group]) for group in members) for members in of_class.values()])
    most = sizes - 1  # one row of each class stays
    exact = np.minimum(sizes * fraction, most)
    quotas = np.floor(exact).astype(int)
    missing = max(round(sizes.sum() * fraction) - int(quotas.sum()), 0)
    by_remainder = [at for at in np.argsort(quotas - exact, kind="stable") if quotas[at] < most[at]]
    quotas[by_remainder[:missing]] += 1
    held = []
    for members, quota in zip(of_class.values(), quotas, strict=True):
        free = int(quota)
        for group in chance.permutation(members):
            if len(groups[group]) <= free:
                held.append(int(group))
                free -= len(groups[group])
    return held


def _give_back(groups: list[list[int]], labels: list[list[Any]], held: list[int]) -> list[int]:
    """Takes a group back for each class that would have no row left to learn from."""
    kept = set(range(len(groups))).difference(held)
    known = {label for group in kept for at in groups[group] for label in labels[at]}
    back = set()
    for group in held:
        mine = {label for at in groups[group] for label in labels[at]}
        if not mine <= known:
            back.add(group)
            known |= mine
    return [group for group in held if group not in back]


def _too_few(rows: Dataset, fraction: float) -> DataError:
    return DataError(
        f"too few rows to hold out a part ({fraction:g}) of them",
        found=f"{len(rows)} rows",
        expected=f"at least {MIN_ROWS}, with different texts, and more than one of each class",
        mend="give a validation file, or more rows",
    )
