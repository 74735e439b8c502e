"""CPU seconds and memory of a check on rows that lie on the disk.

    python benchmarks/checking.py                                # a million rows of each task
    python benchmarks/checking.py --rows 10000000 --tasks classification

Every task is checked in a process of its own. Its rows are made up: words at random, one in a hundred rows stands
there twice. They are written to an Arrow file and mapped into memory. What is counted is the memory that the check adds
and that is the process's own (RssAnon); pages of the file, which the system may take back, are not.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

TASKS = ("classification", "regression", "tagging", "question_answering", "hold_out")
BATCH = 10_000


def rows_of(task: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields made-up rows of about 60 characters of text."""
    chance = np.random.default_rng(seed)
    words = np.array(["".join(chance.choice(list("abcdefghij"), 4)) for _ in range(5000)])
    tags = np.array(["O", "O", "O", "B-PER", "B-LOC"])
    for start in range(0, count, BATCH):
        picks = words[chance.integers(0, len(words), (BATCH, 12))].tolist()
        marks = tags[chance.integers(0, len(tags), (BATCH, 12))].tolist()
        numbers = chance.normal(size=BATCH).tolist()
        for at in range(min(BATCH, count - start)):
            number = start + at + 1
            at -= at % 100 == 99  # the row before once more
            text = " ".join(picks[at])
            row: dict[str, Any] = {"text": text, "label": f"class {int(abs(numbers[at]) * 20)}"}
            if task == "regression":
                row["label"] = numbers[at]
            elif task == "tagging":
                row = {"tokens": picks[at], "tags": marks[at]}
            elif task == "question_answering":
                start_at = text.index(picks[at][6])
                answers = {"text": [picks[at][6]], "answer_start": [start_at]}
                row = {"question": " ".join(picks[at][:3]), "context": text, "answers": answers}
            yield {**row, "_row": number}


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(task: str, folder: str) -> None:
    """Checks what lies in the folder, and prints how it went."""
    from hybridtune.data import split
    from hybridtune.data.checking import check

    splits = {name: Dataset.load_from_disk(f"{folder}/{name}") for name in ("train", "test")}
    sources = dict.fromkeys(splits, "rows.csv")
    before, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, told = time.process_time(), []
    if task == "hold_out":
        rows = splits["train"]
        held = split.hold_out(rows, 0.1, 0, texts=["text"], strata=rows["label"][:])
        told = [f"{len(held[1])} rows"]
    else:
        extra = {"multi_label": False} if task == "classification" else {}
        made, found = getattr(check, f"check_{task}")(splits, sources=sources, **extra)
        told = [f"{item.kind} {item.count}" for item in found if item.split == "train"][:3]
        held = made
    seconds, left = time.process_time() - began, own_memory() - before
    done.set()
    watcher.join()
    count = len(splits["train"])
    print(
        f"{task:20} {count:>10,} rows {seconds:7.1f} s of CPU  {seconds / count * 1e6:5.1f} us a row"
        f"  peak {peak[0] / 2**20:6.0f} MiB = {peak[0] / count:5.0f} B a row"
        f"  left {left / count:5.0f} B a row  ({', '.join(told)})",
        flush=True,
    )


def main() -> None:
    """Writes the rows of each task, and measures in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        measure(given.tasks[0], given.folder)
        return
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}")
    for task in given.tasks:
        with tempfile.TemporaryDirectory() as folder:
            for seed, (name, count) in enumerate((("train", given.rows), ("test", given.rows // 100))):
                made = Dataset.from_generator(
                    rows_of, gen_kwargs={"task": task, "count": count, "seed": seed}, cache_dir=f"{folder}/cache"
                )
                made.save_to_disk(f"{folder}/{name}")
            subprocess.run([sys.executable, __file__, "--tasks", task, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
