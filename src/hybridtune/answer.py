"""Runs a model over items: the longest first, in batches of one length, results back in the items' order."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from . import engine as engines
from .engine import Engine, proof
from .engine.casts import Casts
from .engine.patch import alone
from .guard import is_out_of_memory
from .tasks import Task

BATCH = 32  # items at a time
Compute = Callable[[dict[str, torch.Tensor]], torch.Tensor]
Watch = Callable[[int, int], Any]  # is told how many items are done, of how many


def answers(
    model: PreTrainedModel,
    task: Task,
    items: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    watch: Watch | None = None,
    bf16: bool = False,
) -> list[np.ndarray]:
    """What a model answers: for every item its logits, float32, or the tokens that it wrote, int64.

    A model that writes is run with padding: it computes a token at a time, and its cache has a place for every row.
    """
    asked = task.questions(items, tokenizer)
    return run(
        model,
        asked,
        tokenizer,
        batch_size,
        lambda batch: task.respond(model, batch),
        per_token=task.per_token,
        fast=not task.writes,
        watch=watch,
        bf16=bf16,
    )


def run(
    model: PreTrainedModel,
    items: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    compute: Compute,
    *,
    per_token: bool = False,
    fast: bool = True,
    watch: Watch | None = None,
    bf16: bool = False,
) -> list[np.ndarray]:
    """Computes something of all items.

    Args:
        model: put into evaluation mode.
        items: the columns that it takes.
        tokenizer: pads them.
        batch_size: items at a time; halved where memory does not suffice; a single item is tried without the copies of
            weights that bf16 is faster with, too.
        compute: of a batch, something with an entry for each of its items.
        per_token: whether that has a place for every token.
        fast: whether it runs through the engine, without padding.
        watch: is told after every batch.
        bf16: whether under autocast to bf16.

    Returns:
        An array an item, in their order; of what has a place for every token, without those of padding.

    Raises:
        RuntimeError: out of memory with a single item.
    """
    device, collate = next(model.parameters()).device, DataCollatorWithPadding(tokenizer)
    rows = items.to_list()
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
    results: dict[int, np.ndarray] = {}
    engine: Engine | None = None
    casts = Casts(model, still=True)  # a model that writes would cast all its weights for every token
    with (
        alone(model),
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        casts.open() if bf16 else nullcontext(),
    ):
        model.eval()
        while order:
            numbers = order[:batch_size]
            try:
                batch = {key: value.to(device) for key, value in collate([rows[n] for n in numbers]).items()}
                few = proof.rows_of_batch(batch) if fast and engine is None else None
                engine = engines.start(model, few) if few else engine
                with engine.open(casts) if engine else nullcontext():
                    found = compute(batch)
                given = (found.float() if found.is_floating_point() else found).cpu().numpy()
            except RuntimeError as error:
                if not is_out_of_memory(error) or (len(numbers) == 1 and not casts.give_up()):
                    raise
                batch_size = -(-len(numbers) // 2)
                given = None
            if given is None:  # outside of the handler, whose error holds what was computed
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            for number, answer in zip(numbers, given, strict=True):
                results[number] = answer[: len(rows[number]["input_ids"])] if per_token else answer
            del order[: len(numbers)]
            if watch is not None:
                watch(len(rows) - len(order), len(rows))
    return [results[number] for number in range(len(rows))]
