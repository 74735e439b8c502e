"""Rows of words with tags."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .labels import tidy, written_list
from .rows import Rows, as_text, column_type, open_rows
from .schemes import OUTSIDE, Scheme, begins, marked, parse, pieces

WORDS = pa.list_(pa.string())
FINE, MISSING, MISMATCH = range(3)
RENAMED, BROKEN = 1, 2


@dataclass(frozen=True)
class Rule:
    """What is done to the tags of a split.

    Attributes:
        renames: tag -> what it is called.
        chunked: whether tags mark pieces of several words.
        scheme: the scheme that they have to keep, or None.
        repairs: whether tags that break it are changed.
        fine: pairs of neighbours in rows that were seen to keep it. What breaks a scheme is always such a pair.
    """

    renames: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    scheme: Scheme | None = None
    repairs: bool = False
    fine: set[tuple[str, str]] = field(default_factory=set)

    def __call__(self, tags: list[str]) -> list[str]:
        """Returns the tags that a row has in the end."""
        named = self.named(tags)
        return self.kept(named) if self.repairs else named

    def named(self, tags: list[str]) -> list[str]:
        """Returns tags with the names that they are meant to have."""
        return [self.renames.get(tag, tag) for tag in tags] if self.renames else tags

    def kept(self, tags: list[str]) -> list[str]:
        """Returns tags that mark the same pieces and keep the scheme."""
        if self.scheme is None:
            return tags
        pairs = set(pairwise([OUTSIDE, *tags, OUTSIDE]))
        if pairs <= self.fine:
            return tags
        kept = marked(pieces(tags), len(tags), self.scheme)
        if kept == tags:
            self.fine.update(pairs)
        return kept


@dataclass(frozen=True)
class Tally:
    """What tags mark.

    Attributes:
        types: how many pieces there are of each type; where tags mark none, how many words with each tag.
        first: in which row each stands first.
    """

    types: Counter[str]
    first: dict[str, int]


@dataclass(frozen=True)
class Tagged(Rows):
    """Rows of a tagging.

    Attributes:
        faults: for each kept row `FINE`, `MISSING` or `MISMATCH`.
        digests: for each kept row eight bytes, equal for equal tags.
        marks: for each kept row whether tags of it are `RENAMED`, and whether they are `BROKEN`.
        pairs: how often each tag comes after which other in the data set; "O" stands before the first.
        rule: what makes the tags that a row has in the end of those that it has in the data set.
    """

    faults: np.ndarray
    digests: np.ndarray
    marks: np.ndarray
    pairs: Counter[tuple[str, str]]
    rule: Rule

    def having(self, fault: int) -> np.ndarray:
        """Returns the positions of the rows with a fault."""
        return np.flatnonzero(self.faults == fault)

    def marked(self, mark: int) -> np.ndarray:
        """Returns the positions of the rows with a mark."""
        return np.flatnonzero(self.marks & mark)

    @property
    def same(self) -> np.ndarray:
        """For each kept row eight bytes, equal for equal tags."""
        return self.digests

    def target(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's tags."""
        tags = words(self.row(index)["tags"])
        return {"tags": as_text(tags if self.faults[index] else self.rule(_tags(tags)))[:160]}

    def change(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's tags as they stand there, and as they would be without fault."""
        tags = _tags(words(self.row(index)["tags"]))
        return {"tags": as_text(tags)[:160], "suggestion": as_text(self.rule.kept(self.rule.named(tags)))[:160]}

    def lengths(self, index: int) -> dict[str, Any]:
        """Returns what an example says of how many words and tags a row has."""
        row = self.row(index)
        return {"tags": f"{len(words(row['tokens']))} tokens and {len(words(row['tags']))} tags"}

    def counts(self) -> Counter[str]:
        """Returns tag -> how many words have it in the data set."""
        found: Counter[str] = Counter()
        for (_, tag), count in self.pairs.items():
            found[tag] += count
        return found

    def settled(self, rule: Rule) -> tuple[Tagged, Counter[tuple[str, str]]]:
        """Returns the rows with a rule, and how often which tag breaks the scheme and which would keep it."""
        digests, marks = array("Q"), array("b")
        broken: Counter[tuple[str, str]] = Counter()
        for tags in self._tags():
            named = rule.named(tags)
            kept = rule.kept(named)
            if kept != named:
                broken.update(pair for pair in zip(named, kept, strict=True) if pair[0] != pair[1])
            marks.append(RENAMED * (named != tags) + BROKEN * (kept != named))
            told = "\x1f".join(kept if rule.repairs else named).encode("utf-8", "replace")
            digests.append(int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big"))
        made = replace(self, rule=rule, digests=np.array(digests, np.uint64), marks=np.array(marks, np.int8))
        return made, broken

    def tally(self) -> Tally:
        """Returns what the tags mark in the end."""
        pairs: Counter[tuple[str, str]] = Counter()
        rows_of: dict[tuple[str, str], int] = {}
        for at, tags in enumerate(map(self.rule, self._tags())):
            known = len(pairs)
            pairs.update(mine := list(pairwise([OUTSIDE, *tags])))
            if len(pairs) > known:
                rows_of |= {pair: at for pair in mine if pair not in rows_of}
        found = Tally(Counter(), {})
        for (before, tag), count in pairs.items():
            kind = tag if not self.rule.chunked else (parse(tag) or (OUTSIDE, ""))[1] if begins(before, tag) else None
            if kind is not None:
                found.types[kind] += count
                found.first[kind] = min(rows_of[before, tag], found.first.get(kind, len(self)))
        return found

    def written(self) -> dict[str, pa.ChunkedArray]:
        """Returns the columns `tokens` and `tags`, where they have to be written anew."""
        made = {}
        if column_type(self.data, "tokens") != WORDS or self.gaps.any():
            made["tokens"] = self.rewritten(_each(lambda row: list(map(as_text, words(row)))), WORDS, "tokens")
        if column_type(self.data, "tags") != WORDS or (self.marks & (RENAMED | BROKEN * self.rule.repairs)).any():
            made["tags"] = self.rewritten(_each(lambda row: self.rule(_tags(words(row)))), WORDS, "tags")
        return made

    def _tags(self) -> Iterator[list[str]]:
        return (_tags(words(value)) for (values,) in self.batches("tags") for value in values)


def open_tagged(split: str, data: Dataset, source: str) -> Tagged:
    """Takes the words and tags out of a split with canonical columns.

    Raises:
        DataError: the columns `tokens` and `tags` are not there.
    """
    rows = open_rows(split, data, source, ["tokens"], "tags", read=lambda value: as_text(words(value)))
    faults, gaps = array("b"), array("b")
    pairs: Counter[tuple[str, str]] = Counter()
    for tokens, tags in (row for columns in rows.batches("tokens", "tags") for row in zip(*columns, strict=True)):
        given = [tidy(tag) for tag in words(tags)]
        length = len(words(tokens))
        lacks = None in given or (length and not given)
        faults.append(MISSING if lacks else MISMATCH if length != len(given) else FINE)
        gaps.append(tokens is None or not all(isinstance(token, str) for token in tokens))
        if not faults[-1]:
            texts = list(map(str, given))
            pairs.update(pairwise([OUTSIDE, *texts]))
    rows = replace(rows, gaps=np.array(gaps, bool))
    nothing = np.zeros(len(rows), np.int8)
    faults_of = np.array(faults, np.int8)
    return rows.into(Tagged, faults=faults_of, digests=nothing, marks=nothing, pairs=pairs, rule=Rule())


def words(value: Any) -> list[Any]:
    """Returns the words of a row: a list, one that is written out, or a text with spaces between them."""
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        written = written_list(value.strip())
        return value.split() if written is None else written
    return [] if value is None else [value]


def _each(change: Callable[[Any], list[str]]) -> Callable[[list[Any]], list[list[str]]]:
    return lambda rows: list(map(change, rows))


def _tags(given: list[Any]) -> list[str]:
    return [tag if isinstance(tag, str) else str(tidy(tag)) for tag in given]
