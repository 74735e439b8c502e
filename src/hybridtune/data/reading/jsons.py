"""JSON and JSON Lines: objects, each with the line where it starts.

A file of JSON Lines is read as a stream. One JSON value is in memory as text, but its entries are read one by one.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ...errors import DataError
from .delimited import bad_character
from .encoding import Text
from .header import clean
from .notes import Notes
from .spool import BATCH_CHARACTERS, BATCH_ROWS, Batch
from .squad import flatten, is_squad
from .tables import whole_characters

_SPACE = re.compile(r"[ \t\r\n]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_EXAMPLE = '[{"text": "...", ...}, ...]'
_LONGEST_REPR = 2**20
_SHOWN = 160


class JsonReader:
    """Reads the JSON values of one file, and counts what it had to repair."""

    def __init__(self, text: Text, notes: Notes) -> None:
        self.text, self.name, self.notes = text, text.file.name, notes
        self.missing = self.halves = 0
        self.decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=self._constant)

    def lines(self) -> Iterator[Batch]:
        """Reads a file of one object a line.

        Raises:
            DataError: a line is no object.
        """
        yield from in_batches(self._line_entries(), self.text.file.lined)
        self._say_repairs()

    def whole(self) -> Iterator[Batch]:
        """Reads a file that is a list of objects, or an object with one such list inside.

        Raises:
            DataError: it is not JSON, or something else than that.
        """
        with self.text.open() as stream:
            text = stream.read()
        if self.text.damage is not None:
            raise self.text.damage
        start = _skip(text, 1 if text.startswith("\ufeff") else 0)
        try:
            if text[start] == "[":
                entries = self._list_entries(text, start)
            else:
                entries = self._inner_entries(self._whole(text, start))
            first = next(entries, None)
            if first is None:
                raise DataError(f"{self.name}: the list is empty", expected=_EXAMPLE)
            entries = chain([first], entries)
            if is_squad(first[1]):
                entries = flatten(entries, self.name, self.notes)
            yield from in_batches(self._objects(entries), self.text.file.lined)
        except (ValueError, RecursionError) as error:
            line, column, found, mend = _explain(text, error)
            raise DataError(
                f"{self.name}:{line}:{column}: is not JSON ({_message(error)})", found=found, mend=mend
            ) from error
        self._say_repairs()

    def _line_entries(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        # Lines end at \n alone: U+2028 and its like are allowed inside a string.
        with self.text.open(newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                bare = line.strip().lstrip("\ufeff")
                if not bare:
                    continue
                problem, column, mend = bad_character(line, self.text), None, None
                expected = "one JSON object a line"
                if problem is None:
                    try:
                        entry = self.decoder.decode(bare)
                    except (ValueError, RecursionError) as error:
                        problem = f"the line is not JSON ({_message(error)})"
                        _, column, _, mend = _explain(bare, error, "line")
                    else:
                        if isinstance(entry, dict):
                            yield number, self._repaired(entry, bare), len(line)
                            continue
                        problem = "the line is not a JSON object"
                        expected = 'an object such as {"text": "...", "label": "..."}'
                self.notes.reject(self.name, number, problem, line, column=column, expected=expected, mend=mend)

    def _list_entries(self, text: str, start: int) -> Iterator[tuple[int, Any, int]]:
        """Yields line, value and length of each entry of a list."""
        at, line, counted = _skip(text, start + 1), 1, 0
        while text[at : at + 1] != "]":
            value, end = self.decoder.raw_decode(text, at)
            line, counted = line + text.count("\n", counted, at), at
            yield line, self._repaired(value, text[at:end]), end - at
            at = _skip(text, end)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("Expecting value", text, at)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if (end := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)

    def _whole(self, text: str, start: int) -> Any:
        value, end = self.decoder.raw_decode(text, start)
        if (after := _skip(text, end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, after)
        return self._repaired(value, text)

    def _inner_entries(self, tree: Any) -> Iterator[tuple[int, Any, int]]:
        """The entries of the one list of objects in an object; they are told by their numbers."""
        inside = tree if isinstance(tree, dict) else {}
        lists = {
            key: value
            for key, value in inside.items()
            if isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        }
        if len(lists) != 1:
            found = f"an object with {', '.join(list(inside)[:8])}" if inside else f"{type(tree).__name__}: {tree!r}"
            pandas = bool(inside) and all(isinstance(value, dict) for value in inside.values())
            raise DataError(
                f"{self.name}: is not a list of objects",
                found=found[:_SHOWN],
                expected=f'{_EXAMPLE}, or an object with one such list: {{"data": {_EXAMPLE}}}',
                mend='write a pandas frame with to_json(..., orient="records", lines=True)' if pandas else None,
            )
        for number, entry in enumerate(next(iter(lists.values())), 1):
            yield number, entry, 0

    def _objects(self, entries: Iterator[tuple[int, Any, int]]) -> Iterator[tuple[int, dict[str, Any], int]]:
        for number, (line, entry, size) in enumerate(entries, 1):
            if isinstance(entry, dict):
                yield line, entry, size
            else:
                problem = f"entry {number} is not an object"
                said = json.dumps(entry, ensure_ascii=False, default=str)
                self.notes.reject(self.name, line, problem, said, expected='{"text": "...", ...}')

    def _constant(self, word: str) -> None:
        if word != "NaN":
            raise ValueError(f"{word} is no number in JSON")
        self.missing += 1

    def _repaired(self, value: Any, raw: str) -> Any:
        if not _HALF.search(raw):
            return value
        whole = _with_whole_characters(value)
        self.halves += whole != value
        return whole

    def _say_repairs(self) -> None:
        if self.missing:
            self.notes.warn(f"{self.name}: {self.missing} times NaN, which JSON does not have: read as missing")
        if self.halves:
            self.notes.warn(
                f"{self.name}: {self.halves} rows with half a character (such as \\ud83d alone): read as \ufffd"
            )


def in_batches(entries: Iterator[tuple[int, dict[str, Any], int]], lined: bool) -> Iterator[Batch]:
    """Puts entries (line, columns, about how many characters) together.

    Args:
        entries: the rows.
        lined: whether they are numbered by their lines; else from 1.
    """
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    size = 0
    for number, (line, entry, characters) in enumerate(entries, 1):
        rows.append(entry)
        numbers.append(line if lined else number)
        size += characters
        if len(rows) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield _columns(rows), numbers
            rows, numbers, size = [], [], 0
    if rows:
        yield _columns(rows), numbers


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    if all(name == clean(name) for name in names):
        return {name: [row.get(name) for row in rows] for name in names}
    cleaned: dict[str, list[Any]] = {}
    for name in names:
        cleaned.setdefault(clean(name), [row.get(name) for row in rows])
    return cleaned


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'an object has the key "{twin}" twice')
    return made


def _with_whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_with_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(key): _with_whole_characters(item) for key, item in value.items()}
    return value


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _message(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _explain(text: str, error: Exception, what: str = "file") -> tuple[int, int, str, str | None]:
    """Where it goes wrong, what stands there, and what to do, where that can be told."""
    if not isinstance(error, json.JSONDecodeError):
        return 1, 1, text[:_SHOWN].strip(), None
    start = text.rfind("\n", 0, error.pos) + 1
    found = text[max(start, error.pos - 80) : error.pos + 80].strip()
    before = text[: error.pos].rstrip()[-1:]
    mend = None
    if _is_python(text):
        mend = "these are Python's own literals (single quotes, None, True): write the rows with json.dumps"
    elif (before == "," and text[error.pos : error.pos + 1] in ("}", "]")) or "trailing comma" in error.msg:
        mend = "take out the comma after the last entry"
    elif error.pos >= len(text.rstrip()):
        mend = f"the {what} ends too early: copy it once more, or close what is open"
    return error.lineno, error.colno, found, mend


def _is_python(text: str) -> bool:
    if len(text) > _LONGEST_REPR or "'" not in text:
        return False
    try:
        return isinstance(ast.literal_eval(text.strip()), (dict, list))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
