"""What trimming a vocabulary to the rows saves, and whether the model still says the same.

    python benchmarks/trimming.py --model FOLDER           # an encoder with a large vocabulary, such as
                                                           # multilingual-e5-small

Rows are the caption pairs of multi30k, train and validation. Printed, and appended to results/trimming.jsonl: pieces
and bytes of weights before and after, seconds, and by how much the last hidden states of 64 rows differ at most.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Record

from hybridtune import environment, vocabulary
from hybridtune import model as models
from hybridtune.recipe import Vocabulary

RECORD = Record("trimming")
DATA = Path(__file__).parents[2] / "shared" / "data" / "multi30k_en_de"
SOME = 64
BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", required=True)
    asked = parser.parse_args()
    texts = [text for split in ("train", "validation") for text in pairs(asked.data / f"{split}.jsonl")]
    loaded = models.load(asked.model, "AutoModel")
    before = weights(loaded.model)
    hidden = states(loaded.model, loaded.tokenizer, texts[:SOME])

    def cut(tokenizer: Any) -> Iterator[list[int]]:
        for start in range(0, len(texts), BATCH):
            yield from tokenizer(texts[start : start + BATCH])["input_ids"]

    begun = time.perf_counter()
    fewer = vocabulary.change(Vocabulary(trim=True), loaded, lambda: iter([texts]), cut)
    after = vocabulary.follow(loaded, fewer)
    seconds = time.perf_counter() - begun
    row = {
        "model": Path(asked.model).name,
        "texts": len(texts),
        "pieces": [len(loaded.tokenizer), len(fewer)],
        "bytes": [before, weights(after.model)],
        "difference": float((states(after.model, fewer, texts[:SOME]) - hidden).abs().max()),
        "seconds": round(seconds, 1),
        "processor": environment.describe(torch.device("cpu"))["processor"],
        "date": time.strftime("%Y-%m-%d"),
    }
    RECORD.add(row)
    print(json.dumps(row, indent=1))


def pairs(path: Path) -> Iterator[str]:
    """Both sides of each row."""
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        yield from (row["source"], row["target"])


def weights(model: torch.nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def states(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Last hidden states of the tokens that are no padding, [tokens, width]."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found: torch.Tensor = model(**batch).last_hidden_state
    return found[batch["attention_mask"].bool()]


if __name__ == "__main__":
    main()
