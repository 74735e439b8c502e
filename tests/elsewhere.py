"""Models loaded in a new process: with hybridtune, and where it cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import tiny
import torch

# Runs a snippet that makes `model` and `tokenizer`, and writes [logits, class, training], or what went wrong.
PLAIN = """
import json, sys, traceback
sys.modules["hybridtune"] = None  # importing it fails
import torch
jobs, ids, mask = json.loads(sys.stdin.read())
batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
for snippet, out in jobs:
    names = {}
    try:
        exec(snippet, names)
        with torch.no_grad():
            logits = names["model"](**batch).logits.double().tolist()
        names["tokenizer"](["a b"])
        found = [logits, type(names["model"]).__name__, names["model"].training]
    except Exception:
        found = traceback.format_exc()
    json.dump(found, open(out, "w"))
"""
# Loads a delta's folder and writes its logits.
OURS = """
import json, sys
import torch
from pathlib import Path
from hybridtune import checkpoint
jobs, ids, mask = json.loads(sys.stdin.read())
batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
for folder, out in jobs:
    with torch.no_grad():
        logits = checkpoint.load(Path(folder))[0].model(**batch).logits
    json.dump(logits.double().tolist(), open(out, "w"))
"""


def in_a_new_process(code: str, jobs: list[tuple[str, str]]) -> None:
    """Does jobs in one new process, on `tiny.batch()`.

    Args:
        code: PLAIN or OURS.
        jobs: what each is about, and the file that its result goes to.
    """
    batch = tiny.batch()
    sent = json.dumps([jobs, batch["input_ids"].tolist(), batch["attention_mask"].tolist()])
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
