"""A tokenizer with those of its pieces alone that rows use.

Texts that were looked at are cut as before. Of words cut greedily (WordPiece) and of the best-scored pieces (Unigram)
what was chosen is still there, and fewer others are; merges (BPE) go by rank, and those that made a piece stay.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import ModelError
from ..files import read_json

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")


def trimmed(tokenizer: PreTrainedTokenizerBase, used: Collection[int]) -> PreTrainedTokenizerBase:
    """The tokenizer less the pieces that are not used. The others keep their order.

    Special and added tokens stay, single characters and bytes, and what used pieces are merged from: any text can still
    be written that could be before.

    Args:
        tokenizer: a fast one.
        used: ids of the pieces that rows use.

    Raises:
        ModelError: it is no fast tokenizer, or of a kind that cannot be trimmed.
    """
    tree = tree_of(tokenizer, "trim")
    numbers = tokenizer.get_vocab()
    model, added = tree["model"], {token["content"] for token in tree["added_tokens"]}
    kept = {piece for piece, at in numbers.items() if at in used} | added | set(_named(tokenizer, model))
    if model["type"] == "BPE":
        kept.update(_made_of(model, kept - added))
    bare = _without_marks(model)
    kept |= {piece for piece in numbers if len(bare(piece)) < 2 or _BYTE.fullmatch(piece)}
    if model["type"] == "Unigram":  # from its lowest score that of unknown characters is taken
        kept.add(min(model["vocab"], key=lambda one: one[1])[0])
    own = {piece: at for piece, at in numbers.items() if piece in kept}
    in_model = {piece for piece, *_ in model["vocab"]} if model["type"] == "Unigram" else set(model["vocab"])
    order = sorted(own, key=lambda piece: (piece not in in_model, own[piece]))
    return rebuilt(tokenizer, renumbered(tree, {piece: at for at, piece in enumerate(order)}))


def tree_of(tokenizer: PreTrainedTokenizerBase, key: str) -> dict[str, Any]:
    """A fast tokenizer as JSON.

    Raises:
        ModelError: it is no fast one, or of an unknown kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tree: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    kind = tree["model"]["type"]
    if kind not in KINDS:
        raise ModelError(
            f"vocabulary: {key}: cannot be done with this tokenizer",
            found=f"{type(tokenizer).__name__} ({kind})",
            expected=f"a fast tokenizer: {', '.join(KINDS)}",
            mend=f"leave {key} away",
        )
    return tree


def rebuilt(tokenizer: PreTrainedTokenizerBase, tree: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer of the same class from changed JSON, read from files as it will be later.

    Raises:
        ModelError: its class makes something else of the files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        settings = read_json(folder / "tokenizer_config.json")
        settings.pop("added_tokens_decoder", None)  # it has the old numbers, and all that it says stands in the tree
        for path in folder.iterdir():  # files of older forms, which a class may read first
            if path.suffix in (".txt", ".model") or path.name in ("vocab.json", "added_tokens.json"):
                path.unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(tree), "utf-8")
        made = AutoTokenizer.from_pretrained(temporary)
    vocab = tree["model"]["vocab"]
    pieces = [piece for piece, *_ in vocab] if isinstance(vocab, list) else sorted(vocab, key=vocab.__getitem__)
    expected = {piece: at for at, piece in enumerate(pieces)}
    expected |= {token["content"]: token["id"] for token in tree["added_tokens"]}
    return checked(made, expected, tokenizer)


def checked(
    made: PreTrainedTokenizerBase, expected: dict[str, int], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """A tokenizer that was read from files; it is called as the one that it was made of.

    Raises:
        ModelError: its class makes something else of the files.
    """
    if made.get_vocab() != expected:
        raise ModelError(
            "vocabulary: a tokenizer of this class cannot have another vocabulary",
            found=f"{type(made).__name__} with {len(made.get_vocab())} pieces from files with {len(expected)}",
            mend="leave vocabulary away",
        )
    made.name_or_path = made.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return made


def _named(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any]) -> Iterator[str]:
    """Pieces that the tokenizer knows by name."""
    yield from map(str, tokenizer.all_special_tokens)
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    if unknown is not None:
        yield unknown


def _without_marks(model: dict[str, Any]) -> Callable[[str], str]:
    """A piece without what marks it as the end of a word, or as none of its beginning."""
    front, back = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return lambda piece: piece.removeprefix(front).removesuffix(back)


def _made_of(model: dict[str, Any], pieces: Collection[str]) -> set[str]:
    """What pieces of a BPE are merged from, step by step, by the rank of the merges."""
    front, back = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    rank = {tuple(_pair(merge)): at for at, merge in enumerate(model["merges"])}
    found = set[str]()
    for piece in pieces:
        characters = piece.removeprefix(front).removesuffix(back)
        steps = [character if at == 0 else front + character for at, character in enumerate(characters)]
        if steps and piece.startswith(front):
            steps[0] = front + steps[0]
        if steps and back and piece.endswith(back):
            steps[-1] += back
        found.update(steps)
        while len(steps) > 1:
            best = min(range(len(steps) - 1), key=lambda at: rank.get((steps[at], steps[at + 1]), len(rank)))
            if (steps[best], steps[best + 1]) not in rank:
                break
            steps[best : best + 2] = [steps[best] + steps[best + 1].removeprefix(front)]
            found.add(steps[best])
    return found & set(model["vocab"])


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def renumbered(tree: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """The tree of a tokenizer with these pieces, numbered so, alone."""
    model = dict(tree["model"])
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            model["unk_id"] = numbers[model["vocab"][model["unk_id"]][0]]
        last = {one[0]: one for one in model["vocab"]}  # of a piece that stands there twice, the last counts
        model["vocab"] = [last[piece] for piece in sorted(last.keys() & numbers.keys(), key=numbers.__getitem__)]
    else:
        model["vocab"] = {piece: numbers[piece] for piece in model["vocab"] if piece in numbers}
    if model["type"] == "BPE":
        front = model.get("continuing_subword_prefix") or ""
        pairs = (_pair(merge) for merge in model["merges"])
        model["merges"] = [
            [a, b] for a, b in pairs if a in numbers and b in numbers and a + b.removeprefix(front) in numbers
        ]
    tokens = [{**token, "id": numbers[token["content"]]} for token in tree["added_tokens"]]
    tokens.sort(key=lambda token: token["id"])
    tree = {**tree, "model": model, "added_tokens": tokens, "truncation": None, "padding": None}
    return tree | {"post_processor": _special(tree["post_processor"], numbers)}


def _special(node: Any, numbers: dict[str, int]) -> Any:
    """A post-processor, which has special tokens by name and number."""
    if isinstance(node, list):
        if len(node) == 2 and isinstance(node[0], str) and isinstance(node[1], int):  # of BERT's and RoBERTa's
            return [node[0], numbers[node[0]]]
        return [_special(one, numbers) for one in node]
    if not isinstance(node, dict):
        return node
    if "ids" in node and "tokens" in node:
        return {**node, "ids": [numbers[token] for token in node["tokens"]]}
    return {key: _special(value, numbers) for key, value in node.items()}
