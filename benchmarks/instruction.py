"""Instruction tuning of a small decoder, from its first word on: by LoRA, in full and by a hybrid of both.

    python benchmarks/instruction.py --folder FOLDER   # what is not there yet; FOLDER keeps the model in between
    python benchmarks/instruction.py --table           # print the table of what is there
    python benchmarks/instruction.py --small           # a look whether all of it runs, in a minute; nothing is kept

A decoder shaped like Qwen3, of 5 million parameters, is trained on the English texts of the data sets by transformers'
Trainer: about nine minutes on two cores. Then it is tuned on instructions that a program makes of the same sets' labels
(a message's intent, its sentiment, whether it is spam, a word of it; one in four rows has two turns), two minutes a
strategy. Test rows are made of the sets' test rows. Results are appended to results/instruction.jsonl as they come, and
what stands there is skipped; the language model goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from record import Record
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

import hybridtune
from hybridtune import environment
from hybridtune.console import Console

RECORD = Record("instruction")
DATA = Path(__file__).parents[2] / "shared" / "data"
STRATEGIES = ("lora", "full", "top-full-lora-below")
SEEDS = (0, 1)
TEXTS = {"scitldr": "document", "squad_subset": "context", "multi30k_en_de": "source", "snips": "text"} | dict.fromkeys(
    ("banking77", "sms_spam_tiny", "xlmt_sentiment/en"), "text"
)
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCK, HELD = 128, 256  # tokens of a row of the language model; rows that its loss is measured on
SIZES = {"steps": 360, "train": 2000, "validation": 120, "test": 400, "epochs": 3}
SMALL = {"steps": 4, "train": 40, "validation": 8, "test": 8, "epochs": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--folder", type=Path, help="for the model; a temporary one otherwise")
    parser.add_argument("--small", action="store_true", help="few rows and steps; results are printed alone")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        with tempfile.TemporaryDirectory() as temporary:
            run(asked.data, asked.folder or Path(temporary), asked.small)
    if not asked.small:
        print(table(RECORD.rows()))


def run(data: Path, folder: Path, small: bool) -> None:
    """Tunes what is not there yet; of a small one a single seed, which is not written down."""
    seeds = SEEDS[: 1 if small else None]
    wanted = [(one, seed) for seed in seeds for one in STRATEGIES if small or not RECORD.has([one, seed])]
    if not wanted:
        return
    sizes = SMALL if small else SIZES
    model = pretrained(data, folder / ("small" if small else "model"), sizes["steps"])
    rows = {split: instructions(data, split, sizes[split]) for split in ("train", "validation", "test")}
    for strategy, seed in wanted:
        row = tuned(model, rows, strategy, seed, sizes["epochs"])
        print(json.dumps(row), flush=True)
        if not small:
            RECORD.add(row)


def of_set(data: Path, name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a data set."""
    return [json.loads(line) for line in (data / name / f"{split}.jsonl").read_text("utf-8").splitlines()]


def pretrained(data: Path, folder: Path, steps: int) -> Path:
    """A language model of the training texts, and its loss on validation texts in pretraining.json; made once."""
    if (folder / "pretraining.json").is_file():
        return folder
    texts = {
        split: [str(row[column]) for name, column in TEXTS.items() for row in of_set(data, name, split)]
        for split in ("train", "validation")
    }
    tokenizer = tokenizer_of(texts["train"])
    blocks = {split: Dataset.from_list(list(in_blocks(tokenizer, some))) for split, some in texts.items()}
    blocks["validation"] = blocks["validation"].select(range(min(HELD, len(blocks["validation"]))))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=256,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=768,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    arguments = TrainingArguments(
        str(folder / "training"), max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=32,
        learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.1, save_steps=40,
        save_total_limit=1, report_to="none", disable_tqdm=True, logging_steps=20, seed=0,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=blocks["train"], eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
    )  # fmt: skip
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    told = {"eval_loss": trainer.evaluate()["eval_loss"], "seconds": round(time.perf_counter() - started)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(told))
    print(json.dumps(told), flush=True)
    return folder


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, with the format of a conversation."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=special[0],
        pad_token=special[0],
        additional_special_tokens=special[1:],
        chat_template=CHAT,
        model_max_length=512,
    )


def in_blocks(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[dict[str, list[int]]]:
    """Texts in a random order, one behind the other, cut into rows of one length."""
    mixed = random.Random(0).sample(list(texts), len(texts))
    ids = [one for text in tokenizer(mixed, verbose=False)["input_ids"] for one in (*text, tokenizer.eos_token_id)]
    for start in range(0, len(ids) - BLOCK, BLOCK):
        block = ids[start : start + BLOCK]
        yield {"input_ids": block, "labels": block}


def instructions(data: Path, split: str, count: int) -> list[dict[str, Any]]:
    """Conversations out of the rows of a split: what is asked, and what the set says is right; `kind` of the last."""
    chance = random.Random(f"{split} {count}")
    banks = {
        "sentiment": [
            (f"Classify the sentiment as positive, negative or neutral.\n{row['text']}", row["label"])
            for row in of_set(data, "xlmt_sentiment/en", split)
        ],
        "spam": [
            (f"Is this message spam? Answer yes or no.\n{row['text']}", "yes" if row["label"] == "spam" else "no")
            for row in of_set(data, "sms_spam_tiny", split)
        ],
        "intent": [
            (f"What does the user want?\n{row['text']}", spaced(row["label"])) for row in of_set(data, "snips", split)
        ],
        "last word": [
            (f"Copy the last word.\n{row['text']}", row["text"].split()[-1]) for row in of_set(data, "banking77", split)
        ],
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        turns: list[dict[str, str]] = []
        for _ in range(chance.choice((1, 1, 1, 2))):
            kind = chance.choice(list(banks))
            asked, answer = chance.choice(banks[kind])
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "kind": kind})
    return rows


def spaced(label: str) -> str:
    """AddToPlaylist as words."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in label).strip()


def tuned(model: Path, rows: dict[str, list[dict[str, Any]]], strategy: str, seed: int, epochs: int) -> dict[str, Any]:
    """One tuning, and how its model answers the test rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = hybridtune.tune(
            model=str(model), task="instruction", **rows, strategy=strategy, seed=seed, num_train_epochs=epochs,
            per_device_train_batch_size=32, max_tokens_per_micro_batch=2048, max_new_tokens=12, max_length=256,
            output=str(Path(folder) / "run"), data={"survey": False}, console=Console(quiet=True),
        )  # fmt: skip
        lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text("utf-8").splitlines()]
        chosen = run.decision["candidates"][0]
        told = run.evaluation
    by_kind: dict[str, list[float]] = {}
    for row, line in zip(rows["test"], lines, strict=True):
        by_kind.setdefault(row["kind"], []).append(line["stats"]["exact_match"])
    machine = environment.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "key": [strategy, seed],
        "metrics": {name: metric["value"] for name, metric in told["metrics"].items()},
        "intervals": {name: [metric["low"], metric["high"]] for name, metric in told["metrics"].items()},
        "exact_match": {kind: 100 * float(np.mean(right)) for kind, right in sorted(by_kind.items())},
        "baselines": {
            one["name"]: {name: metric["value"] for name, metric in one["metrics"].items()} for one in told["baselines"]
        },
        "validation": chosen["validation"],
        **{key: chosen[key] for key in ("seconds", "peak_bytes", "trainable", "total")},
        "pretraining": json.loads((model / "pretraining.json").read_text()),
        "processor": machine["processor"],
        "threads": machine["threads"],
        "versions": {key: machine[key] for key in ("hybridtune", "torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, in Markdown."""
    lines = ["| strategy | exact match | ROUGE-L | trained | seconds | MiB | seeds |", "|---|---|---|---|---|---|---|"]
    for strategy in STRATEGIES:
        mine = [row for row in rows if row["key"][0] == strategy]
        if not mine:
            continue
        exact, rouge = (np.mean([row["metrics"][name] for row in mine]) for name in ("exact_match", "rougeL"))
        seconds = np.mean([row["seconds"] for row in mine])
        peaks = [row["peak_bytes"] for row in mine if row["peak_bytes"]]
        memory = f"{max(peaks) / 2**20:,.0f}" if peaks else "-"
        trained = f"{mine[0]['trainable']:,}"
        lines.append(f"| {strategy} | {exact:.1f} | {rouge:.1f} | {trained} | {seconds:.0f} | {memory} | {len(mine)} |")
    if rows:
        for name, metrics in rows[-1]["baselines"].items():
            lines.append(f"| {name} | {metrics['exact_match']:.1f} | {metrics['rougeL']:.1f} | - | - | - | - |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
