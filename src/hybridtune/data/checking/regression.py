"""The check of a regression: whether the targets are numbers, and which."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from ...errors import DataError
from .findings import Finding, finding
from .numbers import MISSING, NO_NUMBER, Numbers, open_numbers, plain_number
from .rows import as_text, open_rows
from .steps import empty_texts, missing, train_of, unfit
from .twins import conflicts, duplicates, leaks, repeats

FEW_VALUES = 10
FAR_OUT = 3  # times the distance of the quartiles, from either of them: Tukey, Exploratory Data Analysis (1977)
FEW = 0.05


def check_regression(
    splits: dict[str, Dataset], *, sources: dict[str, str], width: int | None = None
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs texts with numbers.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `text`, `label`, `_row` and
            perhaps `text_pair`. They are not changed.
        sources: for each split what `describe` returned, for messages.
        width: how many numbers a row has, where that is known and there is no train.

    Returns:
        The repaired splits (`label` is a number, or a list of equally many), and what was found and done.

    Raises:
        DataError: the data cannot be what is wanted: labels that are no numbers, lists of different lengths, the same
            number everywhere, a row of validation or test without a label, nothing left.
    """
    if width is None:
        train_of(splits)
    found: list[Finding] = []
    opened = {}
    for name, data in splits.items():
        texts = [column for column in ("text", "text_pair") if column in data.column_names or column == "text"]
        opened[name] = open_rows(name, data, sources.get(name, name), texts, "label")
    rows = open_numbers(opened, width)
    rows = missing(rows, {name: np.flatnonzero(split.faults == MISSING) for name, split in rows.items()}, found)
    rows = unfit(
        rows,
        {name: np.flatnonzero(split.faults == NO_NUMBER) for name, split in rows.items()},
        found,
        "no_number",
        Numbers.given,
        problem="the label is not a number",
        expected="a number on every row",
        mend=_mend_of(rows),
    )
    for split in rows.values():
        _say_converted(split, found)
    rows = empty_texts(rows, found)
    if "train" in rows:
        rows = _compared(rows, found)
    repeats(rows, found)
    made = {name: split.to_dataset({**split.plain_texts(), **split.written()}) for name, split in rows.items()}
    return made, found


def _mend_of(rows: dict[str, Numbers]) -> str:
    """What can be done about labels that are no numbers, by what the first of them looks like."""
    first = next(
        (split.given(int(at))["label"] for split in rows.values() for at in np.flatnonzero(split.faults == NO_NUMBER)),
        "",
    )
    plain = plain_number(first)
    if plain:
        return f"write the number alone, without marks between thousands or a unit: {plain} for {first.strip()}"
    return "correct these rows; for labels that are names, task: classification"


def _compared(rows: dict[str, Numbers], found: list[Finding]) -> dict[str, Numbers]:
    """Looks at train as a whole, and at the other splits beside it."""
    rows = duplicates(rows, found)
    conflicts(rows["train"], found, lambda first: _spread(rows["train"].values, first))
    before = len(np.unique(rows["train"].values, axis=0))
    rows = leaks(rows, found)
    _refuse_constant(rows["train"], before, found)
    for split in rows.values():
        _outliers(rows["train"], split, found)
    _few_values(rows["train"], found)
    return rows


def _say_converted(rows: Numbers, found: list[Finding]) -> None:
    def details(rows: Numbers, at: int) -> dict[str, Any]:
        return {**rows.given(at), "suggestion": rows.target(at)["label"]}

    texts, commas = (np.flatnonzero(rows.texts_were >= least) for least in (1, 2))
    if len(commas):
        did = "read with a decimal comma, as 3,5 is 3.5"
        found.append(finding("decimal_comma", rows, commas, did, "warning", details))
    if 0 < len(texts) < len(rows):  # in a file of texts all are
        found.append(finding("label_type", rows, texts, "texts made numbers", "info", details))


def _spread(values: np.ndarray, first: np.ndarray) -> str:
    """Says how far apart the numbers of one text are: a bound for what any model can reach."""
    high, low = values.copy(), values.copy()
    np.maximum.at(high, first, values)
    np.minimum.at(low, first, values)
    twins = np.bincount(first, minlength=len(first)) > 1
    spread = (high - low)[twins].max(axis=1)
    return f"; they differ by {spread.mean():.4g} on average, by {spread.max():.4g} at most"


def _refuse_constant(train: Numbers, before_leaks: int, found: list[Finding]) -> None:
    constant = np.flatnonzero(np.ptp(train.values, axis=0) == 0)
    if len(constant) == train.values.shape[1]:
        raise DataError(
            f"{train.source}: train has one number only",
            found=f"{as_text(train.target(0)['label'])} on all {len(train)} rows",
            expected="different numbers",
            mend="check that data.columns names the right column as label, and that the file is not cut off"
            if before_leaks < 2
            else "all rows with other numbers also stand in validation or test: add others",
        )
    if len(constant):
        did = f"kept, but there is nothing to learn: number {', '.join(str(at + 1) for at in constant)} of the list "
        found.append(finding("constant_target", train, [], did + "never changes", "warning", count=len(constant)))


def _outliers(train: Numbers, rows: Numbers, found: list[Finding]) -> None:
    """Reports numbers far from those of train. They may be errors, or codes for "missing" such as 999."""
    low, high = np.percentile(train.values, [25, 75], axis=0)
    reach = np.where(high > low, FAR_OUT * (high - low), np.inf)  # half of train may have one number
    low, high = low - reach, high + reach
    far = np.flatnonzero(((rows.values < low) | (rows.values > high)).any(axis=1))
    if len(far):
        limits = ", ".join(f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True))
        did = f"kept: far from the middle half of train's numbers, outside {limits}"
        level = "warning" if len(far) <= max(1, FEW * len(rows)) else "info"  # many are the data's shape
        distance = np.maximum(low - rows.values[far], rows.values[far] - high).max(axis=1)
        found.append(finding("outlier", rows, far[np.argsort(-distance, kind="stable")], did, level))


def _few_values(train: Numbers, found: list[Finding]) -> None:
    values = np.unique(train.values)
    if not train.several and len(values) <= FEW_VALUES and (values == np.floor(values)).all():
        shown = ", ".join(f"{value:g}" for value in values)
        did = f"kept: only {shown}; if these are names of classes, task: classification is meant"
        found.append(finding("few_values", train, [], did, "info", count=len(values)))
