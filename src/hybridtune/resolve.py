"""Fills in a strategy for one model: every value that was not given, of a stage or of a method."""

from __future__ import annotations

from typing import Any, TypeVar

from . import methods
from .compose import Assembly
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


def resolve(
    strategy: Strategy,
    training: Training,
    start: Assembly,
    width: int,
    stage_defaults: dict[str, Any] = STAGE_DEFAULTS,
) -> tuple[Strategy, list[str]]:
    """Fills in all that was not given: the recipe's value first, then the default of the method or of a stage.

    Args:
        strategy: as asked for.
        training: the recipe's own training keys.
        start: the model, and what is on it before the first stage.
        width: the model's hidden width.
        stage_defaults: for keys that neither stage nor recipe gives.

    Returns:
        The strategy with every value, and the dotted paths of those that are defaults.

    Raises:
        PartError, MethodError, RecipeError: a part, method or option does not exist on this model.
    """
    stages, defaults, anatomy = [], [], start.anatomy
    training = _saving(training)
    for number, asked in enumerate(map(_saving, _repeated(strategy.stages))):
        stage = asked.model_copy(deep=True)
        if number == 0 and anatomy.new and all(rule.part != "new" for rule in stage.rules):
            frozen = [
                n for n, rule in enumerate(stage.rules) if rule.part == "all" and methods.load(rule.method).FREEZES
            ]
            stage.rules.insert(max(frozen, default=-1) + 1, Rule(part="new", method="full"))
        here = f"stages.{number}"
        for key, value in stage_defaults.items():
            if getattr(stage, key) is None:
                given = getattr(training, key)
                setattr(stage, key, value if given is None else given)
                if given is None:
                    defaults.append(f"{here}.{key}")
        for key in Training.model_fields:
            if key == "max_steps" and asked.num_train_epochs is not None:
                continue  # the stage gives its own length
            if getattr(stage, key) is None and getattr(training, key) is not None:
                setattr(stage, key, getattr(training, key))
        if stage.max_steps is not None and f"{here}.num_train_epochs" in defaults:
            stage.num_train_epochs = None
            defaults.remove(f"{here}.num_train_epochs")
        rules = [
            _resolve_rule(rule, stage, start, number == 0, width, f"{here}.rules.{n}", defaults)
            for n, rule in enumerate(stage.rules)
        ]
        stages.append(stage.model_copy(update={"rules": rules}))
    return strategy.model_copy(update={"stages": stages}), defaults


def _resolve_rule(
    rule: Rule, stage: Stage, start: Assembly, first: bool, width: int, here: str, defaults: list[str]
) -> Rule:
    method = methods.load(rule.method)
    part = start.anatomy.part(rule.part)
    there = start.found(rule) if first and stage.previous == "keep" else None
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


def positions(strategy: Strategy) -> int:
    """How many positions of the model's sequence a strategy takes at most: what soft prompts need beside the text.

    Raises:
        MethodError, RecipeError: a method or option does not exist.
    """

    def taken(rule: Rule) -> int:
        method = methods.load(rule.method)
        return method.positions(methods.options_of(method, rule.options))

    return max(sum(map(taken, stage.rules)) for stage in strategy.stages)
