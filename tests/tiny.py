"""Tiny random models of real architectures, built from configs; and a tiny tokenizer for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from hybridtune import model as models_of_ours
from hybridtune.anatomy import Anatomy
from hybridtune.checkpoint import Base
from hybridtune.compose import Assembly
from hybridtune.recipe import Rule

AUTO = "AutoModelForSequenceClassification"
# What a checkpoint of a stage holds, and nothing else.
CHECKPOINT_FILES = {
    *("delta.safetensors", "manifest.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
}

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "good", "bad", "new", "old"]
_SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}

CLASSIFIERS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "bert": lambda **k: hf.BertForSequenceClassification(hf.BertConfig(**_SIZE, pad_token_id=0, **k)),
    "roberta": lambda **k: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZE, **_IDS, **k)),
    "distilbert": lambda **k: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=64, vocab_size=100, pad_token_id=0, **k)
    ),
    "deberta-v2": lambda **k: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **_SIZE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, pad_token_id=0, **k
        )
    ),
    "modernbert": lambda **k: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**_SIZE, **_IDS, cls_token_id=2, sep_token_id=3, **k)
    ),
    "llama": lambda **k: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_SIZE, **_IDS, num_key_value_heads=2, **k)),
    "qwen3": lambda **k: hf.Qwen3ForSequenceClassification(
        hf.Qwen3Config(**_SIZE, **_IDS, num_key_value_heads=2, head_dim=8, **k)
    ),
    "gemma": lambda **k: hf.GemmaForSequenceClassification(
        hf.GemmaConfig(**_SIZE, **_IDS, num_key_value_heads=1, head_dim=8, **k)
    ),
    "gpt2": lambda **k: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, **_IDS, **k)
    ),
    "t5": lambda **k: hf.T5ForSequenceClassification(
        hf.T5Config(
            d_model=32,
            num_layers=3,
            num_heads=4,
            d_kv=8,
            d_ff=64,
            vocab_size=100,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
            **k,
        )
    ),
    "bart": lambda **k: hf.BartForSequenceClassification(
        hf.BartConfig(
            d_model=32,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=100,
            **_IDS,
            decoder_start_token_id=3,
            **k,
        )
    ),
}

_LANGUAGE_MODELS = {
    "llama": hf.LlamaForCausalLM,
    "qwen3": hf.Qwen3ForCausalLM,
    "gemma": hf.GemmaForCausalLM,
    "gpt2": hf.GPT2LMHeadModel,
    "t5": hf.T5ForConditionalGeneration,
    "bart": hf.BartForConditionalGeneration,
    "marian": hf.MarianMTModel,
}
CAUSAL, SEQ2SEQ = ("llama", "qwen3", "gemma", "gpt2"), ("t5", "bart", "marian")


def classifier(name: str, seed: int = 0, **config: object) -> hf.PreTrainedModel:
    """A tiny classifier with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return CLASSIFIERS[name](**config).eval()


def headed(name: str, head: str, seed: int = 0) -> hf.PreTrainedModel:
    """A tiny model of an architecture with another head, such as TokenClassification, in evaluation mode."""
    config = classifier(name, seed).config
    torch.manual_seed(seed)
    return getattr(hf, f"AutoModelFor{head}").from_config(config).eval()


def _writer(name: str, seed: int, **config: object) -> hf.PreTrainedModel:
    if name == "marian":  # which has no classifier, and BART's sizes
        own = {"model_type": "marian", "max_position_embeddings": 128}  # which it computes slowly
        built = hf.MarianConfig(**classifier("bart").config.to_diff_dict() | own | config)
    else:
        built = classifier(name, seed, **config).config
    torch.manual_seed(seed)
    return _LANGUAGE_MODELS[name](built)


def language_model(name: str, seed: int = 0, **config: object) -> hf.PreTrainedModel:
    """A tiny language model, in evaluation mode, with weights so large that texts differ."""
    model = _writer(name, seed, **config).eval()
    saved = (one for key, one in model.named_parameters() if key not in model._keys_to_ignore_on_save)
    shake(saved, by=0.2, seed=seed)
    return model


def encoder_decoder() -> hf.PreTrainedModel:
    """Two tiny BERTs, the second with cross-attention."""
    torch.manual_seed(0)
    decoder = hf.BertConfig(**_SIZE, is_decoder=True, add_cross_attention=True)
    return hf.EncoderDecoderModel(
        encoder=hf.BertModel(hf.BertConfig(**_SIZE)), decoder=hf.BertLMHeadModel(decoder)
    ).eval()


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Splits at white space; letters and a few words are known."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def save_pretrained(folder: Path, name: str = "bert", seed: int = 0, **config: object) -> Path:
    """Writes a tiny model and its tokenizer as a plain Hugging Face folder."""
    classifier(name, seed, **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_writer(folder: Path, name: str, seed: int = 0, **config: object) -> Path:
    """Writes a tiny language model and its tokenizer, which ends texts with [SEP]."""
    model = encoder_decoder() if name == "encoder-decoder" else _writer(name, seed, **config)
    model.save_pretrained(folder)
    known = tokenizer()
    known.eos_token = "[SEP]"
    known.save_pretrained(folder)
    return folder


def save_body(folder: Path, name: str = "bert", seed: int = 0) -> Path:
    """Writes a tiny model without its head, as pretrained models come, and its tokenizer.

    Its weights are ten times as large as random ones are at first, so that what is added to them shows in the logits.
    """
    body = classifier(name, seed).base_model
    shake(body.parameters(), by=0.2, seed=seed)
    body.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    """Two rows of different lengths that end with the end token, padded."""
    ids = torch.tensor([[2, 5, 6, 7, 8, 9, 3], [2, 10, 11, 12, 3, 0, 0]])
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's logits for `batch()`, without gradients."""
    with torch.no_grad():
        return model(**batch()).logits


def train(model: torch.nn.Module, trained: Iterable[torch.nn.Parameter], steps: int, rate: float) -> None:
    """Plain SGD on `batch()`; nothing else requires gradients, and dropout stays as the model's mode says."""
    trained = list(trained)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=rate)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(**batch()).logits, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def shake(parameters: Iterable[torch.nn.Parameter], by: float = 0.1, seed: int = 0) -> None:
    """Adds noise, so that what a method has added shows in the output as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))


def rows(count: int, seed: int = 0, labels: int = 2, longest: int = 12, multi_label: bool = False) -> list[dict]:
    """Encoded rows of different lengths; the second token says which label (of several: which labels) a row has."""
    pick = random.Random(seed)
    made = []
    for _ in range(count):
        gold = pick.randrange(labels)
        ids = [2, 30 + gold, *(pick.randrange(4, 30) for _ in range(pick.randrange(1, longest - 2))), 3]
        row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": gold}
        if multi_label:
            row["labels"] = [float(number == gold or pick.random() < 0.2) for number in range(labels)]
        made.append(row)
    return made


def assembly(folder: Path, **config: object) -> tuple[Assembly, Base]:
    """A classifier loaded from a folder, ready for rules, and what manifests say it was loaded from."""
    loaded = models_of_ours.load(str(folder), AUTO, **config)
    base = Base(str(folder), None, models_of_ours.fingerprint(loaded.model, loaded.new), AUTO, dict(config))
    return Assembly(loaded.model, Anatomy(loaded.model, loaded.new)), base


def rule(part: str, method: str, **more: object) -> Rule:
    """A rule with all that a resolved one has."""
    return Rule(**{"part": part, "method": method, "learning_rate": 0.1, "weight_decay": 0.0, **more})
