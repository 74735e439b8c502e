"""Gives the columns of a data set the names that a task knows them by."""

from __future__ import annotations

from collections.abc import Collection

from datasets import Dataset

from ...errors import DataError, nearest, unknown
from .files import READ_AS
from .notes import Notes
from .tables import ROW, SOURCE


def map_columns(
    rows: Dataset,
    split: str,
    source: str,
    wanted: dict[str, tuple[str, ...]],
    hints: dict[str, str],
    required: Collection[str],
    in_recipe: bool = True,
    instead: str = "",
) -> Dataset:
    """Gives the columns their canonical names.

    Args:
        rows: what `read` returned.
        split: the split's name, for messages.
        source: what `describe` returned, for messages.
        wanted: canonical name -> other names that the column commonly has, tried in order, whatever their case.
        hints: canonical name -> the user's column (`data.columns` of the recipe); wins.
        required: canonical names that must be found.
        in_recipe: whether hints stand in a recipe, for messages; else they were given with the call.
        instead: what there might be in place of the required columns, for messages.

    Returns:
        The rows with canonical names. Other columns are kept, but one that stands in the way of a canonical name is
        left out.

    Raises:
        DataError: as `find_columns`.
    """
    return rename_columns(rows, find_columns(rows, split, source, wanted, hints, required, in_recipe, instead), wanted)


def rename_columns(rows: Dataset, found: dict[str, str], wanted: Collection[str]) -> Dataset:
    """Gives the columns that `find_columns` has found their canonical names; what stands in their way is left out."""
    in_the_way = [name for name in rows.column_names if name in wanted and name not in found.values()]
    renames = {column: canonical for canonical, column in found.items() if column != canonical}
    rows = rows.remove_columns(in_the_way) if in_the_way else rows
    return rows.rename_columns(renames) if renames else rows


def find_columns(
    rows: Dataset,
    split: str,
    source: str,
    wanted: dict[str, tuple[str, ...]],
    hints: dict[str, str],
    required: Collection[str],
    in_recipe: bool = True,
    instead: str = "",
) -> dict[str, str]:
    """Finds the columns of a task, with the arguments of `map_columns`.

    Returns:
        Canonical name -> the column that it is.

    Raises:
        DataError: a hint names no column or no canonical name, two hints name one column, or a required column is
            not found.
    """
    where = f"{source.partition(READ_AS)[0]} ({split})"
    columns = [name for name in rows.column_names if name != ROW]
    found = _hinted(columns, where, wanted, hints, in_recipe)
    for canonical, known in wanted.items():
        free = [name for name in columns if name not in found.values()]
        column = None if canonical in found else _known(free, (canonical, *known))
        if column is not None:
            found[canonical] = column
    for canonical in required:
        if canonical not in found:
            free = [name for name in columns if name not in found.values()]
            raise DataError(
                f"{where}: there is no column for {canonical}",
                found=", ".join(columns),
                expected=" or ".join(dict.fromkeys((canonical, *wanted.get(canonical, ()))))
                + (f"; or {instead}" if instead else ""),
                mend=_mend(canonical, free[0], in_recipe)
                if free
                else f"add a column {canonical}; the first line names the columns",
            )
    return {canonical: found[canonical] for canonical in wanted if canonical in found}


def say_empty(rows: Dataset, names: Collection[str], came: Dataset, notes: Notes) -> None:
    """Says where a column that rows of some files have is empty in all of another file, which is seldom meant.

    Args:
        rows: with canonical names.
        names: of the columns that rows ought to have.
        came: the same rows with the columns that they came with.
        notes: is told.
    """
    names = [name for name in dict.fromkeys(names) if name in rows.column_names]
    if SOURCE not in rows.column_names or not names:
        return
    filled = _filled(rows, names)
    empty = {name: [file for file, has in filled.items() if name not in has] for name in names}
    lacking = {name: files for name, files in empty.items() if 0 < len(files) < len(filled)}
    if not lacking:
        return
    theirs = _filled(came, [one for one in came.column_names if one not in (ROW, SOURCE)])
    for name, files in lacking.items():
        for file in files:
            said = f"{file}: none of its rows has a value for {name}, as rows of other files have"
            notes.warn(f"{said}; its columns: {', '.join(theirs[file])}")


def _filled(rows: Dataset, names: Collection[str]) -> dict[str, list[str]]:
    """Of every file the columns in which any of its rows has a value."""
    groups = rows.select_columns([SOURCE, *names]).with_format("arrow")[:].group_by(SOURCE, use_threads=False)
    counts = groups.aggregate([(name, "count") for name in names]).to_pylist()
    return {of[SOURCE]: [name for name in names if of[f"{name}_count"]] for of in counts}


def _hinted(
    columns: list[str], where: str, wanted: dict[str, tuple[str, ...]], hints: dict[str, str], in_recipe: bool
) -> dict[str, str]:
    found: dict[str, str] = {}
    key = "data.columns" if in_recipe else "columns (--column)"
    for canonical, column in hints.items():
        if canonical not in wanted:
            raise DataError(f"{key}: {unknown('column', canonical, wanted)}", expected=", ".join(wanted))
        if column not in columns:
            guess = nearest(column, columns)
            raise DataError(
                f'{where}: there is no column "{column}", which {key} names for {canonical}',
                found=", ".join(columns),
                mend=f'did you mean "{guess}"?' if guess else _mend(canonical, columns[0], in_recipe),
            )
        if column in found.values():
            raise DataError(f'{key}: "{column}" is named twice', found=hints, expected="a column for each")
        found[canonical] = column
    return found


def _known(columns: list[str], names: tuple[str, ...]) -> str | None:
    by_lower = {name.strip().lower(): name for name in reversed(columns)}
    for name in names:
        if name in columns:
            return name
        if name.lower() in by_lower:
            return by_lower[name.lower()]
    return None


def _mend(canonical: str, column: str, in_recipe: bool) -> str:
    written = f"data: {{columns: {{{canonical}: {column}}}}}" if in_recipe else f'columns={{"{canonical}": "{column}"}}'
    return f"say which column it is, e.g. {written} or --column {canonical}={column}"
