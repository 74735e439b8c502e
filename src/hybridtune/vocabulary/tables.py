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
    for config in _configs(model):
        for key in _SIZES:
            if getattr(config, key, None) == size:
                setattr(config, key, len(pieces))
    with torch.device("meta"):
        twin: Any = type(model)(copy.deepcopy(model.config))  # type: ignore[arg-type]
    _take_numbers(model, twin, size)
    tables = _resize(model, twin, size, pieces)
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
    found: dict[int, PreTrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for inner in vars(config).values():
                add(inner)

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _renumber(config: Any, numbers: dict[int, int]) -> None:
    """Special tokens by their new numbers; one that no piece is any more is none."""
    for key in config.to_dict() if config is not None else ():
        value = getattr(config, key, None)
        if not (key.endswith("_token_id") or key in _LISTS) or value is None:
            continue
        if isinstance(value, list):
            setattr(config, key, [numbers[one] for one in value if one in numbers] or None)
        else:
            setattr(config, key, numbers.get(value))


def _take_numbers(model: PreTrainedModel, twin: nn.Module, size: int) -> None:
    """Sizes and special tokens that modules have noted, as the twin has them.

    Raises:
        ModelError: positions are counted from the padding token's number, which is another now.
    """
    for name, module in model.named_modules():
        other = twin.get_submodule(name)
        for key, value in vars(other).items():
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


def _resize(model: PreTrainedModel, twin: nn.Module, size: int, pieces: Sources) -> list[nn.Parameter]:
    """Puts tables of new rows in the place of what has another shape in the twin; tied ones stay tied.

    Returns:
        The tables of embeddings, input and output, each once.
    """
    tables: dict[int, nn.Parameter] = {}
    wanted = dict(_tensors(twin))
    kept: dict[int, torch.Tensor] = {}
    for name, tensor in list(_tensors(model)):
        sides = [side for side, (a, b) in enumerate(zip(tensor.shape, wanted[name].shape, strict=True)) if a != b]
        if not sides:
            continue
        if len(sides) > 1 or tensor.shape[sides[0]] != size:
            raise ModelError(f"vocabulary: {name} follows it in a way that is unknown", found=str(tuple(tensor.shape)))
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if id(tensor) not in tables:
            made = _taken(tensor.detach(), sides[0], pieces)
            kept[id(tensor)] = tensor  # its id is not another's while it is here
            tables[id(tensor)] = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made  # type: ignore[assignment]
        setattr(module, leaf, tables[id(tensor)])
    return [table for table in tables.values() if isinstance(table, nn.Parameter) and table.dim() == 2]


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
