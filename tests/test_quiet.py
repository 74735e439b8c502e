"""Through Python nothing but hybridtune speaks, and what the user has set of other libraries stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUNE = """
import sys, warnings
import datasets
from transformers.utils import logging
import tiny, texts, hybridtune
from hybridtune import api
from hybridtune.console import Console
base, folder, kind = sys.argv[1:]
before = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled(), logging.get_verbosity()
least = {"model": base, "num_train_epochs": 1, "baselines": False, "output": folder, "console": Console(quiet=True)}
if kind == "adapter":
    run = api.tune(task="classification", strategy="lora", **texts.splits(24, 8, 8), **least)
    hybridtune.load(folder).predict(["good a"])
elif kind == "checkpoint":
    rows = texts.splits(48, 8, 8)
    api.tune(task="classification", strategy="full", data={"train": rows["train"], "folds": 2}, **least)
else:
    def spans(text):
        return [[text.index(word), text.index(word) + len(word), "X"] for word in ("good", "bad") if word in text]
    rows = [{"text": row["text"], "spans": spans(row["text"])} for row in texts.labelled(40)]
    api.tune(task="tagging", strategy="head", train=rows, **least)
after = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled(), logging.get_verbosity()
assert before == after == (False, True, logging.WARNING), after
assert not any("is_gradient" in str(one) for one in warnings.filters)
"""


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "spans"])
def test_nobody_else_speaks(base: Path, tmp_path: Path, kind: str) -> None:
    loud = {"HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"}
    environment = {key: value for key, value in os.environ.items() if key not in loud}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-c", TUNE, str(base), str(tmp_path / "run"), kind]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for sign in ("it/s", "%|", "is_gradient_checkpointing", "Flattening", "shards"):
        assert sign not in done.stderr, done.stderr
