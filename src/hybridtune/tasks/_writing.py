"""How a model writes: the settings of `generate`, and a batch of texts written with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

MAX_NEW_TOKENS = 128  # as max_target_length of transformers' examples for translation and summarization
SETTINGS = (
    "num_beams",
    "max_new_tokens",
    "length_penalty",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "early_stopping",
)
_OF_BEAMS = ("length_penalty", "early_stopping")
# Of sampling, which is off, and of lengths that the model was told for other texts.
_UNSET = (
    *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_length", "min_length", "min_new_tokens"),
)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The settings that a recipe gives.

    Raises:
        RecipeError: one is of beam search, and there is one beam.
    """
    settings = {key: value for key in SETTINGS if (value := getattr(recipe, key)) is not None}
    for key in _OF_BEAMS:
        if key in settings and settings.get("num_beams") == 1:
            raise RecipeError(
                f"{key}: is of beam search", found="num_beams: 1", expected="num_beams: 2 or more", mend=f"no {key}"
            )
    return settings


def settings_in(config: Any) -> dict[str, Any]:
    """The settings that a generation_config stands at."""
    found = {key: getattr(config, key, None) for key in SETTINGS} | {"num_beams": config.num_beams or 1}
    return found if found["num_beams"] > 1 else {key: one for key, one in found.items() if key not in _OF_BEAMS}


def set_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], end: int) -> Any:
    """Tells a model how to write, in its generation_config; what is not given stays as the model has it.

    Args:
        model, tokenizer: as loaded.
        settings: of `SETTINGS`.
        end: the token that ends a text.

    Returns:
        The generation_config.

    Raises:
        ModelError: a setting is of beam search, and there is one beam; or texts would be longer than positions are.
    """
    config: Any = model.generation_config
    most = settings.get("max_new_tokens", MAX_NEW_TOKENS)
    room = longest(model, most, 0)
    if most > max(room, MAX_NEW_TOKENS):  # the default is cut to what there is
        raise ModelError(f"max_new_tokens: {most} is more than the model has positions for", expected=f"at most {room}")
    for key in _UNSET:
        setattr(config, key, None)
    config.do_sample, config.pad_token_id = False, tokenizer.pad_token_id
    config._from_model_config = False  # else `generate` may make another of the model's configuration
    for key, value in settings.items():
        setattr(config, key, value)
    if (config.num_beams or 1) == 1:
        for key in _OF_BEAMS:
            if key in settings:
                raise ModelError(f"{key}: is of beam search, and there is one beam", mend="num_beams: 4, say")
            setattr(config, key, None)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(one for one in (*known, end) if one is not None))
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if model.config.is_encoder_decoder:  # training begins where writing does
        told = (model.config.decoder_start_token_id, config.decoder_start_token_id)
        begins = (*told, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
        first = next(one for one in begins if one is not None)
        config.decoder_start_token_id = model.config.decoder_start_token_id = first
    return config


def write(model: PreTrainedModel, batch: dict[str, torch.Tensor], most: int) -> torch.Tensor:
    """What a model writes about a batch, [rows, tokens]; behind the end of a text there is padding.

    Args:
        model: an encoder-decoder, or a decoder that goes on with what it is given.
        batch: padded on the right.
        most: tokens.
    """
    given = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    batch = batch if model.config.is_encoder_decoder else padded_on_the_left(batch)
    written: torch.Tensor = model.generate(**batch, max_new_tokens=longest(model, most, given))  # type: ignore[operator]
    return written[:, given:]


def longest(model: PreTrainedModel, most: int, given: int) -> int:
    """How many of `most` tokens a model has positions for, behind those that are there already."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(most, max(int(positions or 10**9) - given, 1))


def refuse_encoders(model: PreTrainedModel) -> None:
    """Refuses a model that sees the words behind the one it is to write: one for masked words, not told otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    config: Any = model.config
    sees_all = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not model.can_generate() or (sees_all and not config.is_encoder_decoder):
        raise ModelError(
            f"model {model.name_or_path or config.model_type}: a {config.model_type} cannot write"
            + (": it was made to see the words on both sides" if sees_all else ""),
            expected="an encoder-decoder (T5, BART, Marian, NLLB) or a decoder (GPT-2, Llama, Qwen)",
        )


def padded_on_the_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is padded on the right with the padding on the left, so that all texts end where writing begins."""
    import torch

    mask = batch["attention_mask"]
    width = mask.shape[1]
    places = (torch.arange(width, device=mask.device) + mask.sum(1, keepdim=True)) % width
    return {key: value.gather(1, places) for key, value in batch.items()}
