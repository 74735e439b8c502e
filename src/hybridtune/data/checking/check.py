"""Checks rows before any time is spent on them, repairs what can be repaired safely, and says what it did.

Rows of train are repaired or dropped; rows of validation and test are never dropped to make a result look better, only
where a leak would make it worth nothing (validation rows that stand in test). What cannot be repaired is refused.
"""

from __future__ import annotations

import numpy as np

from .classification import check_classification
from .findings import Finding
from .labels import label_names, label_table, split_labels
from .question_answering import check_question_answering
from .regression import check_regression
from .summarization import check_summarization
from .tagging import check_tagging
from .translation import check_translation

__all__ = [
    "Finding",
    "check_classification",
    "check_question_answering",
    "check_regression",
    "check_summarization",
    "check_tagging",
    "check_translation",
    "label_names",
    "label_table",
    "length_summary",
    "split_labels",
]


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
