"""Checks labelled rows before any time is spent on them, repairs what can be repaired safely, and says what it did.

Rows of train are repaired or dropped; rows of validation and test are never dropped to make a result look better, only
where a leak would make it worth nothing (validation rows that stand in test). What cannot be repaired is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..errors import DataError, nearest
from .findings import EXAMPLES, Finding, Splits, drop, finding
from .labels import (
    DOUBT_SHARE,
    label_names,
    label_table,
    refuse_what_is_no_class,
    separators_of,
    sort_labels,
    split_labels,
    typos,
    variant_key,
    variants,
)
from .rows import Rows, open_rows, same_label_type
from .twins import conflicts, duplicates, leaks

__all__ = ["Finding", "check_classification", "label_names", "label_table", "length_summary", "split_labels"]

SMALL_CLASS = 8
IMBALANCE = 10


def check_classification(
    splits: dict[str, Dataset], *, sources: dict[str, str], multi_label: bool, separators: str | None = None
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs labelled texts.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `text`, `label`, `_row` and
            perhaps `text_pair`. They are not changed.
        sources: for each split what `describe` returned, for messages.
        multi_label: whether a row may have several labels, or none.
        separators: what stands between labels in one text, in all splits; looked for in train where not given.

    Returns:
        The repaired splits (`label` is one value, or a list where `multi_label`), and what was found and done.

    Raises:
        DataError: the data cannot be what is wanted: one class only, no classes but numbers or free text, a label that
            train does not know, a row of validation or test without a label, nothing left.
    """
    if "train" not in splits:
        raise DataError("there is no train split", found=", ".join(splits), expected="train")
    found: list[Finding] = []
    if multi_label and separators is None and "label" in splits["train"].column_names:
        separators = separators_of(splits["train"]["label"][:])
    rows = {
        name: open_rows(name, data, sources.get(name, name), multi_label, separators) for name, data in splits.items()
    }
    rows, changed = same_label_type(rows)
    for name in sorted(changed):
        found.append(finding("label_type", rows[name], range(len(rows[name])), "made text, as in other splits", "info"))
    rows = _missing_labels(rows, found)
    _refuse_swapped(rows["train"])
    refuse_what_is_no_class([label for labels in rows["train"].labels for label in labels], rows["train"].source)
    rows = _empty_texts(rows, found)
    rows = _rename(rows, variants(rows["train"].counts()), "label_variant", found)
    rows = _rename(rows, typos(rows["train"].counts()), "label_typo", found)
    _doubtful_labels(rows["train"], found)
    rows = duplicates(rows, found)
    conflicts(rows, found)
    known = set(rows["train"].counts())
    rows = leaks(rows, found)
    _refuse_one_class(rows["train"], known)
    _refuse_unknown_labels(rows, known)
    _class_sizes(rows, found)
    names = sort_labels(rows["train"].counts())
    label_type = pa.array(names).type
    return {name: split.to_dataset(label_type) for name, split in rows.items()}, found


def length_summary(lengths: np.ndarray, limit: int) -> dict[str, int]:
    """Returns how long the rows are, in the unit of `lengths`, and how many are longer than `limit`."""
    lengths = np.asarray(lengths)
    if not lengths.size:
        return {"median": 0, "p95": 0, "max": 0, "limit": int(limit), "truncated": 0}
    return {
        "median": round(float(np.median(lengths))),
        "p95": round(float(np.percentile(lengths, 95))),
        "max": int(lengths.max()),
        "limit": int(limit),
        "truncated": int((lengths > limit).sum()),
    }


def _missing_labels(splits: Splits, found: list[Finding]) -> Splits:
    for split, rows in splits.items():
        missing = [at for at in range(len(rows)) if rows.missing[at]]
        if missing and split != "train":
            raise DataError(
                f"{rows.place(missing[0])}: the row has no label",
                found=f"{len(missing)} of {len(rows)} rows of {split} without one",
                expected="a label on every row",
                mend="label these rows, or take them out of the file",
            )
        if missing:
            found.append(finding("missing_label", rows, missing, "dropped", "warning"))
            splits = drop(splits, split, missing, found)
    return splits


def _empty_texts(splits: Splits, found: list[Finding]) -> Splits:
    for split, rows in splits.items():
        empty = [at for at in range(len(rows)) if rows.is_empty(at)]
        if not empty:
            continue
        did = "dropped" if split == "train" else "kept, so that the score counts them"
        found.append(finding("empty_text", rows, empty, did, "warning"))
        if split == "train":
            splits = drop(splits, split, empty, found)
    return splits


def _rename(splits: Splits, renames: dict[Any, Any], kind: str, found: list[Finding]) -> Splits:
    """Gives labels the name that they were meant to have; in validation and test only where train has none such."""
    known = set(splits["train"].counts()) - set(renames)
    by_key = {variant_key(label): label for label in known if isinstance(label, str)}
    for split, rows in splits.items():
        mine = {label: renames[label] for label in rows.counts() if label in renames}
        if kind == "label_variant":  # train may be written in one way only, and test in another
            for label in rows.counts():
                if isinstance(label, str) and label not in known and variant_key(label) in by_key:
                    mine[label] = by_key[variant_key(label)]
        touched = [at for at in range(len(rows)) if any(label in mine for label in rows.labels[at])]
        if not touched:
            continue
        counts = rows.counts()
        did = "renamed " + ", ".join(f"{old} -> {new} ({counts[old]})" for old, new in list(mine.items())[:EXAMPLES])

        def details(rows: Rows, at: int, mine: dict[Any, Any] = mine) -> dict[str, Any]:
            old = next(label for label in rows.labels[at] if label in mine)
            return {"label": old, "suggestion": mine[old]}

        did += f" and {len(mine) - EXAMPLES} more" if len(mine) > EXAMPLES else ""
        found.append(finding(kind, rows, touched, did, "info" if kind == "label_variant" else "warning", details))
        labels = [list(dict.fromkeys(mine.get(label, label) for label in labels)) for labels in rows.labels]
        splits = {**splits, split: replace(rows, labels=labels)}
    return splits


def _doubtful_labels(train: Rows, found: list[Finding]) -> None:
    """Reports labels that may be misspelt, but are too frequent to be renamed unasked."""
    counts = train.counts()
    doubtful = typos(counts, DOUBT_SHARE)
    if not doubtful:
        return
    where = [at for at in range(len(train)) if any(label in doubtful for label in train.labels[at])]
    pairs = [f"{old} ({counts[old]}) for {new} ({counts[new]})" for old, new in doubtful.items()]
    did = f"kept, but perhaps misspelt: {', '.join(pairs[:EXAMPLES])}"
    did += f" and {len(pairs) - EXAMPLES} more" if len(pairs) > EXAMPLES else ""

    def details(rows: Rows, at: int) -> dict[str, Any]:
        label = next(label for label in rows.labels[at] if label in doubtful)
        return {"label": label, "suggestion": doubtful[label]}

    found.append(finding("doubtful_label", train, where, did, "warning", details))


def _refuse_swapped(train: Rows) -> None:
    """Many labels, longer than the texts, of which there are few: the columns stand the wrong way round."""
    labels = [str(label) for label in train.counts()]
    texts = {" ".join(texts) for texts in train.texts}
    if len(train) < SMALL_CLASS or len(labels) <= len(train) / 2 or len(texts) > len(labels) / 2:
        return
    if sum(map(len, labels)) / len(labels) <= 2 * sum(map(len, texts)) / len(texts):
        return
    raise DataError(
        f"{train.source}: text and label look swapped",
        found=f"{len(labels)} labels such as {max(labels, key=len)[:60]!r}, "
        f"{len(texts)} texts such as {min(texts)[:60]!r}",
        expected="a few labels on many texts",
        mend="name the columns the other way round: --column text=... --column label=..., or data.columns",
    )


def _refuse_one_class(train: Rows, before_leaks: set[Any]) -> None:
    counts = train.counts()
    if not counts:
        raise DataError(f"{train.source}: no row of train has a label", expected="at least two classes")
    if len(counts) == 1 and all(train.labels):
        raise DataError(
            f"{train.source}: train has one class only",
            found=f"{next(iter(counts))} on all {len(train)} rows",
            expected="at least two classes",
            mend="check that data.columns names the right column as label, and that the file is not cut off"
            if len(before_leaks) < 2
            else "all rows of the other classes also stand in validation or test: add others",
        )


def _refuse_unknown_labels(splits: Splits, before_leaks: set[Any]) -> None:
    known = set(splits["train"].counts())
    for split, rows in splits.items():
        unknown = [at for at in range(len(rows)) if not known.issuperset(rows.labels[at])]
        if not unknown:
            continue
        label = next(label for label in rows.labels[unknown[0]] if label not in known)
        guess = nearest(str(label), [str(name) for name in known])
        if label in before_leaks:
            mend = f"all rows of this class in train also stand in {split} or test: add others"
        else:
            mend = (f'did you mean "{guess}"? ' if guess else "") + "correct the label, or add rows with it to train"
        raise DataError(
            f'{rows.place(unknown[0])}: train has no label "{label}"',
            found=f"{len(unknown)} rows of {split} with labels that train does not have",
            expected=", ".join(str(name) for name in sort_labels(known)[:20]) + (", ..." if len(known) > 20 else ""),
            mend=mend,
        )


def _class_sizes(splits: Splits, found: list[Finding]) -> None:
    train = splits["train"]
    counts = train.counts()
    by_size = [label for label, _ in reversed(counts.most_common())]

    def report(kind: str, labels: list[Any], did: str) -> None:
        where = [next(at for at, row in enumerate(train.labels) if label in row) for label in labels[:EXAMPLES]]
        names = iter(labels)  # finding() asks in their order; two labels may have one row as their first

        def details(_: Rows, at: int) -> dict[str, Any]:
            label = next(names)
            return {"label": label, "rows": counts[label]}

        found.append(finding(kind, train, where, did, "warning", details, len(labels)))

    small = [label for label in by_size if counts[label] < SMALL_CLASS]
    if small:
        report("small_class", small, f"kept: classes with fewer than {SMALL_CLASS} rows")
    least, most = by_size[0], by_size[-1]
    rare = [label for label in by_size if counts[most] > IMBALANCE * counts[label]]
    if rare:
        did = f"kept: {most} has {counts[most]} rows, {least} has {counts[least]}; class_weight: balanced may help"
        report("imbalance", rare, did)
    for rows in splits.values():
        absent = sort_labels(set(counts) - set(rows.counts()))
        if absent:
            names = ", ".join(str(label) for label in absent[:EXAMPLES]) + (", ..." if len(absent) > EXAMPLES else "")
            found.append(finding("absent_class", rows, [], f"not measured there: {names}", "info", count=len(absent)))
