"""Translation from English into German without a pretrained translator, and what hybrids of tuning give it.

    python benchmarks/translation.py                                   # all that the table needs
    python benchmarks/translation.py --models t5 --strategies full
    python benchmarks/translation.py --max-rows 200 --minutes 0.5      # whether it runs at all; kept apart in the key
    python benchmarks/translation.py --table                           # print the table of what is there

Data are the pairs of multi30k (29,000 captions, 1,000 for the test). Four models, made once into --folder:

    marian        a Marian of 3 + 3 layers, width 256, with random weights; its tokenizer (6,000 pieces) is trained on
                  the rows
    t5            a T5 of the same size, likewise
    multilingual  an EncoderDecoderModel warm-started from a multilingual encoder (Rothe et al. 2020, Leveraging
                  Pre-trained Checkpoints for Sequence Generation Tasks, arXiv 1907.12461): its first 6 layers as the
                  encoder, its first 3 as the decoder with new cross-attention; `vocabulary: {trim: true}`
    retrained     the same with `vocabulary: {train: 8000}`

The multilingual encoder is a folder (--encoder): multilingual-e5-small, say, or another of BERT's kind. Each strategy
trains for --minutes, the last part of them with a learning rate that falls to zero. Results are appended to
results/translation.jsonl as they come; what stands there already is skipped. Beside each model stands what its
tokenizer would give to perfect translations: the references, cut into pieces and put together again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import sacrebleu
import torch
import transformers as hf
from record import Record
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

import hybridtune
from hybridtune.console import Console

RECORD = Record("translation")
DATA = Path(__file__).parents[2] / "shared" / "data" / "multi30k_en_de"
SPLITS = ("train", "validation", "test")
VOCABULARY = {"marian": None, "t5": None, "multilingual": {"trim": True}, "retrained": {"train": 8000}}
BATCH = 64
SETTLING = 0.15  # of the time, with a learning rate that falls to zero

# Small enough for several passes over the pairs in half an hour on two cores.
SIDE = {"layers": 3, "attention_heads": 4, "ffn_dim": 512}
T5 = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 3}
MARIAN = {
    "d_model": 256,
    "scale_embedding": True,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIDE.items()},
}
LORA = {"part": "encoder.layers", "method": "lora", "r": 16, "learning_rate": 2e-3}
ALL, DECODER = {"part": "all", "method": "full"}, {"part": "decoder.layers", "method": "full"}
TABLE, HEAD = {"part": "embeddings", "method": "full"}, {"part": "head", "method": "full"}
# What is trained, and the rates: where weights are pretrained, the new cross-attention learns faster than they do.
STRATEGIES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "t5": {
        "full": [ALL],
        "lora-encoder": [LORA, DECODER, TABLE],
        "frozen-encoder": [DECODER, TABLE],
    },
    "multilingual": {
        "full": [{**ALL, "learning_rate": 2e-4}, DECODER, HEAD],
        "lora-encoder": [LORA, DECODER, HEAD],
        "frozen-encoder": [DECODER, HEAD],
    },
}
STRATEGIES["marian"] = STRATEGIES["t5"]
STRATEGIES["retrained"] = {
    name: [*STRATEGIES["multilingual"][name], {"part": "new", "method": "full", "learning_rate": 1e-3}]
    for name in ("full", "lora-encoder")
}
RATE = {"marian": 2e-3, "t5": 3e-3, "multilingual": 5e-4, "retrained": 5e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--models", nargs="+", choices=list(STRATEGIES), default=["marian", "multilingual"])
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--encoder", type=Path, help="folder of the multilingual encoder")
    parser.add_argument("--folder", type=Path, default=Path("runs/translation-models"), help="where models are made")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, for each strategy")
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    if not asked.table:
        for model in asked.models:
            for strategy in asked.strategies or STRATEGIES[model]:
                run(asked, model, strategy)
    print(table(RECORD.rows()))


def run(asked: argparse.Namespace, model: str, strategy: str) -> None:
    """One tuning, unless it is there already."""
    key = [model, strategy, asked.seed, asked.minutes, *([f"{asked.max_rows} rows"] if asked.max_rows else [])]
    if RECORD.has(key):
        return
    row = {"key": key, **tune(asked, made(asked, model), model, strategy)}
    RECORD.add(row)
    print(json.dumps({key: row[key] for key in ("key", "test", "ceiling", "seconds")}), flush=True)


def texts(asked: argparse.Namespace, split: str) -> list[str]:
    """Both sides of a split."""
    rows = [json.loads(line) for line in (asked.data / f"{split}.jsonl").read_text("utf-8").splitlines()]
    return [row[side] for row in rows for side in ("source", "target")]


def made(asked: argparse.Namespace, model: str) -> Path:
    """The folder of a model, made where it is not there."""
    folder: Path = asked.folder / ("multilingual" if model == "retrained" else model)
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    if model in ("marian", "t5"):
        tokenizer = trained_tokenizer(texts(asked, "train"))
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        given = {"vocab_size": len(tokenizer), "decoder_start_token_id": ids["pad_token_id"], **ids}
        if model == "t5":
            built: Any = hf.T5ForConditionalGeneration(hf.T5Config(**given, **T5))
        else:
            built = hf.MarianMTModel(hf.MarianConfig(**given, **MARIAN, forced_eos_token_id=ids["eos_token_id"]))
    else:
        if asked.encoder is None:
            raise SystemExit(f"{model}: give the folder of a multilingual encoder with --encoder")
        tokenizer = hf.AutoTokenizer.from_pretrained(asked.encoder)
        built = hf.EncoderDecoderModel.from_encoder_decoder_pretrained(
            *(str(asked.encoder), str(asked.encoder)),
            encoder_num_hidden_layers=6,
            decoder_num_hidden_layers=3,
        )
        built.config.decoder_start_token_id = tokenizer.bos_token_id or tokenizer.cls_token_id
        built.config.eos_token_id = tokenizer.eos_token_id or tokenizer.sep_token_id
        built.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    built.save_pretrained(folder)
    return folder


def trained_tokenizer(rows: list[str], pieces: int = 6000) -> Any:
    """T5's tokenizer with pieces of these texts, letters and case as they are."""
    words = Tokenizer(kinds.Unigram())
    words.normalizer, words.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=pieces, special_tokens=special, unk_token="<unk>", show_progress=False)
    words.train_from_iterator(rows, trainer)
    vocab = [tuple(piece) for piece in json.loads(words.to_str())["model"]["vocab"]]
    return hf.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def stages(model: str, strategy: str, minutes: float) -> dict[str, Any]:
    """A strategy: most of the time by the inverse square root, the rest straight down to zero."""
    rate, rules = RATE[model], STRATEGIES[model][strategy]
    most = {
        "name": "train",
        "rules": rules,
        "learning_rate": rate,
        "num_train_epochs": 100,
        "max_seconds": 60 * minutes * (1 - SETTLING),
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 300,
    }
    lower = [
        {**rule, "learning_rate": rule["learning_rate"] / 4} if "learning_rate" in rule else rule for rule in rules
    ]
    rest = {
        "name": "settle",
        "rules": lower,
        "learning_rate": rate / 4,
        "num_train_epochs": 1,
        "max_seconds": 60 * minutes * SETTLING,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
    }
    return {"name": strategy, "stages": [most, rest]}


def tune(asked: argparse.Namespace, folder: Path, model: str, strategy: str) -> dict[str, Any]:
    """One tuning, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as temporary:
        run = hybridtune.tune(
            model=str(folder),
            task="translation",
            data={**{split: str(asked.data / f"{split}.jsonl") for split in SPLITS}, "survey": False},
            vocabulary=VOCABULARY[model],
            strategy=[stages(model, strategy, asked.minutes)],
            per_device_train_batch_size=BATCH,
            max_length=128,
            max_new_tokens=64,
            num_beams=4,
            generate_on=100,
            max_rows=asked.max_rows,
            seed=asked.seed,
            output=str(Path(temporary) / "run"),
            console=Console(),
        )
        candidate = run.evaluation["candidates"][0]
        environment, data = (json.loads((run.folder / f"{name}.json").read_text()) for name in ("environment", "data"))
        return {
            "test": candidate["metrics"],
            "validation": run.decision["candidates"][0]["validation"],
            "baselines": {b["name"]: b["metrics"] for b in run.evaluation["baselines"]},
            "ceiling": ceiling(run.tokenizer, texts(asked, "test")[1::2]),
            "vocabulary": data.get("vocabulary", {"pieces": len(run.tokenizer)}),
            "epochs": steps(run.folder) * BATCH / data["splits"]["train"]["rows"],
            **{key: candidate[key] for key in ("seconds", "trainable", "total", "peak_bytes")},
            "rows": run.evaluation["rows"],
            "processor": environment["processor"],
            "threads": environment["threads"],
            "versions": {key: environment[key] for key in ("hybridtune", "torch", "transformers", "peft")},
            "date": time.strftime("%Y-%m-%d"),
        }


def steps(folder: Path) -> int:
    """How many updates the stages of a run came to, each of a batch."""
    logs = [(stage / "log.jsonl").read_text().splitlines() for stage in (folder / "stages").iterdir()]
    return sum(max((json.loads(line)["step"] for line in log), default=0) for log in logs)


def ceiling(tokenizer: Any, references: list[str]) -> dict[str, float]:
    """BLEU and chrF of the references after the tokenizer has cut them and put them together again."""
    again = tokenizer.batch_decode(tokenizer(text_target=references)["input_ids"], skip_special_tokens=True)
    return {
        "bleu": sacrebleu.corpus_bleu(again, [references]).score,
        "chrf": sacrebleu.corpus_chrf(again, [references]).score,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one block a model, the best first."""
    lines = []
    for model in dict.fromkeys(row["key"][0] for row in rows):
        found = sorted((row for row in rows if row["key"][0] == model), key=lambda row: -row["test"]["bleu"]["value"])
        first = found[0]
        lines += [
            f"\n**{model}** ({first['rows']} test rows, {first['vocabulary']['pieces']:,} pieces; the tokenizer alone: "
            f"BLEU {first['ceiling']['bleu']:.1f}, chrF {first['ceiling']['chrf']:.1f})\n",
            "| strategy | test BLEU | test chrF | trained | minutes | epochs |",
            "|---|---|---|---|---|---|",
        ]
        for row in found:
            _, strategy, seed, *rest = row["key"]
            extra = f", seed {seed}" * bool(seed) + "".join(f", {one}" for one in rest[1:])
            lines.append(
                f"| {strategy}{extra} | {score(row['test']['bleu'])} | {score(row['test']['chrf'])} | "
                f"{row['trainable']:,} | {row['seconds'] / 60:.1f} | {row['epochs']:.1f} |"
            )
        for title, metrics in first["baselines"].items():
            lines.append(f"| {title} (baseline) | {score(metrics['bleu'])} | {score(metrics['chrf'])} | - | - | - |")
    return "\n".join(lines)


def score(metric: dict[str, float]) -> str:
    """Such as 27.1 [26.0, 28.3]."""
    return f"{metric['value']:.1f} [{metric['low']:.1f}, {metric['high']:.1f}]"


if __name__ == "__main__":
    main()
