"""Tiny trained tokenizers of every kind, with tiny models for them."""

from __future__ import annotations

import random
from pathlib import Path

import tiny
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_SYLLABLES = ["ka", "lo", "mi", "ten", "sar", "vu", "re", "no", "pi", "gol", "dra", "esh"]
KINDS = ("bert", "gpt2", "llama", "t5", "roberta", "bart")


def sentences(count: int, seed: int, syllables: int = len(_SYLLABLES)) -> list[str]:
    """Sentences of a made-up language; with fewer syllables they use fewer pieces."""
    chance = random.Random(seed)
    words = ["".join(chance.choices(_SYLLABLES[:syllables], k=chance.randint(1, 4))) for _ in range(40)]
    return [" ".join(chance.choices(words, k=chance.randint(2, 8))) for _ in range(count)]


def tokenizer(kind: str, size: int = 160) -> hf.PreTrainedTokenizerBase:
    """A tokenizer of the class that such models have, trained on `sentences`."""
    texts = sentences(400, 0)
    if kind == "bert":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
        return hf.BertTokenizer(vocab=backend.get_vocab(), model_max_length=64)
    if kind in ("gpt2", "roberta", "bart"):
        special = ["<|endoftext|>"] if kind == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size + 256, special_tokens=special, initial_alphabet=letters)
        backend.train_from_iterator(texts, trainer)
        merges = [tuple(merge) for merge in _tree(backend)["model"]["merges"]]
        made = hf.GPT2Tokenizer if kind == "gpt2" else hf.RobertaTokenizer
        return made(vocab=backend.get_vocab(), merges=merges, model_max_length=64)
    if kind == "llama":
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Replace("▁", " ")
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size + 256, special_tokens=special))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return hf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>")
    )
    pieces = [tuple(piece) for piece in _tree(backend)["model"]["vocab"]]
    return hf.T5Tokenizer(vocab=pieces, extra_ids=4, model_max_length=64)


def save(folder: Path, kind: str, head: str = "", spare: int = 5) -> Path:
    """Writes a tiny model and its tokenizer; the model has some rows that no piece has.

    Args:
        folder: where to.
        kind: one of `KINDS`.
        head: such as ForCausalLM; a body alone where not given.
        spare: how many rows more than pieces.
    """
    tokens = tokenizer(kind)
    ids = {f"{name}_token_id": getattr(tokens, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ids = {key: value for key, value in ids.items() if value is not None}
    config = tiny.classifier(kind).config
    config.vocab_size = len(tokens) + spare
    for key, value in ids.items():
        setattr(config, key, value)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = ids["pad_token_id"]
    torch.manual_seed(0)
    model = getattr(hf, f"AutoModel{head}").from_config(config).eval()
    tiny.shake(model.parameters(), by=0.2)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def _tree(backend: Tokenizer) -> dict:
    import json

    return json.loads(backend.to_str())
