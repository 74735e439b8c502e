"""What the checks tell: findings, with examples, and the dropping of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ...errors import DataError
from .rows import Rows, as_text

R = TypeVar("R", bound=Rows)
Details: TypeAlias = Callable[[Any, int], dict[str, Any]]

EXAMPLES = 5
SHOWN = 160


@dataclass(frozen=True)
class Finding:
    """Something that a check found, and what it did about it.

    Attributes:
        kind: of every task: `empty_text`, `duplicate`, `conflict`, `leak`; where the target may be missing or unfit:
            `missing_label`, `label_type`. Of classification: `label_variant`, `label_typo`, `doubtful_label`,
            `small_class`, `imbalance`, `absent_class`, `numeric_labels`. Of regression: `no_number`, `decimal_comma`,
            `outlier`, `constant_target`, `few_values`. Of tagging: `length_mismatch`, `span_widened`, `scheme`,
            `broken_tags`, `tag_variant`, `rare_type`, `unknown_type`, `absent_type`. Of question answering:
            `answer_spaces`, `answer_writing`, `offset_missing`, `offset_bytes`, `offset_utf16`, `offset_line_ends`,
            `offset_moved`, `answer_absent`, `no_answer`, `shared_context`. Of translation and summarization:
            `copied_target`, `length_ratio`, `language_order`, `long_summary`, `no_spaces`. Of instruction:
            `unknown_role`, `late_system`, `empty_turn`, `joined_turns`, `leading_answer`, `cut_back`,
            `answer_cut_away`, `one_by_one`.
        split: the split where it was found.
        count: how many rows; how many classes or types for kinds that speak of these.
        did: what was done, in words.
        level: "info" or "warning".
        examples: at most five rows, each with `row`, its texts by the names of their columns, and what belongs to the
            kind: `label` (or `tags`, `answers`), `suggestion`, `other_row`, `other_split`, `other_label` (or
            `other_tags`, `other_answers`), `rows` (of the class).
    """

    kind: str
    split: str
    count: int
    did: str
    level: str
    examples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding as data.json has it."""
        return asdict(self)


def finding(
    kind: str,
    rows: Rows,
    where: Sequence[int] | np.ndarray,
    did: str,
    level: str,
    details: Details | None = None,
    count: int | None = None,
) -> Finding:
    """Makes a finding.

    Args:
        kind: what was found.
        rows: the split.
        where: the rows that it was found in, by their position in `rows`.
        did: what was done.
        level: "info" or "warning".
        details: gives what an example says besides row and texts; the target where it is not given.
        count: where it is not the number of rows.
    """
    examples = []
    for at in map(int, where[:EXAMPLES]):
        row = rows.row(at)
        texts = {name: as_text(row[name])[:SHOWN] for name in rows.texts}
        told = details(rows, at) if details else rows.target(at)
        examples.append({"row": int(rows.number[at]), **texts, **told})
    return Finding(kind, rows.split, len(where) if count is None else count, did, level, examples)


def drop(splits: dict[str, R], split: str, dropped: np.ndarray, found: list[Finding]) -> dict[str, R]:
    """Takes rows out of a split.

    Raises:
        DataError: none would be left; the findings so far say why.
    """
    wanted = np.ones(len(splits[split]), bool)
    wanted[dropped] = False
    kept = splits[split].keep(wanted)
    if len(kept) == 0:
        raise DataError(
            f"{kept.source}: no rows of {split} are left after the check",
            found="; ".join(f"{item.kind}: {item.count} rows {item.did}" for item in found if item.split == split),
            mend="look at these rows, and at whether data.columns names the right columns",
        )
    return {**splits, split: kept}


def some(words: Iterable[str]) -> str:
    """Returns the first few of these, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - EXAMPLES} more" if len(words) > EXAMPLES else ""
    return ", ".join(words[:EXAMPLES]) + more
