"""NEFTune: noise on the embedded text while a model is trained (Jain et al. 2023, arXiv 2310.05914).

    x' = x + alpha / sqrt(L d) * u        x [L, d], a row's embedded text; u ~ Uniform(-1, 1), [L, d]

L is the length of the row itself, as in the authors' code. transformers' own hook takes the width of the padded batch,
so that a short row gets less noise beside a long one; here how much a row gets depends on no other, whether rows are
padded, packed or cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class Noise:
    """Adds noise to the text that a model's body is given; in an encoder-decoder to the encoder's alone.

    Soft prompts get none: they are in no table of embeddings.

    Args:
        model: any transformers model.
        alpha: the size of the noise, 5 to 15 in the paper.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        config = getattr(model, "config", None)
        self.body = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model.base_model
        self.embeddings: nn.Module = self.body.get_input_embeddings()
        self.alpha = alpha
        self._mask: torch.Tensor | None = None  # of the batch that the body is given, [rows, width]
        self._on = False  # a table that the decoder shares gives it its text as it is

    @contextmanager
    def open(self) -> Iterator[None]:
        """For forwards and, where layers are computed again in them, their backwards."""
        with ExitStack() as undo:
            # First of all hooks: a soft prompt embeds the text, and widens the mask, in a hook of the body too
            begin = self.body.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
            for handle in (
                begin,
                self.body.register_forward_hook(self._end),
                self.embeddings.register_forward_hook(self._add),
            ):
                undo.callback(handle.remove)
            undo.callback(self._end)
            yield

    def _begin(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask, self._on = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None, True

    def _end(self, *_: Any) -> None:
        self._mask, self._on = None, False

    def _add(self, embeddings: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if not (self._on and self.body.training):
            return None
        rows, width, size = embedded.shape
        whole = self._mask is None or self._mask.shape != (rows, width)
        # in 32 bits: the largest number of float16 is 65504, less than tokens times width
        lengths = torch.full((rows,), width) if whole else self._mask.sum(1)  # type: ignore[union-attr]
        scale = self.alpha / (lengths.to(embedded.device, torch.float32).clamp(min=1) * size).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale[:, None, None].to(embedded.dtype)
