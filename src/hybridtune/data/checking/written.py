"""Rows of a text and what is to be written about it, and the checks that translation and summarization share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .findings import SHOWN, Finding, finding
from .rows import Rows, as_text, open_rows
from .steps import empty_texts, missing
from .twins import conflicts, duplicates, leaks, repeats

MANY = 0.01  # a larger share of rows with something odd is worth a warning


@dataclass(frozen=True)
class Written(Rows):
    """Rows of a task whose models write.

    Attributes:
        column: of the targets.
        digests: for each kept row eight bytes, equal for equal targets but for case and white space.
        lengths: for each kept row the characters of its text and of its target, [rows, 2].
        unsaid: for each kept row whether its target is empty.
        unwritten: for each kept row whether its target is no text.
    """

    column: str
    digests: np.ndarray
    lengths: np.ndarray
    unsaid: np.ndarray
    unwritten: np.ndarray

    @property
    def same(self) -> np.ndarray:
        """For each kept row eight bytes, equal for equal targets."""
        return self.digests

    def target(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's target."""
        return {self.column: as_text(self.row(index)[self.column])[:SHOWN]}

    @property
    def ratios(self) -> np.ndarray:
        """For each kept row how much longer its target is than its text."""
        return np.asarray(self.lengths[:, 1] / np.maximum(self.lengths[:, 0], 1))

    def written(self) -> dict[str, pa.ChunkedArray]:
        """Returns the column of the targets, where it has to be written anew."""
        if not self.unwritten.any():
            return {}
        return {self.column: self.rewritten(lambda values: list(map(as_text, values)), pa.string(), self.column)}


def open_written(splits: dict[str, Dataset], sources: dict[str, str], text: str, target: str) -> dict[str, Written]:
    """Looks at the rows of all splits.

    Args:
        splits: with the columns `text` and `target`, as they are called.
        sources: for each split what `describe` returned, for messages.
        text: the column of what is given.
        target: the column of what is to be written.

    Raises:
        DataError: a column is not there, or holds something else than texts.
    """
    made = {}
    for name, data in splits.items():
        source = sources.get(name, name)
        rows = open_rows(name, data, source, (text,), target)
        targets = open_rows(name, data, source, (target,), text)
        lengths = [
            (len(as_text(a)), len(as_text(b)))
            for columns in rows.batches(text, target)
            for a, b in zip(*columns, strict=True)
        ]
        made[name] = rows.into(
            Written,
            column=target,
            digests=targets.keys,
            lengths=np.array(lengths, np.int32).reshape(-1, 2),
            unsaid=targets.empty,
            unwritten=targets.gaps,
        )
    return made


def repaired(rows: dict[str, Written], found: list[Finding], more: Any) -> dict[str, Dataset]:
    """Drops, refuses and counts what is wrong with rows of every such task.

    Args:
        rows: of all splits.
        found: gets the findings.
        more: counts what is odd for the one task, given the rows that are left and `found`.

    Returns:
        The repaired splits.

    Raises:
        DataError: a row of validation or test has no target, or nothing is left.
    """
    name = next(iter(rows.values())).column
    words = f"{'an' if name.startswith('a') else 'a'} {name}"
    rows = missing(rows, {split: np.flatnonzero(one.unsaid) for split, one in rows.items()}, found, words)
    rows = empty_texts(rows, found)
    if "train" in rows:
        rows = duplicates(rows, found)
        conflicts(rows["train"], found)
        rows = leaks(rows, found)
    repeats(rows, found)
    for one in rows.values():
        odd("copied_target", one, one.digests == one.keys, f"kept: the {name} is the {one.texts[0]} itself", found)
        more(one, found)
    return {split: one.to_dataset({**one.plain_texts(), **one.written()}) for split, one in rows.items()}


def odd(kind: str, rows: Written, which: np.ndarray, did: str, found: list[Finding]) -> None:
    """Reports rows that may be wrong: a warning where they are many."""
    where = np.flatnonzero(which & ~rows.empty)
    if len(where):
        found.append(finding(kind, rows, where, did, "warning" if len(where) > MANY * len(rows) else "info"))
