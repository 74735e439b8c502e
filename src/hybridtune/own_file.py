"""Python files of the user's own that offer a method, a task or metrics: found by their path, run once a version."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import UserError


def is_path(name: str) -> bool:
    """Whether a name is meant as the path of such a file."""
    return name.endswith(".py")


def absolute(name: str) -> str:
    """The path of such a file from the root, so that it is found from another directory too; other names stay."""
    return str(Path(name).expanduser().resolve()) if is_path(name) else name


def shown(name: str) -> str:
    """What a person is told of a name: of such a file its own name."""
    return Path(name).name if is_path(name) else name


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
            mend="put the file there again: a run names the files of your own that it was tuned with"
            if path.is_absolute()
            else f"the path is taken from {Path.cwd()}, where hybridtune was started",
        )
    try:
        return _run(path.resolve(), path.stat().st_mtime_ns, what)
    except Exception as problem:  # whatever a user's file may raise
        raise error(f"{what}: {name}: cannot be run", found=f"{type(problem).__name__}: {problem}") from problem


@functools.cache
def _run(path: Path, changed: int, what: str) -> ModuleType:
    """Time of change is there so that a file that was written anew is run anew."""
    version = hashlib.blake2b(f"{path} {changed}".encode(), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(f"hybridtune_{what}_{path.stem}_{version}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic and dataclasses look up what annotations name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
