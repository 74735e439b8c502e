"""Which rule has which tensor, stage after stage; what resolve() fills in; and what is refused before any training."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from hybridtune import methods
from hybridtune import model as models
from hybridtune.anatomy import Anatomy
from hybridtune.compose import Assembly, Composition
from hybridtune.errors import MethodError, PartError, RecipeError
from hybridtune.recipe import Rule, Stage, Strategy, Training, built_in_strategies, load_strategy
from hybridtune.resolve import STAGE_DEFAULTS, plan, resolve

NEW = ("classifier.weight", "classifier.bias")
RULES = list[tuple[str, str] | tuple[str, str, dict[str, object]]]


def assembly(name: str = "bert", new: tuple[str, ...] = NEW) -> Assembly:
    model = tiny.classifier(name)
    return Assembly(model, Anatomy(model, new))


def stage(rules: RULES, **keys: object) -> Stage:
    return Stage(rules=[tiny.rule(part, method, **dict(*options)) for part, method, *options in rules], **keys)


def names(*parts: str) -> set[str]:
    """Names of the parameters of some parts of the tiny BERT."""
    return {name for part in parts for name in bert().part(part).parameters}


@cache
def bert() -> Anatomy:
    return Anatomy(tiny.classifier("bert"), NEW)


def bases(composition: Composition) -> set[str]:
    """The matrices that LoRA sits on."""
    return {name.split(".lora_")[0] for name in composition.names if ".lora_" in name}


def under(*layers: int, model: str = "bert.encoder.layer") -> tuple[str, ...]:
    return tuple(f"{model}.{number}." for number in layers)


# --- claims


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        ([("layers[0]", "full")], names("layers[0]")),
        ([("layers[0]", "full"), ("head", "full")], names("layers[0]", "head")),
        ([("layers", "full"), ("layers[1]", "freeze")], names("layers[0]", "layers[2]")),
        ([("layers[1]", "freeze"), ("layers", "full")], names("layers")),
        ([("all", "full"), ("embeddings", "freeze")], names("layers", "head")),
        ([("all", "full"), ("norms", "freeze")], names("all") - names("norms")),
        ([("layers", "freeze"), ("layers.biases", "full")], names("layers.biases")),
        ([("all", "freeze"), ("layers[2].attention", "full"), ("layers[2].attention.q", "freeze"), ("new", "full")],
         names("layers[2].attention", "new") - names("layers[2].attention.q")),
    ],
)  # fmt: skip
def test_of_two_claims_the_later_rule_wins(rules: RULES, trained: set[str]) -> None:
    composition = assembly().begin(stage(rules))
    assert set(composition.names) == trained
    assert len(composition.names) == len(trained)


def test_a_rule_keeps_its_rate_where_the_later_rule_took_the_rest() -> None:
    rules = stage([("all", "full", {"learning_rate": 1e-4}), ("layers[-1:]", "full", {"learning_rate": 1e-3})])
    composition = assembly().begin(rules)
    rates = {name: group.learning_rate for group in composition.groups for name in group.names}
    assert {name for name, rate in rates.items() if rate == 1e-3} == names("layers[2]")
    assert {name for name, rate in rates.items() if rate == 1e-4} == names("all") - names("layers[2]")


def test_full_on_top_leaves_no_lora_there() -> None:
    made = assembly()
    composition = made.begin(stage([("layers", "lora"), ("layers[-2:]", "full")]))
    assert bases(composition) == set(bert().part("layers[0]").matrices)
    assert {n for n in composition.names if ".lora_" not in n} == names("layers[1:]")
    assert not any("lora" in n for n, _ in made.model.named_parameters() if n.startswith(under(1, 2)))


def test_freeze_after_lora_leaves_no_lora_there() -> None:
    composition = assembly().begin(stage([("layers", "lora"), ("layers[0:2]", "freeze")]))
    assert bases(composition) == set(bert().part("layers[2]").matrices)


def test_lora_after_full_freezes_the_matrices_it_sits_on() -> None:
    composition = assembly().begin(stage([("layers[0]", "full"), ("layers[0].attention.q", "lora")]))
    query = "bert.encoder.layer.0.attention.self.query"
    assert set(composition.names) == names("layers[0]") - {f"{query}.weight"} | {
        f"{query}.lora_A.default.weight",
        f"{query}.lora_B.default.weight",
    }


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_an_adapter_and_lora_share_a_layer_in_either_order(architecture: str, mode: str) -> None:
    outputs = []
    for order in (1, -1):
        made = assembly(architecture, ())
        start = tiny.logits(made.model)
        rules: RULES = [("layers", "lora", {"r": 2}), ("layers", "adapter", {"bottleneck": 4, "mode": mode})]
        composition = made.begin(stage(rules[::order]))
        assert torch.equal(tiny.logits(made.model), start)
        assert {".lora_" in n or ".adapter_" in n for n in composition.names} == {True}
        tiny.shake(made.parameter(n) for n in sorted(composition.names))
        outputs.append(tiny.logits(made.model))
        assert not torch.equal(outputs[-1], start)
        made.drop()
        assert torch.equal(tiny.logits(made.model), start)
    assert torch.equal(*outputs)


def test_what_was_added_is_in_the_models_mode() -> None:
    """A model that is evaluated must not drop out in its adapters, one that trains must."""
    for mode in (False, True):
        made = assembly()
        made.model.train(mode)
        made.begin(stage([("layers", "lora", {"lora_dropout": 0.5}), ("layers", "adapter", {"dropout": 0.5})]))
        assert {module.training for module in made.model.modules()} == {mode}


# --- what cannot be


def tied() -> Assembly:
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, bos_token_id=2, eos_token_id=3)
    )
    return Assembly(model, Anatomy(model))


@pytest.mark.parametrize(
    ("make", "rules", "says"),
    [
        (assembly, [("layers", "lora", {"r": 4}), ("layers[1].mlp", "lora", {"r": 8})],
         r"two rules sit on one matrix: layers: lora\(r=4\) and layers\[1\]\.mlp: lora\(r=8\)\n.*found.*intermediate"
         r".*\n.*mend.*do not overlap"),
        (assembly, [("head", "lora")], r"head: lora: classifier.weight is new.*\n.*mend: +head: full"),
        (assembly, [("new", "lora")], "lora on new: no matrix is left there"),
        (tied, [("embeddings", "freeze"), ("head", "full")],
         r"embeddings: freeze and head: full: transformer.wte.weight is tied.*\n.*mend: +train both parts or freeze"),
        (tied, [("embeddings", "full"), ("head", "freeze")], "is tied"),
        (assembly, [("layers", "freeze")], r"leave nothing to train\n.*layers: freeze"),
        (assembly, [("layers", "full"), ("all", "freeze")], "leave nothing to train"),
        (assembly, [("layers", "lora"), ("layers", "full"), ("layers", "freeze")], "lora on layers: no matrix is left"),
        (assembly, [("layers", "bias"), ("all", "bias")], "bias on layers: neither a bias nor a matrix is left there"),
        (assembly, [("layers", "adapter"), ("layers", "adapter")],
         r"two rules train the same: layers: adapter and layers: adapter\n.*found.*adapter_attention\.down\.weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Callable[[], Assembly], rules: RULES, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        make().begin(stage(rules))


@pytest.mark.parametrize("rules", [[("embeddings", "full"), ("head", "full")], [("all", "full"), ("head", "freeze")]])
def test_tied_weights_may_be_trained_or_frozen_by_both_names(rules: RULES) -> None:
    trained = tied().begin(stage(rules)).names
    assert trained.count("transformer.wte.weight") == (rules[1][1] == "full")


def test_lora_on_all_leaves_tied_and_new_weights_alone() -> None:
    assert "lm_head" not in bases(tied().begin(stage([("all", "lora")])))
    made = assembly()
    made.begin(stage([("head", "full")]))
    matrices = {*bert().part("layers").matrices, "bert.pooler.dense"}
    assert bases(made.begin(stage([("all", "lora")]))) == matrices  # in a later stage too


# --- new weights


def resolved(made: Assembly, *stages: Stage | RULES, **training: object) -> Strategy:
    asked = [one if isinstance(one, Stage) else Stage(rules=[Rule(part=p, method=m) for p, m in one]) for one in stages]
    return resolve(Strategy(name="s", stages=asked), Training(**training), made, 32)[0]


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        ([("layers[0]", "lora")], True),
        ([("all", "lora")], True),
        ([("layers[0]", "full")], True),
        ([("all", "freeze"), ("layers[0]", "full")], True),  # not by name: a random head would stay random
        ([("new", "freeze"), ("layers[0]", "full")], False),
        ([("layers[0]", "full"), ("head", "freeze")], False),
    ],
)
def test_new_weights_are_trained_in_the_first_stage_unless_frozen_by_name(rules: RULES, trained: bool) -> None:
    made = assembly()
    first, second = resolved(made, rules, [("layers[1]", "full")]).stages
    assert (set(NEW) <= set(made.begin(first).names)) == trained
    assert set(NEW).isdisjoint(made.begin(second).names)
    assert set(NEW) <= set(made.delta)  # trained or not: a reload would make others


def test_new_weights_get_the_rate_of_a_later_rule_on_them() -> None:
    made = assembly()
    asked = Stage(rules=[Rule(part="head", method="full", learning_rate=0.5), Rule(part="layers", method="lora")])
    composition = made.begin(resolved(made, asked).stages[0])
    assert {g.learning_rate for g in composition.groups if set(NEW) & set(g.names)} == {0.5}


def test_a_checkpoint_that_has_everything_gets_no_rule_for_new_weights() -> None:
    made = assembly(new=())
    assert [rule.part for rule in resolved(made, [("layers", "lora")]).stages[0].rules] == ["layers"]


# --- groups


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_biases_and_norms_are_not_decayed(architecture: str) -> None:
    made = assembly(architecture, ())
    rules: RULES = [
        ("all", "full", {"learning_rate": 1e-5, "weight_decay": 0.1}),
        ("layers[0:2].attention", "adapter", {"learning_rate": 1e-3, "weight_decay": 0.2}),
        ("layers[0:1].mlp", "lora", {"learning_rate": 1e-2, "weight_decay": 0.0}),
    ]
    composition = made.begin(stage(rules))
    of = {n: (g.learning_rate, g.weight_decay, g.rule) for g in composition.groups for n in g.names}
    assert len(of) == len(composition.names)
    plain = {id(m.weight) for m in made.model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for name, (rate, decay, rule) in of.items():
        parameter = made.parameter(name)
        matrix = id(parameter) in plain
        if ".adapter_" in name:
            assert (rate, decay) == (1e-3, 0.2 if matrix else 0.0)
            assert rule.startswith("layers[0:2].attention: adapter")
        elif ".lora_" in name:
            assert (rate, decay) == (1e-2, 0.0)
        else:
            assert (rate, decay, rule) == (1e-5, 0.1 if matrix else 0.0, "all: full")


# --- stages


def test_keep_leaves_what_was_added_frozen() -> None:
    made = assembly()
    first = made.begin(stage([("layers", "adapter", {"bottleneck": 4}), ("head", "full")]))
    added = made.added
    second = made.begin(stage([("layers[2]", "full")]))
    assert set(second.names) == names("layers[2]")
    assert made.added == added
    assert set(added) == {n for n in first.names if "adapter" in n}
    assert set(made.delta) == names("layers[2]", "head") | set(added)


def test_the_same_rule_in_a_later_stage_trains_the_same_parameters_on() -> None:
    made = assembly()
    rules: RULES = [("layers", "lora", {"r": 4}), ("layers[2]", "adapter")]
    first = made.begin(stage(rules))
    tiny.shake(made.parameter(n) for n in first.names)
    output, count = tiny.logits(made.model), len(list(made.model.parameters()))
    second = made.begin(stage([(*rules[0][:2], {"r": 4, "learning_rate": 1e-5}), *rules[1:], ("head", "full")]))
    assert set(second.names) == set(first.names) | names("head")
    assert len(list(made.model.parameters())) == count
    assert torch.equal(tiny.logits(made.model), output)


def test_rules_that_claim_different_things_are_different_ones() -> None:
    """A new bias for matrices without one claims nothing of the model's own."""
    made = assembly("t5", ())
    made.begin(stage([("layers.mlp", "bias")]))
    second = made.begin(stage([("head", "bias")]))
    assert set(second.names) == {n for n in made.anatomy.part("head").parameters if n.endswith(".bias")} != set()


@pytest.mark.parametrize("later", ["freeze", "full"])
def test_a_kept_lora_is_not_trained_on_where_a_later_rule_wins(later: str) -> None:
    made = assembly()
    made.begin(stage([("layers", "lora")]))
    second = made.begin(stage([("layers", "lora"), ("layers[0:2]", later)]))
    assert bases(second) == set(bert().part("layers[2]").matrices)
    assert {n for n in second.names if ".lora_" not in n} == (names("layers[0:2]") if later == "full" else set())


def test_another_lora_on_kept_matrices_is_refused_with_both_named() -> None:
    made = assembly()
    made.begin(stage([("layers", "lora", {"r": 4})]))
    with pytest.raises(MethodError, match=r"layers\[2\]: lora\(r=8\): layers: lora of an earlier stage .*\n.*mend"):
        made.begin(stage([("layers[2]", "lora", {"r": 8})]))


@pytest.mark.parametrize("previous", ["merge", "drop"])
def test_merge_and_drop_take_everything_off(previous: str) -> None:
    made = assembly()
    start, own = tiny.logits(made.model), [n for n, _ in made.model.named_parameters()]
    first = made.begin(stage([("layers[1:]", "lora", {"r": 4})]))
    tiny.shake(made.parameter(n) for n in first.names)
    tuned = tiny.logits(made.model)
    second = made.begin(stage([("layers[0]", "lora", {"r": 2})], previous=previous))
    kept = {"merge": tuned, "drop": start}[previous]
    torch.testing.assert_close(tiny.logits(made.model), kept, atol=1e-6, rtol=0)
    assert not torch.allclose(tuned, start, atol=1e-4)
    assert bases(second) == set(bert().part("layers[0]").matrices)
    assert made.added == second.names
    merged = {f"{m}.weight" for m in bert().part("layers[1:]").matrices} if previous == "merge" else set()
    assert made.changed == merged | set(NEW)
    made.drop()
    assert [n for n, _ in made.model.named_parameters()] == own


def test_drop_lets_adapters_be_put_on_again() -> None:
    made = assembly()
    made.begin(stage([("layers", "adapter", {"bottleneck": 4}), ("layers", "lora")]))
    second = made.begin(stage([("layers", "adapter", {"bottleneck": 8})], previous="drop"))
    assert {made.parameter(n).shape[0] for n in second.names if n.endswith("down.weight")} == {8}
    assert not any("lora" in n for n, _ in made.model.named_parameters())


def test_merging_adapters_is_refused() -> None:
    """By begin(); and by resolve(), which is before anything is trained."""
    made = assembly()
    adapters, merging = stage([("layers", "adapter")]), stage([("head", "full")], previous="merge")
    with pytest.raises(MethodError, match=r"stage 2 \(full\): layers: adapter cannot be merged.*\n.*previous"):
        resolved(made, adapters, merging)
    with pytest.raises(MethodError, match="cannot be merged"):
        resolved(made, adapters, stage([("layers", "lora")]), merging)  # kept in between
    resolved(made, adapters, stage([("layers", "lora")], previous="drop"), merging)
    assert not made.attachments, "it was tried on a copy"
    made.begin(adapters)
    before = [n for n, _ in made.model.named_parameters()]
    with pytest.raises(MethodError, match=r"layers: adapter cannot be merged.*\n.*previous: keep or drop"):
        made.begin(merging)
    assert [n for n, _ in made.model.named_parameters()] == before


# --- resolve()


@pytest.mark.parametrize(
    ("first", "second", "ranks"),
    [
        ("layers", "layers", {4}),
        ("layers.attention.q", "re:.*query", {4}),  # the same matrices by another name
        ("layers[0]", "layers", {4}),  # and some more
        ("layers[0]", "layers[1]", {4, 16}),
    ],
)
def test_a_rule_takes_what_it_does_not_say_from_what_an_earlier_stage_has_put_there(
    first: str, second: str, ranks: set[int]
) -> None:
    made = assembly()
    lora = Stage(rules=[_rule(first, "lora", r=4, lora_dropout=0.5)])
    between, again = Stage(rules=[_rule("head")]), Stage(rules=[_rule(second, "lora")])
    strategy, defaults = resolve(Strategy(name="s", stages=[lora, between, again]), Training(), made, 32)
    assert "stages.2.rules.0.r" in defaults
    for one in strategy.stages[:-1]:
        made.begin(one)
    before = set(made.added)
    composition = made.begin(strategy.stages[-1])
    assert {made.parameter(name).shape[0] for name in made.added if ".lora_A." in name} == ranks
    assert before <= set(composition.names) or ranks == {4, 16}
    assert bases(composition) == set(made.anatomy.part(second).matrices)


@pytest.mark.parametrize("previous", ["merge", "drop"])
def test_a_rule_takes_nothing_from_what_is_there_no_more(previous: str) -> None:
    stages = [Stage(rules=[_rule("layers", "lora", r=4)]), Stage(rules=[_rule("layers", "lora")], previous=previous)]
    assert resolved(assembly(), *stages).stages[1].rules[0].options["r"] == 16


@pytest.mark.parametrize(
    ("stages", "positions"),
    [
        ([[("layers", "lora")]], 7),
        ([[("head", "full")], [("layers", "lora")]], 7),
        ([[("embeddings", "prompt")]], 7),  # that which is there
        ([Stage(rules=[Rule(part="layers", method="lora")], previous="drop")], 0),
        ([Stage(rules=[Rule(part="embeddings", method="prompt", num_virtual_tokens=3)], previous="drop")], 3),
        ([Stage(rules=[Rule(part="head", method="full")], previous="drop"), [("embeddings", "prompt")]], 20),
    ],
)
def test_what_is_on_the_start_takes_positions_until_it_is_dropped(stages: list[Stage | RULES], positions: int) -> None:
    made = assembly()
    made.begin(stage([("embeddings", "prompt", {"num_virtual_tokens": 7})]))
    asked = [one if isinstance(one, Stage) else Stage(rules=[_rule(*rule) for rule in one]) for one in stages]
    assert plan(Strategy(name="s", stages=asked), Training(), made, 32).positions == positions


def test_every_stage_is_tried_before_the_next_is_filled_in() -> None:
    """On a copy: the model itself stays as it was."""
    made = assembly()
    before = [name for name, _ in made.model.named_parameters()]
    merging = Stage(name="last", rules=[_rule("head")], previous="merge")
    with pytest.raises(MethodError, match=r"strategy s, stage 2 \(last\): layers: adapter cannot be merged"):
        resolved(made, [("layers", "adapter")], merging)
    assert [name for name, _ in made.model.named_parameters()] == before
    assert made.attachments == []
    left = plan(Strategy(name="s", stages=[Stage(rules=[_rule("layers", "adapter")])]), Training(), made, 32)
    assert list(left.unmergeable) == ["layers: adapter"]


def test_values_come_from_the_rule_then_the_stage_then_the_recipe_then_the_method() -> None:
    made = assembly(new=())
    strategy = Strategy(
        name="s",
        stages=[
            Stage(
                learning_rate=2e-2,
                optim="sgd",
                rules=[Rule(part="layers[0]", method="full", learning_rate=1e-2, weight_decay=0.0), _rule("layers[1]")],
            ),
            Stage(rules=[_rule("layers[2]")]),
        ],
    )
    training = Training(weight_decay=0.3, optim="adafactor", adam_beta1=0.5, num_train_epochs=7)
    (first, second), _ = _stages(resolve(strategy, training, made, 32))
    assert [(r.learning_rate, r.weight_decay) for r in first.rules] == [(1e-2, 0.0), (2e-2, 0.3)]
    assert (first.optim, second.optim) == ("sgd", "adafactor")
    assert (first.adam_beta1, first.num_train_epochs) == (0.5, 7)
    own = methods.load("full")
    assert second.rules[0].learning_rate == own.learning_rate(made.anatomy.part("layers[2]"), 32)
    assert second.rules[0].weight_decay == 0.3
    assert second.gradient_accumulation_steps == STAGE_DEFAULTS["gradient_accumulation_steps"]
    bare, _ = resolve(Strategy(name="s", stages=[Stage(rules=[_rule("layers")])]), Training(), made, 32)
    assert bare.stages[0].rules[0].weight_decay == own.WEIGHT_DECAY
    assert strategy.stages[1].rules[0].learning_rate is None  # what was asked for stays as it was


def _rule(part: str, method: str = "full", **more: object) -> Rule:
    return Rule(part=part, method=method, **more)


def _stages(result: tuple[Strategy, list[str]]) -> tuple[list[Stage], list[str]]:
    return result[0].stages, result[1]


def test_the_defaults_are_named_exactly() -> None:
    strategy = Strategy(
        name="s",
        stages=[
            Stage(
                num_train_epochs=2,
                warmup_steps=0,
                rules=[_rule("layers", "lora", r=4, learning_rate=1e-3), _rule("layers[0]", "freeze")],
            ),
            Stage(max_steps=5, rules=[_rule("head", weight_decay=0.0)]),
        ],
    )
    training = Training(optim="sgd", logging_steps=3, eval_strategy="no", save_strategy="no")
    (first, second), found = _stages(resolve(strategy, training, assembly(), 32))
    assert [str(rule.part) for rule in first.rules] == ["new", "layers", "layers[0]"]
    everywhere = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "max_grad_norm",
        "load_best_model_at_end",
    )
    options = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio")
    assert sorted(found) == sorted(
        [
            *(f"stages.0.{key}" for key in everywhere),
            *(f"stages.1.{key}" for key in (*everywhere, "warmup_steps")),
            "stages.0.rules.0.learning_rate",
            "stages.0.rules.0.weight_decay",
            *(f"stages.0.rules.1.{key}" for key in (*options, "weight_decay")),
            "stages.0.rules.2.weight_decay",
            "stages.1.rules.0.learning_rate",
        ]
    )
    tree = {"stages": [one.model_dump(exclude_none=True) for one in (first, second)]}
    for path in found:  # each leads to a value
        here: object = tree
        for step in path.split("."):
            here = here[int(step)] if isinstance(here, list) else here[step]  # type: ignore[index]
        assert here is not None
    assert (second.max_steps, second.num_train_epochs) == (5, None)


def test_resolving_twice_changes_nothing() -> None:
    once, _ = resolve(load_strategy("top-full-lora-below"), Training(), assembly(), 32)
    twice, defaults = resolve(once, Training(), assembly(), 32)
    assert twice == once
    assert defaults == []


@pytest.mark.parametrize(
    ("rule", "error", "says"),
    [
        (_rule("layers[5]"), PartError, "outside the model"),
        (_rule("layers[5]", learning_rate=1e-3, weight_decay=0.0), PartError, "outside the model"),
        (_rule("layers", "lora", rank=4), RecipeError, "unknown option rank"),
        (_rule("layers", "fulll"), MethodError, 'did you mean "full"'),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused(rule: Rule, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve(
            Strategy(name="s", stages=[Stage(rules=[_rule("head")]), Stage(rules=[rule])]), Training(), assembly(), 32
        )


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("strategy", built_in_strategies())
def test_built_in_strategies_fit_every_architecture(strategy: str, architecture: str) -> None:
    model = tiny.classifier(architecture)
    head = tuple(Anatomy(model).part("head").parameters)
    asked, _ = resolve(load_strategy(strategy), Training(), Assembly(model, Anatomy(model, head)), models.width(model))
    for one in asked.stages:
        assert all(getattr(one, key) is not None for key in STAGE_DEFAULTS)
        assert all(rule.learning_rate and rule.weight_decay is not None for rule in one.rules)
    assert torch.isfinite(tiny.logits(model)).all()


# --- any set of rules

PARTS = [
    *("all", "embeddings", "layers", "head", "norms", "biases", "layers[0:2]", "layers[-1:]", "layers[0,2]"),
    *("layers.mlp", "layers.attention", "layers[1].attention.q", "layers[1:].mlp.down", "layers[2].norms"),
    r"re:.*\.(key|value)",
]
METHODS = ["full", "full", "freeze", "lora", "adapter"]


def random_rules(draw: random.Random) -> RULES:
    small = {"lora": {"r": 2}, "adapter": {"bottleneck": 4}}
    chosen = [(draw.choice(PARTS), draw.choice(METHODS)) for _ in range(draw.randint(1, 4))]
    return [(part, method, small.get(method, {})) for part, method in chosen]


@pytest.mark.parametrize("seed", range(20))
def test_what_changes_is_what_the_composition_names(seed: int) -> None:
    draw = random.Random(seed)
    while True:
        made, rules = assembly(), random_rules(draw)
        try:
            composition = made.begin(resolved(made, stage(rules)).stages[0])
        except MethodError:  # lora where there is no matrix, and such
            continue
        break
    assert len(set(composition.names)) == len(composition.names)
    made.model.double()  # D and A move in the second step only, and by little
    own = [n for n, _ in tiny.classifier("bert").named_parameters()]
    before = {n: made.parameter(n).detach().clone() for n in (*own, *made.added)}
    assert len(before) == len(list(made.model.parameters()))
    tiny.train(made.model, (made.parameter(n) for n in composition.names), steps=2, rate=0.1)
    assert {n for n, old in before.items() if not torch.equal(made.parameter(n), old)} == set(composition.names)
    assert set(made.delta) == {*NEW, *made.added, *composition.names}
