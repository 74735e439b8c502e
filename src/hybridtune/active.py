"""Rules that train only some of their layers at a time: which ones, at every step of a stage.

    random     a random choice of layers, new in every interval (LISA: Pan et al. 2024, arXiv 2403.17919)
    cycle      group after group from the top down, then from the top again (HiFT: Liu et al. 2024, arXiv 2401.15207)
    unfreeze   from the top down, more in every interval (gradual unfreezing: Howard & Ruder 2018, arXiv 1801.06146)

What is chosen depends on the seed and the interval's number alone, so that a resumed stage chooses the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .anatomy import Anatomy
from .errors import MethodError
from .recipe import Active, Rule


@dataclass(frozen=True)
class Rotation:
    """The layers of one rule, from the top down, and how they take turns.

    Attributes:
        active: how many at a time, for how long, in which order.
        number: of the rule in its stage: two rules choose differently.
        layers: for each layer the names of what the rule trains there; what lies in no layer is always trained.
    """

    active: Active
    number: int
    layers: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, rule: Rule, number: int, names: tuple[str, ...], anatomy: Anatomy) -> Rotation:
        """Sorts what a rule trains into layers. The embeddings count as the lowest one.

        Raises:
            MethodError: none of it lies in a layer, or there are fewer layers than are asked for at a time.
        """
        assert rule.active is not None
        found: dict[tuple[int, str], list[str]] = {}
        for name in names:
            depth, layer = anatomy.depth_of(name), anatomy.layer_of(name)
            if depth:
                found.setdefault((depth, layer[0] if layer else ""), []).append(name)
        if not found:
            raise MethodError(
                f"{rule}: nothing that it trains lies in a layer that could take turns (active)",
                mend="leave active out, or name a part with layers in it",
            )
        if rule.active.layers >= 1 and round(rule.active.layers) > len(found):
            raise MethodError(
                f"{rule}: active: more layers at a time than there are",
                found=f"layers: {rule.active.layers:g}",
                expected=f"at most {len(found)}, or a share of them below 1",
                mend="lower layers; leave active out to train all of them all the time",
            )
        return cls(rule.active, number, tuple(tuple(found[key]) for key in sorted(found)))

    def interval(self, step: int, steps: int) -> int:
        """The number of the interval that a step lies in.

        Args:
            step: from 0.
            steps: of the whole stage.
        """
        every = self.active.every
        return step // max(1, round(every) if every >= 1 else math.ceil(every * steps))

    def resting(self, interval: int, seed: int) -> frozenset[str]:
        """Names of what is not trained in an interval."""
        chosen = self._chosen(interval, seed)
        return frozenset(name for at, names in enumerate(self.layers) if at not in chosen for name in names)

    def _chosen(self, interval: int, seed: int) -> set[int]:
        count, share = len(self.layers), self.active.layers
        size = min(count, max(1, round(share * count) if share < 1 else round(share)))
        if self.active.order == "unfreeze":
            return set(range(min(count, size * (interval + 1))))
        if self.active.order == "cycle":
            first = size * (interval % math.ceil(count / size))
            return set(range(first, min(first + size, count)))
        return set(random.Random(f"{seed}/{self.number}/{interval}").sample(range(count), size))


class Turns(TrainerCallback):  # type: ignore[misc]
    """Tells a trainer at the start of every interval which parameters rest.

    Args:
        rotations: of a stage's rules.
        seed: of the stage.
        rest: is given the names of what is not trained until it is called again.
    """

    def __init__(self, rotations: Sequence[Rotation], seed: int, rest: Callable[[frozenset[str]], None]) -> None:
        self.rotations, self.seed, self.rest = rotations, seed, rest
        self.now: tuple[int, ...] = ()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step."""
        now = tuple(rotation.interval(state.global_step, state.max_steps) for rotation in self.rotations)
        if now != self.now:
            self.now = now
            resting = (r.resting(interval, self.seed) for r, interval in zip(self.rotations, now, strict=True))
            self.rest(frozenset().union(*resting))
