"""A tokenizer with more tokens, or with more languages to mark texts with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError


def extended(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], languages: Sequence[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer with more tokens behind those that are there.

    Args:
        tokenizer: any.
        tokens: texts that become one token each wherever they stand.
        languages: codes that texts can be marked with, beside those of a multilingual model.

    Raises:
        ModelError: one is a token already, or the tokenizer marks no languages.
    """
    known = tokenizer.get_vocab()
    for key, asked in (("add_tokens", tokens), ("add_languages", languages)):
        there = [token for token in asked if token in known]
        if there:
            raise ModelError(
                f"vocabulary: {key}: the vocabulary has {there[0]} already", mend=f"leave {', '.join(there)} away"
            )
    if languages and not codes(tokenizer):
        raise ModelError(
            "vocabulary: add_languages: this model does not mark texts with their language",
            found=type(tokenizer).__name__,
            expected="a model such as mBART, NLLB or M2M100",
            mend="give the codes as add_tokens, and put them into the template",
        )
    grown: Any = copy.deepcopy(tokenizer)
    grown.add_tokens(list(tokens))
    if languages:
        special = [*(grown.extra_special_tokens or []), *languages]
        grown.add_special_tokens({"extra_special_tokens": special})
    return grown  # type: ignore[no-any-return]


def codes(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """The codes that a tokenizer marks texts with: its table's, and special tokens besides the usual ones."""
    if not (hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")):
        return []
    table = getattr(tokenizer, "lang_code_to_id", None) or {}
    return list(dict.fromkeys((*table, *(getattr(tokenizer, "extra_special_tokens", None) or []))))
