"""The check of questions and their answers, which stand in a context or are in words of their own."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ...errors import DataError
from .answers import ABSENT, KINDS, Answer, answers_of, settled
from .findings import SHOWN, Finding, drop, finding
from .rows import Rows, as_text, column_type, open_rows, text_keys
from .steps import empty_texts, train_of
from .twins import conflicts, duplicates, leaks, repeats

ANSWERS = pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int64())})
LOOKED_AT = 200


@dataclass(frozen=True)
class Answered(Rows):
    """Rows of a question answering.

    Attributes:
        extracted: whether answers are pieces of their contexts.
        contexts: for each kept row eight bytes, equal for equal contexts.
        digests: for each kept row eight bytes, equal for equal answers.
        amiss: for each kept row which of `KINDS` one of its answers has, a bit for each.
        given: for each kept row how many answers it came with.
        left: for each kept row how many of them stand in its context.
        changed: for each kept row whether its answers are not what they were.
    """

    extracted: bool
    contexts: np.ndarray
    digests: np.ndarray
    amiss: np.ndarray
    given: np.ndarray
    left: np.ndarray
    changed: np.ndarray

    @property
    def same(self) -> np.ndarray:
        """For each kept row eight bytes, equal for equal answers."""
        return self.digests

    def target(self, index: int) -> dict[str, Any]:
        """Returns what an example says of a row's answers."""
        row = self.row(index)
        texts = [text[:SHOWN] for text, _ in answers_of(row["answers"], row.get("answer_start"))]
        return {"answers": list(dict.fromkeys(texts))[:5]}

    def having(self, kind: str) -> np.ndarray:
        """Returns the positions of the rows with something amiss."""
        return np.flatnonzero(self.amiss & _BITS[kind])

    def written(self) -> dict[str, pa.ChunkedArray]:
        """Returns the column `answers`, where it has to be written anew."""
        if column_type(self.data, "answers") == ANSWERS and not self.changed.any():
            return {}

        names = _columns(self)

        def made(*columns: list[Any]) -> list[Any]:
            rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
            return [_settled(_answers(row), row, self.extracted, self.split)[0] for row in rows]

        return {"answers": self.rewritten(made, ANSWERS, *names)}


_BITS = {kind: 1 << at for at, kind in enumerate(KINDS)}


def check_question_answering(
    splits: dict[str, Dataset],
    *,
    sources: dict[str, str],
    texts: Sequence[str] = ("question", "context"),
    extracted: bool = True,
    no_answer: bool | None = None,
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs questions and their answers.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `texts`,
            `answers` (in any form that `answers_of` reads), `_row` and perhaps `answer_start`. They are not changed.
        sources: for each split what `describe` returned, for messages.
        texts: what a question consists of; there may be no context where answers are in words of their own.
        extracted: whether answers are pieces of their contexts, and not in words of their own.
        no_answer: whether rows may have none, where that is known and there is no train.

    Returns:
        The repaired splits, and what was found and done. `answers` is `{"text": [...], "answer_start": [...]}`, with
        empty lists where there is no answer; -1 is the place of one of validation or test that is not in its context,
        and of all that are in words of their own.

    Raises:
        DataError: the data cannot be what is wanted: no answer stands in its context, no question has one, answers that
            cannot be read, nothing left.
    """
    if no_answer is None:
        train_of(splits)
    found: list[Finding] = []
    rows = {name: _open(name, data, sources.get(name, name), texts, extracted) for name, data in splits.items()}
    rows = empty_texts(rows, found)
    if extracted:
        for split in rows.values():
            _refuse_all_absent(split)
        for name in list(rows):
            rows = _say_amiss(rows, name, found)
    if "train" in rows:
        rows = duplicates(rows, found)
        conflicts(rows["train"], found)
        rows = leaks(rows, found)
        no_answer = _refuse_no_answers(rows["train"])
        if "context" in texts:
            _shared_contexts(rows, found)
    repeats(rows, found)
    _without_an_answer(rows, bool(no_answer), found)
    made = {name: split.to_dataset({**split.plain_texts(), **split.written()}) for name, split in rows.items()}
    return made, found


def _columns(rows: Rows) -> list[str]:
    """The columns that an answer is read from, which may have its offset in a column of its own."""
    return [name for name in ("context", "answers", "answer_start") if name in rows.data.column_names]


def _answers(row: dict[str, Any]) -> list[Answer]:
    return answers_of(row["answers"], row.get("answer_start"))


def _settled(
    answers: list[Answer], row: dict[str, Any], extracted: bool, split: str
) -> tuple[dict[str, list[Any]], list[str]]:
    """The answers of a row as they are kept, and what was amiss."""
    if extracted:
        return settled(answers, as_text(row["context"]), split == "train")
    return {"text": [text.strip() for text, _ in answers], "answer_start": [-1] * len(answers)}, []


def _open(name: str, data: Dataset, source: str, texts: Sequence[str], extracted: bool) -> Answered:
    rows = open_rows(name, data, source, texts, "answers", needed=len(texts))
    digests, left, changed = array("Q"), array("i"), array("b")
    amiss, given = array("i"), array("i")
    names = _columns(rows)
    values = (
        dict(zip(names, row, strict=True)) for columns in rows.batches(*names) for row in zip(*columns, strict=True)
    )
    for row in values:
        try:
            answers = _answers(row)
        except ValueError:
            raise DataError(
                f"{rows.place(len(left))}: the answers cannot be read",
                found=repr(row["answers"])[:160],
                expected='{"text": ["..."], "answer_start": [0]}, a list of such objects, a list of texts, or one text',
            ) from None
        made, kinds = _settled(answers, row, extracted, name)
        told = repr(sorted(set(zip(made["text"], made["answer_start"], strict=True))))
        digests.append(int.from_bytes(hashlib.blake2b(told.encode("utf-8", "replace"), digest_size=8).digest(), "big"))
        amiss.append(sum(_BITS[kind] for kind in set(kinds)))
        given.append(len(answers))
        left.append(len(answers) - kinds.count(ABSENT))
        changed.append(made != row["answers"])
    return rows.into(
        Answered,
        extracted=extracted,
        contexts=text_keys(rows.data, texts[-1:])[0],
        digests=np.array(digests, np.uint64),
        amiss=np.array(amiss, np.int32),
        given=np.array(given, np.int32),
        left=np.array(left, np.int32),
        changed=np.array(changed, bool),
    )


def _refuse_all_absent(rows: Answered) -> None:
    """Of answers that stand in no context, the columns or the files are the wrong ones."""
    answered = np.flatnonzero(rows.given > 0)
    if not len(answered) or rows.left[answered].any():
        return
    looked = answered[:LOOKED_AT].tolist()
    told = [rows.row(at) for at in looked]
    answers = [rows.target(at)["answers"] for at in looked]
    around = [
        [as_text(rows.row(near)["context"]) for near in (at - 1, at + 1) if 0 <= near < len(rows)] for at in looked
    ]
    pairs = list(zip(answers, told, around, strict=True))
    if 2 * sum(_stands(mine, [as_text(row["question"])]) for mine, row, _ in pairs) > len(pairs):
        mend = "context and question look swapped: name the columns the other way round in data.columns"
    elif 2 * sum(_stands(mine, near) for mine, _, near in pairs) > len(pairs):
        mend = "the answers stand in the contexts of the rows beside them: the columns are shifted by a row"
    else:
        mend = "check that data.columns names the right columns, and that the answers belong to these contexts"
    raise DataError(
        f"{rows.place(looked[0])}: the answer does not stand in the context, and so it is on every row of {rows.split}",
        found=f"{answers[0][0]!r} is not in {as_text(told[0]['context'])[:120]!r}",
        expected="answers that are pieces of their context, letter by letter",
        mend=mend,
    )


def _stands(answers: list[str], texts: list[str]) -> bool:
    return any(answer.strip() in text for answer in answers for text in texts)


def _say_amiss(splits: dict[str, Answered], split: str, found: list[Finding]) -> dict[str, Answered]:
    """Reports what was amiss with answers, and drops rows of train of which no answer is left."""
    rows = splits[split]
    for kind, did in KINDS.items():
        where = rows.having(kind)
        if len(where) and kind != ABSENT:
            level = "info" if kind in ("answer_spaces", "offset_missing") else "warning"
            found.append(finding(kind, rows, where, did, level))
    absent = rows.having(ABSENT)
    lost = np.flatnonzero((rows.given > 0) & (rows.left == 0))
    if len(absent) and split == "train":
        did = f"dropped ({len(lost)}), or other answers kept ({len(absent) - len(lost)}): not in the context"
        found.append(finding(ABSENT, rows, absent, did, "warning"))
        return drop(splits, split, lost, found)
    if len(absent):
        did = f"kept, though not in the context: {len(lost)} of these rows cannot be answered right"
        found.append(finding(ABSENT, rows, absent, did, "warning"))
    return splits


def _refuse_no_answers(train: Answered) -> bool:
    """Refuses a train whose questions all have none; returns whether some have none."""
    if not train.given.any():
        raise DataError(
            f"{train.source}: no question of train has an answer",
            found=f"{len(train)} rows without one",
            expected='answers such as {"text": ["..."], "answer_start": [0]}',
            mend="check that data.columns names the right column as answers",
        )
    return not train.given.all()


def _without_an_answer(splits: dict[str, Answered], no_answer: bool, found: list[Finding]) -> None:
    """Counts questions that have no answer."""
    for rows in splits.values():
        without = np.flatnonzero(rows.given == 0)
        if not len(without):
            continue
        unlearnt = not no_answer
        did = "kept: questions without an answer" + (", though train has none, so that none can be learnt" * unlearnt)
        found.append(finding("no_answer", rows, without, did, "warning" if unlearnt else "info"))


def _shared_contexts(splits: dict[str, Answered], found: list[Finding]) -> None:
    """Reports contexts that other questions of train are about: scores there are no scores on new texts."""
    train = splits["train"]
    for split, rows in splits.items():
        shared = np.flatnonzero(np.isin(rows.contexts, train.contexts) & ~rows.empty)
        if split != "train" and len(shared):
            did = f"kept: train has other questions about {len(np.unique(rows.contexts[shared]))} of their contexts"
            found.append(finding("shared_context", rows, shared, did, "info"))
