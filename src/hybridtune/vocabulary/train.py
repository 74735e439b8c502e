"""A tokenizer of the same kind as a model's own, trained on texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError, first_line
from .trim import rebuilt, renumbered, tree_of


def trained(tokenizer: PreTrainedTokenizerBase, texts: Iterator[list[str]], pieces: int) -> PreTrainedTokenizerBase:
    """Trains it: what comes before and behind the pieces (normalizer, special tokens) is the tokenizer's own.

    Args:
        tokenizer: a fast one.
        texts: to train on, in lists.
        pieces: how many it may have, special tokens and single characters counted.

    Raises:
        ModelError: it is no fast tokenizer, or so few pieces do not hold the characters of the texts.
    """
    tree = tree_of(tokenizer, "train")
    more = {"show_progress": False}
    if tree["model"]["type"] == "WordPiece":
        more["continuing_subword_prefix"] = tree["model"]["continuing_subword_prefix"]
    try:
        made = tokenizer.train_new_from_iterator(texts, pieces, **more)
    except Exception as error:  # whatever the trainer, which is no Python, may raise
        raise ModelError(
            f"vocabulary: train: no tokenizer of {pieces:,} pieces can be trained on these texts",
            found=first_line(error),
            mend="give another number of pieces",
        ) from None
    return rebuilt(made, _in_order(tree_of(made, "train"), made.get_vocab()))


def _in_order(tree: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """The same pieces in one order: the trainer of WordPiece numbers letters another way each time.

    Merges have an order of their own, which is always the same; that of a Unigram's pieces is the trainer's, whose sums
    of probabilities are never the same to the last bit.
    """
    if tree["model"]["type"] in ("BPE", "Unigram"):
        return tree
    added = [token["content"] for token in sorted(tree["added_tokens"], key=lambda token: token["id"])]
    rest = sorted(numbers.keys() - set(added), key=lambda piece: (len(piece), piece))
    return renumbered(tree, {piece: at for at, piece in enumerate([*added, *rest])})
