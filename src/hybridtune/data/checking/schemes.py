"""Schemes of tags: what a tag says of the piece of text that it is part of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

Piece: TypeAlias = tuple[int, int, str]
"""First word, last word and type."""

OUTSIDE = "O"

_NONE = (OUTSIDE, "")
_TAG = re.compile(r"([BIESLUM])-(.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Scheme:
    """How pieces are marked.

    Attributes:
        name: its usual name.
        first, inner, last, single: the letters for the words of a piece, and for the word of one that has no other.
    """

    name: str
    first: str = "B"
    inner: str = "I"
    last: str = "I"
    single: str = "B"

    @property
    def letters(self) -> set[str]:
        """All of its letters."""
        return {self.first, self.inner, self.last, self.single}


IOB2 = Scheme("IOB2")
IOB1 = Scheme("IOB1", first="I", single="I")  # B- only where a piece follows another of its type
LONGER = (
    Scheme("BIOES", last="E", single="S"),
    Scheme("BILOU", last="L", single="U"),
    Scheme("BMES", inner="M", last="E", single="S"),
)
STRAY = 0.05  # so many pieces may begin as in another scheme


@lru_cache(maxsize=100_000)
def parse(tag: str) -> tuple[str, str] | None:
    """Returns the letter and the type of a tag ("O" and "" outside), or None where it has no letter."""
    if tag.upper() == OUTSIDE:
        return OUTSIDE, ""
    match = _TAG.fullmatch(tag)
    return (match[1].upper(), match[2]) if match else None


def begins(before: str, tag: str) -> bool:
    """Whether a piece begins at a tag, read as conlleval reads them, and seqeval where it is not strict.

    That is at B, S and U, after E, S, L, U and O, and where the type changes.
    """
    (last, kind), (letter, mine) = parse(before) or _NONE, parse(tag) or _NONE
    return letter != OUTSIDE and (letter in "BSU" or last in "OESLU" or mine != kind)


def is_chunked(tags: Iterable[str]) -> bool:
    """Whether tags mark pieces of several words, and are not one for each word, as parts of speech are."""
    letters = [part and part[0] for part in map(parse, tags)]
    return None not in letters and bool(set(letters) - {OUTSIDE})


def scheme_of(pairs: Counter[tuple[str, str]]) -> Scheme | None:
    """Returns the scheme of tags that mark pieces, or None where it is none of these.

    Args:
        pairs: how often each tag comes after which other; "O" stands before the first.
    """
    letters, starts = set(), Counter[str]()
    for (before, tag), count in pairs.items():
        (_, last), (letter, kind) = parse(before) or _NONE, parse(tag) or _NONE
        letters.add(letter)
        starts[letter] += count * (letter != OUTSIDE and kind != last)
    letters.discard(OUTSIDE)
    if letters <= IOB2.letters:
        return IOB1 if starts["B"] < STRAY * starts["I"] else IOB2
    return next((scheme for scheme in LONGER if letters <= scheme.letters), None)


def pieces(tags: Sequence[str]) -> list[Piece]:
    """Returns the pieces that tags mark."""
    found: list[Piece] = []
    for at, (before, tag) in enumerate(pairwise([OUTSIDE, *tags])):
        letter, kind = parse(tag) or _NONE
        if begins(before, tag):
            found.append((at, at, kind))
        elif letter != OUTSIDE:
            found[-1] = (found[-1][0], at, kind)
    return found


def marked(found: Sequence[Piece], length: int, scheme: Scheme) -> list[str]:
    """Returns the tags that mark pieces in a scheme."""
    tags = [OUTSIDE] * length
    end, before = -1, ""
    for first, last, kind in found:
        letters = [scheme.first, *[scheme.inner] * (last - first - 1), scheme.last] if last > first else [scheme.single]
        if scheme is IOB1 and first == end + 1 and kind == before:
            letters[0] = "B"
        tags[first : last + 1] = [f"{letter}-{kind}" for letter in letters]
        end, before = last, kind
    return tags
