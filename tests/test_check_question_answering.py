"""The check of question answering: each fault planted by hand, with what is found, done and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.answers import answers_of, settle
from hybridtune.data.checking.check import Finding, check_question_answering
from hybridtune.data.reading.read import read
from hybridtune.errors import DataError

SOURCES = {"train": "train.jsonl", "validation": "dev.jsonl, read as cp1252", "test": "datasets.Dataset"}

Row = tuple[str | None, str | None, Any]


def check(
    train: list[Row], validation: list[Row] | None = None, test: list[Row] | None = None
) -> tuple[dict[str, Dataset], dict[tuple[str, str], Finding]]:
    """Checks (question, context, answers) rows whose `_row` begins with 2."""
    splits = {}
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if rows:
            columns = {name: [row[at] for row in rows] for at, name in enumerate(("question", "context", "answers"))}
            splits[name] = Dataset.from_dict({**columns, "_row": range(2, len(rows) + 2)})
    before = {name: split.to_list() for name, split in splits.items()}
    repaired, found = check_question_answering(splits, sources=SOURCES)
    assert {name: split.to_list() for name, split in splits.items()} == before
    json.dumps([item.as_dict() for item in found], allow_nan=False)
    by_kind = {(item.kind, item.split): item for item in found}
    assert len(by_kind) == len(found)
    for split, rows in repaired.items():
        for row in rows:
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                assert row["context"][start:][: len(text)] == text or (start == -1 and split != "train")
    return repaired, by_kind


def answer(text: str, start: int | None = None, context: str = "") -> dict[str, list[Any]]:
    return {"text": [text], "answer_start": [context.index(text) if start is None else start]}


def clean(count: int, word: str = "town") -> list[Row]:
    contexts = [f"The {word} {n} lies on river {n * 7}." for n in range(count)]
    return [(f"Where lies {word} {n}?", text, answer(f"river {n * 7}", None, text)) for n, text in enumerate(contexts)]


def test_clean_data_come_back_as_they_were() -> None:
    repaired, found = check(clean(9), clean(3, "hill"), clean(4, "wood"))
    assert found == {}
    assert [row["answers"] for row in repaired["train"]] == [row[2] for row in clean(9)]


FORMS = [
    ({"text": ["b c"], "answer_start": [2]}, [("b c", 2)]),
    ({"text": "b c", "answer_start": 2}, [("b c", 2)]),
    ({"text": ["b", "c"], "answer_start": [2]}, [("b", None), ("c", None)]),  # which one the offset is of, none can say
    ({"text": [], "answer_start": []}, []),
    ({"text": None, "answer_start": None}, []),
    ({"text": [""], "answer_start": [0]}, []),
    ([{"text": "b", "answer_start": 2}, {"text": "c", "answer_start": 4}], [("b", 2), ("c", 4)]),
    (["b", "c"], [("b", None), ("c", None)]),
    ("b c", [("b c", None)]),
    (1984, [("1984", None)]),
    ("", []),
    (None, []),
    ([], []),
    ("{'text': ['b'], 'answer_start': [2]}", [("b", 2)]),
    ('{"text": ["b"], "answer_start": [2]}', [("b", 2)]),
    ('["b", "c"]', [("b", None), ("c", None)]),
    ("[sic] b", [("[sic] b", None)]),
]


@pytest.mark.parametrize(("value", "expected"), FORMS)
def test_forms_of_answers(value: Any, expected: list[Any]) -> None:
    assert answers_of(value) == expected


def test_offsets_in_a_column_of_their_own() -> None:
    assert answers_of("b", 4) == answers_of(["b"], [4]) == answers_of("b", "4") == [("b", 4)]
    columns = {"question": ["q", "r"], "context": ["a b a b", "x y"], "answers": ["b", "y"], "answer_start": [6, 2]}
    repaired, found = check_question_answering({"train": Dataset.from_dict(columns)}, sources=SOURCES)
    assert found == []
    assert repaired["train"]["answers"][0] == {"text": ["b"], "answer_start": [6]}


@pytest.mark.parametrize("form", [[{"text": "river 7", "answer_start": 19}], ["river 7"], "river 7"])
def test_every_form_becomes_one(form: Any) -> None:
    _, context, canonical = clean(2)[1]
    repaired, _ = check([("q", context, form), ("r", context, form)])
    assert repaired["train"]["answers"][0] == canonical


SETTLED = [
    ("river", 2, "a river", ("river", 2, None)),
    (" river ", 1, "a river b", ("river", 2, "answer_spaces")),
    ("river ", 2, "a river b", ("river", 2, "answer_spaces")),
    ("river", 4, "a river", ("river", 2, "offset_moved")),
    ("x", 6, "x a x a x", ("x", 4, "offset_moved")),  # of 4 and 8 the first
    ("x", 7, "x a x a x", ("x", 8, "offset_moved")),
    ("river", None, "a river, river", ("river", 2, "offset_missing")),
    ("river", 7, "é ü ö river", ("river", 6, "offset_moved")),
    ("river", 9, "é ü ö river", ("river", 6, "offset_bytes")),
    ("river", 3, "😀 river", ("river", 2, "offset_utf16")),
    ("river", 6, "a\nb\nriver", ("river", 4, "offset_line_ends")),
    ("river", 4, "a\r\nb\r\nriver", ("river", 6, "offset_line_ends")),
    ("big river", 2, "a big\n river", ("big\n river", 2, "answer_writing")),
    ("Big River", 0, "a big river", ("big river", 2, "answer_writing")),
    ("lake", 2, "a river", ("lake", -1, "answer_absent")),
    ("a+b", 0, "see a+b", ("a+b", 4, "offset_moved")),
]


@pytest.mark.parametrize(("text", "start", "context", "expected"), SETTLED)
def test_where_an_answer_stands(text: str, start: int | None, context: str, expected: tuple[str, int, str]) -> None:
    assert settle(text, start, context) == expected


@pytest.mark.parametrize(
    ("row", "kind", "level"),
    [
        (("q", "Über der Stadt", answer("Stadt", 10)), "offset_bytes", "warning"),
        (("q", "the big town", answer("town", 7)), "offset_moved", "warning"),
        (("q", "the big town", answer(" town ", 7)), "answer_spaces", "info"),
        (("q", "the big  town", answer("big town", 4)), "answer_writing", "warning"),
        (("q", "the big town", {"text": ["big", "town"], "answer_start": [4]}), "offset_missing", "info"),
    ],
)
def test_offsets_are_repaired_everywhere_and_told(row: Row, kind: str, level: str) -> None:
    other = (f"{row[0]}!", *row[1:])
    repaired, found = check([*clean(3), row], [*clean(3, "hill"), other])
    for split, number in (("train", 5), ("validation", 5)):
        item = found[kind, split]
        assert (item.count, item.level, item.examples[0]["row"]) == (1, level, number)
        assert item.examples[0]["answers"] and item.examples[0]["context"] == row[1]
        assert len(repaired[split]) == 4


def test_answers_that_do_not_stand_in_their_context() -> None:
    lost: Row = ("q", "a river", answer("lake", 2))
    half: Row = ("r", "a river", {"text": ["river", "lake"], "answer_start": [2, 2]})
    repaired, found = check([*clean(3), lost, half], [*clean(2, "hill"), ("v", *lost[1:]), ("w", *half[1:])])
    train, validation = found["answer_absent", "train"], found["answer_absent", "validation"]
    assert (train.count, train.did) == (2, "dropped (1), or other answers kept (1): not in the context")
    assert [example["row"] for example in train.examples] == [5, 6]
    assert repaired["train"]["answers"][3] == {"text": ["river"], "answer_start": [2]}
    assert (validation.count, validation.level) == (2, "warning")
    assert "1 of these rows cannot" in validation.did
    assert repaired["validation"]["answers"][2:] == [
        {"text": ["lake"], "answer_start": [-1]},
        {"text": ["river", "lake"], "answer_start": [2, -1]},
    ]


def test_no_answer_stands_in_its_context() -> None:
    swapped = [(context, question, answers) for question, context, answers in clean(9)]
    with pytest.raises(DataError, match=r"^train\.jsonl:2: the answer does not stand[\s\S]*look swapped"):
        check(swapped)
    shifted = [(q, c, clean(12)[at + 3][2]) for at, (q, c, _) in enumerate(clean(6))]
    with pytest.raises(DataError, match=r"^train\.jsonl:2: [\s\S]*'river 21' is not in 'The town 0[\s\S]*belong"):
        check(shifted)
    texts = ["red", "green", "blue", "white"]
    beside: list[Row] = [(f"q{n}", f"{text} car", texts[(n + 1) % 4]) for n, text in enumerate(texts)]
    with pytest.raises(DataError, match=r"shifted by a row"):
        check(beside)
    with pytest.raises(DataError, match=r"^datasets\.Dataset, row 2: the answer[^\n]*every row of test"):
        check(clean(5), test=[("q", "a river", answer("lake", 0))])


def test_questions_without_an_answer() -> None:
    none = {"text": [], "answer_start": []}
    repaired, found = check([*clean(5), ("q", "c", none)], [*clean(2, "hill"), ("r", "d", none), ("s", "d", none)])
    assert (found["no_answer", "train"].count, found["no_answer", "train"].level) == (1, "info")
    assert found["no_answer", "validation"].count == 2
    assert repaired["train"]["answers"][5] == none
    item = check(clean(5), [*clean(2, "hill"), ("r", "d", none)])[1]["no_answer", "validation"]
    assert item.level == "warning" and "train has none" in item.did
    with pytest.raises(DataError, match=r"^train\.jsonl: no question of train has an answer\n.*2 rows"):
        check([("q", "c", none), ("r", "c", none)])


def test_missing_questions_and_contexts() -> None:
    nothing: list[Row] = [("", "a river", answer("river", 2)), ("q", None, answer("river", 2))]
    repaired, found = check([*clean(4), *nothing], [*clean(2, "hill"), *nothing])
    assert (found["empty_text", "train"].count, found["empty_text", "train"].did) == (2, "dropped")
    assert found["empty_text", "validation"].count == 2
    assert "kept" in found["empty_text", "validation"].did
    assert (len(repaired["train"]), repaired["validation"]["context"][3]) == (4, "")


def test_rows_that_stand_there_twice() -> None:
    q, context, answers = clean(1)[0]
    train = [*clean(6), (q.upper(), context, answers), (q, context, answer("town 0", 4)), ("new?", context, answers)]
    repaired, found = check(train, [clean(3)[2], *clean(2, "hill")], [clean(4)[3], ("other?", *clean(2)[1][1:])])
    duplicate = found["duplicate", "train"]
    assert (duplicate.count, duplicate.examples[0]["row"], duplicate.examples[0]["other_row"]) == (1, 8, 2)
    conflict = found["conflict", "train"]
    assert (conflict.count, conflict.examples[0]["row"]) == (2, 9)
    assert conflict.did == "kept: the same text stands there with other answers"
    assert (conflict.examples[0]["answers"], conflict.examples[0]["other_answers"]) == (["town 0"], ["river 0"])
    assert found["leak", "train"].did == "dropped: also in test (1) and validation (1)"
    shared = found["shared_context", "test"]
    assert (shared.count, shared.level) == (1, "info")
    assert shared.examples[0]["question"] == "other?"
    assert ("shared_context", "validation") not in found
    assert len(repaired["test"]) == 2


def test_several_answers_are_no_conflict() -> None:
    row: Row = ("q", "a big river", {"text": ["river", "big river", "river"], "answer_start": [6, 2, 6]})
    repaired, found = check([*clean(3), row])
    assert found == {}
    assert repaired["train"]["answers"][3] == row[2]


def test_answers_that_cannot_be_read() -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl:2: the answers cannot be read\n.*spans"):
        check([("q", "c", {"spans": [[1, 2]]})])
    with pytest.raises(DataError, match=r"^train\.jsonl: there is no column answers\n"):
        check_question_answering({"train": Dataset.from_dict({"question": ["q"], "context": ["c"]})}, sources=SOURCES)


def test_a_second_check_finds_nothing_to_repair() -> None:
    dirty = [*clean(5), ("q", "the big  town", answer("big town", 3)), ("", "c", answer("c", 0)), clean(1)[0]]
    repaired, _ = check(dirty, [("r", "a river", answer("river ", 1))])
    again, found = check_question_answering(repaired, sources=SOURCES)
    assert found == []
    assert {name: split.to_list() for name, split in again.items()} == {n: s.to_list() for n, s in repaired.items()}


def test_real_data(shared_data: Path) -> None:
    """The README of the set counts its repeats by a program of its own."""
    files = {split: shared_data / "squad_subset" / f"{split}.jsonl" for split in ("train", "validation", "test")}
    splits = {split: read(file, split) for split, file in files.items()}
    repaired, found = check_question_answering(splits, sources=dict.fromkeys(files, "squad"))
    assert not {"leak", "shared_context", "answer_absent", "offset_moved", "no_answer"} & {item.kind for item in found}
    assert len(repaired["test"]) == 1000
