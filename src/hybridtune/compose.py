"""Applies a stage to a model: parts + methods -> what is trained, in which parameter groups.

The one place that training, cost, checkpoints and prediction all use, so that none of them can disagree about what a
rule means. It never sets `requires_grad`: `train.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel
from torch import nn

from . import methods
from .anatomy import Anatomy, Part
from .errors import MethodError
from .recipe import Rule, Stage, Strategy, Training

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
class Attachment:
    """One rule as it was put on a model; enough to put it there again.

    Attributes:
        method, part, options: the rule.
        less: parameters of the part that other rules had claimed.
        parameters: names of what the method added (empty where it trains what was there).
    """

    method: str
    part: str
    options: dict[str, Any]
    less: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Group:
    """Parameters that are trained with one learning rate and weight decay."""

    rule: str
    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Composition:
    """What a stage trains."""

    stage: Stage
    groups: tuple[Group, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of everything that is trained."""
        return tuple(name for group in self.groups for name in group.names)


@dataclass
class Assembly:
    """A model and all that has been put on it so far.

    Names of the model's own parameters are those of the loaded model, whatever has been wrapped around them since.

    Attributes:
        model: the model.
        anatomy: its parts, as loaded.
        attachments: what sits on it now.
        changed: names of its own parameters that may differ from the checkpoint it was loaded from.
    """

    model: nn.Module
    anatomy: Anatomy
    attachments: list[Attachment] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._parameters = dict(self.model.named_parameters())
        self.changed.update(self.anatomy.new)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name, of the model's own or added."""
        return self._parameters[name]

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the parameters that methods have added and that are still there."""
        return tuple(name for attachment in self.attachments for name in attachment.parameters)

    @property
    def delta(self) -> tuple[str, ...]:
        """Names of all tensors that a checkpoint needs on top of the loaded model."""
        return tuple(sorted(self.changed)) + self.added

    def begin(self, stage: Stage) -> Composition:
        """Deals with what the stage before added, puts the stage's methods on the model and says what to train.

        Args:
            stage: resolved: every rule has its learning rate, weight decay and options.

        Raises:
            PartError, MethodError: a rule cannot be kept.
        """
        rules = [self._read(rule) for rule in stage.rules]
        less = _settle(rules, self.anatomy)
        if stage.previous == "merge":
            self.merge()
        elif stage.previous == "drop":
            self.drop()
        trained: dict[int, tuple[str, ...]] = {}
        for number in sorted(range(len(rules)), key=lambda n: not rules[n].method.WRAPS):
            trained[number] = self._put(rules[number], less[number])
        groups = [group for number, rule in enumerate(rules) for group in self._groups(rule, trained[number])]
        if not groups:
            raise MethodError(
                f"stage {stage.name}: its rules leave nothing to train", found="; ".join(map(str, stage.rules))
            )
        composition = Composition(stage, tuple(groups))
        added = set(self.added)
        self.changed.update(name for name in composition.names if name not in added)
        return composition

    def put_again(self, attachments: Iterable[Attachment]) -> None:
        """Puts attachments of a manifest on a freshly loaded model."""
        for attachment in attachments:
            rule = Rule(part=attachment.part, method=attachment.method, **attachment.options)
            self._put(self._read(rule), set(attachment.less))

    def merge(self) -> None:
        """Folds all that was added into the model's own weights.

        Raises:
            MethodError: a method cannot be merged.
        """
        for attachment in self.attachments:
            method = methods.load(attachment.method)
            if method.MERGES is not True:
                raise MethodError(
                    f"{attachment.part}: {attachment.method} cannot be merged: {method.MERGES}",
                    mend="use previous: keep or drop",
                )
        for attachment in self.attachments:
            methods.load(attachment.method).merge(self.model, list(attachment.parameters))
            self.changed.update(self._claimed_by(attachment))
        self._forget()

    def drop(self) -> None:
        """Takes all that was added off again."""
        for attachment in self.attachments:
            methods.load(attachment.method).detach(self.model, list(attachment.parameters))
        self._forget()

    def _forget(self) -> None:
        for name in self.added:
            del self._parameters[name]
        self.attachments = []

    def _read(self, rule: Rule) -> _Rule:
        method = methods.load(rule.method)
        part = self.anatomy.part(rule.part)
        return _Rule(rule, method, part, methods.options_of(method, rule.method, rule.options))

    def _put(self, rule: _Rule, less: set[str]) -> tuple[str, ...]:
        """Attaches one rule, or finds what an earlier stage has attached for the same rule; returns what it trains."""
        options = rule.options.model_dump()
        for there in self.attachments:
            if (there.method, there.part, there.options) == (rule.rule.method, rule.part.name, options):
                lost = [f"{matrix}." for matrix in rule.part.matrices if f"{matrix}.weight" in less]
                wrapped = tuple(lost) if rule.method.WRAPS else ()
                return tuple(name for name in there.parameters if not name.startswith(wrapped))
            both_wrap = rule.method.WRAPS and methods.load(there.method).WRAPS
            if both_wrap and (set(rule.claims) - less) & self._claimed_by(there):
                raise MethodError(
                    f"{rule.rule}: {there.method} of an earlier stage sits on the same matrices ({there.part})",
                    mend="give the stage previous: merge or previous: drop, or repeat the earlier rule to train it on",
                )
        names = tuple(rule.method.attach(self.model, rule.part.without(less), rule.options))
        self.model.train(self.model.training)  # what was added is in the model's mode
        added = tuple(name for name in names if name not in self._parameters)
        if added:
            now = dict(self.model.named_parameters())
            self._parameters.update({name: now[name] for name in added})
            self.attachments.append(
                Attachment(
                    rule.rule.method, rule.part.name, options, tuple(sorted(less & set(rule.part.parameters))), added
                )
            )
        return names

    def _claimed_by(self, attachment: Attachment) -> set[str]:
        rule = self._read(Rule(part=attachment.part, method=attachment.method, **attachment.options))
        return set(rule.claims) - set(attachment.less)

    def _groups(self, rule: _Rule, names: tuple[str, ...]) -> list[Group]:
        """Biases and norms are not decayed, as in Trainer."""
        if not names:
            return []
        norms = self.anatomy.norm_parameters()
        decay = tuple(n for n in names if self._parameters[n].dim() > 1 and n not in norms)
        rest = tuple(n for n in names if n not in set(decay))
        rate, weight_decay = rule.rule.learning_rate, rule.rule.weight_decay
        assert rate is not None, "the stage is not resolved"
        assert weight_decay is not None, "the stage is not resolved"
        return [Group(str(rule.rule), n, rate, w) for n, w in ((decay, weight_decay), (rest, 0.0)) if n]


@dataclass(frozen=True)
class _Rule:
    """A rule with its names looked up."""

    rule: Rule
    method: methods.Method
    part: Part
    options: BaseModel

    @property
    def claims(self) -> tuple[str, ...]:
        return self.method.claims(self.part, self.options)


def _settle(rules: list[_Rule], anatomy: Anatomy) -> list[set[str]]:
    """Of two claims on one tensor the later rule wins; returns what each rule has lost to another.

    A method that wraps matrices never gets new ones, whose random weights it would freeze.

    Raises:
        MethodError: two methods would wrap one matrix, or tied weights would be trained and frozen.
    """
    owner: dict[str, int] = {}
    for number, rule in enumerate(rules):
        for name in rule.claims:
            other = rules[owner[name]] if name in owner else None
            if rule.method.WRAPS and name in anatomy.new:
                if rule.part.name != "all":
                    raise MethodError(
                        f"{rule.rule}: {name} is new, its random weights would stay frozen", mend=f"{rule.part}: full"
                    )
                continue
            if other is not None:
                _check_pair(other, rule, name, tied=name in anatomy.tied)
            owner[name] = number
    lost = [{name for name, holder in owner.items() if holder != number} for number in range(len(rules))]
    return [less | set(anatomy.new) if rule.method.WRAPS else less for rule, less in zip(rules, lost, strict=True)]


def _check_pair(first: _Rule, second: _Rule, name: str, tied: bool) -> None:
    """Refuses what two rules cannot both do to one tensor."""
    if first.method.WRAPS and second.method.WRAPS:
        raise MethodError(
            f"two rules sit on one matrix: {first.rule} and {second.rule}",
            found=name,
            mend="give the two rules parts that do not overlap",
        )
    one_freezes = (first.rule.method == "freeze") != (second.rule.method == "freeze")
    if (
        tied
        and one_freezes
        and "all" not in (first.part.name, second.part.name)
        and first.part.name != second.part.name
    ):
        raise MethodError(
            f"{first.rule} and {second.rule}: {name} is tied, one tensor with two names",
            mend="train both parts or freeze both",
        )


def resolve(
    strategy: Strategy,
    training: Training,
    anatomy: Anatomy,
    width: int,
    stage_defaults: dict[str, Any] = STAGE_DEFAULTS,
) -> tuple[Strategy, list[str]]:
    """Fills in all that was not given: the recipe's value first, then the default of the method or of a stage.

    Args:
        strategy: as asked for.
        training: the recipe's own training keys.
        anatomy: the model's parts.
        width: the model's hidden width.
        stage_defaults: for keys that neither stage nor recipe gives.

    Returns:
        The strategy with every value, and the dotted paths of those that are defaults.

    Raises:
        PartError, MethodError, RecipeError: a rule cannot be kept on this model.
    """
    stages, defaults = [], []
    for number, asked in enumerate(strategy.stages):
        stage = asked.model_copy(deep=True)
        if number == 0 and anatomy.new and all(rule.part != "new" for rule in stage.rules):
            frozen = [n for n, rule in enumerate(stage.rules) if (rule.part, rule.method) == ("all", "freeze")]
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
            _resolve_rule(rule, stage, anatomy, width, f"{here}.rules.{n}", defaults)
            for n, rule in enumerate(stage.rules)
        ]
        stages.append(stage.model_copy(update={"rules": rules}))
    resolved = strategy.model_copy(update={"stages": stages})
    _check_merges(resolved)
    return resolved, defaults


def _resolve_rule(rule: Rule, stage: Stage, anatomy: Anatomy, width: int, here: str, defaults: list[str]) -> Rule:
    method = methods.load(rule.method)
    part = anatomy.part(rule.part)
    options = methods.options_of(method, rule.method, rule.options).model_dump()
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
    return Rule(part=rule.part, method=rule.method, learning_rate=rate, weight_decay=decay, **options)


def _check_merges(strategy: Strategy) -> None:
    """Says before training, not after, that a stage cannot merge what the stages before it add."""
    added: list[Rule] = []
    for stage in strategy.stages:
        if stage.previous == "merge":
            for rule in added:
                merges = methods.load(rule.method).MERGES
                if merges is not True:
                    raise MethodError(
                        f"strategy {strategy.name}, stage {stage.name}: {rule} cannot be merged: {merges}",
                        mend="use previous: keep or previous: drop",
                    )
        added = stage.rules if stage.previous != "keep" else added + stage.rules
