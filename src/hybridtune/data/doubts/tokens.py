"""What a tokenizer makes of texts: how long the rows are, what is cut, and which characters it does not know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 20


def token_summary(lengths: ArrayLike, unknown: ArrayLike, limit: int) -> dict[str, Any]:
    """Says how long rows are and what truncation takes from them.

    Args:
        lengths: of the rows in tokens, before they are cut, [rows].
        unknown: how many of these tokens are unknown ones, [rows].
        limit: after how many tokens rows are cut.

    Returns:
        `median`, `p95`, `max`, `limit` and `truncated` (rows that are cut); `rows`; `tokens`, of which `cut_tokens` are
        cut off and `unknown_tokens` unknown; the shares `truncated_share` of rows, `cut_share` and `unknown_share` of
        tokens; and `histogram`: the rows (`counts`, at most 20) between `edges`, of which each bin holds the lower.
    """
    sizes, strange = np.asarray(lengths, dtype=np.int64), np.asarray(unknown, dtype=np.int64)
    tokens, cut, truncated = int(sizes.sum()), int(np.maximum(sizes - limit, 0).sum()), int((sizes > limit).sum())
    some = sizes if sizes.size else np.zeros(1)
    return {
        "median": round(float(np.median(some))),
        "p95": round(float(np.percentile(some, 95))),
        "max": int(some.max()),
        "limit": int(limit),
        "truncated": truncated,
        "rows": int(sizes.size),
        "tokens": tokens,
        "cut_tokens": cut,
        "unknown_tokens": int(strange.sum()),
        "truncated_share": truncated / max(sizes.size, 1),
        "cut_share": cut / max(tokens, 1),
        "unknown_share": int(strange.sum()) / max(tokens, 1),
        "histogram": _histogram(sizes),
    }


def _histogram(sizes: np.ndarray) -> dict[str, list[int]]:
    """Bins of one width, a whole number of tokens, from the shortest row on."""
    if not sizes.size:
        return {"edges": [], "counts": []}
    low, high = int(sizes.min()), int(sizes.max())
    width = (high - low) // BINS + 1
    counts = np.bincount((sizes - low) // width)
    return {"edges": [low + at * width for at in range(len(counts) + 1)], "counts": counts.tolist()}


def unknown_characters(texts: Iterable[str], is_unknown: Callable[[str], bool]) -> Counter[str]:
    """Counts the characters that a tokenizer does not know.

    Args:
        texts: the rows' texts.
        is_unknown: whether it makes an unknown token of a character that stands alone; asked once for each.

    Returns:
        Character -> how often it stands in the texts; `most_common` gives the worst. White space is none of them.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return Counter({one: count for one, count in counts.items() if not one.isspace() and is_unknown(one)})
