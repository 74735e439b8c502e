"""Layers that are computed again in the backward: they really are, and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from hybridtune.errors import RecipeError
from hybridtune.train import HybridTrainer

PER_TOKEN = True  # the hooks here count

HEAD = {"part": "head", "method": "full"}
METHODS: dict[str, list[dict[str, Any]]] = {
    "full": [{"part": "all", "method": "full"}],
    "lora": [{"part": "layers", "method": "lora", "r": 2}, HEAD],
    "adapter": [{"part": "layers", "method": "adapter", "bottleneck": 4}, HEAD],
    "ia3": [{"part": "layers", "method": "ia3"}, HEAD],
    "prompt": [{"part": "embeddings", "method": "prompt", "num_virtual_tokens": 2}, HEAD],
    "prefix": [{"part": "layers", "method": "prefix", "num_virtual_tokens": 2}, HEAD],
    "bias": [{"part": "layers", "method": "bias"}, HEAD],
    "top": [{"part": "layers[-1]", "method": "full"}, HEAD],
}
Build = Callable[..., HybridTrainer]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "dropout_prob", "classifier_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model


@pytest.fixture
def build(tmp_path: Path) -> Build:
    made = 0

    def make(stages: Any, name: str = "bert", dropout: bool = False, **more: Any) -> HybridTrainer:
        nonlocal made
        made += 1
        model = tiny.classifier(name)
        tiny.shake(model.parameters(), by=0.1)
        model = model if dropout else without_dropout(model)
        model._hybridtune_new = ()
        engine = more.pop("engine", "auto")
        fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "optim": "sgd"}
        given = {"per_device_train_batch_size": 8, "max_steps": 3, "seed": 1, "learning_rate": 0.05}
        trainer = HybridTrainer(
            model,
            hf.TrainingArguments(str(tmp_path / str(made)), **fixed | given | more),
            train_dataset=tiny.rows(24),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            strategy=stages,
            engine=engine,
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def forwards(trainer: HybridTrainer) -> dict[str, int]:
    """How often the last layer's attention is entered, in forwards and in backwards."""
    inside, counts = list(trainer.model.modules()), {"forward": 0, "backward": 0}
    last = next(m for m in reversed(inside) if isinstance(m, nn.ModuleList) and len(m) == 3)[-1]
    attention = next(module for name, module in last.named_children() if "att" in name)

    def count(*_: Any) -> None:
        counts["backward" if torch._C._current_graph_task_id() != -1 else "forward"] += trainer.model.training

    attention.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_layers_run_twice_and_weights_are_the_same(build: Build, name: str, method: str, engine: str) -> None:
    if (name, method) == ("llama", "bias"):
        pytest.skip("llama has no biases")
    stage = {"rules": METHODS[method]}
    plain = build([stage], name, engine=engine)
    again = build([stage | {"gradient_checkpointing": True}], name, engine=engine)
    counts = forwards(again)
    plain.train()
    again.train()
    assert counts["backward"] == 3, "once a step"
    assert again.engine is not None
    assert again.engine.on is (engine == "auto")
    for key, value in again.model.named_parameters():
        torch.testing.assert_close(value, plain.model.get_parameter(key), rtol=1e-4, atol=1e-6, msg=key)


def test_dropout_is_drawn_once(build: Build) -> None:
    """Where a layer is computed again, the same numbers are dropped."""
    stage = {"rules": METHODS["lora"]}
    plain, again = build([stage], dropout=True), build([stage | {"gradient_checkpointing": True}], dropout=True)
    plain.train()
    again.train()
    for key, value in again.model.named_parameters():
        torch.testing.assert_close(value, plain.model.get_parameter(key), rtol=1e-4, atol=1e-6, msg=key)


def test_frozen_layers_are_still_computed_once_a_row(build: Build) -> None:
    trainer = build([{"rules": METHODS["top"], "gradient_checkpointing": True}])
    trainer.train()
    assert "2 frozen layers computed once a row" in str(trainer.engine)


def test_a_stage_alone_and_all_stages(build: Build) -> None:
    stages = [{"name": "one", "rules": METHODS["lora"], "gradient_checkpointing": True}]
    stages.append({"name": "two", "rules": METHODS["top"]})
    alone = build(stages)
    counts = forwards(alone)
    alone.train()
    assert counts["backward"] == 3
    assert not alone.model.is_gradient_checkpointing
    every = build([{**stages[0], "gradient_checkpointing": None}, stages[1]], gradient_checkpointing=True)
    counts = forwards(every)
    every.train()
    assert counts["backward"] == 6


def test_a_model_that_cannot(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.BertForSequenceClassification, "supports_gradient_checkpointing", False)
    with pytest.raises(RecipeError, match="gradient_checkpointing: BertForSequenceClassification does not support it"):
        build([{"rules": METHODS["lora"], "gradient_checkpointing": True}])


def test_reentrant_checkpoints_run_padded(build: Build) -> None:
    """They hand tensors on without what is written on them."""
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = build([{"rules": METHODS["lora"]}], **more)
    plain = build([{"rules": METHODS["lora"]}])
    with pytest.warns(UserWarning, match="not under reentrant gradient checkpointing"):
        trainer.train()
    plain.train()
    for key, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, plain.model.get_parameter(key), rtol=1e-4, atol=1e-6, msg=key)
