"""Long rows, cut into windows of tokens that overlap, each token with its place in the row's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ModelError
from ._texts import count_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRIDE = 128  # tokens that two windows share, as in the SQuAD baselines


def windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    limit: int,
    stride: int | None = None,
    before: Sequence[str] | None = None,
) -> dict[str, list[Any]]:
    """Cuts every text into windows of at most `limit` tokens.

    Args:
        tokenizer: a fast one: others do not say where in the text a token stands.
        texts: one a row.
        limit: tokens of a window, special ones and the text before included.
        stride: tokens that neighbouring windows share; 128, or a quarter of the limit where that is less.
        before: a text that stands whole in every window of its row, in front; cut where it takes more than half of it.

    Returns:
        Columns, one value a window: what the model takes; `row`; `starts` and `ends`, the characters of the text that a
        token stands for (-1 for tokens that are none of the text's); `length`, tokens of the whole row, and `unknown`,
        how many of them the tokenizer does not know, both in a row's first window and 0 in the others.

    Raises:
        ModelError: the tokenizer cannot say where tokens stand.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} does not say where in a text its tokens stand",
            expected="a fast tokenizer (tokenizer.json)",
            mend="save it with AutoTokenizer.from_pretrained(MODEL, use_fast=True).save_pretrained(FOLDER)",
        )
    own = 1 if before is not None else 0
    pair = [_cut(tokenizer, before, limit // 2), list(texts)] if before is not None else [list(texts)]
    encoded = tokenizer(
        *pair,
        truncation="only_second" if own else True,
        max_length=limit,
        stride=min(STRIDE, limit // 4) if stride is None else stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    columns: dict[str, list[Any]] = {key: encoded[key] for key in encoded if key in tokenizer.model_input_names}
    columns["row"] = [int(row) for row in encoded["overflow_to_sample_mapping"]]
    columns["starts"], columns["ends"] = [], []
    for at, offsets in enumerate(encoded["offset_mapping"]):
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        of_text = np.array([one == own for one in encoded.sequence_ids(at)], dtype=bool)
        places[~of_text | (places[:, 0] == places[:, 1])] = -1
        columns["starts"].append(places[:, 0].tolist())
        columns["ends"].append(places[:, 1].tolist())
    full = tokenizer(*pair, truncation=False, verbose=False)["input_ids"]
    first = np.diff(columns["row"], prepend=-1) > 0
    for name, values in (("length", [len(ids) for ids in full]), ("unknown", count_unknown(full, tokenizer))):
        columns[name] = [values[row] if new else 0 for row, new in zip(columns["row"], first, strict=True)]
    return columns


def _cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[str]:
    """The texts, of each at most so many tokens."""
    offsets = tokenizer(
        list(texts), truncation=True, max_length=limit, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    return [text[: places[-1][1]] if places else text for text, places in zip(texts, offsets, strict=True)]


def of_rows(rows: Sequence[int], count: int) -> list[list[int]]:
    """For each of `count` rows the numbers of its windows; `rows` says for each window which row it is of."""
    found: list[list[int]] = [[] for _ in range(count)]
    for window, row in enumerate(rows):
        found[row].append(window)
    return found
