"""On a GPU alone: kernels over all rows against each row by itself, and models packed against padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DataCollatorWithPadding, TrainingArguments

from hybridtune import engine
from hybridtune.engine import varlen
from hybridtune.engine.layout import Layout
from hybridtune.recipe import Stage
from hybridtune.train import HybridTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (3, 70, 1, 129)


def rows() -> tuple[torch.Tensor, int]:
    """The bounds of rows of several lengths, and the tokens of the longest."""
    mask = torch.arange(max(LENGTHS), device="cuda") < torch.tensor(LENGTHS, device="cuda")[:, None]
    layout = Layout.of(mask)
    return layout.bounds, layout.longest


def states(heads: int = 4) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scaling: float) -> torch.Tensor:
    """Every row by itself, in 64 bits."""
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    pieces = []
    for row in zip(*(one.double().transpose(0, 1).split(sorted(LENGTHS), 1) for one in (q, k, v)), strict=True):
        pieces.append(functional.scaled_dot_product_attention(*row, is_causal=causal, scale=scaling))
    return torch.cat(pieces, 1).transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
def test_a_kernel_gives_the_same(heads: int, causal: bool) -> None:
    """Values and gradients, to the roundings of half precision."""
    torch.manual_seed(0)
    given = states(), states(heads), states(heads)
    found, expected = varlen.flash(*given, *rows(), causal, 0.1, 0.0), alone(*given, causal, 0.1)
    along = torch.randn_like(found)
    for one, other in [
        (found, expected),
        *zip(
            torch.autograd.grad(found, given, along), torch.autograd.grad(expected, given, along.double()), strict=True
        ),
    ]:
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 0.01


def test_a_kernel_drops_weights() -> None:
    """Of ones each token keeps the share of its row's tokens that were not dropped, on average all."""
    torch.manual_seed(0)
    query, ones = torch.zeros_like(states()), torch.ones_like(states())
    kept = varlen.flash(query, query, ones, *rows(), False, 0.1, 0.5)[-129:, :, 0].float()
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert kept.var().item() == pytest.approx(1 / 129, rel=0.2)


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "modernbert", "t5", "bart", "gpt2"])
@pytest.mark.parametrize("half", [False, True])
def test_a_model_proves_itself(name: str, half: bool) -> None:
    """Its engine is on, and gives the padded logits, with and without autocast."""
    model = tiny.classifier(name).cuda()
    tiny.shake(model.parameters())
    ids = torch.randint(4, 100, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20) < torch.tensor([20, 3, 11, 7, 20, 5])[:, None]
    ids[:, 0] = 2
    ids = ids.where(mask, 0)
    ids[torch.arange(6), mask.sum(1) - 1] = 3  # the end
    batch = {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        found = engine.start(model, batch)
        assert found.on, found.reason
        with torch.no_grad():
            padded = model(**batch).logits
            with found.open():
                packed = model(**batch).logits
    assert float((packed - padded).norm() / padded.norm()) < (0.05 if half else 1e-4)


DRY = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "qwen3": dict[str, float](),
    "t5": {"dropout_rate": 0.0},
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", list(DRY))
def test_a_training_gives_what_trainer_gives(name: str, method: str, tmp_path: Path) -> None:
    """Losses in bf16, dropout off: with norms of torch's, casts together and rows without padding."""
    rules = [{"part": "layers", "method": method}, {"part": "head", "method": "full"}]
    dataset = Dataset.from_dict(
        {"input_ids": [[2, *range(4, 4 + number), 3] for number in range(3, 27)], "labels": [0, 1] * 12}
    )

    def losses(way: str) -> list[float]:
        model = tiny.classifier(name, **DRY[name])
        tiny.shake(model.parameters())
        model._hybridtune_new = ()
        given = TrainingArguments(
            str(tmp_path / way),
            num_train_epochs=3,
            per_device_train_batch_size=8,
            logging_steps=1,
            bf16=True,
            report_to=[],
        )
        stage = Stage.model_validate({"rules": rules})
        collate = DataCollatorWithPadding(tiny.tokenizer())
        more = {"train_dataset": dataset, "data_collator": collate, "engine": way}
        trainer = HybridTrainer(model, given, strategy=[stage], **more)
        trainer.train()
        assert trainer.engine is not None
        assert trainer.engine.on == (way == "auto")
        assert bool(trainer.engine.norms) == (way == "auto" and name != "bert")
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses("auto") == pytest.approx(losses("off"), rel=0.05)
