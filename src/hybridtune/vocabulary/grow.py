"""A tokenizer with more tokens, or with more languages to mark texts with."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import ModelError
from .trim import checked

_SIDES = ("text", "text_target")


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
    made = grown
    if grown.is_fast:  # read from files, as it will be later; slow ones would look for theirs again and again
        with tempfile.TemporaryDirectory() as temporary:
            grown.save_pretrained(temporary)
            made = AutoTokenizer.from_pretrained(temporary)
    lost = [code for code in languages if not _marks_with(copy.deepcopy(made), code)]
    if lost:
        raise ModelError(
            f"vocabulary: add_languages: a {type(made).__name__} cannot mark texts with {lost[0]}",
            expected="a tokenizer that looks its languages up among its tokens, such as mBART's or NLLB's",
            mend="give the codes as add_tokens, and put them into the template",
        )
    return checked(made, grown.get_vocab(), tokenizer)


def _marks_with(tokenizer: Any, code: str) -> bool:
    try:
        tokenizer.src_lang = tokenizer.tgt_lang = code
        return all(tokenizer.convert_tokens_to_ids(code) in tokenizer(**{key: "a"})["input_ids"] for key in _SIDES)
    except (KeyError, ValueError):  # a table that only its class can change
        return False


def codes(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """The codes that a tokenizer marks texts with: its table's, and special tokens besides the usual ones."""
    if not (hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")):
        return []
    table = getattr(tokenizer, "lang_code_to_id", None) or {}
    return list(dict.fromkeys((*table, *(getattr(tokenizer, "extra_special_tokens", None) or []))))
