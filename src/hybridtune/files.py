"""Writing files so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import HybridtuneError, RunError, nearest_file

# What torch and safetensors say of a full disk, in errors of their own.
_FULL = ("No space left on device", "os error 28", "inline_container.cc", "PytorchStreamWriter")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into an error that names the path and the mend."""
    try:
        yield
    except HybridtuneError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in _FULL):
            there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            raise RunError(
                f"{path}: no space left on the disk",
                found=f"{shutil.disk_usage(there).free / 2**20:.0f} MiB free",
                mend="free some space or choose another output; what was finished before is kept",
            ) from None
        # A file that is not there, where one was to be written: the folder around it cannot be made.
        unmade = number == errno.ENOENT and not path.parent.exists()
        if unmade or number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
            raise RunError(f"{path}: cannot be written", found=str(error), mend="choose another output") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file: temporary name, fsync, rename.

    Raises:
        RunError: the disk is full or read-only.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, readable and in UTF-8, as `write_text` does."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def refuse_no_run(run: Path) -> None:
    """Refuses a folder of a run that is not there.

    Raises:
        RunError: it is not.
    """
    if run.exists() and not run.is_dir():
        raise RunError(f"{run}: is a file", expected="the folder of a run", mend="`hybridtune runs` lists the runs")
    if not run.is_dir():
        near = nearest_file(run, "*/")
        mend = f"did you mean {near}?" if near else "`hybridtune runs` lists the runs"
        raise RunError(f"{run}: there is no such folder", mend=mend)


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file", mend="give a folder that a tuning finished") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: is not JSON", found=str(error)) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path`, whole, when the block ends without an error.

    Raises:
        RunError: the disk is full or read-only.
    """
    with disk_errors(path):
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
