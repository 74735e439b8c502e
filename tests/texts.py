"""Small labelled texts for tiny models, and what tests of whole runs share."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIGNS = ("good", "bad", "new", "old")


def labelled(count: int, seed: int = 0, labels: Sequence[Any] = ("ham", "spam")) -> list[dict[str, Any]]:
    """Texts of 3 to 13 letters, each with the one word that gives its label (of at most four) away."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        words = chance.choices("abcdefghijklmnopqrstuvwxy", k=chance.randint(2, 12))  # z is free for a test
        words.insert(chance.randint(0, len(words)), SIGNS[number % len(labels)])
        found.append({"text": " ".join(words), "label": labels[number % len(labels)]})
    return found


def save_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def splits(
    train: int = 48, validation: int = 16, test: int = 20, labels: Sequence[Any] = ("ham", "spam")
) -> dict[str, Any]:
    """Rows of three splits that have no text in common."""
    counts = {"train": train, "validation": validation, "test": test}
    return {name: labelled(count, seed, labels) for seed, (name, count) in enumerate(counts.items(), 1)}
