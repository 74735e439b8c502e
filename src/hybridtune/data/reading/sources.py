"""Where the rows of a split are: one place or several, patterns, weights, and paths on other machines."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from datasets import Dataset

from ...errors import DataError, first_line, nearest_file
from .files import LINED_SUFFIXES, READ_AS
from .tables import ROW, SOURCE

_PATTERN = re.compile(r"[*?\[]")
_REMOTE_PATTERN = re.compile(r"[*\[]")  # a ? begins the query of an address
_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """One of the places that rows come from.

    Attributes:
        name: a path, an address or a hub id.
        weight: how often each of its rows is drawn in training.
    """

    name: str
    weight: float = 1.0


def are_places(source: Any) -> bool:
    """Whether a source names places, by paths and perhaps weights; else it holds the rows themselves."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(one, (str, Path)) or _is_weighted(one) for one in source)
    return isinstance(source, (str, Path)) or _is_weighted(source)


def _is_weighted(one: Any) -> bool:
    return isinstance(one, dict) and "path" in one and set(one) <= {"path", "weight"}


def asked(source: Any) -> list[Part]:
    """Returns the places as they were asked for.

    Raises:
        DataError: a weight is no number above zero.
    """
    parts = []
    for one in source if isinstance(source, (list, tuple)) else [source]:
        named = one if isinstance(one, dict) else {"path": one}
        weight = named.get("weight", 1.0)
        weight = 1.0 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise DataError(
                f"data: the weight of {named['path']} is no number above zero",
                found=repr(weight),
                expected="2.0: each row twice; 0.5: half of the rows",
            )
        parts.append(Part(str(named["path"]), float(weight)))
    return parts


def plain(source: Any) -> Any:
    """Returns places as a recipe writes them: a path, or a list of paths and of `{path, weight}`."""
    written: list[Any] = [
        part.name if part.weight == 1 else {"path": part.name, "weight": part.weight} for part in asked(source)
    ]
    return written if isinstance(source, (list, tuple)) else written[0]


def describe(source: Any) -> str:
    """Returns the places in a few words."""
    parts = asked(source)
    names = [part.name + (f" (weight {part.weight:g})" if part.weight != 1 else "") for part in parts]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def expand(source: Any, split: str) -> list[Part]:
    """Returns the places with patterns replaced by what they match.

    Raises:
        DataError: a pattern matches nothing, a place is there twice, or a split other than train has weights.
    """
    parts = []
    for part in asked(source):
        if part.weight != 1 and split != "train":
            raise DataError(
                f"data.{split}: {part.name} has a weight",
                found=f"weight: {part.weight:g}",
                expected="weights in train alone: other rows are measured as they are",
                mend="take the weight away",
            )
        parts += [Part(name, part.weight) for name in _matches(part.name)]
    names = [part.name for part in parts]
    twin = next((name for name in names if names.count(name) > 1), None)
    if twin is not None:
        raise DataError(f"data.{split}: {twin} is named twice", mend=f"name it once, e.g. {{path: {twin}, weight: 2}}")
    return parts


def _matches(name: str) -> list[str]:
    if "://" in name:
        if name.startswith("file://"):
            return [Path(one).as_uri() for one in _local(name.removeprefix("file://"))]
        if not _REMOTE_PATTERN.search(name):
            return [name]
        system, path = _system(name)
        try:
            found = [system.unstrip_protocol(one) for one in sorted(system.glob(path))]
        except Exception as error:  # whatever a driver may raise
            raise _unreachable(name, error) from error
        return found or _no_match(name)
    return _local(name)


def _local(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.exists() or not _PATTERN.search(name):
        return [name]
    found = sorted(one for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
    return found or _no_match(name)


def _no_match(name: str) -> list[str]:
    before = _PATTERN.split(name)[0]
    folder = Path(before).expanduser()
    folder = folder if before.endswith("/") else folder.parent
    missing = "://" not in name and not folder.is_dir()
    there = [] if missing or "://" in name else sorted(one.name for one in folder.iterdir())[:8]
    raise DataError(
        f"{name}: no file matches the pattern",
        found=f"no folder {folder}" if missing else ", ".join(there) or None,
        mend="correct the pattern, or name the files",
    )


def _system(name: str) -> tuple[Any, str]:
    try:
        system, path = fsspec.core.url_to_fs(name)
        return system, path
    except ImportError as error:
        raise DataError(
            f"{name}: the package that reads such addresses is not installed",
            found=first_line(error),
            mend="pip install 'hybridtune[remote]' for https and s3, that package for others, or copy the file here",
        ) from error
    except Exception as error:  # whatever a driver may raise
        raise _unreachable(name, error) from error


def fetch(name: str, folder: Path) -> Path:
    """Copies what an address names into a folder, and returns the copy; a local file stays where it is.

    Raises:
        DataError: there is no such file, or it cannot be reached.
    """
    system, path = _system(name)
    if name.startswith("file://"):
        return Path(path)
    target = folder / f"{len(list(folder.iterdir()))}.copy"
    try:
        if system.isdir(path) and not system.isfile(path):
            raise DataError(f"{name}: is a folder", expected="a file", mend=f"name its files: {name.rstrip('/')}/*.csv")
        system.get_file(path, str(target))
    except DataError:
        raise
    except Exception as error:  # whatever a driver may raise
        raise _unreachable(name, error) from error
    return target


def _unreachable(name: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name}: there is no such file", mend="correct the address")
    return DataError(
        f"{name}: cannot be read from there",
        found=first_line(error, 160),
        mend="check the address, the connection and the rights, or copy the file to this machine",
    )


def missing_file(path: Path) -> str:
    """Returns the mend for a file that is not there."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = nearest_file(path)
    return f"did you mean {near}?" if near else "give the path of an existing file"


def same_files(one: Any, other: Any) -> list[str]:
    """Returns the local files that two sources have in common."""
    seen = {path.stat()[1:3] for path in _files(one)}
    return [str(path) for path in _files(other) if path.stat()[1:3] in seen]


def _files(source: Any) -> list[Path]:
    if not are_places(source):
        return []
    names = [name for part in asked(source) for name in (_local(part.name) if "://" not in part.name else [])]
    return [path for path in (Path(name).expanduser() for name in names) if path.is_file()]


def places(rows: Dataset, source: str) -> Callable[[int], str]:
    """Returns a function from a position in `rows` to where that row stands: file:line, or file and number.

    Args:
        rows: with `_row`, and with `_source` where they came from several files.
        source: what `describe` returned; the file, where there is but one.
    """
    numbers: Sequence[int] = rows[ROW]
    several: Sequence[str] | None = rows[SOURCE] if SOURCE in rows.column_names else None
    one = source.partition(READ_AS)[0]

    def place(at: int) -> str:
        name = several[at] if several is not None else one
        if name.lower().endswith(".txt"):
            return name  # one row a file
        return f"{name}:{numbers[at]}" if name.lower().endswith(LINED_SUFFIXES) else f"{name}, row {numbers[at]}"

    return place


def weigh(rows: Dataset, source: Any, seed: int) -> Dataset:
    """Repeats, or leaves out, rows of train as the weights of their places say.

    Args:
        rows: checked, and with nothing to hold out any more: equal rows would be dropped, or stand on both sides.
        source: `data.train`.
        seed: chooses the rows where a weight is no whole number.
    """
    weights = {part.name: part.weight for part in expand(source, "train")} if are_places(source) else {}
    if all(weight == 1 for weight in weights.values()):
        return rows
    chance = np.random.default_rng(seed)
    names = rows[SOURCE][:] if SOURCE in rows.column_names else [next(iter(weights))] * len(rows)
    of_each: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        of_each.setdefault(_place_of(name, weights), []).append(at)
    times = np.zeros(len(rows), np.int64)
    for name, positions in of_each.items():
        whole, part = divmod(weights[name], 1)
        times[positions] = int(whole)
        times[chance.permutation(positions)[: round(part * len(positions))]] += 1
    return rows.select(np.repeat(np.arange(len(rows)), times))


def _place_of(name: str, weights: dict[str, float]) -> str:
    """The place that a row came from: a file of a folder belongs to the folder."""
    return name if name in weights else next(one for one in weights if name.startswith(one.rstrip("/") + "/"))
