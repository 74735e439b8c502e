"""Rules whose layers take turns: what rests when, and that it does not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset
from transformers import TrainerCallback

from hybridtune.active import Rotation
from hybridtune.anatomy import Anatomy
from hybridtune.errors import MethodError
from hybridtune.recipe import Active, Rule
from hybridtune.train import HybridTrainer

LAYERS = 3


def rotation(model: Any, part: str = "layers", **active: Any) -> Rotation:
    anatomy = Anatomy(model)
    rule = Rule(part=part, method="full", active=Active(**active))
    return Rotation.of(rule, 0, anatomy.part(part).parameters, anatomy)


def trained(made: Rotation, interval: int, seed: int = 0) -> set[int]:
    """Numbers of the layers, from the top down, that are trained in an interval."""
    resting = made.resting(interval, seed)
    return {at for at, names in enumerate(made.layers) if not set(names) <= resting}


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ({"layers": 1, "order": "cycle"}, [{0}, {1}, {2}, {0}]),
        ({"layers": 2, "order": "cycle"}, [{0, 1}, {2}, {0, 1}]),
        ({"layers": 1, "order": "unfreeze"}, [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2}]),
        ({"layers": 0.5, "order": "unfreeze"}, [{0, 1}, {0, 1, 2}]),
        ({"layers": 3, "order": "random"}, [{0, 1, 2}]),
    ],
)
def test_who_is_trained_when(active: dict[str, Any], expected: list[set[int]]) -> None:
    made = rotation(tiny.classifier("bert"), every=1, **active)
    assert [trained(made, interval) for interval in range(len(expected))] == expected


def test_layers_are_sorted_from_the_top_and_embeddings_are_the_lowest() -> None:
    model = tiny.classifier("bert")
    made = rotation(model, "all", layers=1, every=1, order="cycle")
    assert len(made.layers) == LAYERS + 1
    assert all(name.startswith("bert.encoder.layer.2.") for name in made.layers[0])
    assert all(name.startswith("bert.embeddings.") for name in made.layers[-1])
    assert not any("classifier" in name or "pooler" in name for name in made.resting(0, 0))


def test_more_layers_than_there_are_are_refused() -> None:
    model = tiny.classifier("bert")  # three layers
    assert len(rotation(model, layers=3, every=1).layers) == 3
    with pytest.raises(MethodError, match=r"more layers at a time than there are\n +found: +layers: 9\n.*at most 3"):
        rotation(model, layers=9, every=1)


def test_random_draws_differ_by_interval_and_seed_and_repeat() -> None:
    made = rotation(tiny.classifier("bert"), layers=2, every=1)
    draws = [trained(made, interval) for interval in range(60)]
    assert all(len(draw) == 2 for draw in draws)
    assert draws == [trained(made, interval) for interval in range(60)]
    assert draws != [trained(made, interval, seed=1) for interval in range(60)]
    assert all(10 < sum(at in draw for draw in draws) < 60 for at in range(LAYERS))


@pytest.mark.parametrize(("every", "steps", "expected"), [(3, 100, [0, 0, 0, 1]), (0.25, 8, [0, 0, 1, 1, 2])])
def test_intervals_are_steps_or_a_share_of_the_stage(every: float, steps: int, expected: list[int]) -> None:
    made = rotation(tiny.classifier("bert"), layers=1, every=every)
    assert [made.interval(step, steps) for step in range(len(expected))] == expected


@pytest.mark.parametrize("order", ["random", "cycle", "unfreeze"])
def test_a_rule_without_layers_is_refused_before_training(order: str, tmp_path: Path) -> None:
    rule = {"part": "head", "method": "full", "active": {"layers": 1, "every": 1, "order": order}}
    with pytest.raises(MethodError, match=r"stage 1 \(full\): head: full: nothing .* \(active\)\n.*leave active out"):
        HybridTrainer(
            tiny.classifier("bert"), hf.TrainingArguments(str(tmp_path), use_cpu=True), strategy=[{"rules": [rule]}]
        )


class Watch(TrainerCallback):
    """Remembers what moved in every step, and which layers the optimizer holds states of."""

    def __init__(self, model: Any) -> None:
        self.model, self.moved, self.held = model, [], []

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = self._values()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        after = self._values()
        self.moved.append({name for name, value in after.items() if not torch.equal(value, self.before[name])})
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.held.append({names[id(parameter)] for parameter in optimizer.state})
        self.before = after


def layer(name: str) -> int | None:
    steps = name.split(".")
    return int(steps[3]) if "layer" in steps else None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_rests_does_not_move_and_the_optimizer_holds_nothing_of_it(method: str, tmp_path: Path) -> None:
    model = tiny.classifier("bert", hidden_dropout_prob=0.0)
    watch = Watch(model)
    rule = {"part": "layers", "method": method, "active": {"layers": 1, "every": 2, "order": "cycle"}}
    trainer = HybridTrainer(
        model,
        hf.TrainingArguments(str(tmp_path), max_steps=6, use_cpu=True, report_to="none", save_strategy="no"),
        train_dataset=Dataset.from_list(tiny.rows(64)),
        processing_class=tiny.tokenizer(),
        strategy=[{"rules": [rule, {"part": "head", "method": "full"}], "weight_decay": 0.0}],
        callbacks=[watch],
    )
    trainer.train()
    for step, moved in enumerate(watch.moved):
        active = LAYERS - 1 - step // 2
        assert {layer(name) for name in moved} == {None, active}
        assert {layer(name) for name in watch.held[step]} == {None, active}
