"""Folders: a data set that `save_to_disk` wrote, or a sub-folder of .txt files for each class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ...errors import DataError
from .encoding import look
from .files import LINED_SUFFIXES, SUFFIXES, TEXT_SUFFIXES, File
from .jsons import in_batches
from .notes import Notes
from .spool import Batch
from .tables import SOURCE, whole_characters

_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


def load_saved(name: str, path: Path) -> Any:
    """Loads what `save_to_disk` wrote.

    Raises:
        DataError: the folder holds something else.
    """
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        known = (*SUFFIXES, *TEXT_SUFFIXES, *LINED_SUFFIXES)
        files = sorted(file.name for file in path.iterdir() if file.name.lower().endswith(known))
        several = len({Path(file).suffix for file in files}) == 1 < len(files)
        raise DataError(
            f"{name}: the folder holds no data set that can be loaded",
            found=", ".join(files[:8]) or "no data files",
            expected="a folder written by save_to_disk, or one with a sub-folder of .txt files for each class",
            mend=(f"name one of its files, e.g. {path / files[0]}" if files else "name a file of rows")
            + (f', or all of them: "{path}/*{Path(files[0]).suffix}"' if several else ""),
        ) from error


def text_folder(path: Path, split: str) -> Path | None:
    """Returns the folder whose sub-folders are the classes: `path`, or its sub-folder for the split; else None."""
    if any((path / name).exists() for name in _SAVED):
        return None
    for folder in (path / split, path):
        if folder.is_dir() and _classes(folder):
            return folder
    return None


def read_text_folder(path: Path, notes: Notes) -> Iterator[Batch]:
    """Reads rows of `text` and `label`: each file is one, and its folder's name the label.

    Raises:
        DataError: a file cannot be read.
    """
    yield from in_batches(_rows(path, notes), lined=False)


def _classes(folder: Path) -> list[Path]:
    return sorted(
        one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".") and any(one.glob("*.txt"))
    )


def _rows(path: Path, notes: Notes) -> Iterator[tuple[int, dict[str, Any], int]]:
    classes = _classes(path)
    empty = [one.name for one in path.iterdir() if one.is_dir() and one not in classes and one.name[0] != "."]
    if empty:
        notes.warn(f"{path}: sub-folders without .txt files are no classes: {', '.join(sorted(empty)[:8])}")
    for folder in classes:
        others = [one.name for one in folder.iterdir() if one.suffix.lower() != ".txt"]
        if others:
            notes.warn(f"{folder}: {len(others)} entries are no .txt files and are not read, such as {others[0]}")
        for file in sorted(folder.glob("*.txt")):
            text = look(File(str(file), file))
            if text.damage is not None:
                notes.reject(str(file), 1, "a byte of the file is not UTF-8", str(file))
                continue
            if text.guessed:
                notes.warn(f"{file}: read as {text.encoding}, which is a guess")
            with text.open() as stream:
                content = whole_characters(stream.read()).replace("\r\n", "\n").strip("\n")
            if "\0" in content:
                notes.reject(str(file), 1, "the file holds a NUL character", str(file))
                continue
            yield 1, {"text": content, "label": folder.name, SOURCE: str(file)}, len(content)
