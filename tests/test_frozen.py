"""Frozen layers, computed once a row: the same losses and weights, and nothing kept that is not true any more."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hybridtune import engine
from hybridtune.engine import Caches, proof
from hybridtune.engine.frozen import Frozen, keys_of
from hybridtune.engine.store import Limits, Store
from hybridtune.recipe import Stage, Strategy
from hybridtune.train import HybridTrainer

TOP = [{"part": "layers[-1]", "method": "full"}, {"part": "head", "method": "full"}]
HEAD = [{"part": "head", "method": "full"}]


def no_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "dropout_prob", "classifier_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., HybridTrainer]:
    """Builds a trainer over 24 rows, three steps an epoch."""
    made = 0

    def make(name: str = "bert", rules: Any = TOP, rows: Any = None, **more: Any) -> HybridTrainer:
        nonlocal made
        made += 1
        model = no_dropout(tiny.classifier(name))
        tiny.shake(model.parameters(), by=0.2)
        model._hybridtune_new = ()
        keys = {key: more.pop(key) for key in ("caches", "engine", "compute_metrics") if key in more}
        fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "seed": 1}
        given = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "eval_strategy": "epoch", "optim": "sgd"}
        trainer = HybridTrainer(
            model,
            hf.TrainingArguments(str(tmp_path / str(made)), **fixed | given | more),
            train_dataset=rows or tiny.rows(24),
            eval_dataset=tiny.rows(10, seed=1),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            strategy=[{"rules": rules}] if isinstance(rules, list) else rules,
            **keys,
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def losses(trainer: HybridTrainer) -> list[float]:
    trainer.train()
    return [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]


def frozen(trainer: HybridTrainer) -> Frozen:
    assert trainer.engine is not None
    assert trainer.engine.seam is not None
    assert trainer.engine.seam.frozen is not None
    return trainer.engine.seam.frozen


@pytest.mark.parametrize(
    ("name", "rules", "depth"),
    [
        ("bert", TOP, 2),
        ("bert", HEAD, 3),
        ("bert", [{"part": "layers[1:]", "method": "lora", "r": 2}, *HEAD], 1),
        ("roberta", TOP, 2),
        ("distilbert", TOP, 2),
        ("modernbert", TOP, 2),
        ("llama", TOP, 2),
        ("qwen3", HEAD, 3),
        ("gemma", TOP, 2),
        ("gpt2", TOP, 2),
        ("bart", [{"part": "decoder.layers", "method": "full"}, *HEAD], 3),
        ("bart", [{"part": "encoder.layers[-1]", "method": "full"}, *HEAD], 2),
        ("t5", [{"part": "decoder.layers", "method": "full"}, *HEAD], 3),
        ("t5", [{"part": "encoder.layers[-1]", "method": "full"}, *HEAD], 2),
    ],
)
def test_a_training_gives_the_same(build: Callable[..., HybridTrainer], name: str, rules: Any, depth: int) -> None:
    kept, plain = build(name, rules), build(name, rules, engine="off")
    assert losses(kept) == pytest.approx(losses(plain), abs=2e-5)
    assert frozen(kept).depth == depth
    assert len(frozen(kept).store) == len({str(row["input_ids"]) for row in [*tiny.rows(24), *tiny.rows(10, seed=1)]})
    expected = dict(plain.model.named_parameters())
    for key, value in kept.model.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    "rules",
    [
        [{"part": "all", "method": "full"}],
        [{"part": "embeddings", "method": "prompt", "num_virtual_tokens": 2}, *HEAD],
        [{"part": "layers", "method": "lora", "r": 2}, *HEAD],
    ],
)
def test_where_all_is_reached_nothing_is_kept(build: Callable[..., HybridTrainer], rules: Any) -> None:
    trainer = build(rules=rules)
    trainer.train()
    assert trainer.engine is not None
    assert trainer.engine.seam is not None
    assert trainer.engine.seam.frozen is None


def then(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes what a module gives: with a hook in a layer, rows would run with padding."""
    own = module.forward
    module.forward = lambda *args, **kwargs: change(own(*args, **kwargs))


def test_frozen_layers_run_once_a_row(build: Callable[..., HybridTrainer]) -> None:
    trainer, calls = build(num_train_epochs=3), [0]

    class Epochs(hf.TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            calls.append(0)

    def count(output: torch.Tensor) -> torch.Tensor:
        calls[-1] += 1
        return output

    trainer.add_callback(Epochs())
    then(trainer.model.bert.encoder.layer[0].intermediate, count)
    trainer.train()
    assert calls[1] > 3, "in the first epoch, and in the evaluation after it"
    assert calls[2:] == [0, 0]


def test_two_trainings_share(build: Callable[..., HybridTrainer]) -> None:
    caches = Caches()
    first = build(caches=caches)
    first.train()
    second, kept = (
        build(rules=[{"part": "layers[-1]", "method": "lora", "r": 2}, *HEAD], caches=caches),
        len(frozen(first).store),
    )
    second.train()
    assert frozen(second).store is frozen(first).store
    assert len(frozen(second).store) == kept


def test_what_is_all_there_already_is_no_other_case(build: Callable[..., HybridTrainer]) -> None:
    """T5's layers give more than hidden states, also where none of them runs."""
    rules, caches = [{"part": "decoder.layers", "method": "full"}, *HEAD], Caches()
    first, second = (build("t5", rules, caches=caches) for _ in range(2))
    assert losses(first) == losses(second)
    assert frozen(second).store is frozen(first).store


def test_other_weights_share_nothing(build: Callable[..., HybridTrainer]) -> None:
    caches = Caches()
    first, second = build(caches=caches), build(caches=caches)
    first.train()
    with torch.no_grad():
        second.model.bert.encoder.layer[0].output.dense.weight[0, 0] += 0.01
    second.train()
    assert frozen(second).store is not frozen(first).store


def test_a_stage_that_changes_the_layers_begins_anew(build: Callable[..., HybridTrainer]) -> None:
    """Full, then the top alone: what the second stage keeps is of the tuned layers."""
    stages = [{"name": "all", "rules": [{"part": "all", "method": "full"}]}, {"name": "top", "rules": TOP}]
    strategy = Strategy(name="two", stages=[Stage.model_validate(stage) for stage in stages])
    assert losses(build(rules=strategy)) == pytest.approx(losses(build(rules=strategy, engine="off")), abs=2e-5)


def test_layers_that_take_turns_are_not_kept(build: Callable[..., HybridTrainer]) -> None:
    rules = [{"part": "layers[1:]", "method": "full", "active": {"layers": 1, "every": 1, "order": "cycle"}}, *HEAD]
    trainer = build(rules=rules)
    trainer.train()
    assert trainer.engine is not None
    assert trainer.engine.on
    assert trainer.engine.seam is not None
    assert trainer.engine.seam.frozen is None


def test_dropout_is_off_below_and_on_above(build: Callable[..., HybridTrainer]) -> None:
    trainer = build()
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    seen: dict[int, set[bool]] = {0: set(), 2: set()}
    for at in seen:
        dropout = trainer.model.bert.encoder.layer[at].output.dropout
        then(dropout, lambda output, at=at, dropout=dropout: (seen[at].add(dropout.training), output)[1])
    trainer.train()
    assert seen == {0: {False}, 2: {False, True}}, "above, evaluations are without"


def test_no_room_is_said_and_changes_nothing(build: Callable[..., HybridTrainer]) -> None:
    with pytest.warns(UserWarning, match="no room to keep more rows"):
        found = losses(build(caches=Caches(Limits(memory=0, disk=0))))
    assert found == pytest.approx(losses(build(engine="off")), abs=2e-5)


def test_in_files(build: Callable[..., HybridTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer = build(caches=Caches(Limits(memory=0, disk=2**30)))
    assert losses(trainer) == pytest.approx(losses(build(engine="off")), abs=2e-5)
    assert len(frozen(trainer).store) > 20
    assert not list(tmp_path.glob("hybridtune-*"))


def test_rows_that_stand_twice_in_a_batch(build: Callable[..., HybridTrainer]) -> None:
    rows = [tiny.rows(1)[0]] * 3 + tiny.rows(5, seed=3)
    found = losses(build(rows=rows))
    assert found == pytest.approx(losses(build(rows=rows, engine="off")), abs=2e-5)


def test_a_store_against_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtune.engine.store.SEGMENT", 400)
    store = Store(Limits(memory=1000, disk=1000))
    rows = {f"{number}".encode(): torch.randn(number % 5 + 1, 7) for number in range(30)}
    with pytest.warns(UserWarning, match="no room"):
        expected = {key: row for key, row in rows.items() if store.put(key, row)}
    assert 10 < len(store) == len(expected) < 30
    for key, row in expected.items():
        assert torch.equal(store.get(key), row)


def test_stores_used_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtune.engine.store.SEGMENT", 400)
    caches, row = Caches(Limits(memory=800, disk=400)), torch.ones(10, 10)
    first, second, third = (caches.of(name) for name in ("first", "second", "third"))
    for store in (first, second, third):
        assert store.put(b"row", row)
    assert (caches.limits.memory, caches.limits.disk) == (0, 0)
    assert caches.of("first") is first
    fourth = caches.of("fourth")
    assert fourth.put(b"row", row)
    assert [len(store) for store in (first, second, third, fourth)] == [1, 0, 1, 1]
    assert torch.equal(fourth.get(b"row"), row)
    assert fourth.put(b"other", row)
    assert fourth.put(b"third", row)
    with pytest.warns(UserWarning, match="no room"):
        assert not fourth.put(b"more", row)
    assert [len(store) for store in (first, second, third, fourth)] == [0, 0, 0, 3]
    assert caches.of("second").put(b"row", row), "a store that was emptied is filled again"


def test_the_limit_holds_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps something; what a training that is over has kept is given back."""
    monkeypatch.setattr("hybridtune.engine.store.SEGMENT", 400)
    assert Caches().limits is Caches().limits
    limits = Limits(memory=800, disk=0)
    one, other = Caches(limits), Caches(limits)
    assert one.of("a").put(b"row", torch.ones(10, 10))
    assert other.of("b").put(b"row", torch.ones(10, 10))
    assert limits.memory == 0
    del one
    gc.collect()
    assert limits.memory == 400


def test_several_strategies_in_turn_with_a_small_limit(
    build: Callable[..., HybridTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each changes the layers first, so that none finds what another has kept: each has room."""
    monkeypatch.setattr("hybridtune.engine.store.SEGMENT", 2**12)
    limits = Limits(memory=2**16, disk=0)  # 34 rows of at most 12 tokens, 32 numbers wide, in 32 bits: for one of them
    caches, stores = Caches(limits), []
    for seed in range(1, 4):
        stages = [{"name": "all", "rules": [{"part": "all", "method": "full"}]}, {"name": "top", "rules": TOP}]
        strategy = Strategy(name="two", stages=[Stage.model_validate(stage) for stage in stages])
        trainer = build(rules=strategy, caches=caches, seed=seed, num_train_epochs=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="engine: no room")
            trainer.train()
        stores.append(frozen(trainer).store)
        assert len(stores[-1]) > 20
        assert 0 <= limits.memory == 2**16 - sum(store.taken.memory for store in stores)
    assert len(set(map(id, stores))) == 3
    assert len(stores[0]) == 0


def test_kept_states_that_are_wrong_are_found_out(build: Callable[..., HybridTrainer]) -> None:
    """Every training proves on a few rows what it finds."""
    caches = Caches()
    first = build(caches=caches)
    first.train()
    for row in frozen(first).store._rows.values():
        row.add_(1.0)
    with pytest.warns(UserWarning, match="frozen layers are not kept: its logits would be others"):
        found = losses(build(caches=caches))
    assert found == pytest.approx(losses(build(engine="off")), abs=2e-5)


@pytest.mark.parametrize("least", [64, 256, None])
def test_a_row_is_the_same_whatever_it_is_computed_with(build: Callable[..., HybridTrainer], least: int | None) -> None:
    """To the last bit: a resumed training computes rows with others than the one that was never interrupted."""
    trainer = build()
    trainer.train()
    seam, rows = trainer.engine.seam, tiny.rows(8)  # type: ignore[union-attr]
    batch = hf.DataCollatorWithPadding(tiny.tokenizer())(rows)
    del batch["labels"]
    assert seam is not None
    assert seam.frozen is not None

    def computed(order: list[int]) -> dict[int, torch.Tensor]:
        seam.frozen = Frozen(2, seam.frozen.modules, Store(Limits()), least)
        for at in order:
            with seam.open(), torch.no_grad():
                seam.model(**{key: value[at:] for key, value in batch.items()})
        with seam.open():
            return dict(enumerate(seam._known(seam.frozen, dict(batch))))

    first, second = computed([0]), computed([7, 5, 2, 0])
    portions = {64: [[0, 1]], 256: [[0, 1, 0, 1, 0, 1, 0, 1]], None: [[0], [1]]}
    assert seam.frozen.portions([b"a", b"b"], torch.ones(2, 32, dtype=torch.long)) == portions[least]
    for row, hidden in first.items():
        assert torch.equal(hidden, second[row])


@pytest.mark.parametrize(
    ("lengths", "rounds_otherwise", "least"),
    [
        ((3, 5, 9), lambda tokens: False, 64),
        ((3, 5, 9), lambda tokens: tokens <= 66, 256),
        ((3, 5, 9), lambda tokens: 90 < tokens < 200, 256),
        ((3, 5, 9), lambda tokens: tokens < 500, 512),
        ((3, 5, 9), lambda tokens: tokens < 1000, None),
        ((70, 90), lambda tokens: tokens < 75, 256),
        ((70, 90), lambda tokens: False, 70),
    ],
)
def test_how_many_tokens_are_computed_at_once(
    lengths: tuple[int, ...],
    rounds_otherwise: Callable[[int], bool],
    least: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as it takes on a processor whose products of some numbers of tokens round in another way."""
    model = tiny.classifier("bert", max_position_embeddings=128).requires_grad_(False)
    model.classifier.requires_grad_(True)
    ids = [{"input_ids": [5 + at % 20 for at in range(length)]} for length in lengths]
    batch = hf.DataCollatorWithPadding(tiny.tokenizer())(ids)
    product = nn.functional.linear

    def rounded(x: torch.Tensor, *args: Any) -> torch.Tensor:
        found = product(x, *args)
        return found * (1 + 1e-6) if x.dim() == 3 and rounds_otherwise(x.shape[1]) else found

    monkeypatch.setattr(nn.functional, "linear", rounded)
    found = engine.start(model, dict(batch), Caches()).seam
    assert found is not None
    assert found.frozen is not None
    assert found.frozen.least == least


def test_without_gradients_all_is_frozen() -> None:
    """A model that nothing is trained of: all its layers are kept."""
    model = tiny.classifier("bert").requires_grad_(False)
    rows = hf.DataCollatorWithPadding(tiny.tokenizer())(tiny.rows(4))
    found = engine.start(model, proof.rows_of_batch(rows), Caches())
    assert found.seam is not None
    assert found.seam.frozen is not None
    assert found.seam.frozen.depth == 3


def test_a_prompt_below_belongs_to_what_is_kept(build: Callable[..., HybridTrainer]) -> None:
    """Frozen in the second stage, and another one with each seed: it is called by a hook, not as a module."""
    prompt = {"part": "embeddings", "method": "prompt", "num_virtual_tokens": 2}
    stages = [Stage.model_validate({"rules": [prompt, *HEAD]}), Stage.model_validate({"rules": HEAD})]
    caches = Caches()
    one, other = (build(rules=Strategy(name="two", stages=stages), caches=caches, seed=seed) for seed in (1, 2))
    one.train()
    other.train()
    assert frozen(one).store is not frozen(other).store


def test_buffers_tell_weights_apart(build: Callable[..., HybridTrainer]) -> None:
    """Running statistics of a frozen layer are no parameters; those of the head are none of what is kept."""
    caches = Caches()
    trainers = [build(caches=caches) for _ in range(3)]
    for number, (below, above) in enumerate([(1.0, 1.0), (1.0, 3.0), (2.0, 3.0)]):
        model = trainers[number].model
        for module, scale in ((model.bert.encoder.layer[0], below), (model.classifier, above)):
            module.register_buffer("scale", torch.tensor(scale))
            then(module, lambda output, module=module: output * module.scale)
        trainers[number].train()
    same, head, layer = (frozen(one).store for one in trainers)
    assert head is same
    assert layer is not same


def test_buffers_that_are_changed_in_the_middle(build: Callable[..., HybridTrainer]) -> None:
    class Change(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                model.bert.encoder.layer[0].scale.fill_(1.5)

    changed, plain = build(), build(engine="off")
    for trainer in (changed, plain):
        layer = trainer.model.bert.encoder.layer[0]
        layer.register_buffer("scale", torch.ones(()))
        then(layer, lambda output, layer=layer: output * layer.scale)
        trainer.add_callback(Change())
    with pytest.warns(UserWarning, match="frozen layers were changed"):
        found = losses(changed)
    assert found == pytest.approx(losses(plain), abs=2e-5)


def test_weights_that_are_changed_in_the_middle(build: Callable[..., HybridTrainer]) -> None:
    class Change(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                with torch.no_grad():
                    model.bert.encoder.layer[0].output.dense.weight.mul_(1.5)

    changed, plain = build(), build(engine="off")
    for trainer in (changed, plain):
        trainer.add_callback(Change())
    with pytest.warns(UserWarning, match="frozen layers were changed"):
        found = losses(changed)
    assert found == pytest.approx(losses(plain), abs=2e-5)


def test_what_else_a_row_has_tells_it_apart() -> None:
    """Boxes of words, and how far the padding on the left reaches; not what only a decoder is given."""
    batch = {"input_ids": torch.tensor([[5, 6], [5, 6]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    same = keys_of(batch)
    assert same[0] == same[1]
    boxes = keys_of(batch | {"bbox": torch.arange(16).view(2, 2, 4)})
    assert boxes[0] != boxes[1]
    assert same == keys_of(batch | {"decoder_input_ids": torch.arange(4).view(2, 2)})
    left = [
        keys_of({"input_ids": torch.tensor([[0] * n + [5, 6]]), "attention_mask": torch.tensor([[0] * n + [1, 1]])})
        for n in (1, 2)
    ]
    right = keys_of({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    assert left[0] != left[1]
    assert right == [same[0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.merge(),
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight.detach() * 2, False)),
    ],
    ids=["adapters off", "another scale", "merged", "another weight"],
)
def test_what_is_done_to_frozen_layers_without_a_write(change: Callable[[Any], None]) -> None:
    model = tiny.classifier("bert")
    tiny.shake(model.parameters(), by=0.2)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).eval()
    model.requires_grad_(False)
    model.base_model.model.classifier.requires_grad_(True)
    rows = tiny.batch()
    found = engine.start(model, proof.rows_of_batch(rows), Caches())
    assert found.seam is not None
    with found.open():
        model(**rows)
    assert found.seam.frozen is not None
    change(model.base_model.model.bert.encoder.layer[0].attention.self.query)
    with torch.no_grad():
        expected = model(**rows).logits
        with found.open(), pytest.warns(UserWarning, match="frozen layers were changed"):
            ours = model(**rows).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
