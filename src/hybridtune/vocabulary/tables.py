"""Has a model follow its new tokenizer: tables, biases, configuration and special tokens.

What follows the vocabulary is not listed for each architecture, but seen: a twin of the model is made from the changed
configuration, without memory, and whatever has another shape there is a table of pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from ..model import Loaded
from .grow import codes
from .rows import put_on

Sources = list[tuple[int, ...]]
_SIZES = ("vocab_size", "decoder_vocab_size")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_NESTED = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")


def follow(loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """Gives a model the vocabulary of another tokenizer, in place.

    The row of a piece that was there is that piece's; that of a new one starts as the mean of the rows of those pieces
    that its text was before (Gee et al. 2022, Fast Vocabulary Transfer for Language Model Compression), a new
    language's as the mean of all languages. The rows of new pieces are `new`.

    Args:
        loaded: a model as it was loaded, with its own tokenizer.
        tokenizer: the one to follow.

    Raises:
        ModelError: the model has no table that can follow.
    """
    model, size = loaded.model, _size(loaded.model)
    known, found = loaded.tokenizer.get_vocab(), tokenizer.get_vocab()
    if max(known.values()) >= size:
        raise ModelError(
            "vocabulary: the tokenizer has more pieces than the model",
            found=f"{len(known):,} pieces, and {size:,} rows",
            mend="give a model with its own tokenizer",
        )
    pieces = _sources(loaded.tokenizer, known, tokenizer, found)
    if all(found.get(piece) == at for piece, at in known.items()):  # more pieces: rows that no piece had stay there
        pieces += [(at,) for at in range(len(pieces), size)]
    else:
        numbers = {at: found[piece] for piece, at in known.items() if piece in found}
        for config in [*_configs(model), getattr(model, "generation_config", None)]:
            _renumber(config, numbers)
    sides = _following(model, size)
    _set_size(_configs(model), size, len(pieces))
    _take_numbers(model, _twin(model), size)
    tables = _resize(model, sides, pieces)
    fresh = sorted(at for piece, at in found.items() if piece not in known)
    new = [put_on(model, table, torch.tensor(fresh)) for table in tables] if fresh else []
    gone = set(loaded.new) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return replace(loaded, tokenizer=tokenizer, new=tuple(sorted({*loaded.new, *new} - gone)))


def _sources(
    before: PreTrainedTokenizerBase, known: dict[str, int], after: PreTrainedTokenizerBase, found: dict[str, int]
) -> Sources:
    """For each id of a tokenizer the ids of an earlier one whose rows it starts as the mean of: the piece's own alone
    where it was there; none where nothing is known of its text.

    Args:
        before, after: the tokenizers.
        known, found: their pieces with their ids.
    """
    languages = {code for code in codes(after) if code not in known}
    of_languages = tuple(known[code] for code in codes(before) if code in known)
    added = set(map(str, after.added_tokens_encoder))
    backend = getattr(before, "backend_tokenizer", None)
    prefix = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None) or ""
    made: Sources = [()] * (max(found.values()) + 1)
    for piece, at in found.items():
        if piece in known:
            made[at] = (known[piece],)
        elif piece in languages:
            made[at] = of_languages
        elif piece in added or backend is None:
            made[at] = _known(before(piece, add_special_tokens=False)["input_ids"], before)
        else:
            tokens = backend.model.tokenize(piece.removeprefix(prefix))
            made[at] = _known([token.id for token in tokens], before)
    return made


def _known(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(one for one in ids if one != tokenizer.unk_token_id)


def _size(model: PreTrainedModel) -> int:
    """How many rows its tables have.

    Raises:
        ModelError: it has none, or of several sizes.
    """
    found = {getattr(config, key) for config in _configs(model) for key in _SIZES if getattr(config, key, None)}
    if len(found) != 1:
        raise ModelError(
            "vocabulary: the model has no table of pieces that could follow"
            if not found
            else "vocabulary: the model has vocabularies of several sizes",
            found=", ".join(map(str, sorted(found))) or type(model).__name__,
            mend="leave vocabulary away",
        )
    return int(found.pop())


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations of a model and of what it is made of, each once; some stacks have copies."""
    found: list[PreTrainedConfig] = []
    for module in model.modules():
        _collect(getattr(module, "config", None), found)
    return found


def _collect(config: Any, found: list[PreTrainedConfig]) -> None:
    """Adds a configuration and those in it."""
    if isinstance(config, PreTrainedConfig) and not any(config is other for other in found):
        found.append(config)
        for inner in vars(config).values():
            _collect(inner, found)


def _renumber(config: Any, numbers: dict[int, int]) -> None:
    """Special tokens by their new numbers; one that no piece is any more is none.

    Raises:
        ModelError: it names other tokens by their numbers.
    """
    for key in config.to_dict() if config is not None else ():
        value = getattr(config, key, None)
        if key in _NESTED and value:
            raise ModelError(
                f"vocabulary: the model's {key} names tokens by numbers that would be other ones",
                found=repr(value)[:160],
                mend=f"take {key} out of its generation_config.json, or leave vocabulary away",
            )
        if not (key.endswith("_token_id") or key in _LISTS) or value is None:
            continue
        if isinstance(value, list):
            setattr(config, key, [numbers[one] for one in value if one in numbers] or None)
        else:
            setattr(config, key, numbers.get(value))


def _set_size(configs: Sequence[PreTrainedConfig], before: int, after: int) -> None:
    for config in configs:
        for key in _SIZES:
            if getattr(config, key, None) == before:
                setattr(config, key, after)


def _twin(model: PreTrainedModel, config: Any = None) -> nn.Module:
    """A model of the same class from a configuration, without memory."""
    with torch.device("meta"):
        made: nn.Module = type(model)(config or copy.deepcopy(model.config))
    return made


def _following(model: PreTrainedModel, size: int) -> dict[str, int]:
    """Names of the tensors that follow the vocabulary, with the dimension that does: a larger one shows them.

    Raises:
        ModelError: one follows it in a way that is unknown.
    """
    config = copy.deepcopy(model.config)
    found: list[PreTrainedConfig] = []
    _collect(config, found)
    _set_size(found, size, size + 1)
    larger, sides = dict(_tensors(_twin(model, config))), dict[str, int]()
    for name, tensor in _tensors(model):
        shapes = tensor.shape, larger[name].shape
        if shapes[0] == shapes[1]:
            continue
        (sides[name], *more) = [side for side, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]
        if more or tensor.shape[sides[name]] != size:
            raise ModelError(f"vocabulary: {name} follows it in a way that is unknown", found=str(tuple(tensor.shape)))
    return sides


def _take_numbers(model: PreTrainedModel, twin: nn.Module, size: int) -> None:
    """Sizes and special tokens that modules have noted, as the twin has them.

    Raises:
        ModelError: positions are counted from the padding token's number, which is another now.
    """
    for name, module in model.named_modules():
        for key, value in vars(twin.get_submodule(name)).items():
            mine = vars(module).get(key, value)
            if not {type(mine), type(value)} <= {int, type(None)} or mine == value:
                continue
            if isinstance(module, nn.Embedding) and key == "padding_idx" and module.num_embeddings != size:
                raise ModelError(
                    "vocabulary: the padding token would get another number, from which this model counts positions",
                    found=f"{mine} and then {value}, in {name}",
                    mend="leave vocabulary away",
                )
            setattr(module, key, value)


def _resize(model: PreTrainedModel, sides: dict[str, int], pieces: Sources) -> list[nn.Parameter]:
    """Puts tables of new rows in the place of what follows the vocabulary; tied ones stay tied.

    Returns:
        The tables of embeddings, input and output, each once.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with what it was, whose id is not another's so long
    for name, tensor in [(name, tensor) for name, tensor in _tensors(model) if name in sides]:
        if id(tensor) not in made:
            rows = _taken(tensor.detach(), sides[name], pieces)
            made[id(tensor)] = tensor, nn.Parameter(rows) if isinstance(tensor, nn.Parameter) else rows
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, made[id(tensor)][1])
    return [table for _, table in made.values() if isinstance(table, nn.Parameter) and table.dim() == 2]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _taken(tensor: torch.Tensor, side: int, pieces: Sources) -> torch.Tensor:
    """The rows of pieces: copies, or means of several."""
    made = tensor.index_select(side, torch.tensor([rows[0] if rows else 0 for rows in pieces]))
    if tensor.is_floating_point():
        for at, rows in enumerate(pieces):
            if len(rows) != 1:
                start = (tensor.index_select(side, torch.tensor(rows)) if rows else tensor).mean(side)
                made.select(side, at).copy_(start)
    return made
