"""Applies a stage to a model: parts + methods -> what is trained, in which parameter groups.

The one place that training, cost, checkpoints and prediction all use, so that none of them can disagree about what a
rule means. It never sets `requires_grad`: `train.py` does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from . import methods, own_file
from .active import Rotation
from .anatomy import Anatomy, Part
from .errors import MethodError
from .recipe import Rule, Stage, Strategy


@dataclass(frozen=True)
class Attachment:
    """One rule as it was put on a model; enough to put it there again.

    Attributes:
        method, part, options: the rule.
        less: parameters of the part that other rules had claimed.
        parameters: names of what the method added.
        frozen: those of them that it does not train.
    """

    method: str
    part: str
    options: dict[str, Any]
    less: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.part}: {own_file.shown(self.method)}"

    @property
    def rule(self) -> Rule:
        """The rule that it came from, without rates."""
        return Rule(part=self.part, method=self.method, **self.options)

    @property
    def trained(self) -> tuple[str, ...]:
        """What a stage with this rule trains."""
        return tuple(name for name in self.parameters if name not in self.frozen)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Attachment:
        """Of a manifest."""
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in told.items()}
        return cls(**given)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained with one learning rate and weight decay."""

    rule: str
    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Composition:
    """What a stage trains.

    Attributes:
        stage: with every value.
        groups: what is trained together, for the optimizer.
        rotations: of rules that train only some of their layers at a time.
    """

    stage: Stage
    groups: tuple[Group, ...]
    rotations: tuple[Rotation, ...] = ()

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

    @property
    def positions(self) -> int:
        """How many positions of the model's sequence are taken by what is on it, as soft prompts are."""
        there = (self._read(attachment.rule) for attachment in self.attachments)
        return sum(rule.method.positions(rule.options) for rule in there)

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
        _check_once(rules, trained)
        groups = [group for number, rule in enumerate(rules) for group in self._groups(rule, trained[number])]
        if not groups:
            raise MethodError(
                f"stage {stage.name}: its rules leave nothing to train", found="; ".join(map(str, stage.rules))
            )
        rotations = (
            Rotation.of(rule.rule, number, trained[number], self.anatomy)
            for number, rule in enumerate(rules)
            if rule.rule.active and trained[number]
        )
        composition = Composition(stage, tuple(groups), tuple(rotations))
        added = set(self.added)
        self.changed.update(name for name in composition.names if name not in added)
        return composition

    def put_again(self, attachments: Iterable[Attachment], without: Collection[str] = ()) -> None:
        """Puts attachments of a manifest on a freshly loaded model, less what sits on some of its parameters."""
        for attachment in attachments:
            rule = self._read(attachment.rule)
            under = self._claimed_by(attachment) or set(rule.part.parameters)
            if not under <= set(without):
                self._attach(rule, {*attachment.less, *without})

    def unmergeable(self) -> dict[str, str]:
        """What cannot be folded into the model's own weights, and why."""
        found = {str(attachment): methods.load(attachment.method).MERGES for attachment in self.attachments}
        return {name: str(reason) for name, reason in found.items() if reason is not True}

    def merge(self) -> None:
        """Folds all that was added into the model's own weights.

        Raises:
            MethodError: a method cannot be merged.
        """
        for name, reason in self.unmergeable().items():
            raise MethodError(f"{name} cannot be merged: {reason}", mend="use previous: keep or drop")
        for attachment in self.attachments:
            methods.load(attachment.method).merge(self.model, list(attachment.parameters))
            self.changed.update(self._claimed_by(attachment))
        self._forget()

    def drop(self) -> None:
        """Takes all that was added off again.

        Raises:
            MethodError: an initialisation has moved a part of the model's own weights into what would be dropped.
        """
        for attachment in self.attachments:
            rule = self._read(attachment.rule)
            if rule.method.changes(rule.part, rule.options):
                raise MethodError(
                    f"{attachment} cannot be dropped: it holds a part of the model's own weights",
                    mend="use previous: keep or merge, or another initialisation",
                )
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
        return _Rule(rule, method, part, methods.options_of(method, rule.options))

    def _put(self, rule: _Rule, less: set[str]) -> tuple[str, ...]:
        """Attaches one rule, or goes on with what an earlier stage has attached for it; returns what it trains."""
        names: list[str] = []
        claims, lost = set(rule.claims) - less, set(less)
        for there in self.attachments:
            covered = self._claimed_by(there)
            if there.options == rule.options.model_dump() and self._means(rule, there, less):
                given_up = tuple(f"{tensor.removesuffix('.weight')}." for tensor in covered & less)
                names += [name for name in there.trained if not name.startswith(given_up)]
                lost |= covered
            elif rule.method.WRAPS and methods.load(there.method).WRAPS and claims & covered:
                raise MethodError(
                    f"{rule.rule}: {there} of an earlier stage sits on the same matrices",
                    mend="give the stage previous: merge or previous: drop, or repeat the earlier rule to train it on",
                )
        if names and not (rule.method.WRAPS and claims - lost):
            return tuple(names)
        return (*names, *self._attach(rule, lost))

    def _attach(self, rule: _Rule, less: set[str]) -> tuple[str, ...]:
        """Puts one rule on the model; returns what it trains."""
        part, known = rule.part.without(less), set(map(id, self._parameters.values()))
        names = tuple(rule.method.attach(self.model, part, rule.options))
        self.model.train(self.model.training)  # what was added is in the model's mode
        added = {name: tensor for name, tensor in self.model.named_parameters() if id(tensor) not in known}
        self.changed.update(rule.method.changes(part, rule.options))
        if added:
            self._parameters.update(added)
            lost = tuple(sorted(less & set(rule.part.parameters)))
            frozen = tuple(name for name in added if name not in set(names))
            self.attachments.append(
                Attachment(rule.rule.method, rule.part.name, rule.options.model_dump(), lost, tuple(added), frozen)
            )
        return names

    def found(self, rule: Rule) -> Attachment | None:
        """What an earlier stage has attached that a rule goes on with, whatever its options."""
        mine = self._read(rule)
        return next((there for there in self.attachments if self._means(mine, there)), None)

    def _means(self, rule: _Rule, there: Attachment, less: Collection[str] = ()) -> bool:
        """Whether a rule is about what is there: by the name of its part, or since it claims all that there is."""
        covered = self._claimed_by(there)
        all_of_it = bool(covered) and set(rule.claims) - set(less) >= covered
        return there.method == rule.rule.method and (there.part == rule.part.name or all_of_it)

    def _claimed_by(self, attachment: Attachment) -> set[str]:
        return set(self._read(attachment.rule).claims) - set(attachment.less)

    def _groups(self, rule: _Rule, names: tuple[str, ...]) -> list[Group]:
        """One group for each learning rate and weight decay. Biases and norms are not decayed, as in Trainer."""
        asked = rule.rule
        if not names:
            return []
        rate, decay, lower = asked.learning_rate, asked.weight_decay, asked.layerwise_lr_decay or 1.0
        assert rate is not None and decay is not None, "the stage is not resolved"

        def settings(name: str) -> tuple[float, float]:
            decays = self._parameters[name].dim() > 1 and name not in self.anatomy.norm_parameters
            factor = rule.method.rate(name, rule.options) * lower ** self.anatomy.depth_of(name)
            return rate * factor, decay if decays else 0.0

        found = {name: settings(name) for name in names}
        return [
            Group(str(asked), tuple(name for name in names if found[name] == pair), *pair)
            for pair in sorted(set(found.values()), reverse=True)
        ]


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
    one_freezes = first.method.FREEZES != second.method.FREEZES
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


def _check_once(rules: list[_Rule], trained: dict[int, tuple[str, ...]]) -> None:
    """Refuses two rules that go on with one attachment: claims do not tell them apart."""
    owner: dict[str, int] = {}
    for number, names in sorted(trained.items()):
        for name in names:
            if name in owner:
                raise MethodError(
                    f"two rules train the same: {rules[owner[name]].rule} and {rules[number].rule}",
                    found=name,
                    mend="leave one of them out, or give them parts that do not overlap",
                )
            owner[name] = number


def skeleton(assembly: Assembly) -> Assembly:
    """A copy of a model, and of what is on it, without its numbers (on the meta device): to try rules on at no cost."""
    tensors = itertools.chain(assembly.model.parameters(), assembly.model.buffers())
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(assembly, memo)


def try_out(assembly: Assembly, strategy: Strategy, number: int, stage: Stage) -> None:
    """Begins one stage of a strategy, resolved, on a model without its numbers.

    Raises:
        PartError, MethodError: a rule cannot be kept, or what is there cannot be merged or dropped; the stage is named.
    """
    try:
        assembly.begin(stage)
    except MethodError as error:
        raise error.but(f"strategy {strategy.name}, stage {number + 1} ({stage.name}): {error.problem}") from None
