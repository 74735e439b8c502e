"""Fills in a strategy for one model: every value that was not given, of a stage or of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from . import methods, own_file
from .compose import Assembly, skeleton, try_out
from .errors import UserError
from .recipe import Rule, Stage, Strategy, Training

_Keys = TypeVar("_Keys", bound=Training)

# What a stage gets for keys that neither it nor the recipe gives. Rates, decay and options come from the methods.
STAGE_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "optim": "adamw_torch_fused",
    "max_grad_norm": 1.0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "logging_steps": 10,
}


@dataclass(frozen=True)
class Plan:
    """A strategy with every value, and what trying it on the model has shown.

    Attributes:
        strategy: with every value.
        defaults: dotted paths of the values that were not given.
        positions: of the model's sequence that are taken at most: what soft prompts need beside the text.
        unmergeable: what the last stage leaves that cannot be folded into the model's own weights, and why.
    """

    strategy: Strategy
    defaults: list[str]
    positions: int
    unmergeable: dict[str, str]


def plan(
    strategy: Strategy,
    training: Training,
    start: Assembly,
    width: int,
    stage_defaults: dict[str, Any] = STAGE_DEFAULTS,
) -> Plan:
    """Fills in all that was not given: the recipe's value first, then the default of the method or of a stage.

    Every stage is tried on a copy of the model without its numbers before the next one is filled in: rules take what
    they do not say from what is there, and none fails after hours.

    Args:
        strategy: as asked for.
        training: the recipe's own training keys.
        start: the model, and what is on it before the first stage.
        width: the model's hidden width.
        stage_defaults: for keys that neither stage nor recipe gives.

    Raises:
        PartError, MethodError, RecipeError: a part, method or option does not exist on this model, a rule cannot be
            kept, or a stage cannot merge or drop what is there.
    """
    stages, defaults, positions = [], list[str](), 0
    bare, training = skeleton(start), _saving(training)
    for number, asked in enumerate(map(_saving, _repeated(strategy.stages))):
        here = f"stages.{number}"
        stage = _resolve_stage(asked, training, stage_defaults, here, defaults)
        if number == 0 and bare.anatomy.new:
            _train_new(stage)
        rules = []
        for n, rule in enumerate(stage.rules):
            with _of_rule(strategy, stage, rule):
                rules.append(_resolve_rule(rule, stage, bare, width, f"{here}.rules.{n}", defaults))
        stages.append(stage.model_copy(update={"rules": rules}))
        try_out(bare, strategy, number, stages[-1])
        positions = max(positions, bare.positions)
    return Plan(strategy.model_copy(update={"stages": stages}), defaults, positions, bare.unmergeable())


def resolve(
    strategy: Strategy,
    training: Training,
    start: Assembly,
    width: int,
    stage_defaults: dict[str, Any] = STAGE_DEFAULTS,
) -> tuple[Strategy, list[str]]:
    """The strategy and the defaults of its `plan`."""
    made = plan(strategy, training, start, width, stage_defaults)
    return made.strategy, made.defaults


@contextmanager
def _of_rule(strategy: Strategy, stage: Stage, rule: Rule) -> Iterator[None]:
    """Names strategy, stage and rule in an error about a rule."""
    try:
        yield
    except UserError as error:
        of = f"strategy {strategy.name}, stage {stage.name}, rule {rule.part}: {own_file.shown(rule.method)}"
        raise error.but(f"{of}: {error.problem}", at=None) from None


def _resolve_stage(
    asked: Stage, training: Training, stage_defaults: dict[str, Any], here: str, defaults: list[str]
) -> Stage:
    """A stage with every value but those of its rules."""
    stage = asked.model_copy(deep=True)
    if asked.num_train_epochs is not None or asked.max_steps is not None:  # the stage gives its own length
        training = training.model_copy(update={"num_train_epochs": None, "max_steps": None})
    for key, value in stage_defaults.items():
        if getattr(stage, key) is None:
            given = getattr(training, key)
            setattr(stage, key, value if given is None else given)
            if given is None:
                defaults.append(f"{here}.{key}")
    for key in Training.model_fields:
        if getattr(stage, key) is None and getattr(training, key) is not None:
            setattr(stage, key, getattr(training, key))
    if stage.max_steps is not None and f"{here}.num_train_epochs" in defaults:
        stage.num_train_epochs = None
        defaults.remove(f"{here}.num_train_epochs")
    return stage


def _train_new(stage: Stage) -> None:
    """Gives weights that the checkpoint did not have a rule of their own, where the first stage has none for them."""
    if any(rule.part == "new" for rule in stage.rules):
        return
    frozen = [n for n, rule in enumerate(stage.rules) if rule.part == "all" and methods.load(rule.method).FREEZES]
    stage.rules.insert(max(frozen, default=-1) + 1, Rule(part="new", method="full"))


def _resolve_rule(rule: Rule, stage: Stage, on: Assembly, width: int, here: str, defaults: list[str]) -> Rule:
    method = methods.load(rule.method)
    part = on.anatomy.part(rule.part)
    there = on.found(rule) if stage.previous == "keep" else None
    options = methods.options_of(method, {**(there.options if there else {}), **rule.options}).model_dump()
    defaults.extend(f"{here}.{key}" for key in options if key not in rule.options)
    rate, decay = rule.learning_rate or stage.learning_rate, rule.weight_decay
    decay = stage.weight_decay if decay is None else decay
    if rate is None:
        rate = method.learning_rate(part, width) or None  # freeze has none
        if rate is not None:
            defaults.append(f"{here}.learning_rate")
    if decay is None:
        decay = method.WEIGHT_DECAY
        defaults.append(f"{here}.weight_decay")
    given = {
        "learning_rate": rate,
        "weight_decay": decay,
        "layerwise_lr_decay": rule.layerwise_lr_decay or stage.layerwise_lr_decay,
        "active": rule.active,
    }
    return Rule(part=rule.part, method=rule.method, **given, **options)


def _saving(asked: _Keys) -> _Keys:
    """`save_steps` alone means steps: the default, an epoch's end, would let it count for nothing."""
    alone = asked.save_steps is not None and asked.save_strategy is None
    return asked.model_copy(update={"save_strategy": "steps"}) if alone else asked


def _repeated(stages: list[Stage]) -> list[Stage]:
    """A stage with `repeat: 3` as three stages with names of their own."""
    told = []
    for stage in stages:
        for number in range(1, (stage.repeat or 1) + 1):
            name = stage.name if not stage.repeat else f"{stage.name}-{number}"
            told.append(stage.model_copy(update={"name": name, "repeat": None}, deep=True))
    return told
