"""A soft prompt: learned vectors in front of the embedded text, all else as it was.

    h_0 = [P; E x]                P [n, width], learned; E x [batch, length, width], the embedded text

The vectors go in where the embedded text does, so that a body adds its positions and token types to them too. Their
places are cut off again behind the layers: poolers, heads and the search for the last token see rows as long as they
were. In an encoder-decoder they stay, since the decoder attends to them.

They are a registered submodule of the body, put to use by hooks.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..anatomy import Anatomy, Part
from ..errors import MethodError
from ..model import load_tokenizer
from ._modules import unhook

SUMMARY = "learned vectors in front of the embedded text"
FORMULA = "h_0 = [P; E x]"
SOURCE = "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691"
MERGES = "its vectors are no weights of the model"

CHILD = "soft_prompt"


class Options(BaseModel):
    """Length and start of the prompt.

    Attributes:
        num_virtual_tokens: n above.
        prompt_tuning_init: starts as embeddings of tokens drawn at random ("SAMPLE_VOCAB"), as noise of the same
            spread ("RANDOM"), or as those of a text ("TEXT").
        prompt_tuning_init_text: that text, repeated or cut to n tokens; "TEXT" need not be said then.
    """

    model_config = ConfigDict(extra="forbid")

    num_virtual_tokens: int = Field(20, gt=0)
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = Field(None, validate_default=True)

    @field_validator("prompt_tuning_init_text")
    @classmethod
    def _text_fits(cls, text: str | None, info: ValidationInfo) -> str | None:
        init = info.data.get("prompt_tuning_init")
        if init == "TEXT" and not text:
            raise ValueError("a text, since prompt_tuning_init is TEXT")
        if init == "RANDOM" and text:
            raise ValueError("no text, since prompt_tuning_init is RANDOM")
        return text

    @model_validator(mode="after")
    def _text_is_meant(self) -> Options:
        if self.prompt_tuning_init_text:
            self.prompt_tuning_init = "TEXT"
        return self


class SoftPrompt(nn.Module):
    """The vectors; its bound methods are the hooks, so that copies of a model stay whole.

    Args:
        prompt: where they start, [n, width].
        first: number of the first position.
        room: how many positions the body has; None where it has no table of them.
        by_padding: whether the body counts positions past padding, which it cannot see in embedded text.
    """

    def __init__(self, prompt: torch.Tensor, first: int, room: int | None, by_padding: bool) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt)
        self.first, self.room, self.by_padding = first, room, by_padding
        self._length: int | None = None  # prompt and text together, in the forward that runs

    def before(
        self, body: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Forward pre-hook of the body: puts the prompt in front, once for all tokens that a cache will hold."""
        given = _by_name(body, args, kwargs)
        cache = given.get("cache", given.get("past_key_values"))
        seen = int(cache.get_seq_length()) if cache is not None else 0
        given["attention_mask"] = self._widen(given.get("attention_mask"), 1)
        self._length = None
        if seen:
            self._check_room(seen + _length_of(given))
            if given.get("position_ids") is not None:
                given["position_ids"] = given["position_ids"] + len(self.prompt)
            return (), given
        self._check_room(len(self.prompt) + _length_of(given))
        given["position_ids"] = self._positions(given)
        given["token_type_ids"] = self._widen(given.get("token_type_ids"), 0)
        given["inputs_embeds"] = self._in_front(body, given)
        given["input_ids"] = None
        self._length = given["inputs_embeds"].shape[1]
        return (), {name: value for name, value in given.items() if value is not None or name in kwargs}

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the body, and of the module in it that runs the layers: cuts the prompt's places off."""
        return output if self._length is None else self._cut(output)

    def widen(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Forward pre-hook of the decoder: its mask of the encoder's output covers the prompt's places too."""
        given = _by_name(decoder, args, kwargs)
        hidden, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if hidden is not None and mask is not None and mask.shape[-1] + len(self.prompt) == hidden.shape[1]:
            given["encoder_attention_mask"] = self._widen(mask, 1)
        return (), given

    def _in_front(self, body: PreTrainedModel, given: dict[str, Any]) -> torch.Tensor:
        """The embedded text with the prompt in front, [batch, n + length, width]."""
        embedded = given.get("inputs_embeds")
        if embedded is None:
            embedded = body.get_input_embeddings()(given["input_ids"])
        return torch.cat([self.prompt.to(embedded).expand(len(embedded), -1, -1), embedded], dim=1)

    def _widen(self, rows: torch.Tensor | None, value: int) -> torch.Tensor | None:
        """Puts n times a value in front of every row, [batch, length]."""
        if rows is None:
            return None
        if not isinstance(rows, torch.Tensor) or rows.dim() != 2:
            raise MethodError(
                "prompt: the attention mask has to be extended and is not of the form [batch, length]",
                mend="give the tokenizer's own mask; in generate(), no static cache",
            )
        return torch.cat([rows.new_full((len(rows), len(self.prompt)), value), rows], dim=1)

    def _positions(self, given: dict[str, Any]) -> torch.Tensor | None:
        """Numbers of the positions [batch or 1, n + length]; None where the body counts on from the prompt itself."""
        there, ids = given.get("position_ids"), given.get("input_ids")
        if there is None and self.by_padding and ids is not None:
            text = ids.ne(self.first - 1).long()
            there = text.cumsum(1) * text + self.first - 1
            own = torch.where(text.bool(), there + len(self.prompt), there)
        elif there is not None:
            own = there + len(self.prompt)
        else:
            return None
        prompt = torch.arange(len(self.prompt), device=own.device) + self.first
        return torch.cat([prompt.expand(len(own), -1), own], dim=1)

    def _check_room(self, length: int) -> None:
        if self.room is not None and length > self.room:
            raise MethodError(
                f"prompt: {len(self.prompt)} vectors and the text are more than the model has positions",
                found=f"{length} positions",
                expected=f"at most {self.room}",
                mend=f"max_length: {self.room - len(self.prompt)}, or a smaller num_virtual_tokens",
            )

    def _cut(self, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            whole = output.dim() == 3 and output.shape[1] == self._length
            return output[:, len(self.prompt) :] if whole else output
        if isinstance(output, ModelOutput):
            for name in ("last_hidden_state", "hidden_states"):
                if output.get(name) is not None:
                    output[name] = self._cut(output[name])
        elif isinstance(output, (tuple, list)):
            return type(output)(self._cut(item) for item in output)
        return output


def learning_rate(part: Part, width: int) -> float:
    """Far larger than that of weights, since only a few vectors move; the paper has 0.3, with Adafactor."""
    return max(1e-1 * min(1.0, 384 / width), 1e-2)


def positions(options: Options) -> int:
    """How many of the model's positions the prompt takes."""
    return options.num_virtual_tokens


def attach(model: PreTrainedModel, part: Part, options: Options) -> list[str]:
    """Puts the prompt into the body that takes the text.

    Raises:
        MethodError: the part is not where text comes in, the body takes no embedded text, or there is a prompt already.
    """
    anatomy = Anatomy(model)
    body, decoder = _body(model, anatomy)
    path = next(name for name, module in model.named_modules() if module is body)
    embeddings = body.get_input_embeddings()
    _check_place(model, part, embeddings)
    if "inputs_embeds" not in inspect.signature(body.forward).parameters:
        raise MethodError(f"prompt on {part}: {type(body).__name__} takes no embedded text (inputs_embeds)")
    if hasattr(body, CHILD):
        raise MethodError(
            f"prompt on {part}: {type(body).__name__} has one already", mend="use previous: drop, or one prompt rule"
        )
    start = _start(model, embeddings, options).to(embeddings.weight.dtype)
    prompt = SoftPrompt(start, *_table(body, embeddings))
    body.add_module(CHILD, prompt)
    body.register_forward_pre_hook(prompt.before, with_kwargs=True)
    if decoder is not None:
        decoder.register_forward_pre_hook(prompt.widen, with_kwargs=True)
    else:
        for module in {body, _runner(model, anatomy, path)}:
            module.register_forward_hook(prompt.after)
    return [f"{path}.{CHILD}.prompt" if path else f"{CHILD}.prompt"]


def detach(model: nn.Module, names: list[str]) -> None:
    """Takes the prompt off again, hooks included."""
    for path in (name.rpartition(".")[0] for name in names):
        prompt = model.get_submodule(path)
        unhook(model.modules(), prompt)
        delattr(model.get_submodule(path.rpartition(".")[0]), CHILD)


def _body(model: PreTrainedModel, anatomy: Anatomy) -> tuple[PreTrainedModel, nn.Module | None]:
    """The module that takes the text; and the decoder, where that is an encoder."""
    if "decoder" in anatomy.depth:
        return model.get_encoder(), model.get_decoder()
    return model.base_model, None


def _runner(model: nn.Module, anatomy: Anatomy, body: str) -> nn.Module:
    """The body's own child that runs the layers, or the body.

    What comes behind it in the body, such as a pooler, sees no prompt. Not behind the last layer: GPT-2 gives its
    output the shape that went in, and ALBERT calls one layer many times.
    """
    steps = anatomy.stacks[0].path.removeprefix(f"{body}." if body else "").split(".")[:-1]
    return model.get_submodule(".".join([body, *steps[:1]]).strip("."))


def _check_place(model: nn.Module, part: Part, embeddings: nn.Module) -> None:
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is embeddings]
    if not any(root in ("", name) or name.startswith(f"{root}.") for root in part.modules for name in names):
        raise MethodError(
            f"prompt on {part}: it goes in where the text is embedded",
            expected=f"a part with {names[0]} in it",
            mend="embeddings: prompt",
        )


def _table(body: nn.Module, embeddings: nn.Module) -> tuple[int, int | None, bool]:
    """First position, how many there are, and whether padding has none; from the body's table of positions."""
    for name, module in body.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not embeddings and ("position" in last or last == "wpe"):
            if "relative" in name:
                continue
            padding = module.padding_idx
            first = 0 if padding is None else padding + 1
            return first, module.num_embeddings - first - getattr(module, "offset", 0), padding is not None
    return 0, None, False


def _start(model: PreTrainedModel, embeddings: nn.Module, options: Options) -> torch.Tensor:
    """Where the vectors start, [n, width], as the embeddings give them, scaled where those scale."""
    count, weight = options.num_virtual_tokens, embeddings.weight
    assert isinstance(weight, torch.Tensor)
    if options.prompt_tuning_init_text:
        ids = _tokens(model, options.prompt_tuning_init_text, count).to(weight.device)
    else:
        ids = torch.randint(len(weight), (count,), device=weight.device)
    with torch.no_grad():
        start: torch.Tensor = embeddings(ids).detach().clone()
        return torch.randn_like(start) * start.std() if options.prompt_tuning_init == "RANDOM" else start


def _tokens(model: PreTrainedModel, text: str, count: int) -> torch.Tensor:
    """The text's tokens, without special ones, repeated or cut to a number of them."""
    if not model.name_or_path:
        raise MethodError(
            "prompt: prompt_tuning_init_text needs the model's tokenizer, and the model was loaded from nowhere",
            mend="load the model with from_pretrained, or leave the text out",
        )
    ids = load_tokenizer(model.name_or_path)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MethodError("prompt: prompt_tuning_init_text has no tokens", found=repr(text))
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by their names."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _length_of(given: dict[str, Any]) -> int:
    """Number of tokens that came in."""
    ids = given.get("input_ids")
    return int((ids if ids is not None else given["inputs_embeds"]).shape[1])
