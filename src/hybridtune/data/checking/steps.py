"""Steps that the checks of all tasks share."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from ...errors import DataError
from .findings import Details, Finding, drop, finding
from .rows import Rows

R = TypeVar("R", bound=Rows)


def train_of(splits: dict[str, Any]) -> None:
    """Raises a DataError where there are no rows to learn from."""
    if "train" not in splits:
        raise DataError("there is no train split", found=", ".join(splits), expected="train")


def missing(
    splits: dict[str, R], where: dict[str, np.ndarray], found: list[Finding], words: str = "a label"
) -> dict[str, R]:
    """Drops rows of train without a target, and refuses them elsewhere.

    Args:
        splits: all of them.
        where: for each of them the positions of the rows without one.
        found: gets the findings.
        words: what a target is called.

    Raises:
        DataError: a row of validation or test has none.
    """
    for split, gone in where.items():
        rows = splits[split]
        if len(gone) and split != "train":
            raise DataError(
                f"{rows.place(gone[0])}: the row has no {words.rpartition(' ')[2]}",
                found=f"{len(gone)} of {len(rows)} rows of {split} without one",
                expected=f"{words} on every row",
                mend="label these rows, or take them out of the file",
            )
        if len(gone):
            found.append(finding("missing_label", rows, gone, "dropped", "warning"))
            splits = drop(splits, split, gone, found)
    return splits


def unfit(
    splits: dict[str, R],
    where: dict[str, np.ndarray],
    found: list[Finding],
    kind: str,
    details: Details,
    *,
    problem: str,
    expected: str,
    mend: str,
) -> dict[str, R]:
    """Drops rows of train whose target is of no use, and refuses them elsewhere, or where they are half of train.

    Args:
        splits: all of them.
        where: for each of them the positions of these rows.
        found: gets the findings.
        kind: of the findings.
        details: what an example says of a row besides its texts; its values say what was found.
        problem: what is wrong with the row, after its place.
        expected: what it should have.
        mend: what the user can do.

    Raises:
        DataError: a row of validation or test, or half of train, is such a row.
    """
    for split, bad in where.items():
        rows = splits[split]
        if len(bad) and (split != "train" or 2 * len(bad) > len(rows)):
            told = ", ".join(str(value) for value in details(rows, int(bad[0])).values())
            raise DataError(
                f"{rows.place(bad[0])}: {problem}",
                found=f"{told[:160]}; {len(bad)} of {len(rows)} rows of {split} are like that",
                expected=expected,
                mend=mend,
            )
        if len(bad):
            found.append(finding(kind, rows, bad, "dropped", "warning", details))
            splits = drop(splits, split, bad, found)
    return splits


def empty_texts(splits: dict[str, R], found: list[Finding]) -> dict[str, R]:
    """Drops rows of train that lack a text."""
    where = {split: np.flatnonzero(rows.empty) for split, rows in splits.items()}
    return saying_nothing(splits, where, found, "empty_text")


def saying_nothing(
    splits: dict[str, R], where: dict[str, np.ndarray], found: list[Finding], kind: str, why: str = ""
) -> dict[str, R]:
    """Drops rows of train that say nothing where they should, and keeps others.

    Args:
        splits: all of them.
        where: for each of them the positions of these rows.
        found: gets the findings.
        kind: of the findings.
        why: words for their end.
    """
    for split, empty in where.items():
        if not len(empty):
            continue
        did = "dropped" if split == "train" else "kept, so that the score counts them"
        found.append(finding(kind, splits[split], empty, did + why, "warning"))
        if split == "train":
            splits = drop(splits, split, empty, found)
    return splits
