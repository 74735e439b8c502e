"""Chooses a strategy by evidence: every candidate is trained and scored on validation data, the best one is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import console as consoles
from . import trial
from .errors import TrainingError
from .recipe import Strategy
from .tasks.metrics import mean_and_spread
from .trial import Setting, Trial


@dataclass(frozen=True)
class Candidate:
    """One strategy with the trials of all its seeds."""

    strategy: str
    trials: tuple[Trial, ...]

    def validation(self) -> dict[str, float]:
        """Mean over the seeds of every metric on validation data."""
        return {
            key: mean_and_spread([t.validation[key] for t in self.trials])["mean"] for key in self.trials[0].validation
        }

    def best(self, metric: str, direction: str) -> Trial:
        """The seed whose model is taken: the best on validation data."""
        return (max if direction == "maximize" else min)(self.trials, key=lambda t: t.validation[metric])

    def as_dict(self, metric: str) -> dict[str, Any]:
        """For decision.json."""
        peaks = [t.peak_bytes for t in self.trials if t.peak_bytes is not None]
        return {
            "strategy": self.strategy,
            "validation": self.validation(),
            "seconds": mean_and_spread([t.seconds for t in self.trials])["mean"],
            "peak_bytes": max(peaks) if peaks else None,
            "trainable": self.trials[0].trainable,
            "total": self.trials[0].total,
            "seeds": [
                {"seed": t.seed, "fold": t.fold, "validation": t.validation, "seconds": t.seconds} for t in self.trials
            ],
            "spread": {metric: mean_and_spread([t.validation[metric] for t in self.trials])["std"]},
        }


@dataclass(frozen=True)
class Decision:
    """Which candidate was taken, and why."""

    chosen: Candidate
    trial: Trial
    candidates: tuple[Candidate, ...]
    metric: str
    direction: str
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """decision.json."""
        return {
            "chosen": self.chosen.strategy,
            "seed": self.trial.seed,
            "goal": {"metric": self.metric, "direction": self.direction},
            "candidates": [candidate.as_dict(self.metric) for candidate in self.candidates],
            "reasons": list(self.reasons),
        }


def race(
    setting: Setting,
    strategies: Sequence[Strategy],
    seeds: Sequence[int],
    folder: Path,
    begin: Callable[[str, int, int | None], None] = lambda strategy, seed, fold: None,
    end: Callable[[Trial], None] = lambda trial: None,
) -> Decision:
    """Runs every candidate with every seed and decides by the goal's metric on validation data.

    Args:
        setting: what all trials share.
        strategies: the candidates, resolved.
        seeds: each candidate runs with each.
        folder: each trial goes into `folder/NAME` (or `NAME-seed-N`, `NAME-fold-N`, or both).
        begin, end: called around every trial.

    Raises:
        TrainingError: no candidate could be trained. One that could not drops out of the race.
    """
    candidates, failed = [], {}
    for strategy in strategies:
        trials = []
        try:
            for seed, fold in itertools.product(seeds, range(len(setting.folds)) if setting.folds else [None]):
                begin(strategy.name, seed, fold)
                name = strategy.name if len(seeds) == 1 else f"{strategy.name}-seed-{seed}"
                name += "" if fold is None else f"-fold-{fold + 1}"
                trials.append(trial.run(setting, strategy, seed, folder / name, fold))
                end(trials[-1])
        except TrainingError as error:
            failed[strategy.name] = error
            continue
        candidates.append(Candidate(strategy.name, tuple(trials)))
    if not candidates:
        raise next(iter(failed.values()))
    decision = decide(candidates, setting.metric, setting.direction)
    lost = tuple(f"{name} is out: {error.problem}" for name, error in failed.items())
    return replace(decision, reasons=decision.reasons + lost)


def decide(candidates: Sequence[Candidate], metric: str, direction: str) -> Decision:
    """Takes the best mean on validation data; of equals the one that trains fewer parameters."""
    sign = -1 if direction == "maximize" else 1
    ranked = sorted(candidates, key=lambda c: (sign * c.validation()[metric], c.trials[0].trainable))
    best = ranked[0]
    taken = best.best(metric, direction)
    score = best.validation()[metric]
    reasons = [f"{best.strategy} has the best {metric} on validation data: {consoles.number(score, 4)}"]
    if len(ranked) == 1:
        reasons = [
            f"{best.strategy} was the only strategy asked for; {metric} on validation data: {consoles.number(score, 4)}"
        ]
    for other in ranked[1:]:
        gap = abs(score - other.validation()[metric])
        tie = " (a tie: it trains more parameters)" if gap == 0 else ""
        reasons.append(f"{other.strategy} is {consoles.number(gap, 4)} behind{tie}")
    if len(best.trials) > 1:
        spread = mean_and_spread([t.validation[metric] for t in best.trials])["std"]
        seeds, folds = len({t.seed for t in best.trials}), len({t.fold for t in best.trials})
        of = " and ".join(f"{n} {what}" for n, what in ((seeds, "seeds"), (folds, "folds")) if n > 1)
        own = f"seed {taken.seed}" + ("" if taken.fold is None else f", fold {taken.fold + 1}")
        reasons.append(
            f"mean of {of}, standard deviation {consoles.number(spread, 4)}; "
            f"the model is that of {own}, the best on validation data"
        )
    return Decision(best, taken, tuple(candidates), metric, direction, tuple(reasons))
