"""Gradients of embedding tables: those of torch, in memory that is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from hybridtune import engine
from hybridtune.engine.embedding import Tables

IDS = torch.tensor([[5, 2, 2, 0, 0], [7, 1, 5, 5, 3]])


def backward(model: nn.Module, loss: Callable[[], torch.Tensor], tables: Tables | None) -> None:
    with ExitStack() as undo:
        if tables:
            tables.open(undo)
        loss().backward()


def patched(module: nn.Module, tables: Tables) -> bool:
    """Whether the lookup is another while it is open."""
    with ExitStack() as undo:
        tables.open(undo)
        return "forward" in vars(module)


@pytest.mark.parametrize("padding", [None, 0, 2])
def test_rows_are_added_as_the_formula_says(padding: int | None) -> None:
    table = nn.Embedding(9, 4, padding_idx=padding)
    outer = torch.randn(2, 5, 4).round(decimals=1)
    expected = torch.zeros(9, 4)
    for row, ids in zip(outer.view(-1, 4), IDS.view(-1), strict=True):
        if ids != padding:
            expected[ids] += row
    backward(table, lambda: (table(IDS) * outer).sum(), Tables(table))
    torch.testing.assert_close(table.weight.grad, expected, atol=1e-6, rtol=0)
    assert "forward" not in vars(table)


def test_memory_is_kept_and_zeroed_between_updates_and_added_to_within_one() -> None:
    table, plain = nn.Embedding(9, 4), nn.Embedding(9, 4)
    plain.load_state_dict(table.state_dict())
    tables, kept = Tables(table), []
    for update in range(3):
        for micro in range(2):
            outer = torch.randn(2, 5, 4)
            ids = (IDS + update + micro) % 9
            backward(table, lambda ids=ids, outer=outer: (table(ids) * outer).sum(), tables)
            (plain(ids) * outer).sum().backward()
            assert torch.allclose(table.weight.grad, plain.weight.grad, atol=1e-6)
        kept.append(tables._kept[table.weight].tensor.data_ptr())
        for one in (table, plain):
            one.weight.grad.mul_(0.5)  # as clipping does
            one.zero_grad()
        assert table.weight.grad is None
    assert len(set(kept)) == 1  # it was never given back in between
    tables.forget()
    assert not tables._kept


@pytest.mark.parametrize("hold", [lambda one: one, lambda one: one.detach(), lambda one: one[3:]])
def test_a_gradient_that_somebody_holds_stays_what_it_was(hold: Callable[[torch.Tensor], torch.Tensor]) -> None:
    table = nn.Embedding(9, 4)
    tables = Tables(table)
    backward(table, lambda: table(IDS).sum(), tables)
    held = hold(table.weight.grad)
    before = held.clone()
    table.zero_grad()
    backward(table, lambda: (7 * table(IDS)).sum(), tables)
    assert torch.equal(held, before)
    assert table.weight.grad.sum() == 7 * IDS.numel() * 4


def test_what_rests_keeps_no_memory() -> None:
    table = nn.Embedding(9, 4)
    tables = Tables(table)
    backward(table, lambda: table(IDS).sum(), tables)
    table.zero_grad()
    table.weight.requires_grad_(False)
    assert not patched(table, tables)
    assert not tables._kept


def models() -> dict[str, Callable[[], Any]]:
    small = {"vocab_size": 50, "pad_token_id": 0}
    return {
        "bert": lambda: hf.BertForMaskedLM(
            hf.BertConfig(**small, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
        ),  # tied
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **small, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
                tie_word_embeddings=True,
            )
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**small, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),  # one table for encoder, decoder and head
    }  # fmt: skip


@pytest.mark.parametrize("name", list(models()))
def test_gradients_of_whole_models_are_torchs(name: str) -> None:
    model = models()[name]().eval()
    tables = Tables(model)
    batch = {"input_ids": torch.randint(1, 50, (3, 7)), "labels": torch.randint(1, 50, (3, 7))}
    batch["input_ids"][0, 4:] = 0
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    for _ in range(2):  # without gradients, and in memory of the update before
        for _ in range(2):
            backward(model, lambda: model(**batch).loss, tables)
        ours = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}
        model.zero_grad()
        for _ in range(2):
            model(**batch).loss.backward()
        torchs = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
        assert ours.keys() == torchs.keys()
        for key, one in torchs.items():
            assert torch.allclose(ours[key], one, atol=1e-6), key
        model.zero_grad()


@pytest.mark.parametrize(
    "table",
    [
        nn.Embedding(9, 4, sparse=True),
        nn.Embedding(9, 4, max_norm=1.0),
        nn.Embedding(9, 4, scale_grad_by_freq=True),
        nn.Embedding(9, 4, dtype=torch.bfloat16),  # sums of many rows stop growing
        nn.Embedding(9, 4, device="meta"),
        nn.Embedding(9, 4).requires_grad_(False),
    ],
    ids=["sparse", "max_norm", "by frequency", "half", "elsewhere", "frozen"],
)
def test_what_has_more_to_do_is_left_alone(table: nn.Embedding) -> None:
    plain = nn.Embedding(9, 4)
    assert patched(plain, Tables(plain))
    assert not patched(table, Tables(table))


def test_hooks_see_the_gradient() -> None:
    seen = []
    table = nn.Embedding(9, 4)
    table.weight.register_hook(lambda gradient: seen.append(gradient) or gradient * 0)
    backward(table, lambda: table(IDS).sum(), Tables(table))
    assert len(seen) == 1
    assert not table.weight.grad.any()


def test_the_engine_uses_it_on_a_cpu_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()["bert"]()
    table = model.get_input_embeddings()
    batch = {"input_ids": torch.randint(1, 50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    batch["attention_mask"][0, 4:] = 0
    with engine.start(model, batch).open():
        assert "forward" in vars(table)
    with torch.no_grad(), engine.start(model, batch).open():
        assert "forward" not in vars(table)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with engine.start(model, batch).open():
        assert "forward" not in vars(table)
