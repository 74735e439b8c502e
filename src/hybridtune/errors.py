"""Every error that hybridtune raises on purpose.

    HybridtuneError            exit code 1: the work failed
    ├── TrainingError          the training itself failed
    └── UserError              exit code 2: what was asked for cannot be done as written
        ├── RecipeError        a key, value, strategy, stage or rule of the recipe
        ├── DataError          a file, column, label or row of the data
        ├── ModelError         a model or tokenizer that cannot be loaded or does not fit the task
        ├── PartError          a part that the model does not have
        ├── MethodError        a method that cannot sit where a rule puts it
        └── RunError           a run folder that is missing, taken, incomplete or damaged

Each carries what was found, what was expected and the mend; `str(error)` prints all of it. The command line prints
that text and no traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self


class HybridtuneError(Exception):
    """Base of all errors of hybridtune.

    Args:
        problem: one sentence that names the file, line, key or option.
        found: what was there.
        expected: what should have been there.
        mend: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, *, found: object = None, expected: object = None, mend: str | None = None) -> None:
        self.problem, self.found, self.expected, self.mend = problem, found, expected, mend
        lines = [problem]
        for word, value in (("found", found), ("expected", expected), ("mend", mend)):
            if value is not None:
                lines.append(f"  {word + ':':<9} {value}")
        super().__init__("\n".join(lines))


class TrainingError(HybridtuneError):
    """The training itself failed."""


class UserError(HybridtuneError):
    """What was asked for cannot be done as it was written.

    Args:
        problem: as above.
        where: the recipe is, where that is to be said.
        at: keys and numbers that lead to what it is about in the recipe.
        given: what stands there, as far as this is known.
        **told: as above.
    """

    exit_code = 2

    def __init__(
        self, problem: str, *, where: str = "", at: tuple[Any, ...] | None = None, given: object = None, **told: Any
    ) -> None:
        super().__init__(f"{where}: {problem}" if where else problem, **told)
        self.said, self.at, self.given = problem, at, given

    def but(self, problem: str, **other: Any) -> Self:
        """The same error with another problem, and whatever else is given in place of its own."""
        told = {key: getattr(self, key) for key in ("at", "given", "found", "expected", "mend")}
        return type(self)(problem, **told | other)


class RecipeError(UserError):
    """A key, value, strategy, stage or rule of the recipe."""


class DataError(UserError):
    """A file, column, label or row of the data."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or does not fit the task."""


class PartError(UserError):
    """A part that the model does not have."""


class MethodError(UserError):
    """A method that cannot sit where a rule puts it."""


class RunError(UserError):
    """A run folder that is missing, taken, incomplete or damaged."""


class HybridtuneWarning(UserWarning):
    """Something runs otherwise than was asked for, or than was to be expected."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that `word` was probably meant to be, or is the end of ("f1", "macro_f1"), or None."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else next((one for one in known if one.endswith(f"_{word.lower()}")), None)


def nearest_file(path: Path, pattern: str = "*") -> Path | None:
    """Returns the file or folder beside `path` that was probably meant, or None.

    Names are compared without their endings, which all files of a kind share.
    """
    entries = [entry for entry in sorted(path.parent.glob(pattern)) if not entry.name.startswith(".")]
    matches = difflib.get_close_matches(path.stem, [entry.stem for entry in entries], n=1, cutoff=0.7)
    return next((entry for entry in entries if entry.stem == matches[0]), None) if matches else None


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Returns the sentence for an unknown word, with the nearest known one where there is one."""
    guess = nearest(word, known)
    return f'unknown {kind} "{word}"' + (f', did you mean "{guess}"?' if guess else "")
