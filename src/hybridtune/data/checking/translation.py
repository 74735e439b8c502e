"""The check of texts and their translations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from datasets import Dataset

from ..doubts.languages import UNSURE, languages
from .findings import Finding, finding
from .rows import as_text
from .steps import train_of
from .written import Written, odd, open_written, repaired

FAR = 4.0  # times the usual ratio of lengths
SHORT = 20  # characters; the ratio of shorter texts says nothing
LOOKED_AT = 300  # rows whose languages are looked at
SOME = 0.05  # of the rows; less may be the identifier's own mistakes


def check_translation(
    splits: dict[str, Dataset],
    *,
    sources: dict[str, str],
    languages: Sequence[str | None] = (None, None),
    known: bool = False,
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs texts and their translations.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `source`, `target` and
            `_row`. They are not changed.
        sources: for each split what `describe` returned, for messages.
        languages: codes of source and target, where they are known.
        known: whether a model has learnt from train before, which then need not be there.

    Returns:
        The repaired splits, and what was found and done.

    Raises:
        DataError: the data cannot be what is wanted: a target is missing in validation or test, nothing left.
    """
    if not known:
        train_of(splits)
    found: list[Finding] = []
    rows = open_written(splits, sources, "source", "target")
    first = rows["train"] if "train" in rows else next(iter(rows.values()))
    usual = float(np.median(first.ratios)) or 1.0
    made = repaired(rows, found, partial(_lengths, usual=usual))
    _languages(first, languages, found)
    return made, found


def _lengths(rows: Written, found: list[Finding], *, usual: float) -> None:
    ratio = np.maximum(rows.ratios, 1e-9) / usual
    far = ((ratio > FAR) | (ratio < 1 / FAR)) & (rows.lengths.max(1) > SHORT)
    did = f"kept: source and target differ in length {FAR:g} times as much as they usually do"
    odd("length_ratio", rows, far, did, found)


def _languages(rows: Written, told: Sequence[str | None], found: list[Finding]) -> None:
    """Reports sources and targets that seem to be the other way round."""
    some = [rows.row(int(at)) for at in np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)]
    shares = [languages([as_text(row[name]) for row in some]) for name in ("source", "target")]
    source, target = (
        next((name for name, share in one.items() if name != UNSURE and share > 0.5), None) for one in shares
    )
    if source is None or target is None:
        return
    codes = [(code or "").lower().replace("-", "_").split("_")[0] for code in told]
    if [target, source] == codes and source != target:
        did = f"kept: source seems to be in {source} and target in {target}, the other way round than was said"
    elif source == target:
        did = f"kept: source and target both seem to be in {source}"
    elif min(shares[0].get(target, 0.0), shares[1].get(source, 0.0)) > SOME:
        did = (
            f"kept: {shares[0][target]:.0%} of the sources seem to be in {target} and {shares[1][source]:.0%} of the "
            f"targets in {source}: some rows may be the other way round"
        )
    else:
        return
    found.append(finding("language_order", rows, np.arange(min(3, len(rows))), did, "warning", count=len(rows)))
