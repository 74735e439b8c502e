"""The checkpoints of a stage: built under a name with a dot and renamed whole, found, thinned out and removed.

A process may be killed at any line of this file: what is called checkpoint-N is whole at all times.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import disk_errors, read_json

STATE = "trainer_state.json"  # the file that Trainer writes last
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = ".{}.tmp"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for other folders."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def saved_at(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at, also of a copy under another name.

    Raises:
        RunError: it is not whole.
    """
    return int(read_json(checkpoint / STATE)["global_step"])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, the oldest first; copies that a user has made under other names are none."""
    found = (path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and (path / STATE).is_file())
    return sorted(found, key=step_of)


@contextmanager
def aside(folder: Path, step: int, first: bool = True) -> Iterator[Path]:
    """Gives a temporary folder in which checkpoint-STEP is built.

    Args:
        folder: of the stage.
        step: the checkpoint's.
        first: whether this process makes it and removes it; of several processes one does.

    Raises:
        RunError: the disk is full or read-only.
    """
    with disk_errors(folder):
        temporary = folder / _ASIDE.format(f"checkpoint-{step}")
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        try:
            yield temporary
        finally:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)


def put(temporary: Path) -> None:
    """Moves the checkpoint that was built in a temporary folder to its place; one of the same step makes way.

    Raises:
        RunError: the disk is full or read-only.
    """
    (built,) = temporary.glob("checkpoint-*")
    target = temporary.parent / built.name
    with disk_errors(target):
        for path in (*built.rglob("*"), built):
            _sync(path)
        if target.exists():
            os.replace(target, temporary / "before")
        os.replace(built, target)
        _sync(target.parent)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint: first its name, then its files."""
    temporary = checkpoint.with_name(_ASIDE.format(checkpoint.name))
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(checkpoint, temporary)
    shutil.rmtree(temporary)


def thin_out(folder: Path, limit: int | None, protected: set[str]) -> None:
    """Removes the oldest checkpoints until `limit` are left (None: all stay).

    Args:
        folder: of the stage.
        limit: `save_total_limit`.
        protected: names of those that are never removed; they count.
    """
    found = checkpoints(folder)
    spare = [checkpoint for checkpoint in found if checkpoint.name not in protected]
    if limit is not None:
        for checkpoint in spare[: max(len(found) - limit, 0)]:
            remove(checkpoint)


def forget(folder: Path, after: int = -1) -> None:
    """Removes the checkpoints of later steps, which belong to an earlier attempt."""
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) > after:  # a user's own has none
            remove(checkpoint)


def sweep(folder: Path) -> None:
    """Removes what a process that was killed has left half written."""
    for left in folder.glob(_ASIDE.format("checkpoint-*")):
        if _NAME.fullmatch(left.stem.removeprefix(".")):
            shutil.rmtree(left)


def _sync(path: Path) -> None:
    """A folder keeps the names of its files only when it is synced too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
