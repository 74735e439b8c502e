"""Speed and memory on a GPU beside transformers' Trainer with PEFT and Liger Kernel: ratios of interleaved runs.

    python benchmarks/gpu.py                                  # all, on a GPU
    python benchmarks/gpu.py --models bert-base --methods lora --rounds 5
    python benchmarks/gpu.py --seconds 400                    # begin nothing new after that time
    python benchmarks/gpu.py --device cpu --models tiny       # whether it runs at all
    python benchmarks/gpu.py --table                          # print the table of what is there

Models have the shape of a known one and random weights, rows random tokens: encoders rows of 16 to 512 tokens (most of
them short, a quarter of the padded batch), decoders rows of 2,048 to 4,096, all of them labelled. All sides have the
same rows, batch, rates and optimizer, the model's own dropout, and bf16 by autocast over trained weights in fp32:

    trainer        Trainer with a padding collator and PEFT, sdpa
    grouped        the same with batches grouped by length
    liger          the same with Liger Kernel, where it is installed and knows the model
    ours           what `hybridtune tune` does by default
    ours+liger     with `use_liger_kernel`, likewise

In a round each side runs once, in turn, in one process; ratios are those within a round. Figures are useful tokens (no
padding) a second, from the end of the third step on. A side that runs out of memory says so. Results are appended to
results/gpu.jsonl; what stands there of this GPU is skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Record

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers import models as kinds
from transformers.utils import is_liger_kernel_available

from hybridtune import environment
from hybridtune.anatomy import Anatomy
from hybridtune.memory import PeakMemory
from hybridtune.recipe import Stage
from hybridtune.train import HybridTrainer

RECORD = Record("gpu")
BERT = {"vocab_size": 30522, "num_labels": 4, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "bert-base": {"type": "bert", "batch": 128, "lengths": (16, 512), "config": BERT},
    "bert-large": {
        "type": "bert",
        "batch": 64,
        "lengths": (16, 512),
        "config": {
            **BERT,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    },
    "qwen2-0.5b": {
        "type": "qwen2",
        "batch": 4,
        "lengths": (2048, 4096),
        "config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
    },
    "llama-1b": {
        "type": "llama",
        "batch": 4,
        "lengths": (2048, 4096),
        "config": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        },
    },
    "tiny": {
        "type": "qwen2",
        "batch": 4,
        "lengths": (8, 32),
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "pad_token_id": 0,
        },
    },
}
METHODS: dict[str, list[dict[str, Any]]] = {
    "full": [{"part": "all", "method": "full"}],
    "lora": [{"part": "layers", "method": "lora", "r": 16}],
}
PRODUCTS = {"full": 3, "lora": 2}  # of a token with a weight of the layers, forwards and backwards
SIDES = ("ours", "trainer", "grouped", "liger", "ours+liger")
WARM, STEPS = 3, 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=[one for one in MODELS if one != "tiny"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=RECORD.file)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        begun = time.monotonic()
        for model in asked.models:
            for method in asked.methods:
                if time.monotonic() - begun < asked.seconds:
                    run(asked, model, method)
    print(table(Record(asked.results).rows()))


def run(asked: argparse.Namespace, model: str, method: str) -> None:
    """All sides of one method on one model, in the rounds that are not there yet."""
    device = torch.device(asked.device)
    machine = environment.describe(device)
    record = Record(asked.results)
    wanted = [one for one in range(1, asked.rounds + 1) if not record.has([model, method, machine["device"], one])]
    rows = rows_of(MODELS[model])
    keys = ("device", "processor", "hybridtune", "torch", "transformers", "peft")
    about = {**sizes(model), **{one: machine[one] for one in keys}, "date": time.strftime("%Y-%m-%d")}
    for number in [0, *wanted] if wanted else []:  # the first one compiles kernels, and does not count
        runs = []
        for side in SIDES:
            if "liger" in side and (MODELS[model]["type"] == "bert" or not liger(device)):
                continue
            runs.append({"side": side, **once(asked, model, method, side, rows)})
            print(number, json.dumps(runs[-1]), flush=True)
        if number:
            key = [model, method, machine["device"], number]
            record.add({"key": key, "runs": runs, "peak": peak(device), **about})


def liger(device: torch.device) -> bool:
    """Whether Liger Kernel can be run."""
    return device.type == "cuda" and is_liger_kernel_available()


def peak(device: torch.device) -> float:
    """TFLOP/s of a large product in bf16."""
    size = 8192 if device.type == "cuda" else 1024
    x, weight = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        wait(device)
        begun = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e12


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def tokenizer() -> Any:
    """Collators want one."""
    words = Tokenizer(kinds.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def rows_of(shape: dict[str, Any]) -> Dataset:
    """Random tokens; of encoders' rows the lengths' logarithms are spread evenly, of decoders' the lengths."""
    generator = torch.Generator().manual_seed(0)
    low, high = shape["lengths"]
    spread = torch.rand(shape["batch"] * STEPS, generator=generator)
    lengths = low * (high / low) ** spread if shape["type"] == "bert" else low + (high - low) * spread
    vocabulary = shape["config"]["vocab_size"]
    made: dict[str, list[Any]] = {
        "input_ids": [torch.randint(4, vocabulary, (int(one),), generator=generator).tolist() for one in lengths]
    }
    if shape["type"] == "bert":
        made["labels"] = [number % 4 for number in range(len(lengths))]
    return Dataset.from_dict(made)


def built(model: str, device: torch.device) -> Any:
    """A model with random weights."""
    shape = MODELS[model]
    auto = hf.AutoModelForSequenceClassification if shape["type"] == "bert" else hf.AutoModelForCausalLM
    torch.manual_seed(0)
    with device:
        return auto.from_config(hf.AutoConfig.for_model(shape["type"], **shape["config"]), attn_implementation="sdpa")


def sizes(model: str) -> dict[str, int]:
    """Weights of the layers' matrices, and of the head's; twice so many operations is what a token costs forwards."""
    found = built(model, torch.device("meta"))
    layers = sum(found.get_submodule(one).weight.numel() for one in Anatomy(found).part("layers").matrices)
    head = found.get_output_embeddings()
    return {"layer_weights": layers, "head_weights": head.weight.numel() if head is not None else 0}


def once(asked: argparse.Namespace, name: str, method: str, side: str, rows: Dataset) -> dict[str, Any]:
    """One training of a few steps; the clock runs from the end of the third on."""
    device, shape = torch.device(asked.device), MODELS[name]
    model, words = built(name, device), tokenizer()
    times: list[tuple[float, int]] = []
    seen = 0

    class Clock(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (WARM, STEPS):
                wait(device)
                times.append((time.perf_counter(), seen))

    if shape["type"] == "bert":
        collate: Any = hf.DataCollatorWithPadding(words)
    else:
        collate = hf.DataCollatorForLanguageModeling(words, mlm=False)

    def counted(features: list[Any]) -> Any:
        nonlocal seen
        seen += sum(len(one["input_ids"]) for one in features)
        return collate(features)

    with tempfile.TemporaryDirectory() as folder:
        grouped = {"train_sampling_strategy": "group_by_length"} if side in ("grouped", "liger") else {}
        given = hf.TrainingArguments(
            folder,
            per_device_train_batch_size=shape["batch"],
            num_train_epochs=1,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=device.type == "cpu",
            use_liger_kernel="liger" in side,
            report_to=[],
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
            seed=0,
            **grouped,
        )
        more = {"train_dataset": rows, "processing_class": words, "data_collator": counted, "callbacks": [Clock()]}
        if side.startswith("ours"):
            model._hybridtune_new = ()
            rules = METHODS[method]
            if method == "lora" and shape["type"] == "bert":
                rules = [*rules, {"part": "head", "method": "full"}]
            trainer: Any = HybridTrainer(model, given, strategy=[Stage.model_validate({"rules": rules})], **more)
        else:
            if method == "lora":
                matrices = list(Anatomy(model).part("layers").matrices)
                task = "SEQ_CLS" if shape["type"] == "bert" else "CAUSAL_LM"
                model = get_peft_model(model, LoraConfig(task_type=task, r=16, lora_alpha=32, target_modules=matrices))
            trainer = hf.Trainer(model, given, **more)
        trainer.remove_callback(hf.PrinterCallback)
        memory = PeakMemory(device)
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return {"out_of_memory": True}
        finally:
            engine = str(getattr(trainer, "engine", "") or "")
            del trainer, model, more
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    (first, before), (last, after) = times
    return {
        "tokens_per_second": round((after - before) / (last - first), 1),
        "peak_bytes": memory.peak(),
        "engine": engine,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a method and a model."""
    lines = []
    for device in dict.fromkeys(row["key"][2] for row in rows):
        mine = [row for row in rows if row["key"][2] == device]
        where = mine[0]
        best = statistics.median(row["peak"] for row in mine)
        lines += [
            f"\n**{device}** (torch {where['torch']}, transformers {where['transformers']}, PEFT {where['peft']}, "
            f"{where['date']}; a large product in bf16: {best:.0f} TFLOP/s)\n",
            "| model | method | side | tokens/s | of peak | ours, times as fast | memory | rounds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for model, method in dict.fromkeys(tuple(row["key"][:2]) for row in mine):
            rounds = [row for row in mine if row["key"][:2] == [model, method]]
            sides = [run["side"] for run in rounds[0]["runs"]]
            lines += [f"| {model} | {method} | {_cells(rounds, method, side)} |" for side in sides]
    return "\n".join(lines)


def _cells(rounds: list[dict[str, Any]], method: str, side: str) -> str:
    found = [{run["side"]: run for run in row["runs"]} for row in rounds]
    runs = [one[side] for one in found]
    if any("out_of_memory" in one for one in runs):
        return f"{side} | out of memory | - | - | - | {len(runs)}"
    speed = statistics.median(one["tokens_per_second"] for one in runs)
    first = rounds[0]
    # a head over a vocabulary passes its gradient on, and has one of its own where it is trained
    weights = PRODUCTS[method] * (first["layer_weights"] + first["head_weights"])
    share = 2 * weights * speed / 1e12 / statistics.median(row["peak"] for row in rounds)
    ratios = [
        one["ours"]["tokens_per_second"] / one[side]["tokens_per_second"]
        for one in found
        if "out_of_memory" not in one["ours"]
    ]
    times = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else "-"
    memory = max(one["peak_bytes"] for one in runs) / 2**30
    return f"{side} | {speed:,.0f} | {share:.0%} | {times} | {memory:.1f} GiB | {len(runs)}"


if __name__ == "__main__":
    main()
