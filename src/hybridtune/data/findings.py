"""What the checks tell: findings, with examples, and the dropping of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ..errors import DataError
from .rows import Rows

Splits: TypeAlias = dict[str, Rows]
Details: TypeAlias = Callable[[Rows, int], dict[str, Any]]

EXAMPLES = 5
SHOWN = 160


@dataclass(frozen=True)
class Finding:
    """Something that the check found, and what it did about it.

    Attributes:
        kind: `label_type`, `missing_label`, `empty_text`, `label_variant`, `label_typo`, `doubtful_label`, `duplicate`,
            `conflict`, `leak`, `small_class`, `imbalance` or `absent_class`.
        split: the split where it was found.
        count: how many rows; how many classes for `small_class`, `imbalance` and `absent_class`.
        did: what was done, in words.
        level: "info" or "warning".
        examples: at most five rows, each `{"row", "text", ...}` and what belongs to the kind: `label`, `suggestion`,
            `other_row`, `other_split`, `other_label`, `rows` (of the class).
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
    where: Sequence[int],
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
        details: gives what an example says besides row and text; the label where it is not given.
        count: where it is not the number of rows.
    """
    examples = []
    for at in where[:EXAMPLES]:
        texts = zip(("text", "text_pair"), rows.texts[at], strict=False)
        example: dict[str, Any] = {"row": rows.number[at]} | {name: text[:SHOWN] for name, text in texts}
        examples.append(example | (details(rows, at) if details else {"label": rows.label(at)}))
    return Finding(kind, rows.split, len(where) if count is None else count, did, level, examples)


def drop(splits: Splits, split: str, dropped: Iterable[int], found: list[Finding]) -> Splits:
    """Takes rows out of a split.

    Raises:
        DataError: none would be left; the findings so far say why.
    """
    gone = set(dropped)
    kept = splits[split].keep([at not in gone for at in range(len(splits[split]))])
    if len(kept) == 0:
        raise DataError(
            f"{kept.source}: no rows of {split} are left after the check",
            found="; ".join(f"{item.kind}: {item.count} rows {item.did}" for item in found if item.split == split),
            mend="look at these rows, and at whether data.columns names the right columns",
        )
    return {**splits, split: kept}
