"""Another vocabulary for a model: trimmed to the rows, trained on them, or with more tokens; its tables follow.

A changed vocabulary is its tokenizer and nothing else. What each row of the model's tables starts from follows from the
tokenizer before and the one after (`tables`): a checkpoint that names the original model and has the new
tokenizer beside it leads back to the same model.

    trim      the pieces that the rows use stay, with special tokens and single characters: the same tokens as before
    train     a tokenizer of the same kind, trained on the texts; pieces that were there before keep their rows
    grow      more tokens, and more languages
    tables    the tables of a model, its configuration and its special tokens follow
    rows      the rows of new pieces as parameters of their own, which are `new`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from ..model import Loaded
from ..recipe import Vocabulary
from .grow import extended
from .rows import fold, folded
from .tables import follow
from .train import trained
from .trim import trimmed

__all__ = ["change", "digest", "fold", "folded", "follow"]


def change(
    asked: Vocabulary,
    loaded: Loaded,
    texts: Callable[[], Iterator[list[str]]],
    cut: Callable[[PreTrainedTokenizerBase], Iterator[list[int]]],
) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe asks for; the model and its own tokenizer stay as they are.

    Args:
        asked: what is to be done: train, then add, then trim.
        loaded: the model, of which only the tokenizer is looked at.
        texts: gives the texts of the training rows, in lists.
        cut: gives the tokens of the training and validation rows, as a tokenizer cuts them.

    Raises:
        ModelError: it cannot be done with this tokenizer.
    """
    tokenizer = loaded.tokenizer
    if asked.train is not None:
        tokenizer = trained(tokenizer, texts(), asked.train)
    if asked.add_tokens or asked.add_languages:
        tokenizer = extended(tokenizer, asked.add_tokens, asked.add_languages)
    if asked.trim:
        tokenizer = _trimmed(tokenizer, cut)
    return tokenizer


def _trimmed(
    tokenizer: PreTrainedTokenizerBase, cut: Callable[[PreTrainedTokenizerBase], Iterator[list[int]]]
) -> PreTrainedTokenizerBase:
    """Trims, and sees to it that rows are cut as before.

    Raises:
        ModelError: a row would be cut otherwise.
    """
    used, rows = set[int](), list[int]()  # of each row a hash: all tokens of large data would take much memory
    for ids in cut(tokenizer):
        used.update(ids)
        rows.append(hash(tuple(ids)))
    fewer = trimmed(tokenizer, used)
    number = tokenizer.get_vocab()
    before = {at: number[piece] for piece, at in fewer.get_vocab().items()}
    again = [hash(tuple(before[one] for one in ids)) for ids in cut(fewer)]
    other = [row for row, (old, new) in enumerate(zip_longest(rows, again), 1) if old != new]
    if other:
        raise ModelError(
            "vocabulary: trim: with fewer pieces some texts would be cut into other tokens",
            found=f"{len(other)} texts, the first is number {other[0]}",
            expected="every text in the tokens that it had",
            mend="leave trim away",
        )
    return fewer


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """BLAKE2b over the pieces and their numbers, by which a checkpoint knows its vocabulary."""
    pieces: list[tuple[str, Any]] = sorted(tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(pieces).encode(), digest_size=16).hexdigest()
