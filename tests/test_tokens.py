"""What is said of tokens, against counting by hand and against a tokenizer."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace

from hybridtune.data.doubts.tokens import BINS, token_summary, unknown_characters


def test_against_a_hand_count() -> None:
    found = token_summary([3, 4, 10, 12, 5], [0, 1, 0, 2, 0], limit=9)
    expected = {
        "median": 5,
        "max": 12,
        "limit": 9,
        "truncated": 2,
        "rows": 5,
        "tokens": 34,
        "cut_tokens": 1 + 3,
        "unknown_tokens": 3,
        "truncated_share": 2 / 5,
        "cut_share": 4 / 34,
        "unknown_share": 3 / 34,
        "histogram": {"edges": list(range(3, 14)), "counts": [1, 1, 1, 0, 0, 0, 0, 1, 0, 1]},
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_histogram_holds_every_row_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.round(rng.lognormal(3, 1, size=500)).astype(int)
    found = token_summary(lengths, np.zeros(500), 64)
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert counts == np.histogram(lengths, [*edges[:-1], edges[-1] - 0.5])[0].tolist()
    assert sum(counts) == 500
    assert len(counts) <= BINS
    assert len(edges) == len(counts) + 1
    assert found["median"] == round(statistics.median(lengths.tolist()))


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], list(range(100))])
def test_where_the_lengths_lie(lengths: list[int]) -> None:
    found = token_summary(lengths, [0] * len(lengths), 6)
    assert (found["median"], found["p95"]) == (round(np.median(lengths)), round(np.percentile(lengths, 95)))
    assert (found["max"], found["truncated"]) == (max(lengths), sum(length > 6 for length in lengths))


def test_no_rows() -> None:
    found = token_summary([], [], 128)
    assert found["tokens"] == found["truncated"] == found["max"] == 0
    assert found["histogram"] == {"edges": [], "counts": []}
    assert found["unknown_share"] == 0


def test_unknown_characters_are_those_of_the_tokenizer() -> None:
    tokenizer = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "b": 2, "##a": 3, "##b": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    asked: list[str] = []

    def is_unknown(one: str) -> bool:
        asked.append(one)
        return "[UNK]" in tokenizer.encode(one).tokens

    found = unknown_characters(["ab ba", "a中b 中", "b\n☃", ""], is_unknown)
    assert found == Counter({"中": 2, "☃": 1})
    assert found.most_common(1) == [("中", 2)]
    assert sorted(asked) == sorted("ab中☃")
