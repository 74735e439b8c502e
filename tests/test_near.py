"""Near duplicates: the pairs against brute force on strings, and what is not to be among them."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hybridtune.data.doubts.near import Near, clusters, near_duplicates

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
HAN = [chr(0x4E00 + at) for at in range(400)]


@cache
def shingles(text: str) -> frozenset[str]:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return frozenset(plain[at : at + 3] for at in range(len(plain) - 2))


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def edited(text: str, rng: random.Random) -> str:
    letters = list(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(letters))
        letters[at : at + rng.randint(0, 1)] = [rng.choice(letters)]
    return "".join(letters)


def made(count: int, seed: int, words: list[str], between: str) -> list[str]:
    """Random texts, a third of which are an earlier one with a few characters changed."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        fresh = between.join(rng.choices(words, k=rng.randint(20, 50)))
        texts.append(edited(rng.choice(texts), rng) if texts and rng.random() < 1 / 3 else fresh)
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
@pytest.mark.parametrize(("words", "between"), [(WORDS, " "), (HAN, "")], ids=["words", "han"])
def test_pairs_are_those_of_brute_force(words: list[str], between: str, threshold: float) -> None:
    texts = made(400, 3, words, between)
    truth = {(a, b): jaccard(texts[a], texts[b]) for a, b in combinations(range(len(texts)), 2)}
    truth = {pair: value for pair, value in truth.items() if value >= threshold}
    found = {(near.row_a, near.row_b): near for near in near_duplicates({"train": texts}, threshold)}
    assert len(truth) >= 10
    assert set(found) <= set(truth)
    assert len(found) >= 0.99 * len(truth)
    assert all(near.similarity == pytest.approx(truth[pair]) for pair, near in found.items())


def test_estimates_are_unbiased() -> None:
    """MinHash estimates with the standard error sqrt(s (1 - s) / hashes)."""
    texts = made(300, 5, WORDS, " ")
    scaled = []
    for seed in range(20):
        pairs = near_duplicates({"train": texts}, 0.7, seed=seed)
        similarities = np.array([near.similarity for near in pairs])
        errors = np.array([near.estimate for near in pairs]) - similarities
        scaled.append(errors / np.sqrt(similarities * (1 - similarities) / 128))
    assert len(scaled[0]) > 20
    assert abs(np.mean([errors.mean() for errors in scaled])) < 0.15
    assert 0.85 < np.concatenate(scaled).std() < 1.15


def test_across_splits_in_their_order() -> None:
    text, twin = "the quick brown fox jumps over the lazy dog", "the quick brown fox jumps over the lazy dogs"
    splits = {"train": ["something else entirely", text], "validation": [], "test": ["nothing of the kind", "x", twin]}
    (near,) = near_duplicates(splits)
    assert near[:4] == ("train", 1, "test", 2)
    assert near.similarity == pytest.approx(39 / 40)  # of 41 shingles, " th" and "the" stand there twice


def test_equal_texts_are_no_pair_and_stand_for_each_other() -> None:
    text = "Please reset the password of my account"
    same = "please   reset the PASSWORD of my account"
    splits = {"train": [text, same, text + "s"], "test": [same]}
    found = near_duplicates(splits)
    assert [near[:4] for near in found] == [("train", 0, "train", 2), ("train", 2, "test", 0)]
    assert near_duplicates({"train": [text] * 50, "test": [same] * 50}) == []


def test_short_and_odd_texts() -> None:
    odd = ["", " ", "a", "ab", "ba", "\ud83d half a pair", "日本", "日本語", "abc\x00abc"]
    assert near_duplicates({"train": odd}) == []
    assert near_duplicates({"train": []}) == []
    assert near_duplicates({}) == []


def test_both_texts_of_a_pair_count() -> None:
    claim, other = "the contract ends in may of next year", "a wholly different sentence about the weather"
    assert near_duplicates({"train": [(claim, claim), (claim, other)]}) == []
    (near,) = near_duplicates({"train": [(claim, other), (claim + ".", other)]})
    assert near[:4] == ("train", 0, "train", 1)


def test_clusters_hold_together_what_is_linked() -> None:
    texts = made(300, 11, WORDS, " ")
    texts += texts[:5]
    groups = clusters(texts, 0.8)
    seen = defaultdict(set)
    for near in near_duplicates({"": texts}, 0.8):
        seen[near.row_a].add(near.row_b)
        seen[near.row_b].add(near.row_a)
    for at in range(5):
        seen[at].add(len(texts) - 5 + at)
        seen[len(texts) - 5 + at].add(at)
    reached: dict[int, int] = {}
    number = 0
    for start in range(len(texts)):  # a walk along the links
        if start not in reached:
            waiting = [start]
            while waiting:
                at = waiting.pop()
                if at not in reached:
                    reached[at] = number
                    waiting += seen[at]
            number += 1
    assert groups.tolist() == [reached[at] for at in range(len(texts))]
    assert number < len(texts)


def test_rows_of_one_template_are_one_group_in_little_time() -> None:
    texts = [
        f"Your parcel number {at:05d} has been shipped and will arrive within the next three days" for at in range(3000)
    ]
    started = time.perf_counter()
    groups = clusters([*texts, "an odd one out"], 0.8)
    assert time.perf_counter() - started < 30
    assert groups.tolist() == [0] * 3000 + [1]


def test_a_sample_is_seeded_and_spares_small_splits() -> None:
    texts = made(400, 7, WORDS, " ")
    splits = {"train": texts[:300], "test": texts[300:340]}
    first, again, other = (near_duplicates(splits, 0.7, most=140, seed=seed) for seed in (1, 1, 2))
    every = near_duplicates(splits, 0.7, seed=1)
    assert first == again
    assert {near[:4] for near in first} != {near[:4] for near in other}
    assert {near[:4] for near in first} < {near[:4] for near in every}
    rows_of = {near.row_b for near in every if near.split_a == near.split_b == "test"}
    assert {near.row_b for near in first if near.split_a == near.split_b == "test"} == rows_of


def test_the_most_similar_come_first() -> None:
    found = near_duplicates({"train": made(300, 2, WORDS, " ")}, 0.6)
    assert [near.similarity for near in found] == sorted((near.similarity for near in found), reverse=True)
    assert isinstance(found[0], Near)


def test_real_data(shared_data: Path) -> None:
    read = {
        split: [json.loads(line)["text"] for line in (shared_data / "banking77" / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }
    started = time.perf_counter()
    found = near_duplicates(read)
    assert time.perf_counter() - started < 20
    across = [near for near in found if near.split_a != near.split_b]
    assert len(across) > 100
    for near in found[::10]:
        assert near.similarity == pytest.approx(jaccard(read[near.split_a][near.row_a], read[near.split_b][near.row_b]))
