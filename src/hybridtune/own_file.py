"""Python files of the user's own that offer a method, a task or metrics: found by their path, run once a version."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from .errors import UserError


def is_path(name: str) -> bool:
    """Whether a name is meant as the path of such a file."""
    return name.endswith(".py")


def load(name: str, what: str, error: type[UserError]) -> ModuleType:
    """Runs the file and gives its module.

    Args:
        name: its path.
        what: key of the recipe that names it.
        error: what is raised.

    Raises:
        UserError: there is no such file, or it cannot be run.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise error(
            f"{what}: {name}: there is no such file",
            mend=f"the path is taken from {Path.cwd()}, where hybridtune was started",
        )
    try:
        return _run(path.resolve(), path.stat().st_mtime_ns, what)
    except Exception as problem:  # whatever a user's file may raise
        raise error(f"{what}: {name}: cannot be run", found=f"{type(problem).__name__}: {problem}") from problem


@functools.cache
def _run(path: Path, changed: int, what: str) -> ModuleType:
    """Time of change is there so that a file that was written anew is run anew."""
    spec = importlib.util.spec_from_file_location(f"hybridtune_{what}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
