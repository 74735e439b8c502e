"""Metrics of one's own: every public function here is one. Gold and predicted labels come as lists, a row each."""

from __future__ import annotations

from typing import Any


def worst_class(gold: list[Any], predicted: list[Any]) -> float:
    """The recall of the class that is found least often."""
    return min(
        sum(p == label for g, p in zip(gold, predicted, strict=True) if g == label) / gold.count(label)
        for label in set(gold)
    )


def mistakes(gold: list[Any], predicted: list[Any]) -> float:
    """How many rows of a hundred are wrong."""
    return 100 * sum(g != p for g, p in zip(gold, predicted, strict=True)) / len(gold)


mistakes.direction = "minimize"  # type: ignore[attr-defined]
