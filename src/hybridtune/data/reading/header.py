"""The first row of a table: the names of its columns, cleaned; refused where it is a row like all others."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ...errors import DataError
from .notes import Notes

UNNAMED = "unnamed_"

# Of these one is enough to know a header by.
_COMMON = frozenset(
    """
    text texts sentence sentence1 sentence2 text_pair message content review body title label labels class category
    target intent sentiment tag tags tokens words id idx index question answer answers context premise hypothesis
    input output instruction prompt completion response summary document source tweet utterance query score name
    date language lang split
    """.split()  # noqa: SIM905
)
_NUMBER = re.compile(r"[+-]?\d*[.,]?\d+(e[+-]?\d+)?%?", re.IGNORECASE)
_LONGEST_NAME = 64
_MOST_WORDS = 5


def clean(name: str) -> str:
    """Returns a name without spaces around it and characters that cannot be seen."""
    if name.isascii() and name.isprintable():
        return name.strip()
    spaced = re.sub(r"\s", " ", name)
    return "".join(character for character in spaced if unicodedata.category(character) not in ("Cf", "Cc")).strip()


def column_names(cells: Sequence[str], rows: Sequence[Sequence[str]], place: str, notes: Notes) -> list[str]:
    """Returns the names of a table's columns.

    Args:
        cells: the first row.
        rows: some of those that follow.
        place: of the first row, for messages.
        notes: are told where a name was repaired.

    Raises:
        DataError: two columns have one name, or the first row is no header.
    """
    _refuse_data(cells, rows, place)
    names: list[str] = []
    for position, cell in enumerate(cells, 1):
        name = clean(cell)
        if name != cell.strip():
            notes.warn(f"{place}: took characters that cannot be seen out of the column name {cell!a}: {name}")
        name = name or f"{UNNAMED}{position}"  # pandas' to_csv leaves the index without a name
        if name in names:
            raise DataError(
                f'{place}: the header has two columns "{name}"',
                found=", ".join(cells)[:160],
                mend="rename one of them",
            )
        names.append(name)
    return names


def _refuse_data(cells: Sequence[str], rows: Sequence[Sequence[str]], place: str) -> None:
    """A first row of data would be lost, and its words would be the names of columns."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    if not filled or not rows or any(cell.lower() in _COMMON for cell in filled):
        return
    if filled == [str(number) for number in range(len(filled))]:
        return  # a pandas frame whose columns have no names
    sign = None
    if not any(map(_is_name, filled)):
        sign = "none of its cells is like a name"
    else:
        for at, cell in enumerate(cells):
            others = [row for row in rows if len(row) == len(cells) > 1 and list(row) != list(cells)]
            again = sum(row[at].strip() == cell.strip() for row in others)
            if cell.strip() and again:
                sign = f'"{cell.strip()[:40]}" stands in {again} of the next {len(rows)} rows of that column too'
                break
    if sign:
        raise DataError(
            f"{place}: the first row looks like data, not like the names of the columns",
            found=f"{' | '.join(cells)[:160]} ({sign})",
            expected="a header such as: text | label",
            mend="add a first line with the names of the columns",
        )


def _is_name(cell: str) -> bool:
    """Whether a cell may be the name of a column: short, few words, no number, no end of a sentence."""
    return (
        len(cell) <= _LONGEST_NAME
        and len(cell.split()) <= _MOST_WORDS
        and not _NUMBER.fullmatch(cell)
        and cell[-1] not in ".!?。！？"
    )
