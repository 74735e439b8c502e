"""Reading a file that is larger than it should be: seconds, rows a second, and by how much memory grows.

    python benchmarks/bigdata.py                          # 1 and 10 million rows
    python benchmarks/bigdata.py --rows 1000000 --kinds csv jsonl.zst
    python benchmarks/bigdata.py --table                  # print the table of what is there

A file of random words and ten labels is made in a temporary folder and read by a fresh process. Memory is what the
process had at its highest (VmHWM) beyond what it had before it read; of that, what is of the mapped file and can be
taken back at any time is told apart. Results are appended to results/bigdata.jsonl as they come; what stands there
already is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from record import Record

RECORD = Record("bigdata")
KINDS = ("csv", "jsonl", "csv.gz")
ROWS = (1_000_000, 10_000_000)
_WORDS = 20_000
_LABELS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="csv, tsv, jsonl or conll, perhaps .gz, .zst")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(measure(asked.read)))
        return
    for kind in asked.kinds if not asked.table else ():
        for count in asked.rows:
            if RECORD.has([kind, count]):
                continue
            row = {"key": [kind, count], **once(kind, count)}
            RECORD.add(row)
            print(json.dumps(row), flush=True)
    print(table(RECORD.rows()))


def once(kind: str, count: int) -> dict[str, Any]:
    """Makes a file, reads it in a process of its own, and throws it away."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{kind}"
        make(path, kind, count)
        command = [sys.executable, __file__, "--read", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TMPDIR": folder})
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert found["rows"] == count, found
        return {
            **found,
            "file_bytes": path.stat().st_size,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }


def make(path: Path, kind: str, count: int) -> None:
    """Writes rows of 5 to 30 random words."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(_WORDS)]
    compression = {"gz": "gzip", "zst": "zstd"}.get(kind.rpartition(".")[2])
    form = kind.split(".")[0]
    with pa.output_stream(str(path), compression=compression) as file:
        if form in ("csv", "tsv"):
            file.write(b"text,label\n" if form == "csv" else b"text\tlabel\n")
        for start in range(0, count, 10_000):
            lines = []
            for number in range(start, min(start + 10_000, count)):
                said, label = chance.choices(words, k=chance.randint(5, 30)), f"label {number % _LABELS}"
                lines.append(_line(form, said, label))
            file.write("".join(lines).encode())


def _line(form: str, words: list[str], label: str) -> str:
    if form == "jsonl":
        return json.dumps({"text": " ".join(words), "label": label}) + "\n"
    if form == "conll":
        return "".join(f"{word} O\n" for word in words) + "\n"
    return " ".join(words) + ("\t" if form == "tsv" else ",") + label + "\n"


def measure(path: Path) -> dict[str, Any]:
    """Reads a file in this process."""
    from hybridtune.data.reading.read import read

    before = _status()
    started = time.perf_counter()
    rows = read(path, "train")
    seconds = time.perf_counter() - started
    after = _status()
    return {
        "rows": len(rows),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(rows) / seconds),
        "grown_bytes": after["VmHWM"] - before["VmRSS"],
        "mapped_bytes": after["RssFile"] - before["RssFile"],
        "before_bytes": before["VmRSS"],
    }


def _status() -> dict[str, int]:
    """Memory of this process, in bytes; Linux alone tells it."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| file | rows | size | seconds | rows a second | memory grown |", "|---|---|---|---|---|---|"]
    for row in rows:
        kind, count = row["key"]
        lines.append(
            f"| {kind} | {count:,} | {row['file_bytes'] / 2**20:,.0f} MiB | {row['seconds']:.1f} "
            f"| {row['rows_per_second']:,} | {row['grown_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
