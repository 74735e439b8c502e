"""Checks rows before any time is spent on them, repairs what can be repaired safely, and says what it did.

Rows of train are repaired or dropped; rows of validation and test are never dropped to make a result look better, only
where a leak would make it worth nothing (validation rows that stand in test). What cannot be repaired is refused.
"""

from __future__ import annotations

from .classification import check_classification
from .findings import Finding
from .instruction import check_instruction
from .labels import label_names, label_table, split_labels
from .question_answering import check_question_answering
from .regression import check_regression
from .summarization import check_summarization
from .tagging import check_tagging
from .translation import check_translation

__all__ = [
    "Finding",
    "check_classification",
    "check_instruction",
    "check_question_answering",
    "check_regression",
    "check_summarization",
    "check_tagging",
    "check_translation",
    "label_names",
    "label_table",
    "split_labels",
]
