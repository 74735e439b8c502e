"""CoNLL and BIO files: a token a line with its tag in the last column, a blank line after each row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...errors import DataError
from .delimited import bad_character
from .encoding import Text
from .jsons import in_batches
from .notes import Notes
from .spool import Batch

_TAG = re.compile(r"O|[BIESLUM]-\S+")


def read_conll(text: Text, notes: Notes) -> Iterator[Batch]:
    """Reads rows of `tokens` and `tags`.

    Raises:
        DataError: a line has no tag, or another number of columns than the first.
    """
    yield from in_batches(_rows(text, notes), text.file.lined)


def _rows(text: Text, notes: Notes) -> Iterator[tuple[int, dict[str, Any], int]]:
    name, width, tabs, start = text.file.name, 0, False, 0
    fields: list[list[str]] = []
    row: list[str] = []
    problem: tuple[int, str] | None = None

    def done() -> Iterator[tuple[int, dict[str, Any], int]]:
        if problem is not None:
            line, what = problem
            expected = f"{width or 2} columns as in the first line: token ... tag"
            notes.reject(name, line, what, "".join(row), found=row[line - start].strip(), expected=expected)
        elif fields:
            tokens, tags = [cells[0] for cells in fields], [cells[-1] for cells in fields]
            yield start, {"tokens": tokens, "tags": tags}, sum(map(len, row))

    with text.open() as stream:
        for number, line in enumerate(stream, 1):
            bare = line.strip(" \t\r\n")
            if not bare or bare.startswith("-DOCSTART-"):
                yield from done()
                start, fields, problem, row = 0, [], None, []
                continue
            if not width:
                tabs = "\t" in bare
            cells = bare.split("\t") if tabs else re.split(r"[ \t]+", bare)
            if not row and bare.startswith("#") and not _TAG.fullmatch(cells[-1]):
                continue  # "# id 12": some sets have a line of their own before each row
            start = start or number
            row.append(line)
            fields.append(cells)
            if problem is None and (what := bad_character(line, text) or _odd(cells, width)):
                problem = number, what
            elif problem is None:
                width = width or len(cells)
        yield from done()
    if not width and not notes.rejected:
        raise DataError(
            f"{name}: holds no tokens", expected="a token a line, its tag in the last column, a blank line between rows"
        )


def _odd(cells: list[str], width: int) -> str | None:
    if len(cells) < 2:
        return "the token has no tag"
    return f"the line has {len(cells)} columns, those before have {width}" if width not in (0, len(cells)) else None
