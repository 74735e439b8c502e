"""Texts that stand there more than once: in train, with other labels, or in two splits."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .findings import Finding, Splits, drop, finding
from .rows import Rows


def duplicates(splits: Splits, found: list[Finding]) -> Splits:
    """Drops rows of train that repeat an earlier row, text and label."""
    rows = splits["train"]
    first: dict[tuple[bytes, frozenset[Any]], int] = {}
    again: dict[int, int] = {}
    for at, (key, labels) in enumerate(zip(rows.keys, rows.labels, strict=True)):
        before = first.setdefault((key, frozenset(labels)), at)
        if before != at:
            again[at] = rows.number[before]
    if not again:
        return splits

    def details(rows: Rows, at: int) -> dict[str, Any]:
        return {"label": rows.label(at), "other_row": again[at]}

    found.append(finding("duplicate", rows, list(again), "dropped after the first", "info", details))
    return drop(splits, "train", again, found)


def conflicts(splits: Splits, found: list[Finding]) -> None:
    """Reports texts of train that stand there with different labels. Which label is right, only the user can say."""
    rows = splits["train"]
    first: dict[bytes, int] = {}
    other: dict[int, int] = {}
    for at, key in enumerate(rows.keys):  # rows with equal labels are gone: what has the same key has other labels
        if first.setdefault(key, at) != at:
            other[at] = first[key]
    if not other:
        return

    def details(rows: Rows, at: int) -> dict[str, Any]:
        before = other[at]
        return {"label": rows.label(at), "other_row": rows.number[before], "other_label": rows.label(before)}

    count = len(other) + len(set(other.values()))
    did = "kept: the same text stands there with another label"
    found.append(finding("conflict", rows, list(other), did, "warning", details, count))


def leaks(splits: Splits, found: list[Finding]) -> Splits:
    """Takes out of train what also stands in validation or test, and out of validation what stands in test."""
    before = splits
    for split, others in (("train", ("test", "validation")), ("validation", ("test",))):
        if split not in splits:
            continue
        seen: dict[bytes, tuple[str, int]] = {}
        for other in others:
            for at, key in enumerate(before[other].keys) if other in before else ():
                if not before[other].is_empty(at):
                    seen.setdefault(key, (other, before[other].number[at]))
        leaked = [at for at, key in enumerate(splits[split].keys) if key in seen]
        if not leaked:
            continue
        where = Counter(seen[splits[split].keys[at]][0] for at in leaked)
        did = "dropped: also in " + " and ".join(f"{other} ({where[other]})" for other in others if where[other])

        def details(rows: Rows, at: int, seen: dict[bytes, tuple[str, int]] = seen) -> dict[str, Any]:
            other, number = seen[rows.keys[at]]
            return {"label": rows.label(at), "other_row": number, "other_split": other}

        found.append(finding("leak", splits[split], leaked, did, "warning", details))
        splits = drop(splits, split, leaked, found)
    return splits
