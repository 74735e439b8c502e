"""The check of documents and their summaries."""

from __future__ import annotations

from datasets import Dataset

from .findings import Finding
from .steps import train_of
from .written import Written, odd, open_written, repaired


def check_summarization(
    splits: dict[str, Dataset], *, sources: dict[str, str], known: bool = False
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs documents and their summaries.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `document`, `summary` and
            `_row`. They are not changed.
        sources: for each split what `describe` returned, for messages.
        known: whether a model has learnt from train before, which then need not be there.

    Returns:
        The repaired splits, and what was found and done.

    Raises:
        DataError: the data cannot be what is wanted: a summary is missing in validation or test, nothing left.
    """
    if not known:
        train_of(splits)
    found: list[Finding] = []
    return repaired(open_written(splits, sources, "document", "summary"), found, _lengths), found


def _lengths(rows: Written, found: list[Finding]) -> None:
    longer = rows.lengths[:, 1] > rows.lengths[:, 0]
    odd("long_summary", rows, longer, "kept: the summary is longer than its document", found)
