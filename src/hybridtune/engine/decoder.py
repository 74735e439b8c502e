"""What the decoder of an encoder-decoder is given, and which of its places are used.

transformers makes a decoder's tokens from labels, or for a classifier from the encoder's text, and gives it no mask: it
computes padding behind a text as it does text. What comes before never sees that, and what it gives there is not used.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100
MASK = "decoder_attention_mask"


def head_of(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a language model; None for other models."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return head if isinstance(head, nn.Module) else None


def complete(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with what an encoder-decoder makes of labels, where it will not be given them."""
    config: Any = model.config
    if batch.get("labels") is None or any(
        batch.get(f"decoder_{what}") is not None for what in ("input_ids", "inputs_embeds")
    ):
        return batch
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None and getattr(config, "is_encoder_decoder", False):  # M2M100 and others do it in their forward
        prepare = partial(_shifted, first=config.decoder_start_token_id, pad=config.pad_token_id)
    if prepare is None:
        return batch
    made = {"use_cache": False, **batch, "decoder_input_ids": prepare(labels=batch["labels"])}
    if _masks_itself(config) and batch.get(MASK) is None:
        made[MASK] = made["decoder_input_ids"].ne(config.pad_token_id).long()
    return made


def mask_of(model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
    """A mask for a decoder that is given none, where its places behind the last used one are known.

    Used are those that have a label, as tokens, or what comes before one; of a classifier, which reads the encoder's
    text once more, those of that text and the one behind it. A model that answers questions may put all its places
    into one softmax, and what is given alone does not tell what it is for.

    Args:
        model: any transformers model.
        batch: what it is given, and the labels that a loss will be computed with.

    Returns:
        [rows, width], of integers; None where there is nothing to say.
    """
    used = None if batch.get(MASK) is not None or not _takes_mask(model) else _used(model, batch)
    return None if used is None else used.flip(1).cummax(1).values.flip(1).long()


def hides(model: Any, batch: dict[str, Any]) -> bool:
    """Whether a decoder's mask leaves out a place that has a label, which has to be computed."""
    mask, labels = batch.get(MASK), batch.get("labels")
    if mask is None or labels is None or mask.shape != labels.shape or head_of(model) is None:
        return False
    return bool(((labels != IGNORED) & ~mask.bool()).any())


def _used(model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
    given, labels, mask = (batch.get(name) for name in ("decoder_input_ids", "labels", "attention_mask"))
    if batch.get("decoder_inputs_embeds") is not None or batch.get("start_positions") is not None:
        return None
    if head_of(model) is not None:
        if labels is None or labels.dim() != 2 or (_masks_itself(model.config) and given is None):
            return None
        pad = getattr(model.config, "pad_token_id", None)
        labelled: torch.Tensor = labels != IGNORED
        if given is None:
            return labelled
        fits = pad is not None and given.shape == labels.shape
        return labelled | (given != pad) if fits else None
    if given is not None or batch.get("input_ids") is None or mask is None or not bool(mask[:, 0].all()):
        return None
    text: torch.Tensor = mask.bool()
    return text | functional.pad(text[:, :-1], (1, 0), value=True)  # T5Gemma's answer stands behind the text


def _takes_mask(model: Any) -> bool:
    config = getattr(model, "config", None)
    return getattr(config, "is_encoder_decoder", False) and MASK in inspect.signature(model.forward).parameters


def _masks_itself(config: Any) -> bool:
    """Whether a model makes a mask from the tokens that it makes from labels."""
    return bool(config.model_type == "encoder-decoder")


def _shifted(labels: torch.Tensor, first: int, pad: int) -> torch.Tensor:
    before = functional.pad(labels[:, :-1], (1, 0), value=first)
    return before.masked_fill(before == IGNORED, pad)
