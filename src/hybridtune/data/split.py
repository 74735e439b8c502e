"""Holds rows out, by their stratum (such as their label), and without a text standing on both sides."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from ..errors import DataError
from .checking.rows import text_keys, texts_of
from .doubts.near import MOST_ROWS, clusters

MIN_ROWS = 10
FEW_TWINS, MANY_TWINS = 5, 0.01  # a group of more rows than both, and than this share of all, is a template


def hold_out(
    rows: Dataset,
    fraction: float,
    seed: int,
    *,
    texts: Sequence[str],
    strata: Sequence[Hashable] | None,
    keep: Sequence[Collection[Hashable]] | None = None,
) -> tuple[Dataset, Dataset]:
    """Splits rows in two.

    Args:
        rows: of any task.
        fraction: how many of them are held out, between 0 and 1; of every stratum as exactly as whole rows allow.
        seed: the same seed holds out the same rows.
        texts: the columns whose texts make two rows the same. Lists of words are texts too.
        strata: what each row is of, such as its label; None where all are alike.
        keep: what of each row has to stand in a row that is kept, such as all of its labels; its stratum where not
            given.

    Returns:
        What is kept and what is held out, both in the order of `rows`. Rows with equal or almost equal texts
        are on one side, and a stratum of two rows or more keeps at least one.

    Raises:
        DataError: there are too few rows.
    """
    if not 0 < fraction < 1:
        raise DataError("the held-out part is not a fraction", found=fraction, expected="more than 0 and less than 1")
    if len(rows) < MIN_ROWS:
        raise _too_few(rows, fraction)
    group, sizes, stratum = _groups(rows, texts, strata)
    held = _choose(sizes, stratum, fraction, np.random.default_rng(seed))
    if keep is None and strata is not None:
        keep = [(one,) for one in strata]
    out = np.isin(group, _give_back(group, keep, held) if keep is not None else held)
    if out.all() or not out.any():
        raise _too_few(rows, fraction)
    return rows.select(np.flatnonzero(~out)), rows.select(np.flatnonzero(out))


def k_folds(
    rows: Dataset, k: int, seed: int, *, texts: Sequence[str], strata: Sequence[Hashable] | None
) -> list[tuple[Dataset, Dataset]]:
    """Splits rows k times in two, so that each row is held out once.

    Args:
        rows, seed, texts, strata: as of `hold_out`.
        k: how many folds; 2 or more.

    Returns:
        For each fold what is kept and what is held out, both in the order of `rows`. Rows with equal texts are in one
        fold; where no texts are equal, the folds' sizes differ by one row at most, and so does any stratum's share.

    Raises:
        DataError: there are fewer different texts than folds.
    """
    if k < 2:
        raise DataError("the number of folds is too small", found=k, expected="2 or more")
    group, sizes, stratum = _groups(rows, texts, strata)
    if len(sizes) < k:
        raise DataError(f"too few rows for {k} folds", found=f"{len(sizes)} different texts", expected=f"at least {k}")
    chance = np.random.default_rng(seed)
    fold = np.empty(len(sizes), np.int32)
    whole = [0] * k
    for members in _by_stratum(stratum):
        mine = [0] * k
        for one in chance.permutation(members):
            place = min(range(k), key=lambda at: (mine[at], whole[at]))
            fold[one] = place
            mine[place] += int(sizes[one])
            whole[place] += int(sizes[one])
    of_row = fold[group]
    return [(rows.select(np.flatnonzero(of_row != at)), rows.select(np.flatnonzero(of_row == at))) for at in range(k)]


def _groups(
    rows: Dataset, texts: Sequence[str], strata: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each row the group with its texts, and of each group its size and the stratum of its first row."""
    group = _twins(rows, texts)
    sizes = np.bincount(group)
    if strata is None:
        return group, sizes, np.zeros(len(sizes), np.int64)
    codes: dict[Any, int] = {}
    of_row = np.array([codes.setdefault(one, len(codes)) for one in strata])
    first = np.empty(len(sizes), np.int64)
    first[group[::-1]] = np.arange(len(rows))[::-1]
    return group, sizes, of_row[first]


def _twins(rows: Dataset, texts: Sequence[str]) -> np.ndarray:
    """Returns of each row the group of those that are equal or almost equal to it.

    Rows of one template can be linked to groups that no part has room for: there only equal ones stay together.
    """
    keys, _, _ = text_keys(rows, texts)
    equal: np.ndarray = pd.factorize(keys)[0]
    if len(rows) > MOST_ROWS:
        return equal
    near = clusters(list(zip(*(texts_of(rows, name) for name in texts), strict=True)))
    large = np.bincount(near)[near] > max(FEW_TWINS, MANY_TWINS * len(rows))
    group: np.ndarray = pd.factorize(np.where(large, equal + len(rows), near))[0]
    return group


def _by_stratum(stratum: np.ndarray) -> list[np.ndarray]:
    """Returns the groups of each stratum, the strata in the order in which they come."""
    codes, _ = pd.factorize(stratum)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def _choose(sizes: np.ndarray, stratum: np.ndarray, fraction: float, chance: np.random.Generator) -> np.ndarray:
    """Returns the groups to hold out, stratum by stratum, by the method of largest remainders."""
    strata = _by_stratum(stratum)
    rows = np.array([sizes[members].sum() for members in strata])
    most = rows - 1  # one row of each stratum stays
    exact = np.minimum(rows * fraction, most)
    quotas = np.floor(exact).astype(int)
    lacking = max(round(rows.sum() * fraction) - int(quotas.sum()), 0)
    by_remainder = [at for at in np.argsort(quotas - exact, kind="stable") if quotas[at] < most[at]]
    quotas[by_remainder[:lacking]] += 1
    held = []
    for members, quota in zip(strata, quotas, strict=True):
        free = int(quota)
        for group in chance.permutation(members):
            if sizes[group] <= free:
                held.append(int(group))
                free -= int(sizes[group])
    return np.array(held, np.int64)


def _give_back(group: np.ndarray, keep: Sequence[Collection[Hashable]], held: np.ndarray) -> np.ndarray:
    """Takes a group back for each thing that would have no row left to be learnt from."""
    out = np.isin(group, held)
    known = {one for at in np.flatnonzero(~out).tolist() for one in keep[at]}
    mine: dict[int, set[Hashable]] = {}
    for at in np.flatnonzero(out).tolist():
        if not known.issuperset(keep[at]):
            mine.setdefault(int(group[at]), set()).update(keep[at])
    back = []
    for one in held.tolist():
        if not known.issuperset(mine.get(one, ())):
            back.append(one)
            known |= mine[one]
    return np.setdiff1d(held, back)


def _too_few(rows: Dataset, fraction: float) -> DataError:
    return DataError(
        f"too few rows to hold out a part ({fraction:g}) of them",
        found=f"{len(rows)} rows",
        expected=f"at least {MIN_ROWS}, with different texts, and more than one of each class",
        mend="give a validation file, or more rows",
    )
