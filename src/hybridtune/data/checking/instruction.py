"""The check of conversations whose assistant is to be learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .findings import Finding, finding
from .rows import batches, of_table
from .steps import saying_nothing, train_of, unfit
from .turns import (
    CUT_BACK,
    EMPTY_TURN,
    JOINED,
    KINDS,
    LATE_SYSTEM,
    LEADING,
    ROLES,
    UNKNOWN_ROLE,
    as_one_text,
    cut_back,
    parted,
    settled,
)
from .written import Written, open_written, repaired

TURNS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
"""The type of a column of conversations."""

_BITS = {kind: 1 << at for at, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Conversed(Written):
    """Conversations before their last answers, which are the targets.

    Attributes:
        amiss: for each kept row which of `KINDS` its conversation has, a bit for each.
    """

    amiss: np.ndarray

    def having(self, kind: str) -> np.ndarray:
        """Returns the positions of the rows with something amiss."""
        return np.flatnonzero(self.amiss & _BITS[kind])


def check_instruction(
    splits: dict[str, Dataset], *, sources: dict[str, str], known: bool = False
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs conversations.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `messages` (what goes before
            the last answer, of the type `TURNS`), `answer`, `conversation` (the messages as one text) and `_row`. They
            are not changed.
        sources: for each split what `describe` returned, for messages.
        known: whether a model has learnt from train before, which then need not be there.

    Returns:
        The repaired splits, and what was found and done. Turns of a user and of the assistant alternate in them.

    Raises:
        DataError: the data cannot be what is wanted: a conversation of validation or test does not end with an answer,
            roles that are unknown, nothing left.
    """
    if not known:
        train_of(splits)
    found: list[Finding] = []
    made = {name: _settled(data, name == "train") for name, data in splits.items()}
    opened = open_written({name: data for name, (data, _) in made.items()}, sources, "conversation", "answer")
    rows = {name: one.into(Conversed, amiss=made[name][1]) for name, one in opened.items()}
    rows = _refuse_roles(rows, found)
    for split in rows.values():
        for kind in (JOINED, LEADING, CUT_BACK):
            where = split.having(kind)
            if len(where):
                found.append(finding(kind, split, where, KINDS[kind], "warning"))
    silent = {name: split.having(EMPTY_TURN) for name, split in rows.items()}
    rows = saying_nothing(rows, silent, found, EMPTY_TURN, ": a turn says nothing")
    written: dict[str, Written] = dict(rows)
    return repaired(written, found, lambda split, findings: None), found


def _settled(data: Dataset, train: bool) -> tuple[Dataset, np.ndarray]:
    """The rows with turns that alternate; and for each what was amiss with it, in bits."""
    messages, answers, texts, amiss = [], [], [], []
    for before, answer in batches(data, ["messages", "answer"]):
        made = [_row(turns or [], told, train) for turns, told in zip(before, answer, strict=True)]
        turns_of_rows, answers_of_rows, texts_of_rows, bits = zip(*made, strict=True)
        messages.append(pa.array(turns_of_rows, TURNS))
        answers.append(pa.array(answers_of_rows, pa.string()))
        texts.append(pa.array(texts_of_rows, pa.string()))
        amiss += bits
    marks = np.array(amiss, np.int32)
    if not (marks & ~(_BITS[UNKNOWN_ROLE] | _BITS[LATE_SYSTEM] | _BITS[EMPTY_TURN])).any():
        return data, marks
    table = data.with_format("arrow")[:]
    for name, pieces in (("messages", messages), ("answer", answers), ("conversation", texts)):
        column = pa.chunked_array(pieces)
        table = table.set_column(table.column_names.index(name), name, column)
    return of_table(table), marks


def _row(turns: list[Any], answer: str | None, train: bool) -> tuple[list[Any], str | None, str, int]:
    whole = [*turns, *([] if answer is None else [{"role": "assistant", "content": answer}])]
    whole, kinds = settled(whole)
    if train and whole and whole[-1]["role"] == "user" and cut_back(whole):
        whole, kinds = cut_back(whole), [*kinds, CUT_BACK]
    if answer is not None and not answer.strip():
        kinds = [kind for kind in kinds if kind != EMPTY_TURN or any(not one["content"].strip() for one in turns)]
    before, told = parted(whole)
    return before, told, as_one_text(before), sum(_BITS[kind] for kind in kinds)


def _refuse_roles(rows: dict[str, Conversed], found: list[Finding]) -> dict[str, Conversed]:
    """Drops rows with turns that no chat template has a place for, or refuses them."""

    def named(split: Conversed, at: int) -> dict[str, Any]:
        roles = [turn["role"] for turn in split.row(at)["messages"]]
        return {"role": next((role for role in roles if role not in ROLES), ", ".join(roles))}

    rows = unfit(
        rows,
        {name: split.having(UNKNOWN_ROLE) for name, split in rows.items()},
        found,
        UNKNOWN_ROLE,
        named,
        problem="a turn has a role that is unknown",
        expected="system, user or assistant (or human and gpt); tools are not learnt yet",
        mend="rename the role, or take these rows out",
    )
    return unfit(
        rows,
        {name: split.having(LATE_SYSTEM) for name, split in rows.items()},
        found,
        LATE_SYSTEM,
        named,
        problem="a system turn stands behind others",
        expected="system first, then user and assistant by turns",
        mend="make it a part of the user's turn, or take these rows out",
    )
