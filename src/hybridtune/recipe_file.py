"""A YAML file of keys: a recipe or a strategy. Says where in it something stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from . import yaml12
from .errors import RecipeError, UserError, nearest_file

NOWHERE = "the recipe"  # what keys that are in no file are called in messages


def read_recipe(path: Path, expected: str = "model:, task:, data: ...") -> dict[str, Any]:
    """Reads a YAML file of keys.

    Raises:
        RecipeError: there is no such file, or it is not YAML, or holds no keys.
    """
    if path.is_dir():
        own = path / "recipe.yaml"
        raise RecipeError(
            f"{path}: is a folder",
            expected="a YAML file",
            mend=f"did you mean {own}?" if own.is_file() else "give the path of a YAML file",
        )
    if not path.is_file():
        near = nearest_file(path, "*.y*ml")
        raise RecipeError(
            f"{path}: there is no such file",
            mend=f"did you mean {near}?" if near else "give the path of a YAML file",
        )
    try:
        tree = yaml12.load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(
            f"{path}{place}: is not readable YAML",
            found=error.problem or " ".join(str(error).split()),
            mend="correct that line",
        ) from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: is not readable YAML", found=" ".join(str(error).split())) from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: holds no keys", found=type(tree).__name__, expected=expected)
    return {str(key): value for key, value in tree.items()}


@contextmanager
def placed(source: Any) -> Iterator[None]:
    """Has errors about keys say on which line of a file they stand; keys that came another way have none.

    Args:
        source: where keys come from; what is no path of a file leaves errors as they are.

    Raises:
        UserError: what was raised inside.
    """
    try:
        yield
    except UserError as error:
        line = None
        if isinstance(source, (str, Path)) and error.at is not None:
            line = _line(Path(source), error.at, error.given)
        if line is None:
            raise
        raise error.but(error.said, where=f"{Path(source)}:{line}") from None


def _line(path: Path, at: tuple[Any, ...], given: Any) -> int | None:
    """Where a file says this; None where something else is said there, or nothing."""
    try:
        line, here = yaml12.lines(path.read_text("utf-8")).get(at), read_recipe(path)
        for step in at:
            here = here[step]
        return line if repr(here) == repr(given) else None  # two that are not a number are not equal
    except (OSError, LookupError, TypeError, RecipeError):
        return None
