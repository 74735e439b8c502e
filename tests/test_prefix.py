"""Prefixes, against attention written out in float64 numpy, and against what must not change."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from hybridtune import checkpoint, methods
from hybridtune.anatomy import Anatomy
from hybridtune.errors import MethodError
from hybridtune.methods import prefix
from hybridtune.recipe import Stage

COUNT = 4
HEADS, WIDTH = 4, 8
ARCHITECTURES = [name for name in tiny.CLASSIFIERS if name != "deberta-v2"]
HOW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}

on_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
in_both_implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def attach(model: nn.Module, part: str = "layers", **options: object) -> list[str]:
    """Puts prefixes on a model, large enough to be seen."""
    options = {"num_virtual_tokens": COUNT, "init_std": 1.0, **options}
    return prefix.attach(model, Anatomy(model).part(part), methods.options_of(methods.load("prefix"), options))


def classifier(architecture: str, implementation: str = "sdpa", **config: object) -> hf.PreTrainedModel:
    model = tiny.classifier(architecture, **config).double()
    model.set_attn_implementation(implementation)
    tiny.shake(model.parameters(), by=0.2)
    return model


def implementations(model: nn.Module) -> dict[str, str | None]:
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    return {name: config._attn_implementation for name, config in configs.items() if config is not None}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# --- a(x) = softmax(s Q [P_k; K]^T + m) [P_v; V]


class Seen:
    """What goes into a module and comes out of it."""

    def __init__(self, module: nn.Module) -> None:
        module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, object], output: object) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output


def heads(rows: np.ndarray, count: int) -> np.ndarray:
    """[batch, length, heads * width] -> [batch, heads, length, width]"""
    return rows.reshape(*rows.shape[:-1], count, -1).swapaxes(-2, -3)


def by_hand(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, p: tuple[np.ndarray, np.ndarray], seen: np.ndarray, scale: float
) -> np.ndarray:
    """Attention of [batch, heads, queries, width] over [batch, key heads, keys, width] and a prefix [n, all heads]."""
    joined = []
    for learned, own in zip(p, (k, v), strict=True):
        front = np.broadcast_to(heads(learned, own.shape[1]), (*own.shape[:2], len(learned), own.shape[-1]))
        joined.append(np.repeat(np.concatenate([front, own], axis=2), q.shape[1] // own.shape[1], axis=1))
    scores = scale * q @ joined[0].swapaxes(-1, -2)
    seen = np.concatenate([np.ones((*seen.shape[:-1], len(p[0])), dtype=bool), seen], axis=-1)
    scores = np.where(np.broadcast_to(seen, scores.shape), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ joined[1]
    return mixed.swapaxes(1, 2).reshape(len(q), q.shape[2], -1)


def run(model: nn.Module, path: str, *matrices: str) -> tuple[list[np.ndarray], Seen, tuple[np.ndarray, np.ndarray]]:
    """Outputs of an attention module's matrices, what went into it, and its prefix."""
    module = model.get_submodule(path)
    watched = [Seen(module.get_submodule(matrix)) for matrix in matrices]
    whole = Seen(module)
    tiny.logits(model)
    learned = tuple(getattr(module.prefix, name).detach().numpy() for name in ("key", "value"))
    return [one.output.detach().numpy() for one in watched], whole, learned


@in_both_implementations
def test_bert_is_the_formula(implementation: str) -> None:
    model = classifier("bert", implementation)
    names = attach(model, "layers[1]")
    path = "bert.encoder.layer.1.attention.self"
    assert names == [f"{path}.prefix.key", f"{path}.prefix.value"]
    (q, k, v), whole, learned = run(model, path, "query", "key", "value")
    seen = tiny.batch()["attention_mask"].bool().numpy()[:, None, None, :]
    expected = by_hand(heads(q, HEADS), heads(k, HEADS), heads(v, HEADS), learned, seen, WIDTH**-0.5)
    np.testing.assert_allclose(whole.output[0].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@in_both_implementations
def test_llama_is_the_formula(implementation: str) -> None:
    """Two key heads for four query heads, positions rotated, a causal mask; the prefix is not rotated."""
    model = classifier("llama", implementation)
    attach(model, "layers[1].attention")
    path = "model.layers.1.self_attn"
    assert model.get_submodule(path).prefix.key.shape == (COUNT, 2 * WIDTH)
    (q, k, v, _), whole, learned = run(model, path, "q_proj", "k_proj", "v_proj", "o_proj")
    cos, sin = (half.detach().numpy()[:, None] for half in whole.kwargs["position_embeddings"])

    def rotate(x: np.ndarray) -> np.ndarray:
        return x * cos + np.concatenate([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], axis=-1) * sin

    seen = (
        np.tril(np.ones((7, 7), dtype=bool))[None, None] & tiny.batch()["attention_mask"].bool().numpy()[:, None, None]
    )
    mixed = by_hand(rotate(heads(q, HEADS)), rotate(heads(k, 2)), heads(v, 2), learned, seen, WIDTH**-0.5)
    expected = mixed @ model.get_submodule(path).o_proj.weight.detach().numpy().T
    single = {"sdpa": 1e-12, "eager": 1e-6}[implementation]  # its eager softmax is in single precision
    np.testing.assert_allclose(whole.output[0].detach().numpy(), expected, rtol=1e-9, atol=single)


@in_both_implementations
@pytest.mark.parametrize("layer", [0, 1])
def test_gpt2_and_t5_are_the_formula(implementation: str, layer: int) -> None:
    """GPT-2 makes keys and values with one matrix; T5 adds a position bias, none for the prefix, and does not scale."""
    model = classifier("gpt2", implementation)
    attach(model)
    (qkv, mixed_in), _, learned = run(model, f"transformer.h.{layer}.attn", "c_attn", "c_proj")
    rows = [heads(part, HEADS) for part in np.split(qkv, 3, axis=-1)]
    seen = (
        np.tril(np.ones((7, 7), dtype=bool))[None, None] & tiny.batch()["attention_mask"].bool().numpy()[:, None, None]
    )
    out = model.transformer.h[layer].attn.c_proj
    expected = by_hand(*rows, learned, seen, WIDTH**-0.5) @ out.weight.detach().numpy() + out.bias.detach().numpy()
    np.testing.assert_allclose(mixed_in, expected, rtol=1e-9, atol=1e-12)

    model = classifier("t5", implementation)
    attach(model, "encoder.layers")
    path = f"transformer.encoder.block.{layer}.layer.0.SelfAttention"
    (q, k, v, found), whole, learned = run(model, path, "q", "k", "v", "o")
    bias = whole.output[1].detach().numpy()  # [1, heads, queries, keys], as it is handed on to the next layer
    assert bias.shape == (1, HEADS, 7, 7)
    q, k, v = (heads(rows, HEADS) for rows in (q, k, v))
    keys = np.concatenate([np.broadcast_to(heads(learned[0], HEADS), (2, HEADS, COUNT, WIDTH)), k], axis=2)
    values = np.concatenate([np.broadcast_to(heads(learned[1], HEADS), (2, HEADS, COUNT, WIDTH)), v], axis=2)
    scores = q @ keys.swapaxes(-1, -2)
    scores[..., COUNT:] += np.where(tiny.batch()["attention_mask"].bool().numpy()[:, None, None], bias, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True) @ values).swapaxes(1, 2).reshape(2, 7, -1)
    matrix = model.get_submodule(path).o.weight.detach().numpy()
    np.testing.assert_allclose(found, mixed @ matrix.T, rtol=1e-9, atol=1e-12)


@on_every_architecture
def test_both_implementations_agree(architecture: str) -> None:
    logits = []
    for implementation in ("sdpa", "eager"):
        model = classifier(architecture, implementation)
        plain = tiny.logits(model)
        torch.manual_seed(0)
        attach(model)
        logits.append(tiny.logits(model))
        assert (logits[-1] - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)  # some have a softmax in single precision


# --- what must not change


@on_every_architecture
@in_both_implementations
def test_padding_and_a_mask_that_is_left_out_change_nothing(architecture: str, implementation: str) -> None:
    model = classifier(architecture, implementation)
    attach(model)
    whole = tiny.logits(model)
    short = {key: rows[1:, :5] for key, rows in tiny.batch().items()}
    with torch.no_grad():
        close(model(**short).logits, whole[1:])
        close(model(input_ids=short["input_ids"]).logits, whole[1:])


@pytest.mark.parametrize("architecture", tiny.CAUSAL)
@pytest.mark.parametrize("masked", [True, False])
def test_later_tokens_do_not_move_earlier_logits(architecture: str, masked: bool) -> None:
    model = tiny.language_model(architecture).double()
    attach(model)
    ids = tiny.batch()["input_ids"][:1]
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    other = ids.clone()
    other[0, 4] = 40
    with torch.no_grad():
        one, two = model(ids, **mask).logits, model(other, **mask).logits
    close(one[:, :4], two[:, :4])
    assert (one[:, 4:] - two[:, 4:]).abs().amax(-1).min() > 1e-6


def test_a_window_does_not_hide_the_prefix() -> None:
    """Behind the window's end the prefix of the last layer is all that differs."""
    for architecture, config in (("modernbert", {"local_attention": 4}), ("qwen3", WINDOW)):
        model = classifier(architecture, **config)
        attach(model, "layers[1]")
        hidden = []
        for _ in range(2):
            hidden.append(model.base_model(**tiny.batch()).last_hidden_state.detach())
            tiny.shake(p for name, p in model.named_parameters() if ".prefix." in name)
        assert (hidden[0] - hidden[1]).abs().amax(-1)[0].min() > 1e-6  # at every place of the first row


WINDOW = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}


@pytest.mark.parametrize("architecture", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
@in_both_implementations
def test_generation_is_the_same_with_a_cache_and_without(architecture: str, implementation: str) -> None:
    model = tiny.language_model(architecture).double()
    model.set_attn_implementation(implementation)
    batch = tiny.batch()
    if architecture in tiny.CAUSAL:
        ids = torch.tensor([[2, 5, 6, 7, 8], [0, 0, 2, 10, 11]])
        batch = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    plain = model.generate(**batch, **HOW)
    attach(model)
    if architecture in tiny.SEQ2SEQ:
        attach(model, "layers.cross_attention")
    found = model.generate(**batch, **HOW)
    assert torch.equal(found, model.generate(**batch, **HOW, use_cache=False))
    assert not torch.equal(found, plain)
    if architecture in tiny.CAUSAL:  # left padding
        assert torch.equal(model.generate(ids[1:, 2:], **HOW), found[1:, 2:])
    beams = HOW | {"num_beams": 3}
    assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_a_prefix_of_zeros_takes_its_share(architecture: str) -> None:
    model = classifier(architecture)
    before = tiny.logits(model)
    names = attach(model)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    assert (tiny.logits(model) - before).abs().max() > 1e-6


# --- parts


@pytest.mark.parametrize(
    ("architecture", "part", "owners"),
    [
        ("bert", "all", [f"bert.encoder.layer.{n}.attention.self" for n in range(3)]),
        ("bert", "layers[0:2]", [f"bert.encoder.layer.{n}.attention.self" for n in range(2)]),
        ("bert", "layers[-1].attention", ["bert.encoder.layer.2.attention.self"]),
        ("bart", "decoder.layers[0]", ["model.decoder.layers.0.self_attn"]),
        ("bart", "decoder.layers[0].cross_attention", ["model.decoder.layers.0.encoder_attn"]),
        ("t5", "decoder.layers[1].attention", ["transformer.decoder.block.1.layer.0.SelfAttention"]),
        ("t5", "layers[1].cross_attention", ["transformer.decoder.block.1.layer.1.EncDecAttention"]),
        ("modernbert", "layers[0]", ["model.layers.0.attn"]),
        ("gpt2", "layers[0]", ["transformer.h.0.attn"]),
        ("distilbert", "layers[0]", ["distilbert.transformer.layer.0.attention"]),
    ],
)
def test_a_part_says_which_blocks(architecture: str, part: str, owners: list[str]) -> None:
    model = classifier(architecture)
    before = tiny.logits(model)
    names = attach(model, part)
    assert names == [f"{owner}.prefix.{name}" for owner in owners for name in ("key", "value")]
    assert (tiny.logits(model) - before).abs().max() > 1e-6


def test_two_rules_on_different_layers_leave_one_by_one() -> None:
    model = classifier("bert")
    before, own = tiny.logits(model), implementations(model)
    first, second = attach(model, "layers[0]"), attach(model, "layers[1:]", num_virtual_tokens=2)
    assert [len(model.get_parameter(name)) for name in (*first, *second)] == [4, 4, 2, 2, 2, 2]
    prefix.detach(model, first)
    assert set(implementations(model).values()) == {"hybridtune_prefix_sdpa"}
    assert (tiny.logits(model) - before).abs().max() > 1e-6
    prefix.detach(model, second)
    assert implementations(model) == own
    assert torch.equal(tiny.logits(model), before)


def test_lora_and_a_prefix_share_a_block() -> None:
    model = classifier("gpt2")
    lora = methods.load("lora")
    lora.attach(model, Anatomy(model).part("layers"), lora.Options(r=2))
    part = Anatomy(tiny.classifier("gpt2")).part("layers")  # as it was loaded
    names = prefix.attach(model, part, prefix.Options(num_virtual_tokens=COUNT))
    assert model.get_parameter(names[0]).shape == (COUNT, 32)
    tiny.logits(model)


def test_encoder_and_decoder_of_their_own_get_their_own_back() -> None:
    model = tiny.encoder_decoder().double()
    tiny.shake(model.parameters(), by=0.2)
    given = tiny.batch() | {"decoder_input_ids": tiny.batch()["input_ids"]}
    model.set_attn_implementation({"": "sdpa", "encoder": "eager", "decoder": "sdpa"})
    own, before = implementations(model), model(**given).logits
    seen = [before]
    names = []
    for part in ("encoder.layers", "decoder.layers", "decoder.layers.cross_attention"):
        names += attach(model, part)
        seen.append(model(**given).logits)
        assert (seen[-1] - seen[-2]).abs().max() > 1e-6
    prefix.detach(model, names)
    assert implementations(model) == own
    assert torch.equal(model(**given).logits, before)


# --- training


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])  # in double precision throughout
def test_one_step_is_down_the_gradient(architecture: str, checkpointing: bool | None) -> None:
    """Against differences of the loss, in a direction drawn at random."""
    model = classifier(architecture)
    names = attach(model)
    tensors = [model.get_parameter(name) for name in names]
    labels = torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(1)
    way = [torch.randn(tensor.shape, generator=generator, dtype=torch.double) for tensor in tensors]

    def loss(step: float) -> float:
        with torch.no_grad():
            for tensor, one in zip(tensors, way, strict=True):
                tensor.add_(step * one)
            found = nn.functional.cross_entropy(tiny.logits(model), labels).item()
            for tensor, one in zip(tensors, way, strict=True):
                tensor.sub_(step * one)
        return found

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tiny.train(model, tensors, steps=1, rate=0.1)
    moved = sum(((before[n] - t.detach()) / 0.1 * w).sum() for n, t, w in zip(names, tensors, way, strict=True))
    assert abs(slope) > 1e-4
    assert moved.item() == pytest.approx(slope, rel=1e-6)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(names)


# --- on and off


@on_every_architecture
@in_both_implementations
def test_detached_the_model_is_what_it_was(architecture: str, implementation: str) -> None:
    def anatomy_of(model: nn.Module) -> dict[str, object]:
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        there = {**dict(model.named_modules()), **dict(model.named_parameters())}
        objects = {n: id(x) for n, x in there.items()}
        return {"hooks": hooks, "objects": objects, "keys": list(model.state_dict()), "calls": implementations(model)}

    model = classifier(architecture, implementation)
    before, logits = anatomy_of(model), tiny.logits(model)
    names = attach(model)
    assert not torch.equal(tiny.logits(model), logits)
    prefix.detach(model, names)
    assert anatomy_of(model) == before
    assert torch.equal(tiny.logits(model), logits)


@on_every_architecture
def test_a_copy_is_independent(architecture: str) -> None:
    model = classifier(architecture)
    plain = tiny.logits(model)
    names = attach(model)
    other, before = copy.deepcopy(model), tiny.logits(model)
    assert torch.equal(tiny.logits(other), before)
    tiny.shake((other.get_parameter(name) for name in names), by=1.0)
    assert torch.equal(tiny.logits(model), before)
    assert not torch.allclose(tiny.logits(other), before, atol=1e-6)
    prefix.detach(other, names)
    assert torch.equal(tiny.logits(other), plain)
    assert torch.equal(tiny.logits(model), before)


@on_every_architecture
def test_saved_and_loaded_the_logits_are_equal(architecture: str, tmp_path: Path) -> None:
    assembly, base = tiny.assembly(tiny.save_pretrained(tmp_path / "base", architecture), num_labels=5)
    rules = [
        tiny.rule("new", "full"),
        tiny.rule("layers[0]", "prefix", num_virtual_tokens=COUNT),
        tiny.rule("layers[1:]", "prefix", num_virtual_tokens=2),
    ]
    composition = assembly.begin(Stage(rules=rules))
    tiny.shake((assembly.parameter(name) for name in composition.names), by=1.0)
    checkpoint.write(tmp_path, assembly, base)
    loaded, again, _ = checkpoint.load(tmp_path)
    assert (tiny.logits(loaded.model) - tiny.logits(assembly.model)).abs().max() == 0.0
    assert again.attachments == assembly.attachments
    assert again.delta == assembly.delta


@on_every_architecture
def test_a_meta_model_gets_the_same_parameters(architecture: str) -> None:
    real = tiny.classifier(architecture)
    with torch.device("meta"):
        meta = tiny.classifier(architecture)
    assert attach(meta) == attach(real)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert [(n, p.shape) for n, p in meta.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]


@pytest.mark.parametrize("make", [lambda: tiny.classifier("t5"), tiny.encoder_decoder], ids=["t5", "two models"])
def test_a_saved_config_does_not_know(make: Callable[[], hf.PreTrainedModel], tmp_path: Path) -> None:
    model = make()
    attach(model)
    model.config.save_pretrained(tmp_path)
    assert "hybridtune" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


# --- what cannot be


def test_an_attention_that_is_not_called_through_the_interface_is_refused() -> None:
    model = tiny.classifier("deberta-v2")
    own, logits = implementations(model), tiny.logits(model)
    with pytest.raises(MethodError, match=r"DisentangledSelfAttention does not call .*AttentionInterface.*\n.*mend"):
        attach(model)
    assert implementations(model) == own
    assert torch.equal(tiny.logits(model), logits)


def test_a_prefix_that_is_never_reached_is_noticed() -> None:
    model = tiny.classifier("bert")
    attach(model, "layers[1]")
    tiny.logits(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(MethodError, match="prefix on BertSelfAttention does not call"):
        tiny.logits(model)


def test_other_implementations_are_refused() -> None:
    model = tiny.classifier("bert")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        MethodError, match=r"attention is flash_attention_2\n.*sdpa or eager\n.*attn_implementation='sdpa'"
    ):
        attach(model)


@pytest.mark.parametrize("part", ["head", "layers.mlp", "layers.attention.q", "embeddings", "norms"])
def test_a_part_without_attention_is_refused(part: str) -> None:
    with pytest.raises(MethodError, match=rf"prefix on {part}: the part has no whole attention block"):
        attach(tiny.classifier("bert"), part)


def test_a_second_prefix_is_refused() -> None:
    model = tiny.classifier("bert")
    attach(model, "layers[0]")
    with pytest.raises(MethodError, match=r"prefix on bert\.encoder\.layer\.0\.attention\.self: it has one already"):
        attach(model)
