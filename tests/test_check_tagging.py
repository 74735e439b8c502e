"""The check of a tagging: each fault planted by hand, with what is found, done and said."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from datasets import Dataset

from hybridtune.data.checking.check import Finding, check_tagging
from hybridtune.data.checking.schemes import IOB1, IOB2, LONGER, marked, pieces, scheme_of
from hybridtune.errors import DataError

SOURCES = {"train": "train.jsonl", "validation": "dev.jsonl, read as cp1252", "test": "datasets.Dataset"}

Row = tuple[Any, Any]


def check(
    train: list[Row], validation: list[Row] | None = None, test: list[Row] | None = None
) -> tuple[dict[str, Dataset], dict[tuple[str, str], Finding]]:
    """Checks (tokens, tags) rows, each a text that is cut here or a list; `_row` begins with 2."""
    splits = {}
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if rows:
            tokens, tags = ([cut(row[at]) for row in rows] for at in (0, 1))
            splits[name] = Dataset.from_dict({"tokens": tokens, "tags": tags, "_row": range(2, len(rows) + 2)})
    before = {name: split.to_list() for name, split in splits.items()}
    repaired, found = check_tagging(splits, sources=SOURCES)
    assert {name: split.to_list() for name, split in splits.items()} == before
    json.dumps([item.as_dict() for item in found], allow_nan=False)
    by_kind = {(item.kind, item.split): item for item in found}
    assert len(by_kind) == len(found)
    return repaired, by_kind


def cut(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


def clean(count: int, word: str = "") -> list[Row]:
    return [(f"John Smith{n} saw {word}{n} in Rome", "B-PER I-PER O O O B-LOC") for n in range(count)]


def tags_of(rows: Dataset) -> list[str]:
    return [" ".join(tags) for tags in rows["tags"]]


def test_clean_data_come_back_as_they_were() -> None:
    repaired, found = check(clean(9), clean(2, "a"), clean(2, "b"))
    assert not found  # IOB2 is what everybody takes for granted
    assert tags_of(repaired["train"]) == [row[1] for row in clean(9)]


# What does not fit together


def test_as_many_tags_as_tokens() -> None:
    repaired, found = check([*clean(9), ("a b c", "O O"), ("a b", "O O O")])
    item = found["length_mismatch", "train"]
    assert (item.count, item.did) == (2, "dropped")
    assert item.examples[0] == {"row": 11, "tokens": "a b c", "tags": "3 tokens and 2 tags"}
    assert len(repaired["train"]) == 9
    with pytest.raises(
        DataError, match=r"^dev\.jsonl:11: the row has not one tag for every token\n.*3 tokens and 2 tags; 1 of 10 rows"
    ):
        check(clean(9), [*clean(9, "x"), ("a b c", "O O")])
    with pytest.raises(DataError, match=r"^train\.jsonl:2: the row has not one tag"):
        check([("a b c", "O O")] * 3 + clean(2))


def test_missing_tags() -> None:
    repaired, found = check([*clean(9), ("a b", None), ("a b", ["O", None]), ("a b", [])])
    assert (found["missing_label", "train"].count, found["missing_label", "train"].did) == (3, "dropped")
    assert len(repaired["train"]) == 9
    with pytest.raises(DataError, match=r"^datasets\.Dataset, row 3: the row has no tags\n.*1 of 2 rows of test"):
        check(clean(9), test=[*clean(1, "x"), ("a", [None])])


def test_empty_rows() -> None:
    repaired, found = check([*clean(9), ([], [])], [*clean(1, "x"), ([], [])])
    assert (found["empty_text", "train"].count, found["empty_text", "validation"].count) == (1, 1)
    assert (len(repaired["train"]), len(repaired["validation"])) == (9, 2)


def test_numbers_and_texts_become_lists_of_texts() -> None:
    repaired, found = check([([f"a{n}", "b"], [n % 3, 1]) for n in range(30)])
    assert found["label_type", "train"].did == "tags made lists of texts, out of list<item: int64>"
    assert repaired["train"]["tags"][2] == ["2", "1"]
    assert ("scheme", "train") not in found
    texts = {
        "tokens": ["Rome is big", "['a b', 'c']", "['d' ',' \"it's\"]"],
        "tags": ["B-LOC O O", "['O', 'B-LOC']", "['O' 'O' 'B-LOC']"],
    }
    made = check_tagging({"train": Dataset.from_dict(texts)}, sources=SOURCES)[0]["train"]
    assert made["tokens"][:] == [["Rome", "is", "big"], ["a b", "c"], ["d", ",", "it's"]]
    assert made["tags"][:] == [["B-LOC", "O", "O"], ["O", "B-LOC"], ["O", "O", "B-LOC"]]


def test_nothing_is_marked() -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl: train has one tag only\n.*O on all tokens of 2 rows"):
        check([("a b", "O O"), ("c", "O")])
    with pytest.raises(DataError, match=r"one tag only\n.*NN on all"):
        check([("a b", "NN NN"), ("c", "NN")])
    with pytest.raises(DataError, match=r"one tag only[\s\S]*also stand in validation"):
        check([("a b", "O O"), ("Rome", "B-LOC")], [("Rome", "B-LOC")])


# Schemes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("O I-PER I-PER O", "O B-PER I-PER O"),  # after O
        ("B-PER I-LOC I-LOC O", "B-PER B-LOC I-LOC O"),  # after another type
        ("I-PER O O B-LOC", "B-PER O O B-LOC"),
    ],
)
def test_broken_tags_of_train_are_what_conlleval_reads(given: str, expected: str) -> None:
    repaired, found = check([*clean(20), ("w x y z", given)], [*clean(2, "v"), ("s t u v", given)])
    item = found["broken_tags", "train"]
    assert (item.count, item.level) == (1, "warning")
    assert item.examples[0] == {"row": 22, "tokens": "w x y z", "tags": given, "suggestion": expected}
    assert item.did.startswith("made what conlleval reads: I-")
    assert tags_of(repaired["train"])[-1] == expected
    assert found["broken_tags", "validation"].did.startswith("kept, but read")
    assert tags_of(repaired["validation"])[-1] == given
    assert tags_of(repaired["train"])[:20] == [row[1] for row in clean(20)]


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (["B-PER I-PER O", "O B-LOC B-LOC"], None),
        (["I-PER I-PER O", "O I-LOC B-LOC"], "IOB1"),
        (["I-PER I-PER O", "O I-LOC I-PER"], "IOB1"),
        (["B-PER I-PER E-PER", "O S-LOC O"], "BIOES"),
        (["B-PER I-PER L-PER", "O U-LOC O"], "BILOU"),
        (["B-PER M-PER E-PER", "O S-LOC O"], "BMES"),
        (["DET NOUN O", "X PUNCT O"], None),
        (["B-PER M-PER I-PER", "O S-LOC O"], "pieces in no known scheme"),
    ],
)
def test_schemes_are_told_apart(rows: list[str], name: str | None) -> None:
    repaired, found = check([(f"{n} b c", tags) for n, tags in enumerate(rows * 6)])
    if name is None:
        assert ("scheme", "train") not in found
    else:
        assert found["scheme", "train"].did == f"tags read as {name}"
    assert ("broken_tags", "train") not in found
    assert tags_of(repaired["train"]) == rows * 6


def test_broken_tags_of_longer_schemes() -> None:
    rows = [(f"{n} b c", "B-PER I-PER E-PER") for n in range(9)] + [("a", "S-LOC")]
    repaired, found = check([*rows, ("x y z", "B-LOC O I-LOC")])
    assert found["broken_tags", "train"].did == "made what conlleval reads: B-LOC -> S-LOC (1), I-LOC -> S-LOC (1)"
    assert tags_of(repaired["train"])[-1] == "S-LOC O S-LOC"


@pytest.mark.parametrize("scheme", [IOB1, IOB2, *LONGER])
def test_pieces_and_tags_are_each_others_inverse(scheme: Any) -> None:
    chance = random.Random(0)
    pairs: Counter[tuple[str, str]] = Counter()
    for _ in range(300):
        length = chance.randint(1, 12)
        found, at = [], chance.randint(0, 2)
        while at < length:
            last = min(length - 1, at + chance.choice([0, 0, 1, 2, 3]))
            found.append((at, last, chance.choice(["PER", "LOC"])))
            at = last + 1 + chance.choice([0, 0, 1])
        tags = marked(found, length, scheme)
        assert pieces(tags) == found
        pairs.update(pairwise(["O", *tags]))
    assert scheme_of(pairs) == scheme


def test_pieces_are_those_of_seqeval() -> None:
    """Of random tags, broken ones too."""
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    chance = random.Random(1)
    tags = ["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC"))]
    for _ in range(2000):
        row = chance.choices(tags, k=chance.randint(1, 8))
        expected = [(first, last, kind) for kind, first, last in labeling.get_entities(row)]
        assert pieces(row) == expected


# Names


def test_ways_of_writing_a_type() -> None:
    odd: list[Row] = [("x y z", "b-per I-Per o"), ("Rome here now", "B-Loc O O")]
    repaired, found = check([*clean(20), *odd], [("q r s", "B-per I-PER O")])
    item = found["tag_variant", "train"]
    assert (item.count, item.level) == (2, "info")
    assert item.examples[0]["suggestion"] == "B-PER I-PER O"
    assert tags_of(repaired["train"])[-2:] == ["B-PER I-PER O", "B-LOC O O"]
    assert tags_of(repaired["validation"]) == ["B-PER I-PER O"]
    assert ("broken_tags", "train") not in found


def test_parts_of_speech_may_differ_by_case_alone() -> None:
    rows = [(f"{n} b", "NN nn") for n in range(9)]
    assert ("tag_variant", "train") not in check(rows)[1]
    repaired, found = check([(f"{n} b", "NN VB") for n in range(30)] + [("x y", "nn VB")])
    assert found["tag_variant", "train"].did == "renamed nn -> NN"
    assert tags_of(repaired["train"])[-1] == "NN VB"


def test_rare_and_unknown_types() -> None:
    train = [*clean(9), ("Acme sells", "B-ORG O")]
    _, found = check(train, clean(2, "x"), [*clean(2, "y"), ("the May war", "O B-DATE B-EVENT")])
    rare = found["rare_type", "train"]
    assert (rare.count, rare.level) == (1, "warning")
    assert rare.did == "kept: types that stand there fewer than 8 times: ORG (1)"
    assert rare.examples == [{"row": 11, "tokens": "Acme sells", "tags": "B-ORG O"}]
    unknown = found["unknown_type", "test"]
    assert (unknown.count, unknown.level, unknown.examples[0]["row"]) == (2, "warning", 4)
    assert unknown.did.endswith("cannot be found: DATE (1), EVENT (1)")
    assert found["absent_type", "validation"].did.endswith("not measured there: ORG")
    with pytest.raises(DataError, match=r"^datasets\.Dataset, row 3: train has none of the types of test\n.*DATE"):
        check(clean(9), test=[("a", "O"), ("May", "B-DATE")])


# Rows that stand there twice


def test_rows_that_stand_there_twice() -> None:
    tokens, tags = clean(1)[0]
    other = tags.replace("B-LOC", "O")
    train = [*clean(9), (tokens.upper(), tags), (tokens, other)]
    repaired, found = check(train, [clean(3)[2], ("new", "B-LOC")], [clean(4)[3], ("newer", "B-PER")])
    duplicate = found["duplicate", "train"]
    assert (duplicate.count, duplicate.examples[0]["row"], duplicate.examples[0]["other_row"]) == (1, 11, 2)
    conflict = found["conflict", "train"]
    assert (conflict.count, conflict.did) == (2, "kept: the same text stands there with other tags")
    assert (conflict.examples[0]["tags"], conflict.examples[0]["other_tags"]) == (other, tags)
    assert found["leak", "train"].did == "dropped: also in test (1) and validation (1)"
    assert len(repaired["train"]) == 8


def test_repaired_tags_make_a_duplicate() -> None:
    _, found = check([*clean(9), ("John Smith0 saw 0 in Rome", "I-PER I-PER O O O I-LOC")])
    assert found["duplicate", "train"].count == 1


def test_a_second_check_finds_nothing_to_repair() -> None:
    repaired, _ = check([*clean(20), ("a b", "O I-PER"), ("c d", "b-per O"), ([], []), clean(1)[0]], clean(1, "x"))
    again, found = check_tagging(repaired, sources=SOURCES)
    assert not found
    assert {name: split.to_list() for name, split in again.items()} == {n: s.to_list() for n, s in repaired.items()}


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl: there is no column tags\n.*tokens, ner"):
        check_tagging({"train": Dataset.from_dict({"tokens": [["a"]], "ner": [["O"]]})}, sources=SOURCES)
