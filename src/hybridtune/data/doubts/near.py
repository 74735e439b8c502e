"""Near duplicates: texts that are not equal, but say almost the same in the same words.

The similarity of two texts is the Jaccard index of their shingles, the sets of all three neighbouring characters, once
case, white space and Unicode form are made equal. It needs no words, and so works for Chinese as for English.
Candidates are found by MinHash (Broder 1997, "On the resemblance and containment of documents") with banding (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", ch. 3); each is then verified exactly.

Ours and not a library's, since the tables of datasketch take no bound on the pairs that rows of one template make, and
arrays of all rows are three times faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..checking.rows import plain_text, text_key

Texts: TypeAlias = Sequence[str | tuple[str, ...]]
Array: TypeAlias = NDArray[Any]

MOST_ROWS = 200_000
CHARACTERS = 2000  # of a longer text only so many are compared: time and memory stay in proportion to the rows
HASHES = 128
RECALL = 0.99  # of the pairs that are exactly as similar as the threshold; of all above it, more are found
_SHINGLE = 3  # three code points of 21 bits fit in 64: a shingle is a number, and no two of them are the same one
_BLOCK = 1 << 15  # shingles that are hashed at once: what the cache of a processor holds
_CROWD = 64  # more rows than that in one bucket are a template: see _candidates


class Near(NamedTuple):
    """Two rows that are almost equal. `similarity` is exact, `estimate` what MinHash took it for; both 0 to 1."""

    split_a: str
    row_a: int
    split_b: str
    row_b: int
    similarity: float
    estimate: float


def near_duplicates(
    splits: Mapping[str, Texts], threshold: float = 0.8, *, most: int = MOST_ROWS, seed: int = 0
) -> list[Near]:
    """Finds near duplicates within the splits and between them.

    Args:
        splits: name -> texts, or tuples of texts where a row has several.
        threshold: the least similarity, more than 0 and at most 1.
        most: where there are more rows, a sample is looked at: small splits whole, of large ones equally many rows.
        seed: of the sample and of the hashes.

    Returns:
        Pairs of rows, by their position in their split, the most similar first; `a` is before `b` in the order of
        `splits` and rows. Rows that are equal (`text_key`) are no pair; of those in one split the first stands for all.
        Where more than 64 rows follow one template, each is compared with a few of them and not with all.
    """
    names = list(splits)
    texts, split, row, keys = [], [], [], []
    for at, sample in enumerate(_sample([len(splits[name]) for name in names], most, seed)):
        seen: set[bytes] = set()
        for number in sample.tolist():
            parts = _parts(splits[names[at]][number])
            key = text_key(*parts)
            if key not in seen:
                seen.add(key)
                texts.append(parts)
                split.append(at)
                row.append(number)
                keys.append(key)
    return sorted(
        (
            Near(names[split[a]], row[a], names[split[b]], row[b], similarity, estimate)
            for a, b, similarity, estimate in _pairs(texts, threshold, seed)
            if keys[a] != keys[b]
        ),
        key=lambda pair: -pair.similarity,
    )


def clusters(texts: Texts, threshold: float = 0.8, *, most: int = MOST_ROWS, seed: int = 0) -> Array:
    """Groups rows so that equal and near equal texts, and all that are linked by such, are in one group.

    Args:
        texts, threshold, most, seed: as in `near_duplicates`; rows outside the sample are grouped if equal only.

    Returns:
        The number of its group for each row, int [rows]; groups are numbered by their first row.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first: dict[bytes, int] = {}
    leader = [first.setdefault(text_key(*_parts(text)), at) for at, text in enumerate(texts)]
    near = near_duplicates({"": texts}, threshold, most=most, seed=seed)
    a = np.array([*range(len(leader)), *(pair.row_a for pair in near)], dtype=np.int64)
    b = np.array([*leader, *(pair.row_b for pair in near)], dtype=np.int64)
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(len(leader), len(leader)))
    found = connected_components(graph, directed=False)[1]
    _, start, group = np.unique(found, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(start))[group])


def _parts(text: str | tuple[str, ...]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _sample(sizes: list[int], most: int, seed: int) -> list[Array]:
    """The rows of each split that are looked at, in their order; what small splits leave of `most`, large ones get."""
    rng, left, counts = np.random.default_rng(seed), most, {}
    for done, at in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        counts[at] = min(sizes[at], left // (len(sizes) - done))
        left -= counts[at]
    return [np.sort(rng.choice(size, counts[at], replace=False)) for at, size in enumerate(sizes)]


def _pairs(texts: list[tuple[str, ...]], threshold: float, seed: int) -> list[tuple[int, int, float, float]]:
    """Position, position, similarity and estimate of all pairs above the threshold that were found."""
    shingles, starts = _shingles(texts)
    rows = np.flatnonzero(np.diff(starts))  # a text shorter than a shingle has none, and is near no other
    if len(rows) < 2:
        return []
    signatures = _signatures(shingles, starts[rows], seed)
    left, right = _candidates(signatures, threshold)
    estimates = np.concatenate(
        [
            (signatures[left[at : at + 10_000]] == signatures[right[at : at + 10_000]]).mean(1)
            for at in range(0, len(left), 10_000)
        ]
        or [np.empty(0)]
    )
    spread = (threshold * (1 - threshold) / HASHES) ** 0.5
    hopeful = estimates >= threshold - 4 * spread  # to verify a pair takes far longer than to estimate it
    left, right, estimates = rows[left[hopeful]], rows[right[hopeful]], estimates[hopeful]
    similarities = _jaccard(shingles, starts, left, right)
    kept = similarities >= threshold
    columns = (left, right, similarities, estimates)
    return list(zip(*(column[kept].tolist() for column in columns), strict=True))


def _shingles(texts: list[tuple[str, ...]]) -> tuple[Array, Array]:
    """The different shingles of every text, ascending, uint64 [all], and where each text's begin, [texts + 1]."""
    found, ends = [], [0]
    for parts in texts:
        points = np.frombuffer(
            plain_text(*parts)[:CHARACTERS].encode("utf-32-le", "surrogatepass"), dtype="<u4"
        ).astype(np.uint64)
        count = max(len(points) - _SHINGLE + 1, 0)
        numbers = np.zeros(count, dtype=np.uint64)
        for at in range(_SHINGLE):
            numbers = numbers << np.uint64(21) | points[at : at + count]
        found.append(np.unique(numbers))
        ends.append(ends[-1] + len(found[-1]))
    return np.concatenate([*found, np.empty(0, np.uint64)]), np.array(ends)


def _signatures(shingles: Array, starts: Array, seed: int) -> Array:
    """MinHash: of each text the least value of every hash function, uint64 [texts, HASHES].

    The hashes are odd multiples plus an offset, modulo 2^64, of numbers mixed by the finalizer of SplitMix64 (Steele,
    Lea and Flood 2014): neighbouring code points are no random numbers, and a multiple alone would keep their order.
    """
    mixed = shingles.copy()
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    factors, offsets = np.random.default_rng(seed).integers(0, 1 << 64, size=(2, HASHES), dtype=np.uint64)
    found = np.empty((len(starts), HASHES), dtype=np.uint64)
    blocks = np.unique(np.searchsorted(starts, np.arange(0, len(mixed), _BLOCK)))
    blocks = blocks[blocks < len(starts)]  # a block may begin within the last text
    for first, last in pairwise([*blocks.tolist(), len(starts)]):
        mine = mixed[starts[first] : starts[last] if last < len(starts) else None]
        for at, (factor, offset) in enumerate(zip(factors | np.uint64(1), offsets, strict=True)):
            found[first:last, at] = np.minimum.reduceat(mine * factor + offset, starts[first:last] - starts[first])
    return found


def _candidates(signatures: Array, threshold: float) -> tuple[Array, Array]:
    """Rows that agree on all hashes of a band, as two arrays of positions [pairs], first < second.

    Of b bands of r hashes, a pair of similarity s agrees on one with the probability 1 - (1 - s^r)^b: r is the largest
    with which that is RECALL at the threshold. In a bucket of more than _CROWD rows each is paired with the first and
    with its neighbours alone, since the pairs of n rows that follow one template are n²/2.
    """
    wide = max(r for r in range(1, 33) if r == 1 or 1 - (1 - threshold**r) ** (HASHES // r) >= RECALL)
    found = []
    for at in range(HASHES // wide):
        band = np.ascontiguousarray(signatures[:, at * wide : (at + 1) * wide])
        names = band.view(f"V{band.itemsize * wide}").ravel()
        _, bucket = np.unique(names, return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        sizes = np.bincount(bucket)
        ends = np.cumsum(sizes)
        for size in np.unique(sizes[sizes > 1]):
            members = order[ends[sizes == size][:, None] - np.arange(size, 0, -1)]
            if size <= _CROWD:
                a, b = np.triu_indices(size, 1)
            else:
                later = np.arange(1, size)
                a, b = np.concatenate([np.zeros(size - 1, int), later[:-1]]), np.concatenate([later, later[1:]])
            found.append(np.unique(members[:, a].ravel() * len(signatures) + members[:, b].ravel()))
    both = np.unique(np.concatenate([*found, np.empty(0, np.int64)])).astype(np.int64)
    return both // len(signatures), both % len(signatures)


def _jaccard(shingles: Array, starts: Array, left: Array, right: Array) -> Array:
    """The exact similarity of rows, [pairs]: the size of their common shingles by that of all."""
    sizes = np.diff(starts)
    common = np.zeros(len(left))
    for at, (a, b) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        mine, other = shingles[starts[a] : starts[a + 1]], shingles[starts[b] : starts[b + 1]]
        common[at] = len(np.intersect1d(mine, other, assume_unique=True))
    similarities: Array = common / np.maximum(sizes[left] + sizes[right] - common, 1)
    return similarities
