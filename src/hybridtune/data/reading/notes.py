"""What reading has to say besides the rows: what it had to guess, and the rows that it could not read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ...errors import DataError

OnBadRow: TypeAlias = Literal["refuse", "skip"]

MOST_REJECTED = 100_000  # of more, the file is something else than it seems; and they are in memory
_SHOWN = 160


@dataclass
class Notes:
    """Is filled while rows are read.

    Attributes:
        on_bad_row: what becomes of a row that cannot be read: an error, or a place in `rejected`.
        may_skip: whether the user could have asked for such rows to be left out, for the mend.
        kept_in: the file that `rejected` goes into, or None where none is written.
        rejected: such rows, each `{"source", "line", "problem", "text"}`.
        warnings: what a person has to know, a sentence each.
    """

    on_bad_row: OnBadRow = "refuse"
    may_skip: bool = True
    kept_in: str | None = None
    rejected: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Adds a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def reject(
        self,
        source: str,
        line: int,
        problem: str,
        text: str,
        *,
        column: int | None = None,
        found: str | None = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        """Deals with a row that cannot be read.

        Args:
            source: the file.
            line: where the row starts.
            problem: what is wrong with it.
            text: the row as it stands there.
            column: where in the line it goes wrong.
            found: for the error; the text where not given.
            expected: for the error.
            mend: for the error, beside leaving such rows out.

        Raises:
            DataError: bad rows are refused, or there are too many of them.
        """
        place = f"{source}:{line}" + (f":{column}" if column else "")
        if self.on_bad_row == "refuse":
            raise DataError(
                f"{place}: {problem}",
                found=text.strip()[:_SHOWN] if found is None else found,
                expected=expected,
                mend=self.mend(mend or "correct the row"),
            )
        if len(self.rejected) == MOST_REJECTED:
            raise DataError(
                f"{place}: more than {MOST_REJECTED:,} rows cannot be read",
                found=f"here: {problem}",
                mend="look at the first of them without on_bad_row: skip: the file is of another kind than it seems",
            )
        self.rejected.append({"source": source, "line": line, "problem": problem, "text": text.rstrip("\r\n")})

    def mend(self, mend: str) -> str:
        """Returns a mend, with leaving rows out beside it where that can be done."""
        return f"{mend}, or leave such rows out with data: {{on_bad_row: skip}}" if self.may_skip else mend

    def mark(self) -> tuple[int, int]:
        """Returns a place to go back to."""
        return len(self.rejected), len(self.warnings)

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forgets what came after `mark`: the same rows are read once more."""
        del self.rejected[mark[0] :], self.warnings[mark[1] :]
