"""Peak memory and seconds of saving and loading a model of one billion parameters, and the size of the files.

    python benchmarks/large.py --folder FOLDER    # measure what is not there yet; FOLDER gets up to 12 GB for a while
    python benchmarks/large.py --again            # measure everything again; the table shows the latest
    python benchmarks/large.py --table            # print the table of what is there

The model is shaped like Llama, its weights are random: 4 GB in float32. Every measurement runs in a fresh process, with
the files in the page cache. A peak is what the process held at most beyond what it held just before, mapped files
included, as hybridtune/memory.py has it. transformers maps a model's file and reads nothing before it is used, so every
loading here ends, and every saving begins, with a model whose weights have all been read once. hybridtune's seconds
hold what transformers does not do: fsync and SHA-256 when it saves, SHA-256 and the fingerprint of the base's weights
when it loads. Results are appended to results/large.jsonl; what stands there is skipped. The model is removed in the
end unless `--keep` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - here, so that no measurement holds its import
import torch
import transformers
from record import Record
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from hybridtune import checkpoint, environment
from hybridtune import model as models
from hybridtune.anatomy import Anatomy
from hybridtune.compose import Assembly
from hybridtune.memory import PeakMemory
from hybridtune.recipe import Training, load_strategy
from hybridtune.resolve import resolve

RECORD = Record("large")
AUTO = "AutoModelForSequenceClassification"
STRATEGIES = ("lora", "top-full-lora-below", "full")
WORK = (
    ("transformers", "save"),
    ("transformers", "load"),
    *((strategy, step) for strategy in STRATEGIES for step in ("save", "load")),
)
CONFIG = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "intermediate_size": 6784,
    "vocab_size": 32000,
    "pad_token_id": 0,
}
ROOM = 14 * 10**9  # the model, what is saved of it, and a temporary file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the model and what is saved of it; a temporary one otherwise")
    parser.add_argument("--keep", action="store_true", help="keep the model in the folder for the next time")
    parser.add_argument("--again", action="store_true", help="measure also what stands there already")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--one", nargs=2, metavar=("WHO", "STEP"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.folder, *asked.one)))
        return
    if not asked.table:
        with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
            run(asked.folder if asked.keep and asked.folder else Path(temporary), asked.again)
    print(table(RECORD.rows()))


def run(folder: Path, again: bool) -> None:
    """Measures what is wanted, each in a process of its own."""
    wanted = [list(pair) for pair in WORK if again or not RECORD.has(pair)]
    if not wanted:
        return
    if shutil.disk_usage(folder).free < ROOM:
        raise SystemExit(f"{folder}: needs {ROOM / 10**9:.0f} GB of free disk")
    if not (folder / "model" / "config.json").is_file():
        apart(build, folder)
    for who, step in WORK:
        saves = step == "save" and [who, "load"] in wanted and who != "transformers"  # what will be loaded
        if saves or [who, step] in wanted:
            row = {"key": [who, step], **in_process(folder, who, step)}
            if [who, step] in wanted:
                RECORD.add(row)
                print(json.dumps({key: row[key] for key in ("key", "peak_bytes", "seconds", "file_bytes")}), flush=True)
        if step == "load":
            shutil.rmtree(folder / who, ignore_errors=True)


def apart(work: Callable[[Path], None], folder: Path) -> None:
    """Runs a function in a forked process, so that its memory is given back."""
    if (child := os.fork()) == 0:
        work(folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"{work.__name__} failed")


def build(folder: Path) -> None:
    """Writes the model as pretrained ones come: without a head, with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**CONFIG))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "model", max_shard_size="50GB")
    words = Tokenizer(kinds.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder / "model")


def in_process(folder: Path, who: str, step: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--one", who, step]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, who: str, step: str) -> dict[str, Any]:
    """Peak, seconds and bytes of one step of transformers or of a strategy; for the process that does nothing else."""
    transformers.logging.set_verbosity_error()
    warm(folder / "model")
    warm(folder / who)
    if who == "transformers":
        work = save_plain(folder / "model", folder / who) if step == "save" else load_plain(folder / "model")
    else:
        work = save_delta(folder / "model", folder / who, who) if step == "save" else load_delta(folder / who)
    memory, started = PeakMemory(torch.device("cpu")), time.perf_counter()
    kept = work()
    seconds, peak = time.perf_counter() - started, memory.peak()
    del kept
    saved = folder / ("model" if who == "transformers" else who)
    machine = environment.describe(torch.device("cpu"))
    return {
        "peak_bytes": peak,
        "seconds": round(seconds, 2),
        "file_bytes": next(saved.glob("*.safetensors")).stat().st_size,
        "model_bytes": (folder / "model" / "model.safetensors").stat().st_size,
        "processor": machine["processor"],
        "threads": machine["threads"],
        "versions": {key: machine[key] for key in ("hybridtune", "torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


def warm(folder: Path) -> None:
    """Brings files into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def load_plain(source: Path) -> Callable[[], Any]:
    """transformers' own loading."""
    return lambda: used(getattr(transformers, AUTO).from_pretrained(source, dtype=torch.float32))


def used(model: torch.nn.Module) -> torch.nn.Module:
    """Reads every weight once: those of a mapped file are in memory only then."""
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def save_plain(source: Path, to: Path) -> Callable[[], Any]:
    """transformers' own saving."""
    model = load_plain(source)()
    return lambda: model.save_pretrained(to)


def save_delta(source: Path, to: Path, strategy: str) -> Callable[[], Any]:
    """Saving what a strategy trains. Nothing is trained: a delta holds what was trained, moved or not."""
    loaded = models.load(str(source), AUTO)
    base = checkpoint.Base(str(source), None, models.fingerprint(loaded.model, loaded.new), AUTO, {})
    assembly = Assembly(loaded.model, Anatomy(loaded.model, loaded.new))
    full, _ = resolve(load_strategy(strategy), Training(), assembly, models.width(loaded.model))
    for stage in full.stages:
        assembly.begin(stage)
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    return lambda: checkpoint.write(to, assembly, base)


def load_delta(folder: Path) -> Callable[[], Any]:
    """Loading it: base, check of its weights, structure, tensors."""
    return lambda: used(checkpoint.load(folder)[0].model)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; of several measurements of one thing the latest."""
    latest = {tuple(row["key"]): row for row in rows}
    lines = [
        "| | files | of the model | save: peak | save: seconds | load: peak | of the model | load: seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for who in ("transformers", *STRATEGIES):
        save, load = latest.get((who, "save")), latest.get((who, "load"))
        if save and load:
            whole = load["model_bytes"]
            lines.append(
                f"| {'save_pretrained, from_pretrained' if who == 'transformers' else who} "
                f"| {save['file_bytes'] / 1e6:,.0f} MB | {save['file_bytes'] / whole:.1%} "
                f"| {save['peak_bytes'] / 1e6:,.0f} MB | {save['seconds']:.1f} "
                f"| {load['peak_bytes'] / 1e6:,.0f} MB | {load['peak_bytes'] / whole:.2f} x | {load['seconds']:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
