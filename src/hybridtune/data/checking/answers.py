"""Answers to a question about a context: in every form that they are written in, and where they stand."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

from .rows import as_text

Answer: TypeAlias = tuple[str, int | None]
Settled: TypeAlias = tuple[str, int, str | None]

ABSENT = "answer_absent"
KINDS = {
    "answer_spaces": "trimmed at both ends, and the offset moved with them",
    "answer_writing": "written as in the context, which has other white space or capitals there",
    "offset_missing": "looked for in the context: there was no offset",
    "offset_bytes": "offset corrected: it counted bytes, not characters",
    "offset_utf16": "offset corrected: it counted UTF-16 units, not characters",
    "offset_line_ends": "offset corrected: it counted line ends of two characters",
    "offset_moved": "offset corrected: the answer stands elsewhere, the nearest place was taken",
    ABSENT: "",
}
"""What may be amiss with an answer, and what is done."""


def answers_of(value: Any, starts: Any = None) -> list[Answer]:
    """Returns the answers of a row with their offsets, None where there is none.

    Args:
        value: `{"text": [...], "answer_start": [...]}`, a list of `{"text", "answer_start"}`, a list of texts, one
            text, any of these written out as JSON or Python, or None. Blank texts are no answers.
        starts: the offsets, where they do not stand with the answers.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        written = _written(value.strip())
        value = value if written is None else written
    if isinstance(value, dict):
        if "text" not in value:
            raise ValueError
        value, starts = value["text"], value.get("answer_start", starts)
    if value is None or isinstance(value, (str, int, float)):
        value, starts = [value], starts if isinstance(starts, list) else [starts]
    starts = starts if isinstance(starts, list) and len(starts) == len(value) else [None] * len(value)
    found: list[Answer] = []
    for text, start in zip(value, starts, strict=True):
        if isinstance(text, dict):
            found += answers_of(text)
        elif isinstance(text, list):
            raise ValueError
        elif as_text(text).strip():
            found.append((as_text(text), _offset(start)))
    return found


def settle(text: str, start: int | None, context: str) -> Settled:
    """Finds the place of an answer.

    Returns:
        The answer as it stands in the context, its offset, and what was amiss (one of `KINDS`), or None. What does not
        stand in the context comes back as it was, at -1.
    """
    bare = text.strip()
    before = len(text) - len(text.lstrip())
    for at in () if start is None else (start + before, start):
        if context.startswith(bare, at):
            return bare, at, None if bare == text else "answer_spaces"
    places = [at.start() for at in re.finditer(re.escape(bare), context)]
    if places:
        at, kind = _place(places, start, context)
        return bare, at, kind
    pattern = r"\s+".join(map(re.escape, bare.split()))
    matches = list(re.finditer(pattern, context, re.IGNORECASE))
    if not matches:
        return text, -1, ABSENT
    match = min(matches, key=lambda one: abs(one.start() - (start or 0)))
    return match.group(), match.start(), "answer_writing"


def _place(places: list[int], start: int | None, context: str) -> tuple[int, str]:
    """Returns the place that was meant, and in what it was told wrongly."""
    if start is None:
        return places[0], "offset_missing"
    for at in places:
        before = context[:at]
        if len(before.encode("utf-8", "surrogatepass")) == start:
            return at, "offset_bytes"
        if len(before.encode("utf-16-le", "surrogatepass")) == 2 * start:
            return at, "offset_utf16"
        if start - at in (before.count("\n"), -before.count("\r\n")) and start != at:
            return at, "offset_line_ends"
    return min(places, key=lambda at: abs(at - start)), "offset_moved"


def settled(answers: Iterable[Answer], context: str, only_found: bool) -> tuple[dict[str, list[Any]], list[str]]:
    """Returns the answers of a row in their canonical form, and what was amiss.

    Args:
        answers: what `answers_of` returned.
        context: where they stand.
        only_found: whether answers that do not stand there are left out.
    """
    found = [settle(text, start, context) for text, start in answers]
    kept = [one for one in found if one[1] >= 0 or not only_found]
    return (
        {"text": [text for text, _, _ in kept], "answer_start": [start for _, start, _ in kept]},
        [kind for _, _, kind in found if kind is not None],
    )


def _written(text: str) -> Any:
    """Returns what a text writes out as JSON or as Python, or None."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _offset(value: Any) -> int | None:
    try:
        start = int(value)
    except (TypeError, ValueError):
        return None
    return start if start >= 0 else None
