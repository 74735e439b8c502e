"""The three formulas, one step each, against float64 numpy; and one contract suite over every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from scipy.special import ndtr
from torch import nn

from hybridtune import checkpoint, methods
from hybridtune.anatomy import Anatomy
from hybridtune.compose import Assembly, skeleton
from hybridtune.errors import MethodError, RecipeError
from hybridtune.methods import lora
from hybridtune.recipe import Stage

RATE = 0.1
PART = "layers[1:]"
SMALL = {
    "lora": {"r": 2},
    "adapter": {"bottleneck": 4},
    "prompt": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
}
TRAINING = [name for name in methods.names() if name != "freeze"]
CHANGES_OUTPUT_AT_START = {"prompt", "prefix"}
DOES_NOT_APPLY = {("prefix", "deberta-v2"): "does not call transformers' AttentionInterface"}

on_every_architecture = pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
every_method = pytest.mark.parametrize("name", methods.names())


def cells(names: list[str]) -> pytest.MarkDecorator:
    """Every method on every architecture, where it applies."""
    found = [(name, kind) for name in names for kind in tiny.CLASSIFIERS if (name, kind) not in DOES_NOT_APPLY]
    return pytest.mark.parametrize(("name", "architecture"), found)


def part_of(name: str) -> str:
    """Where the contract suite puts a method."""
    return "embeddings" if name == "prompt" else PART


def attach(model: nn.Module, name: str, part: str | None = None, **options: object) -> list[str]:
    """Puts a method on a part of a model, by itself."""
    method, part = methods.load(name), part or part_of(name)
    options = options or SMALL.get(name, {})
    return method.attach(model, Anatomy(model).part(part), methods.options_of(method, options))


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


class Seen:
    """What goes into a module and comes out of it, hooks of methods included, and the gradient that comes back."""

    def __init__(self, module: nn.Module) -> None:
        self._handles = [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not hasattr(self, "_x"):
            self._x = args[0]

    def _after(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        if not hasattr(self, "_y"):
            self._y = output
            if output.requires_grad:
                output.retain_grad()

    def _rows(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().numpy().reshape(-1, tensor.shape[-1])

    @property
    def x(self) -> np.ndarray:
        return self._rows(self._x)

    @property
    def y(self) -> np.ndarray:
        return self._rows(self._y)

    @property
    def g(self) -> np.ndarray:
        assert self._y.grad is not None
        return self._rows(self._y.grad)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


# --- full: W' = W - a dL/dW


def test_full_is_one_step_down_the_gradient() -> None:
    """BERT's head by hand: logits = C tanh(P x + p) + c, cross-entropy over two rows."""
    model = tiny.classifier("bert").double()
    tiny.shake(model.parameters())
    names = attach(model, "full", "head")
    before, seen = values(model), Seen(model.bert.pooler.dense)
    tiny.train(model, [model.get_parameter(name) for name in names], steps=1, rate=RATE)
    after = values(model)

    p, pooler, c, bias = (before[n] for n in ("bert.pooler.dense.weight", "bert.pooler.dense.bias", *CLASSIFIER))
    pooled = np.tanh(seen.x @ p.T + pooler)
    scores = pooled @ c.T + bias
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    d_scores = (softmax - np.eye(2)) / 2
    d_pooled = (d_scores @ c) * (1 - pooled**2)
    gradients = dict(zip(CLASSIFIER, (d_scores.T @ pooled, d_scores.sum(0)), strict=True))
    gradients |= {"bert.pooler.dense.weight": d_pooled.T @ seen.x, "bert.pooler.dense.bias": d_pooled.sum(0)}
    assert set(names) == set(gradients)
    for name, value in before.items():
        close(after[name], value - RATE * gradients[name] if name in gradients else value)
        assert (name in gradients) != np.array_equal(after[name], value)


CLASSIFIER = ("classifier.weight", "classifier.bias")

# --- adapter: h' = h + s (U f(D x + d) + u)


def shared_deberta() -> hf.PreTrainedModel:
    """As deberta-v3 is: its query's and key's matrices are called on relative positions too."""
    torch.manual_seed(0)
    config = tiny.classifier("deberta-v2").config
    config.share_att_key = True
    return hf.DebertaV2ForSequenceClassification(config).eval()


def bert_like(layer: str, value: str) -> dict[str, tuple[str, str]]:
    return {
        "attention": (f"{layer}.attention.self.{value}", f"{layer}.attention.output.dense"),
        "mlp": (f"{layer}.intermediate.dense", f"{layer}.output.dense"),
    }


# part; and of each of its blocks a matrix that the block's input goes into, and the matrix that its output comes from
PLACES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, tuple[str, str]]]] = {
    "bert": (lambda: tiny.classifier("bert"), "layers[1]", bert_like("bert.encoder.layer.1", "query")),
    "deberta": (shared_deberta, "layers[1]", bert_like("deberta.encoder.layer.1", "value_proj")),
    "gpt2": (
        lambda: tiny.classifier("gpt2"),
        "layers[1]",
        {
            "attention": ("transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"),
            "mlp": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
        },
    ),
    "t5": (
        lambda: tiny.classifier("t5"),
        "decoder.layers[1]",
        {
            kind: (f"transformer.decoder.block.1.layer.{first}", f"transformer.decoder.block.1.layer.{last}")
            for kind, first, last in (
                ("attention", "0.SelfAttention.v", "0.SelfAttention.o"),
                ("cross_attention", "1.EncDecAttention.q", "1.EncDecAttention.o"),
                ("mlp", "2.DenseReluDense.wi", "2.DenseReluDense.wo"),
            )
        },
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_adapter_adds_a_bottleneck_and_trains_it(place: str, placement: str, mode: str) -> None:
    make, part, places = PLACES[place]
    model, scale = make().double(), 0.5
    names = attach(model, "adapter", part, bottleneck=4, placement=placement, mode=mode, scaling=scale)
    tiny.shake(model.get_parameter(name) for name in names)  # U = 0 would hide D
    before = values(model)
    blocks = {kind: ends for kind, ends in places.items() if placement == "houlsby" or kind == "mlp"}
    first = {kind: Seen(model.get_submodule(ends[0])) for kind, ends in blocks.items()}
    last = {kind: Seen(model.get_submodule(ends[1])) for kind, ends in blocks.items()}
    tiny.train(model, [model.get_parameter(name) for name in names], steps=1, rate=RATE)
    after = values(model)

    checked = []
    for kind, (_, output) in blocks.items():
        adapter = next(n for n in names if n.endswith(f".adapter_{kind}.down.weight")).removesuffix("down.weight")
        keys = [adapter + key for key in ("down.weight", "down.bias", "up.weight", "up.bias")]
        down, d, up, u = (before[key] for key in keys)
        weight, bias = before[f"{output}.weight"], before.get(f"{output}.bias", 0.0)
        h = last[kind].x @ (weight if place == "gpt2" else weight.T) + bias
        x = h if mode == "sequential" else first[kind].x
        middle = x @ down.T + d
        bent = middle * ndtr(middle)
        close(last[kind].y, h + scale * (bent @ up.T + u))

        g = scale * last[kind].g
        slope = ndtr(middle) + middle * np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi)
        g_middle = (g @ up) * slope
        gradients = (g_middle.T @ x, g_middle.sum(0), g.T @ bent, g.sum(0))
        for key, gradient in zip(keys, gradients, strict=True):
            close(after[key], before[key] - RATE * gradient)
            assert np.abs(gradient).max() > 1e-9
        checked += keys
    assert sorted(checked) == sorted(names)
    assert all(np.array_equal(after[name], value) for name, value in before.items() if name not in names)


# --- LoRA: W' = W0 + (alpha / r) B A


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"r": 4}, 2.0),
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
    ],
    ids=["alpha 2r", "alpha", "rslora"],
)
@pytest.mark.parametrize(
    ("architecture", "part", "matrix"),
    [
        ("bert", "layers[1].attention.q", "bert.encoder.layer.1.attention.self.query"),
        ("gpt2", "layers[1].mlp.up", "transformer.h.1.mlp.c_fc"),  # a Conv1D: its weight is transposed
    ],
)
def test_lora_is_the_explicit_matrix_and_trains_b_and_a(
    architecture: str, part: str, matrix: str, options: dict[str, object], scale: float
) -> None:
    model = tiny.classifier(architecture).double()
    plain = copy.deepcopy(model)
    names = attach(model, "lora", part, **options)
    assert sorted(names) == [f"{matrix}.lora_A.default.weight", f"{matrix}.lora_B.default.weight"]
    tiny.shake(model.get_parameter(name) for name in names)  # B = 0 would hide A
    before, seen = values(model), Seen(model.get_submodule(matrix))
    a, b = (before[name] for name in sorted(names))
    w0, bias = before[f"{matrix}.base_layer.weight"], before[f"{matrix}.base_layer.bias"]
    turn = np.transpose if architecture == "gpt2" else np.asarray
    explicit = turn(w0) + scale * b @ a
    with torch.no_grad():
        plain.get_parameter(f"{matrix}.weight").copy_(torch.from_numpy(turn(explicit)))
    close(tiny.logits(model).numpy(), tiny.logits(plain).numpy())

    seen = Seen(model.get_submodule(matrix))
    tiny.train(model, [model.get_parameter(name) for name in names], steps=1, rate=RATE)
    after = values(model)
    close(seen.y, seen.x @ explicit.T + bias)
    gradient = seen.g.T @ seen.x  # of the explicit matrix
    close(after[names[0]], a - RATE * scale * b.T @ gradient)
    close(after[names[1]], b - RATE * scale * gradient @ a.T)
    assert np.abs(after[names[0]] - a).max() > 1e-9 < np.abs(after[names[1]] - b).max()
    assert all(np.array_equal(after[name], value) for name, value in before.items() if name not in names)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_loras_variants_start_unchanged_and_merge(init: bool | str, architecture: str, dora: bool) -> None:
    model = tiny.classifier(architecture)
    tiny.shake(model.parameters(), by=0.2)
    before = tiny.logits(model)
    names = attach(model, "lora", PART, r=4, init_lora_weights=init, use_dora=dora)
    assert any("magnitude" in name for name in names) == dora
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-5, rtol=0)
    tiny.shake(model.get_parameter(name) for name in names)
    tuned = tiny.logits(model)
    assert (tuned - before).abs().max() > 1e-2
    lora.merge(model, names)
    torch.testing.assert_close(tiny.logits(model), tuned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "mica"])
def test_loras_starts_need_no_numbers_in_a_rehearsal(init: str) -> None:
    model = tiny.classifier("bert")
    bare = skeleton(Assembly(model, Anatomy(model))).model
    names = attach(bare, "lora", PART, r=4, init_lora_weights=init)
    assert names == attach(model, "lora", PART, r=4, init_lora_weights=init)


# --- the contract, of every method on every architecture


@cells(methods.names())
def test_the_output_is_unchanged_at_the_start(name: str, architecture: str) -> None:
    model = tiny.classifier(architecture)
    tiny.shake(model.parameters(), by=0.2)
    before = tiny.logits(model)
    attach(model, name)
    assert torch.equal(tiny.logits(model), before) == (name not in CHANGES_OUTPUT_AT_START)


@cells(TRAINING)
def test_only_what_was_named_is_trained_and_all_of_it(name: str, architecture: str) -> None:
    model = tiny.classifier(architecture).double()  # the first steps of what starts at zero are small
    part = Anatomy(model).part(part_of(name))
    own = dict(model.named_parameters())
    names = attach(model, name)
    everything = own | {n: p for n, p in model.named_parameters() if all(p is not q for q in own.values())}
    before = {n: p.detach().clone() for n, p in everything.items()}
    tiny.train(model, [everything[n] for n in names], steps=3, rate=0.05)
    changed = {n for n, p in everything.items() if not torch.equal(p, before[n])}
    assert changed == set(names)
    assert changed & set(own) <= set(part.parameters)
    if name != "prompt":  # which belongs to the body that holds the embeddings
        assert all(n.startswith(tuple(f"{module}." for module in part.modules)) for n in names)
    assert all(p.isfinite().all() for p in everything.values())


@pytest.mark.parametrize(("name", "architecture"), DOES_NOT_APPLY)
def test_what_does_not_apply_says_why_and_leaves_the_model_as_it_was(name: str, architecture: str) -> None:
    model = tiny.classifier(architecture)
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(MethodError, match=DOES_NOT_APPLY[name, architecture]):
        attach(model, name)
    assert [n for n, _ in model.named_modules()] == before


def test_freeze_claims_everything_and_trains_nothing() -> None:
    model = tiny.classifier("bert")
    freeze, part = methods.load("freeze"), Anatomy(model).part("layers")
    assert freeze.claims(part, freeze.Options()) == part.parameters
    assert attach(model, "freeze", "layers") == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny model, written once."""
    home = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return home / name if (home / name).is_dir() else tiny.save_pretrained(home / name, name)

    return folder


@cells(methods.names())
def test_saved_and_loaded_the_logits_are_equal(
    name: str, architecture: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """On a model with new weights (five labels), which no reload would find again."""
    assembly, base = tiny.assembly(saved(architecture), num_labels=5)
    rules = [tiny.rule("new", "full"), tiny.rule(part_of(name), name, **SMALL.get(name, {}))]
    composition = assembly.begin(Stage(rules=rules))
    tiny.shake(assembly.parameter(n) for n in composition.names)
    checkpoint.write(tmp_path, assembly, base)
    loaded, again, _ = checkpoint.load(tmp_path)
    assert (tiny.logits(loaded.model) - tiny.logits(assembly.model)).abs().max() == 0.0
    assert again.delta == assembly.delta
    assert again.attachments == assembly.attachments


@cells([name for name in methods.names() if methods.load(name).MERGES is True])
def test_merged_is_unmerged(name: str, architecture: str) -> None:
    model = tiny.classifier(architecture)
    own = {n: p.shape for n, p in model.named_parameters()}
    tiny.shake(model.parameters(), by=0.2)
    start, names = tiny.logits(model), attach(model, name)
    tiny.shake(model.get_parameter(n) for n in names)
    before = tiny.logits(model)
    assert ((before - start).abs().max() > 1e-3) == bool(names)
    methods.load(name).merge(model, names)
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-5, rtol=0)
    assert {n: p.shape for n, p in model.named_parameters()} == own


@pytest.mark.parametrize("name", [name for name in methods.names() if methods.load(name).MERGES is not True])
def test_what_cannot_be_merged_says_why(name: str) -> None:
    model = tiny.classifier("llama")  # without biases, so that new ones are added
    assembly = Assembly(model, Anatomy(model))
    assembly.begin(Stage(rules=[tiny.rule("all", name)]))
    with pytest.raises(MethodError, match=rf"all: {name}.* cannot be merged.*\n.*previous: keep or drop"):
        assembly.merge()


@cells(methods.names())
def test_detached_the_model_is_what_it_was(name: str, architecture: str) -> None:
    def anatomy_of(model: nn.Module) -> dict[str, object]:
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        there = {**dict(model.named_modules()), **dict(model.named_parameters())}
        return {"hooks": hooks, "attributes": set(vars(model)), "objects": {n: id(x) for n, x in there.items()}}

    model = tiny.classifier(architecture)
    before, logits = anatomy_of(model), tiny.logits(model)
    own = {id(p) for p in model.parameters()}
    names = attach(model, name)
    tiny.shake(p for p in model.parameters() if id(p) not in own)
    added = [n for n, p in model.named_parameters() if n in names and id(p) not in own]
    methods.load(name).detach(model, added)
    assert anatomy_of(model) == before
    assert torch.equal(tiny.logits(model), logits)


@cells(methods.names())
def test_a_meta_model_gets_the_same_parameters(name: str, architecture: str) -> None:
    real = tiny.classifier(architecture)
    with torch.device("meta"):
        meta = tiny.classifier(architecture)
    assert attach(meta, name) == attach(real, name)
    assert all(p.is_meta for p in meta.parameters())
    assert [(n, p.shape) for n, p in meta.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]


@cells(TRAINING)
def test_a_copy_is_independent(name: str, architecture: str) -> None:
    model = tiny.classifier(architecture)
    names = attach(model, name)
    tiny.shake(model.get_parameter(n) for n in names)
    other, before = copy.deepcopy(model), tiny.logits(model)
    assert torch.equal(tiny.logits(other), before)
    tiny.shake((other.get_parameter(n) for n in names), seed=1)
    assert torch.equal(tiny.logits(model), before)
    moved = tiny.logits(other)
    assert not torch.allclose(moved, before, atol=1e-6)
    tiny.shake((model.get_parameter(n) for n in names), seed=2)
    assert torch.equal(tiny.logits(other), moved)


# --- looking methods up, and what goes wrong

MINE = """
from pydantic import BaseModel

class Options(BaseModel):
    ending: str = "bias"

def learning_rate(part, width):
    return 1e-3

def claims(part, options):
    return tuple(name for name in part.parameters if name.endswith(options.ending))

def attach(model, part, options):
    return list(claims(part, options))

def detach(model, names):
    pass
"""


def test_a_users_own_file_is_a_method(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    mine = methods.load(str(path))
    assert (mine.SUMMARY, mine.WRAPS, mine.MERGES) == ("mine", False, "it has no merge()")
    model = tiny.classifier("bert")
    assembly = Assembly(model, Anatomy(model))
    stage = Stage(rules=[tiny.rule("layers", "full"), tiny.rule("layers[0]", str(path), ending="query.bias")])
    own = ("bert.encoder.layer.0.attention.self.query.bias",)
    composition = assembly.begin(stage)
    assert composition.groups[-1].names == own
    assert set(composition.names) == set(assembly.anatomy.part("layers").parameters)
    with pytest.raises(RecipeError, match="unknown option endin, did you mean ending"):
        methods.options_of(mine, {"endin": "x"})  # its Options do not forbid what they do not know


def test_a_users_own_file_must_keep_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    with pytest.raises(MethodError, match="there is no such file"):
        methods.load(str(path))
    path.write_text(MINE[: MINE.index("def attach")])
    with pytest.raises(MethodError, match=r"lacks attach\n.*mend"):
        methods.load(str(path))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(MethodError, match=r'unknown method "lorra", did you mean "lora"\?\n.*adapter, .*or a path'):
        methods.load("lorra")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lora", {"rank": 4}, "method lora: unknown option rank, did you mean r?.*\n.*r, lora_alpha"),
        ("lora", {"alpha": 4}, "did you mean lora_alpha"),
        ("lora", {"lora_alfa": 4}, "unknown option lora_alfa, did you mean lora_alpha"),
        ("lora", {"r": 0}, r"method lora: r: should be greater than 0\n.*0"),
        ("lora", {"init_lora_weights": "zeros"}, "method lora: .*init_lora_weights: zeros is not true, gaussian"),
        ("lora", {"init_lora_weights": "eva"}, "eva needs a pass over the data"),
        ("lora", {"init_lora_weights": "orthogonal", "r": 3}, "orthogonal needs an even r"),
        ("adapter", {"placement": "houlsbi"}, "method adapter: placement: should be .*'pfeiffer'\n.*houlsbi"),
        ("adapter", {"dropout": 1.0}, "method adapter: dropout: should be less than 1"),
        ("full", {"r": 4}, "method full: unknown option r\n.*no options"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        methods.options_of(methods.load(name), options)


@pytest.mark.parametrize(
    ("name", "part", "options", "says"),
    [
        ("lora", "norms", {}, "lora on norms: no matrix is left there for it"),
        ("lora", "embeddings", {}, "lora on embeddings: no matrix"),
        ("adapter", "head", {}, "adapter on head: the part has no whole attention or feed-forward block"),
        ("adapter", "layers.attention.q", {}, "no whole attention"),
        ("adapter", "layers.attention", {"placement": "pfeiffer"}, "no whole feed-forward block"),
        ("adapter", "layers", {"activation": "sigmoidal"}, r"unknown activation sigmoidal\n.*gelu"),
    ],
)
def test_a_method_that_cannot_sit_there_says_so(name: str, part: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(MethodError, match=says):
        attach(tiny.classifier("bert"), name, part, **options)


def test_a_second_adapter_in_one_block_is_refused() -> None:
    model = tiny.classifier("bert")
    attach(model, "adapter", "layers[0]")
    with pytest.raises(MethodError, match=r"its attention block has one already\n.*previous: drop"):
        attach(model, "adapter", "layers")


def test_default_rates_shrink_with_width_and_depth() -> None:
    parts = Anatomy(tiny.classifier("bert"))
    layers, head = parts.part("layers"), parts.part("head")
    full, bent, low_rank = (methods.load(name).learning_rate for name in ("full", "adapter", "lora"))
    assert full(layers, 384) == 3e-4 > full(layers, 768) > full(layers, 8192) == 1e-5
    assert full(head, 384) == full(head, 8192) == 1e-3
    assert parts.part("layers[0].attention").depth == 3
    assert full(replace(layers, depth=6), 384) == 3e-4 > full(replace(layers, depth=12), 384) == 1.5e-4
    assert low_rank(layers, 384) == bent(layers, 384) == 1e-3 > low_rank(layers, 768) > low_rank(layers, 1e5) == 1e-4
