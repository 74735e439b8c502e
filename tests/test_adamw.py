"""AdamW by rows of tables: the weights and states of torch's, whatever rows had a gradient."""

from __future__ import annotations

import copy
import pickle
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from hybridtune.engine.adamw import AdamW
from hybridtune.engine.embedding import Tables
from hybridtune.train import HybridTrainer

ROWS, WIDTH = 400, 48


class Model(nn.Module):
    """A table, and something behind it that is no table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).tanh())


def pair(**options: Any) -> tuple[Model, Model, AdamW, torch.optim.AdamW, Tables]:
    """Two models with the same weights; ours on the first."""
    torch.manual_seed(0)
    ours = Model()
    torchs = copy.deepcopy(ours)
    tables = Tables(ours)
    options = {"lr": 1e-2, **options}
    return (
        ours,
        torchs,
        AdamW(ours.parameters(), rows=tables.rows, **options),
        torch.optim.AdamW(torchs.parameters(), **options),
        tables,
    )


def batches(steps: int, words: int = 60, seed: int = 0) -> Iterator[torch.Tensor]:
    """Ids of some words; later batches have others, and never those of early ones again."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        yield torch.randint(0, words, (5, 7), generator=generator) + step


def step(model: Model, ids: torch.Tensor, optimizer: torch.optim.Optimizer, tables: Tables | None = None) -> None:
    with ExitStack() as undo:
        if tables:
            tables.open(undo)
        model(ids).square().mean().mul(50).backward()
    parameters = model.parameters()
    if tables:
        with tables.compact(parameters) as compact:
            nn.utils.clip_grad_norm_(compact, 1.0)
    else:
        nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def assert_equal(ours: AdamW, torchs: torch.optim.AdamW) -> None:
    """Weights and states, to a few roundings: norms are sums in another order."""
    for group, expected in zip(ours.param_groups, torchs.param_groups, strict=True):
        for one, other in zip(group["params"], expected["params"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
            assert ours.state[one].keys() == torchs.state[other].keys()
            for name, value in torchs.state[other].items():
                torch.testing.assert_close(ours.state[one][name], value, rtol=1e-5, atol=1e-9)


def copied(optimizer: AdamW) -> int:
    """How many rows of the table the next step would look at; -1: all."""
    (group,) = optimizer.param_groups
    rows = optimizer._of(group["params"][0], group)
    return -1 if rows is None else len(rows)


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs(decay: float, fused: bool | None) -> None:
    ours, torchs, optimizer, expected, tables = pair(weight_decay=decay, fused=fused)
    untouched = ours.table.weight[-1].detach().clone()
    seen: set[int] = set()
    for ids in batches(30):
        step(ours, ids, optimizer, tables)
        step(torchs, ids, expected)
        seen |= set(ids.flatten().tolist())
        assert set(optimizer._live[ours.table.weight][1].nonzero().flatten().tolist()) == seen
    assert_equal(optimizer, expected)
    assert torch.equal(ours.table.weight[-1], untouched) == (not decay)


def test_nothing_but_rows_with_a_gradient_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, optimizer, _, tables = pair(weight_decay=0.0, fused=True)
    sizes = []
    own = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda given, *rest, **more: sizes.append(given[0].shape[0]) or own(
        given, *rest, **more
    ))  # fmt: skip
    for ids in batches(3):
        step(ours, ids, optimizer, tables)
    assert 0 < sizes[0] < sizes[1] < sizes[2] <= 62


def test_a_third_of_the_rows_is_too_many_to_gather() -> None:
    ours, torchs, optimizer, expected, tables = pair(weight_decay=0.1, fused=True)
    ways = []
    for ids in batches(12, words=150):
        step(ours, ids, optimizer, tables)
        step(torchs, ids, expected)
        with ExitStack() as undo:
            tables.open(undo)
            ours(ids).sum().backward()
        ways.append(copied(optimizer))
        optimizer.zero_grad()
    assert 0 < ways[0] <= ROWS / 3
    assert ways[-1] == -1
    assert_equal(optimizer, expected)


def test_steps_over_the_whole_in_between() -> None:
    """Somebody adds to all gradients once: all rows have states from then on."""
    ours, torchs, optimizer, expected, tables = pair(weight_decay=0.1, fused=True)
    for number, ids in enumerate(batches(9)):
        noise = torch.randn(ROWS, WIDTH) if number == 4 else None
        for model, one, kept in ((ours, optimizer, tables), (torchs, expected, None)):
            with ExitStack() as undo:
                if kept:
                    kept.open(undo)
                model(ids).square().mean().backward()
            if noise is not None:
                model.table.weight.grad.add_(noise)
            if kept:
                assert (kept.rows(model.table.weight) is None) == (noise is not None)
            one.step()
            one.zero_grad()
    assert_equal(optimizer, expected)
    step(ours, next(batches(1)), optimizer, tables)
    assert bool(optimizer._live[ours.table.weight][1].all())


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_what_goes_on_is_the_same_to_the_last_bit(how: str) -> None:
    ours, _, optimizer, _, tables = pair(weight_decay=0.1, fused=True)
    whole = list(batches(12))
    for ids in whole[:6]:
        step(ours, ids, optimizer, tables)
    later = copy.deepcopy(ours)
    kept = Tables(later)
    saved = copy.deepcopy(optimizer.state_dict())
    if how == "state_dict":
        again = AdamW(later.parameters(), rows=kept.rows, lr=1.0)
    else:
        again = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        again.param_groups[0]["params"] = list(later.parameters())
    again.load_state_dict(saved)
    for ids in whole[6:]:
        step(ours, ids, optimizer, tables)
        step(later, ids, again, kept)
    for one, other in zip(ours.parameters(), later.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_norm_is_that_of_all_gradients_and_clipping_reaches_them() -> None:
    ours, torchs, _, _, tables = pair()
    ids = next(batches(1))
    with ExitStack() as undo:
        tables.open(undo)
        ours(ids).square().sum().backward()
    torchs(ids).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(torchs.parameters(), 0.5)
    with tables.compact(ours.parameters()) as compact:
        found = nn.utils.clip_grad_norm_(compact, 0.5)
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert tables.rows(ours.table.weight).tolist() == sorted(set(ids.flatten().tolist()))


def train(
    kind: type, folder: Path, model: Any, steps: int = 6, resume: bool = False, accumulation: int = 2, **more: Any
) -> Any:
    given = hf.TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", seed=0, max_steps=steps, learning_rate=1e-3,
        weight_decay=0.1, max_grad_norm=0.5, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        save_steps=3, logging_steps=1,
    )  # fmt: skip
    rows = tiny.rows(32, longest=12)
    trainer = kind(model, given, train_dataset=rows, data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()), **more)
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def bert() -> Any:
    return tiny.classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize("strategy", [None, [{"rules": [{"part": "all", "method": "full"}]}]])
def test_a_training_gives_what_trainers_does(strategy: Any, tmp_path: Path) -> None:
    expected, found = bert(), bert()
    more = {"strategy": strategy} if strategy else {}
    plain = train(hf.Trainer, tmp_path / "plain", expected, accumulation=1)  # with more its loss is another
    ours = train(HybridTrainer, tmp_path / "ours", found, accumulation=1, **more)
    assert type(plain.optimizer.optimizer) is torch.optim.AdamW
    optimizer = ours.optimizer.optimizer
    assert isinstance(optimizer, AdamW)
    table = found.get_input_embeddings().weight
    assert 0 < int(optimizer._live[table][1].sum()) < len(table)
    if strategy is None:  # Trainer decays no biases and norms, a rule all that it trains
        for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    norms = [[one["grad_norm"] for one in by.state.log_history if "grad_norm" in one] for by in (ours, plain)]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4)


def test_a_training_that_goes_on_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    whole, halves = bert(), bert()
    train(HybridTrainer, tmp_path / "whole", whole)
    train(HybridTrainer, tmp_path / "halves", bert(), steps=6)
    for folder in (tmp_path / "halves").glob("checkpoint-6"):
        folder.rename(tmp_path / "gone")
    train(HybridTrainer, tmp_path / "halves", halves, resume=True)
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_torchs_own_where_nobody_wants_ours(tmp_path: Path) -> None:
    off = train(HybridTrainer, tmp_path, bert(), steps=1, engine="off")
    assert type(off.optimizer.optimizer) is torch.optim.AdamW
    given = (torch.optim.AdamW, {"lr": 1e-3})
    own = train(HybridTrainer, tmp_path, bert(), steps=1, optimizer_cls_and_kwargs=given)
    assert type(own.optimizer.optimizer) is torch.optim.AdamW


def tie_by_data(model: Model) -> None:
    """As old code does: two parameters in the same memory."""
    model.second = nn.Embedding(ROWS, WIDTH)
    model.second.weight.data = model.table.weight.data


def test_tables_that_share_memory_are_stepped_over_whole() -> None:
    ours, torchs, *_ = pair()
    for model in (ours, torchs):
        tie_by_data(model)
        model.forward = lambda ids, model=model: model.head(model.table(ids).tanh() + model.second(ids + 9).sin())
    tables = Tables(ours)
    optimizer = AdamW(ours.parameters(), rows=tables.rows, lr=1e-2)
    expected = torch.optim.AdamW(torchs.parameters(), lr=1e-2)
    for ids in batches(6):
        step(ours, ids, optimizer, tables)
        step(torchs, ids, expected)
    torch.testing.assert_close(ours.table.weight, torchs.table.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_table_whose_numbers_lie_another_way(fused: bool) -> None:
    ours, torchs, *_ = pair()
    turned = torch.randn(WIDTH, ROWS)
    for model in (ours, torchs):
        model.table.weight = nn.Parameter(turned.clone().t())
    tables = Tables(ours)
    optimizer = AdamW(ours.parameters(), rows=tables.rows, lr=1e-2, fused=fused)
    expected = torch.optim.AdamW(torchs.parameters(), lr=1e-2, fused=fused)
    for ids in batches(9, words=ROWS - 9):
        step(ours, ids, optimizer, tables)
        step(torchs, ids, expected)
    torch.testing.assert_close(ours.table.weight, torchs.table.weight, rtol=1e-4, atol=1e-6)


def test_one_buffer_for_all_batches() -> None:
    ours, torchs, optimizer, expected, tables = pair()
    buffer = torch.zeros(5, 7, dtype=torch.long)
    for ids in batches(6):
        with ExitStack() as undo:
            tables.open(undo)
            ours(buffer.copy_(ids)).square().mean().backward()
        buffer.zero_()
        optimizer.step()
        optimizer.zero_grad()
        torchs(ids).square().mean().backward()
        expected.step()
        expected.zero_grad()
    assert_equal(optimizer, expected)


def test_what_an_interrupted_step_has_left_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, torchs, optimizer, expected, tables = pair(weight_decay=0.1)
    first, *rest = batches(4)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["torch.optim.adam"], "adam", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(ours, first, optimizer, tables)
    optimizer.zero_grad()
    for ids in rest:
        step(ours, ids, optimizer, tables)
        step(torchs, ids, expected)
    torch.testing.assert_close(ours.table.weight, torchs.table.weight, rtol=1e-5, atol=1e-7)


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_states_that_are_given_up_are_freed() -> None:
    ours, _, optimizer, _, tables = pair()
    step(ours, next(batches(1)), optimizer, tables)
    table = ours.table.weight
    first = weakref.ref(optimizer.state[table]["exp_avg"])
    optimizer.state.pop(table)
    assert first() is None


class Old(torch.optim.SGD):
    """Adds weight decay to gradients past torch's count of changes, as torch's own once did."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    gradient = one.grad.data
                    gradient.add_(one.data, alpha=0.1)
                    one.data.add_(gradient, alpha=-group["lr"])


def test_an_optimizer_of_the_users_own_may_write_to_gradients(tmp_path: Path) -> None:
    expected, found = bert(), bert()
    for kind, model in ((hf.Trainer, expected), (HybridTrainer, found)):
        optimizer = Old(model.parameters(), lr=0.1)
        train(kind, tmp_path, model, accumulation=1, optimizers=(optimizer, None))
    for (name, one), other in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(one, other[1], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
