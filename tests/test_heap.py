"""Memory that a training frees stays with the process until it ends, where glibc has the heap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers as hf
from datasets import Dataset

from hybridtune import heap
from hybridtune.train import HybridTrainer

# In a process of its own: what the heap of this one holds free is anybody's guess.
SCRIPT = """
import json, os, resource
from contextlib import suppress
from hybridtune import heap

BYTES = 100 * 2**20

def cleared(size=BYTES):
    '''Pages that the system clears for a block that is written, freed, and asked for again, of all its pages.'''
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * size
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found / (size / os.sysconf("SC_PAGE_SIZE"))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / BYTES

found = {"before": cleared()}
with heap.kept():
    with heap.kept():
        found["inner"] = cleared()
    found["outer"] = cleared()
    held = resident()
found["given back"] = held - resident()
found["after"] = cleared(4 * BYTES)  # more than any gap in the heap
with suppress(ZeroDivisionError), heap.kept():
    cleared()
    held = resident()
    1 / 0
found["given back after an error"] = held - resident()
with heap.kept():
    cleared()
    held = resident()
    child = os.fork()
    if not child:
        os._exit(int(held - resident() > 0.7 and cleared(4 * BYTES) > 0.7))
    found["a child finds nothing and allocates as ever"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found["still kept after a fork"] = 1 - cleared()
child = 0
with suppress(KeyError), heap.kept():
    child = os.fork()
    if not child:
        raise KeyError
if not child:
    os._exit(heap._open == 0)
found["a child that leaves by an error"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(found))
"""


def ran(**environment: str) -> dict[str, float]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=own | environment, capture_output=True, check=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


@pytest.mark.skipif(heap._library is None, reason="this system's allocator is not glibc's")
def test_freed_memory_is_used_again_and_then_given_back() -> None:
    told = ran()
    assert told["inner"] < 0.01
    assert told["outer"] < 0.01, "a training within another one's callback ends"
    for key in ("before", "after"):
        assert told[key] > 0.7, "as glibc does by itself"
    for key in set(told) - {"inner", "outer", "before", "after"}:
        assert told[key] > 0.7, key


@pytest.mark.skipif(heap._library is None, reason="this system's allocator is not glibc's")
def test_who_sets_the_allocator_keeps_it() -> None:
    told = ran(MALLOC_ARENA_MAX="2")
    assert told["inner"] > 0.7
    assert told["outer"] > 0.7


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_a_training_keeps_it(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def kept() -> Iterator[None]:
        told.append("begins")
        yield
        told.append("ends")

    class Look(hf.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            told.append("step")

    monkeypatch.setattr(heap, "kept", kept)
    given = hf.TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    rows = Dataset.from_list([{"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "labels": n % 2} for n in range(8)])
    trainer = HybridTrainer(
        tiny.classifier("bert"), given, train_dataset=rows, processing_class=tiny.tokenizer(), engine=asked
    )
    trainer.add_callback(Look())
    trainer.train()
    assert told == (["begins", "step", "step", "ends"] if asked == "auto" else ["step", "step"])
