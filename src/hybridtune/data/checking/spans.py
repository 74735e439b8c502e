"""Texts with marked spans, made words with tags."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from datasets import Dataset

from ...errors import DataError
from ..bars import no_bars
from .findings import EXAMPLES, SHOWN, Finding
from .rows import place, row_numbers
from .schemes import OUTSIDE

Places: TypeAlias = Sequence[tuple[int, int]]

_KEYS = ("start", "end", "label")
_NESTED = "entities"  # spaCy's training data has {"entities": [[0, 5, "PER"]]}


def spans_of(value: Any) -> list[Any]:
    """Returns the spans of a row, each `{"start", "end", "label"}` where it is one.

    Args:
        value: a list of these or of triples [start, end, label], a mapping with such a list under `entities`, or any of
            it written out as JSON or as Python does: what is of several types in one column is read as text.
    """
    value = _opened(value)
    if isinstance(value, dict) and _NESTED in value:
        value = _opened(value[_NESTED])
    if value is None or value == "":
        return []
    return [_span(_opened(one)) for one in value] if isinstance(value, (list, tuple)) else [value]


def _opened(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    return value


def _span(value: Any) -> Any:
    triple = isinstance(value, (list, tuple)) and len(value) == len(_KEYS)
    return dict(zip(_KEYS, value, strict=True)) if triple else value


def tagged(
    rows: Dataset, split: str, source: str, word_places: Callable[[str], Places]
) -> tuple[Dataset, list[Finding]]:
    """Makes texts with spans words with tags, B- and I-. A span that ends within a word takes all of it.

    Args:
        rows: with the columns `text` and `spans`.
        split: its name.
        source: what `describe` returned, for messages.
        word_places: where the words of a text begin and end.

    Returns:
        The rows with `tokens` and `tags`, and what was found.

    Raises:
        DataError: a span lies outside of its text, or over another.
    """
    tokens, tags, cut = [], [], list[dict[str, Any]]()
    spans_cut = 0
    for text, spans, number in zip(rows["text"][:], rows["spans"][:], row_numbers(rows).tolist(), strict=True):
        text, where = text or "", place(source, number)
        places = word_places(text)
        tokens.append([text[start:end] for start, end in places])
        mine = [OUTSIDE] * len(places)
        for span in spans_of(spans):
            inside = _words_of(span, text, places, where)
            if any(mine[at] != OUTSIDE for at in inside):
                raise DataError(
                    f"{where}: two spans lie over one word",
                    found=f"{span} on {text[places[inside[0]][0] : places[inside[-1]][1]]!r}",
                    expected="spans apart from each other",
                    mend="keep one of them",
                )
            start, end = places[inside[0]][0], places[inside[-1]][1]
            if start < span["start"] or end > span["end"]:
                spans_cut += 1
                marked = {"span": text[span["start"] : span["end"]], "suggestion": text[start:end]}
                cut.append({"row": number, "text": text[:SHOWN], **marked})
            for at in inside:
                mine[at] = f"{'B' if at == inside[0] else 'I'}-{span['label']}"
        tags.append(mine)
    kept = rows.remove_columns([name for name in ("tokens", "tags") if name in rows.column_names])
    with no_bars():
        made = kept.add_column("tokens", tokens).add_column("tags", tags)
    if not cut:
        return made, []
    did = f"widened to whole words: {spans_cut} spans that begin or end within one, such as {cut[0]['span']!r}"
    count = len({one["row"] for one in cut})
    return made, [Finding("span_widened", split, count, did, "warning", cut[:EXAMPLES])]


def _words_of(span: Any, text: str, places: Places, where: str) -> list[int]:
    """The words that a span touches.

    Raises:
        DataError: it is no span of the text.
    """
    known = isinstance(span, dict) and set(_KEYS) <= set(span)
    known = known and all(isinstance(span[key], int) for key in ("start", "end")) and span["label"] not in (None, "")
    inside = (
        [at for at, (start, end) in enumerate(places) if start < span["end"] and end > span["start"]] if known else []
    )
    if not inside or not 0 <= span["start"] < span["end"] <= len(text):
        raise DataError(
            f"{where}: a span marks nothing in its text, or has no label",
            found=f"{span}, text of {len(text)} characters",
            expected='{"start": 0, "end": 5, "label": "PER"} or [0, 5, "PER"], in characters, start < end',
        )
    return inside
