"""Speed and memory on a GPU beside transformers' Trainer with PEFT and Liger Kernel: ratios of interleaved runs.

    python benchmarks/gpu.py                                  # all, on a GPU
    python benchmarks/gpu.py --models bert-base --methods lora --rounds 5
    python benchmarks/gpu.py --seconds 400                    # begin nothing new after that time
    python benchmarks/gpu.py --profile                        # and where the time goes, ours
    python benchmarks/gpu.py --device cpu --models tiny       # whether it runs at all
    python benchmarks/gpu.py --table                          # print the tables of what is there

Models have the shape of a known one and random weights, rows random tokens: encoders rows of 16 to 512 tokens (most of
them short, a quarter of the padded batch), decoders rows of 2,048 to 4,096, all of them labelled. All sides have the
same rows, batch, rates and optimizer, the model's own dropout, and bf16 by autocast over trained weights in fp32; all
collate batches in the process that trains, as is the default:

    trainer        Trainer with a padding collator and PEFT, sdpa
    grouped        encoders: the same with batches of rows of about one length
    packed         decoders: the same with DataCollatorWithFlattening, which leaves no padding, and flash attention 2 in
                   the kernel that torch has of it
    liger          decoders: `trainer` with Liger Kernel, where it is installed
    packed+liger   both
    ours           what `hybridtune tune` does by default
    ours+liger     with `use_liger_kernel`, decoders

In a round each side runs once, in turn; ratios are those within a round. Liger Kernel changes transformers for all that
a process makes later: sides with it run in one process, those without it in another, which waits meanwhile. A run goes
four times over the same three batches; figures are useful tokens (no padding) a second of the last three times, since
in the first kernels are compiled, some for every width of a batch. A side that fails says so. Results are appended to
results/gpu.jsonl; what stands there of this GPU, measured so, is skipped.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
from hybridtune.engine import varlen
from hybridtune.errors import first_line
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
ENCODERS = ("ours", "trainer", "grouped")
DECODERS = ("ours", "trainer", "packed", "liger", "packed+liger", "ours+liger")
BATCHES, EPOCHS = 3, 4
STEPS = f"{BATCHES} batches {EPOCHS} times, the first of which does not count"
# What torch's operations are for, by the device's time; what kernels it calls otherwise is the rest.
KINDS = {
    "products with weights": r"aten::(mm|addmm_?)",
    "attention": r".*(flash|varlen)_attention.*|.*varlen_attn.*",
    "softmax of a vocabulary": r"aten::(_?softmax|_log_softmax.*|max|gather|scatter_)",
    "norms, GELU, SiLU": r"aten::(native_layer_norm.*|_fused_rms_norm.*|gelu.*|silu.*)|Liger(RMSNorm|SiLUMul).*",
    "copies, casts": r"aten::(copy_|cat|index_.*|fill_|zero_)",
    "sums, products": r"aten::(add_?|mul_?|sum|neg|pow|mean|rsqrt|div_?)",
    "dropout": r"aten::native_dropout.*",
    "optimizer": r"aten::(_fused_adamw_|_foreach_.*)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=[one for one in MODELS if one != "tiny"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=RECORD.file)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--profile", action="store_true")
    what.add_argument("--table", action="store_true", help="print the tables and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        begun, sides = time.monotonic(), Sides(asked.device)
        for number, model, method in itertools.product(range(1, asked.rounds + 1), asked.models, asked.methods):
            if time.monotonic() - begun < asked.seconds:
                run(asked, sides, number, model, method)
    print(table(Record(asked.results).rows()))


class Sides:
    """Two processes on one device, which run in turn: with Liger Kernel, which stays in a process, and without."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._processes = {with_liger: ProcessPoolExecutor(1, get_context("spawn")) for with_liger in (False, True)}
        begun = [process.submit(machine, device) for process in self._processes.values()]  # both at once
        self.machine = begun[0].result()

    def once(self, model: str, method: str, side: str, profile: bool = False) -> dict[str, Any]:
        """One training."""
        process = self._processes["liger" in side]
        try:
            return process.submit(once, self.device, model, method, side, profile).result()
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {first_line(error, 120)}"}

    def peak(self) -> float:
        """TFLOP/s of the device."""
        return self._processes[False].submit(peak, torch.device(self.device)).result()


def run(asked: argparse.Namespace, sides: Sides, number: int, model: str, method: str) -> None:
    """All sides of one method on one model in one round, where it is not there yet, and the profile of ours."""
    record = Record(asked.results)
    about = {**sizes(model), **sides.machine, "date": time.strftime("%Y-%m-%d")}
    key = [model, method, sides.machine["device"], STEPS]
    if not record.has([*key, number]):
        runs = []
        for side in ENCODERS if MODELS[model]["type"] == "bert" else DECODERS:
            if "liger" not in side or is_liger_kernel_available():
                runs.append({"side": side, **sides.once(model, method, side)})
                print(number, model, method, json.dumps(runs[-1]), flush=True)
        record.add({"key": [*key, number], "runs": runs, "peak": sides.peak(), **about})
    if asked.profile and not record.has([*key, "profile"]):
        found = sides.once(model, method, "ours", profile=True)
        if "took" in found:
            record.add({"key": [*key, "profile"], **found, **about})


def machine(on: str) -> dict[str, Any]:
    """What it is measured on."""
    found = environment.describe(torch.device(on))
    return {one: found[one] for one in ("device", "processor", "hybridtune", "torch", "transformers", "peft")}


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


@functools.cache
def rows_of(model: str, grouped: bool) -> Dataset:
    """Random tokens; of encoders' rows the lengths' logarithms are spread evenly, of decoders' the lengths.

    Args:
        model: for which.
        grouped: whether those of about one length lie together.
    """
    shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    low, high = shape["lengths"]
    spread = torch.rand(shape["batch"] * BATCHES, generator=generator)
    lengths = low * (high / low) ** spread if shape["type"] == "bert" else low + (high - low) * spread
    lengths = lengths.sort(descending=True).values if grouped else lengths
    vocabulary = shape["config"]["vocab_size"]
    made: dict[str, list[Any]] = {
        "input_ids": [torch.randint(4, vocabulary, (int(one),), generator=generator).tolist() for one in lengths]
    }
    if shape["type"] == "bert":
        made["labels"] = [number % 4 for number in range(len(lengths))]
    return Dataset.from_dict(made)


def flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' flash attention over a packed batch, by torch's kernel; on a CPU row by row."""
    assert cu_seq_lens_q is not None
    if query.device.type == "cpu":
        sizes = cu_seq_lens_q.diff().tolist()
        pieces = zip(*(torch.split(one.to(value.dtype), sizes, 2) for one in (query, key, value)), strict=True)
        options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        found = [torch.nn.functional.scaled_dot_product_attention(*piece, **options) for piece in pieces]
        return torch.cat(found, 2).transpose(1, 2), None
    dtype = torch.get_autocast_dtype(query.device.type)
    states = (one.to(dtype).squeeze(0).transpose(0, 1) for one in (query, key, value))
    assert scaling is not None
    return varlen.flash(*states, cu_seq_lens_q, max_length_q, True, scaling, 0.0)[None], None


hf.AttentionInterface.register("packed", flash)
hf.AttentionMaskInterface.register("packed", lambda **kwargs: None)


def built(model: str, device: torch.device, attention: str = "sdpa") -> Any:
    """A model with random weights."""
    shape = MODELS[model]
    auto = hf.AutoModelForSequenceClassification if shape["type"] == "bert" else hf.AutoModelForCausalLM
    torch.manual_seed(0)
    with device:
        return auto.from_config(
            hf.AutoConfig.for_model(shape["type"], **shape["config"]), attn_implementation=attention
        )


def sizes(model: str) -> dict[str, int]:
    """Weights of the layers' matrices, and of the head's; twice so many operations is what a token costs forwards."""
    found = built(model, torch.device("meta"))
    layers = sum(found.get_submodule(one).weight.numel() for one in Anatomy(found).part("layers").matrices)
    head = found.get_output_embeddings()
    return {"layer_weights": layers, "head_weights": head.weight.numel() if head is not None else 0}


def once(on: str, name: str, method: str, side: str, profile: bool = False) -> dict[str, Any]:
    """One training of a few steps.

    Args:
        on: which device.
        name: of a model.
        method: one of METHODS.
        side: see above.
        profile: for the seconds of each of KINDS in a step too. The profiler takes time itself.
    """
    device, shape, packed = torch.device(on), MODELS[name], side.startswith("packed")
    rows, last_step = rows_of(name, side == "grouped"), BATCHES * EPOCHS
    model, words = built(name, device, "packed" if packed else "sdpa"), tokenizer()
    times: list[tuple[float, int]] = []
    tokens = 0
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]
    profiler = torch.profiler.profile(activities=kinds)

    class Clock(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (BATCHES, last_step):
                wait(device)
                times.append((time.perf_counter(), tokens))
                if profile:
                    profiler.stop() if state.global_step == last_step else profiler.start()

    if shape["type"] == "bert":
        collate: Any = hf.DataCollatorWithPadding(words)
    elif packed:
        collate = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    else:
        collate = hf.DataCollatorForLanguageModeling(words, mlm=False)

    def counted(features: list[Any]) -> Any:
        nonlocal tokens
        tokens += sum(len(one["input_ids"]) for one in features)
        return collate(features)

    with tempfile.TemporaryDirectory() as folder:
        given = hf.TrainingArguments(
            folder,
            per_device_train_batch_size=shape["batch"],
            num_train_epochs=EPOCHS,
            train_sampling_strategy="sequential",
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
            loss = trainer.train().training_loss
        except torch.OutOfMemoryError:
            return {"failed": "out of memory"}
        finally:
            engine = str(getattr(trainer, "engine", "") or "")
            del trainer, model, more
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    (first, before), (last, after) = times
    steps = last_step - BATCHES
    return {
        "tokens_per_second": round((after - before) / (last - first), 1),
        "tokens_per_step": (after - before) / steps,
        "peak_bytes": memory.peak(),
        "loss": loss,
        "engine": engine,
        **({"took": _kinds(profiler, device, steps)} if profile else {}),
    }


def _kinds(profiler: Any, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of the device in a step; an operation has those of the kernels that it starts itself."""
    time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(one.key, getattr(one, time) / 1e6 / steps) for one in profiler.key_averages() if _of_host(one)]
    took = {kind: sum(spent for key, spent in events if re.fullmatch(names, key)) for kind, names in KINDS.items()}
    return took | {"device": sum(spent for _, spent in events)}


def _of_host(event: Any) -> bool:
    """An operation, not a kernel: what each takes stands with either. The optimizer's mark is neither."""
    return event.device_type == torch.autograd.DeviceType.CPU and "#" not in event.key


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a side of a method on a model, and where the time of ours goes."""
    lines = []
    for device, steps in dict.fromkeys(tuple(row["key"][2:4]) for row in rows):
        same = [row for row in rows if row["key"][2:4] == [device, steps]]
        mine = [row for row in same if "runs" in row]
        where = mine[0]
        best = statistics.median(row["peak"] for row in mine)
        lines += [
            f"\n**{device}** (torch {where['torch']}, transformers {where['transformers']}, PEFT {where['peft']}, "
            f"{where['date']}; {steps}; a large product in bf16: {best:.0f} TFLOP/s)\n",
            "| model | method | side | tokens/s | of peak | ours, times as fast | memory | rounds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for model, method in dict.fromkeys(tuple(row["key"][:2]) for row in mine):
            rounds = [row for row in mine if row["key"][:2] == [model, method]]
            sides = [run["side"] for run in rounds[0]["runs"]]
            lines += [f"| {model} | {method} | {_cells(rounds, method, side)} |" for side in sides]
        lines += _profiles(same)
    return "\n".join(lines)


def _profiles(rows: list[dict[str, Any]]) -> list[str]:
    """Where ours is busy, in percent of the time that the device is; and for how much of a step it is."""
    found = [row for row in rows if "took" in row]
    if not found:
        return []
    lines = [
        "",
        "Where the time of ours goes (`--profile`): the device's, in percent of what it is busy for, and how many",
        "milliseconds that is of a step. In the rest it waits for the host, which the profiler slows down: the step's",
        "milliseconds are those without it.",
        "",
        "| model | method | " + " | ".join(KINDS) + " | rest | busy | step |",
        "|---|---|" + "---|" * (len(KINDS) + 3),
    ]
    for row in found:
        model, method = row["key"][:2]
        took, busy = row["took"], row["took"]["device"]
        shares = [took[kind] / busy for kind in KINDS]
        cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
        runs = [one["runs"][0] for one in rows if one["key"][:2] == row["key"][:2] and "runs" in one]
        step = statistics.median(
            one["tokens_per_step"] / one["tokens_per_second"] for one in runs if "failed" not in one
        )
        lines.append(f"| {model} | {method} | {' | '.join(cells)} | {1e3 * busy:.0f} | {1e3 * step:.0f} |")
    return lines


def _cells(rounds: list[dict[str, Any]], method: str, side: str) -> str:
    found = [{run["side"]: run for run in row["runs"]} for row in rounds]
    runs = [one[side] for one in found]
    failed = next((one["failed"] for one in runs if "failed" in one), "")
    if failed:
        return f"{side} | {failed} | - | - | - | {len(runs)}"
    speed = statistics.median(one["tokens_per_second"] for one in runs)
    first = rounds[0]
    # a head over a vocabulary passes its gradient on, and has one of its own where it is trained
    weights = PRODUCTS[method] * (first["layer_weights"] + first["head_weights"])
    share = 2 * weights * speed / 1e12 / statistics.median(row["peak"] for row in rounds)
    ratios = [
        one["ours"]["tokens_per_second"] / one[side]["tokens_per_second"]
        for one in found
        if "failed" not in one["ours"]
    ]
    times = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else "-"
    memory = max(one["peak_bytes"] for one in runs) / 2**30
    return f"{side} | {speed:,.0f} | {share:.0%} | {times} | {memory:.1f} GiB | {len(runs)}"


if __name__ == "__main__":
    main()
