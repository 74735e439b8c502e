"""Language codes of multilingual translation models (mBART, NLLB, M2M100): which there are, and where they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ModelError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def set_languages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str | None, target: str | None
) -> None:
    """Has the tokenizer mark texts with their languages, and the model begin with that of the target.

    Where the code stands in a target tells how it is begun: in front (mBART-50, NLLB, M2M100) it is the token that is
    forced to come first, at the end (mBART) the one that the decoder starts with.

    Raises:
        ModelError: the model needs codes and they are missing or unknown to it.
    """
    from ..vocabulary.grow import codes

    if not _marks(tokenizer):
        return
    known = codes(tokenizer)
    for key, code in (("target_language", target), ("source_language", source)):
        if code not in known:
            raise ModelError(
                f"{key}: the model marks texts with their language, "
                + ("and none is given" if code is None else unknown("language", code, known)),
                expected=", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else ""),
                mend=f"{key}: {known[0]}" if known and code is None else None,
            )
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    ids = tokenizer(text_target="a")["input_ids"]
    code_id = _id_of(tokenizer, str(target))
    settings: Any = model.generation_config
    if ids[0] == code_id:
        settings.forced_bos_token_id = code_id
    elif ids[-1] == code_id:
        settings.decoder_start_token_id = model.config.decoder_start_token_id = code_id
        settings.forced_bos_token_id = None


def untold(tokenizer: PreTrainedTokenizerBase, given: dict[str, str | None]) -> list[tuple[str, str]]:
    """The remark that a model is not told the languages that are given, where it has no codes of any."""
    keys = [key for key, code in given.items() if code]
    if not keys or _marks(tokenizer):
        return []
    return [(f"{' and '.join(keys)}: this model marks no text with its language, so that it is not told", "info")]


def _marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    return hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")


def _id_of(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    table = getattr(tokenizer, "lang_code_to_id", None) or {}
    return int(table[code]) if code in table else int(tokenizer.convert_tokens_to_ids(code))
