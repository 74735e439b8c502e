"""What a person should look at in the data before hours go into it: near duplicates, languages, labels that are likely
wrong, and whether more data would help. Nothing is changed by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from . import predict
from .answer import BATCH
from .console import Console
from .data.checking.findings import EXAMPLES, SHOWN, Finding
from .data.checking.rows import texts_of
from .data.doubts.curve import Curve, learning_curve
from .data.doubts.languages import UNSURE, languages
from .data.doubts.near import MOST_ROWS, Near, near_duplicates
from .data.doubts.suspects import suspect_label_sets, suspect_labels, suspect_values
from .model import Loaded
from .tasks import Task

SIMILAR = 0.8
TRAIN_ROWS, HELD_ROWS = 5000, 2000  # at most so many are run through the frozen model
FEW_ROWS = 200  # fewer say nothing
# Operations that may go into frozen features: about half a minute of an ordinary machine.
WORK = {"cpu": 3e12, "cuda": 1e15, "mps": 1e14}
MANY_SUSPECTS = 0.1
FEW_LANGUAGES = 0.02  # a smaller share of a language is not told

_SUSPECTS = {"classes": suspect_labels, "labels": suspect_label_sets, "values": suspect_values}


def of_texts(task: Task, rows: dict[str, Dataset], seed: int = 0) -> tuple[list[Finding], dict[str, Any]]:
    """Near duplicates and languages, from the texts alone.

    Args:
        task: knows which columns are texts.
        rows: of the splits, checked. Of very large ones a sample is looked at.
        seed: of the sample.

    Returns:
        Findings, and what data.json says besides.
    """
    rows = {name: _sample(table, seed) for name, table in rows.items()}
    texts = {name: _texts(table, [c for c in task.apart if c in table.column_names]) for name, table in rows.items()}
    pairs = near_duplicates(texts, SIMILAR)
    spoken = {name: languages([" ".join(row) for row in of_split]) for name, of_split in texts.items()}
    looked = min(sum(map(len, rows.values())), MOST_ROWS)
    return _near_findings(pairs, texts, rows), {"languages": spoken, "near_duplicates_looked_at": looked}


def _sample(table: Dataset, seed: int) -> Dataset:
    """At most as many rows as can be compared; their texts alone come into memory."""
    if len(table) <= MOST_ROWS:
        return table
    return table.select(np.sort(np.random.default_rng(seed).choice(len(table), MOST_ROWS, replace=False)))


def _texts(table: Dataset, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(texts_of(table, name) for name in columns), strict=True))


def _near_findings(
    pairs: Sequence[Near], texts: dict[str, list[tuple[str, ...]]], rows: dict[str, Dataset]
) -> list[Finding]:
    """One for each two splits that have near duplicates in common."""
    found = []
    for split, other in dict.fromkeys((pair.split_a, pair.split_b) for pair in pairs):
        mine = [pair for pair in pairs if (pair.split_a, pair.split_b) == (split, other)]
        count = len({pair.row_b for pair in mine})
        within = split == other
        examples = [
            {
                "row": rows[split]["_row"][pair.row_a],
                "text": " | ".join(texts[split][pair.row_a])[:SHOWN],
                "other_split": other,
                "other_row": rows[other]["_row"][pair.row_b],
                "other_text": " | ".join(texts[other][pair.row_b])[:SHOWN],
                "similarity": round(pair.similarity, 3),
            }
            for pair in mine[:EXAMPLES]
        ]
        rows_of = f"{count} row{'s' if count > 1 else ''} of {other} {'are' if count > 1 else 'is'}"
        did = f"kept: {rows_of} almost equal to {'others' if within else f'rows of {split}'}"
        did += f", in {len(mine)} pairs" if len(mine) != count else ""
        did += "" if within or other == "train" else ", so that a score on them is too good"
        found.append(Finding("near_duplicate", split, count, did, "info" if within else "warning", examples))
    return found


@dataclass(frozen=True)
class Features:
    """Mean hidden states of the frozen model for a sample of the rows, float32 [rows, width]."""

    train: np.ndarray
    held_out: np.ndarray
    train_rows: Dataset
    held_rows: Dataset


def features(
    task: Task, loaded: Loaded, rows: dict[str, Dataset], items: dict[str, Dataset], seed: int
) -> Features | str:
    """Runs as many rows of train and validation through the frozen model as take about half a minute.

    Args:
        task, loaded: the model as it was given, on its device.
        rows, items: of the splits, and as they are cut into tokens.
        seed: of the sample.

    Returns:
        The features, or why there are none.
    """
    if not task.pooled:
        return f"not for the task {task.name}"
    tokens = float(np.mean([len(ids) for ids in items["train"]["input_ids"][:1000]]))
    affordable = WORK[next(loaded.model.parameters()).device.type] / (2 * _size(loaded.model) * tokens)
    if affordable < FEW_ROWS:
        return f"the model is too large here: {affordable:.0f} rows could be run in half a minute"
    share = min(1.0, affordable / (TRAIN_ROWS + HELD_ROWS))
    chance, found, picked = np.random.default_rng(seed), [], []
    for name, most in (("train", TRAIN_ROWS), ("validation", HELD_ROWS)):
        count = min(len(rows[name]), int(most * share))
        at = np.sort(chance.permutation(len(rows[name]))[:count])
        found.append(predict.features(loaded.model, items[name].select(at), loaded.tokenizer, BATCH))
        picked.append(rows[name].select(at))
    return Features(found[0], found[1], picked[0], picked[1])


def _size(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with: all but the table of embeddings."""
    embedded = int(model.get_input_embeddings().weight.numel())
    return max(int(sum(parameter.numel() for parameter in model.parameters())) - embedded, 1)


def of_features(task: Task, found: Features, seed: int) -> tuple[list[Finding], Curve]:
    """Labels that are likely wrong, and what more data would bring.

    Args:
        task: a pooled one.
        found: features of a sample of the rows.
        seed: of folds and subsets.
    """
    kind, targets = task.judged(found.train_rows)
    suspects = _SUSPECTS[kind](found.train, targets, seed=seed)
    texts, numbers = task.joined(found.train_rows), found.train_rows["_row"][:]
    examples = [
        {
            "row": numbers[one.row],
            "text": texts[one.row][:SHOWN],
            "label": task.told(one.given),
            "suggestion": task.told(one.suggested),
            "probability": round(one.score, 4),
        }
        for one in suspects[:EXAMPLES]
    ]
    did = f"kept: of {len(numbers):,} rows these may have the wrong label, look at them"
    if len(suspects) > MANY_SUSPECTS * len(numbers):
        did += "; they are so many that it rather means that the frozen model tells these labels apart badly"
    findings = [Finding("suspect_label", "train", len(suspects), did, "info", examples)] if suspects else []
    _, held = task.judged(found.held_rows)
    return findings, learning_curve((found.train, targets), (found.held_out, held), kind, seed=seed)


def say_languages(spoken: dict[str, dict[str, float]], console: Console) -> None:
    """The languages of train, and of another split where they are others."""

    def told(shares: dict[str, float]) -> str:
        return ", ".join(f"{code} {share:.0%}" for code, share in shares.items() if share >= FEW_LANGUAGES)

    main = {name: max((c for c in of if c != UNSURE), key=of.__getitem__, default=None) for name, of in spoken.items()}
    console.line(f"  languages of train: {told(spoken['train'])}")
    for name, code in main.items():
        if None not in (code, main["train"]) and code != main["train"]:
            console.warn(f"{name}: most texts are {code}, those of train are {main['train']}: {told(spoken[name])}")
