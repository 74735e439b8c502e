"""NEFTune against its formula: by a row's own length, never in an evaluation, and the same bits after a resume."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

from hybridtune.engine.noise import Noise
from hybridtune.train import HybridTrainer

ALPHA = 5.0
WRITERS = (*tiny.CAUSAL, *tiny.SEQ2SEQ)
LENGTHS = (9, 4, 6)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 100, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def embedded(model: Any, given: dict[str, torch.Tensor], noise: Noise | None) -> list[torch.Tensor]:
    """What the table of embeddings gives in a forward, call by call: the encoder's text first."""
    seen: list[torch.Tensor] = []
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    table = body.get_input_embeddings()
    if model.config.is_encoder_decoder:
        given = {**given, "decoder_input_ids": given["input_ids"][:, :5]}
    if noise is None:
        handle = table.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        model(**given)
    else:
        with noise.open():
            handle = table.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
            model(**given)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", WRITERS)
def test_noise_is_that_of_the_formula(name: str) -> None:
    model = tiny.language_model(name).train()
    plain, noisy = embedded(model, batch(), None), embedded(model, batch(), Noise(model, ALPHA))
    width = plain[0].shape[-1]
    for row, length in enumerate(LENGTHS):
        bound = ALPHA / math.sqrt(length * width)
        added = (noisy[0] - plain[0])[row, :length]
        assert float(added.abs().max()) <= bound * (1 + 1e-5)
        assert float(added.abs().max()) > 0.9 * bound
        # of Uniform(-b, b) the mean square is b^2 / 3
        assert float((added**2).mean()) == pytest.approx(bound**2 / 3, rel=0.25)
    for before, after in zip(plain[1:], noisy[1:], strict=True):  # the decoder's text, where the table is shared
        assert torch.equal(before, after)
    assert not model.base_model._forward_pre_hooks
    assert torch.equal(embedded(model, batch(), None)[0], plain[0])


def test_the_same_numbers_as_the_authors_code() -> None:
    """From the README of github.com/neelsjain/NEFTune, "Updated code": delta = U(-1, 1) * mask * alpha / sqrt(L d)."""
    model = tiny.language_model("llama").train()
    plain = embedded(model, batch(), None)[0]
    torch.manual_seed(7)
    noisy = embedded(model, batch(), Noise(model, ALPHA))[0]
    torch.manual_seed(7)
    mask = batch()["attention_mask"].to(plain)
    lengths = torch.sum(mask, 1)
    noise = torch.zeros_like(plain).uniform_(-1, 1)
    magnitude = ALPHA / torch.sqrt(lengths * plain.size(-1))
    expected = plain + noise * mask.unsqueeze(2) * magnitude.view(-1, 1, 1)
    torch.testing.assert_close(noisy * mask.unsqueeze(2), expected * mask.unsqueeze(2))


def test_it_is_not_lost_in_half_precision() -> None:
    """Tokens times width may be more than float16 can hold."""
    model = torch.nn.Module()
    model.base_model = torch.nn.Module()
    table = torch.nn.Embedding(3, 1024, dtype=torch.float16)
    model.base_model.get_input_embeddings = lambda: table
    noise = Noise(model, ALPHA)
    noise._begin(table, (), {})
    added = noise._add(table, (), torch.zeros(1, 100, 1024, dtype=torch.float16))
    assert added is not None
    assert added.dtype == torch.float16
    bound = ALPHA / math.sqrt(100 * 1024)
    assert 0.9 * bound < float(added.abs().max()) <= bound * 1.01


def test_none_in_evaluation() -> None:
    model = tiny.language_model("gpt2").eval()
    assert torch.equal(embedded(model, batch(), Noise(model, ALPHA))[0], embedded(model, batch(), None)[0])


def rows(count: int) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": row["input_ids"]}
        for row in tiny.rows(count)
    ]


def trainer(folder: Path, name: str = "llama", strategy: Any = "full", **more: Any) -> HybridTrainer:
    model = tiny.language_model(name)
    model._hybridtune_new = ()
    tokenizer = tiny.tokenizer()
    given = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    arguments = hf.TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", logging_steps=1, seed=1, **given | more
    )
    made = HybridTrainer(
        model,
        arguments,
        train_dataset=rows(24),
        eval_dataset=rows(6),
        data_collator=hf.DataCollatorForSeq2Seq(tokenizer),
        strategy=strategy,
    )
    made.remove_callback(hf.PrinterCallback)
    return made


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (next((folder / "stages").iterdir()) / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("strategy", ["full", None])
def test_it_is_on_in_training_with_and_without_a_strategy(strategy: str | None, tmp_path: Path) -> None:
    """The first step's loss is another, and the first evaluation, of equal weights, is not."""
    found = {}
    for alpha in (None, 50.0):
        made = trainer(tmp_path / str(alpha), strategy=strategy, neftune_noise_alpha=alpha, learning_rate=1e-9)
        made.train()
        losses = [line["loss"] for line in made.state.log_history if "loss" in line]
        evaluations = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
        found[alpha] = losses[0], evaluations[0]
        assert not made.model.get_input_embeddings()._forward_hooks
        if strategy:
            assert made.engine is not None
            assert made.engine.on
    assert abs(found[None][0] - found[50.0][0]) > 1e-3
    assert found[None][1] == pytest.approx(found[50.0][1], abs=1e-5)


def test_what_frozen_layers_give_is_not_kept_and_it_is_said(tmp_path: Path) -> None:
    top = [{"rules": [{"part": "layers[-1]", "method": "full"}]}]
    made = trainer(tmp_path / "noise", "qwen3", top, neftune_noise_alpha=ALPHA)
    with pytest.warns(UserWarning, match="not kept: neftune_noise_alpha"):
        made.train()
    assert made.engine is not None
    assert made.engine.on
    assert made.engine.seam is not None
    assert made.engine.seam.frozen is None
    metrics = json.loads((next((tmp_path / "noise" / "stages").iterdir()) / "metrics.json").read_text())
    assert "not kept" in metrics["engine"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is frozen there
        trainer(tmp_path / "full", "qwen3", "full", neftune_noise_alpha=ALPHA).train()


def test_a_stage_has_its_own(tmp_path: Path) -> None:
    rules = [{"part": "layers", "method": "full"}]
    stages = [{"rules": rules, "max_steps": 1, "neftune_noise_alpha": 50.0}, {"rules": rules, "max_steps": 1}]
    for alpha in (50.0, None):
        trainer(tmp_path / str(alpha), strategy=[{**stages[0], "neftune_noise_alpha": alpha}, stages[1]]).train()
    first = [log(tmp_path / str(alpha))[0]["loss"] for alpha in (50.0, None)]
    assert abs(first[0] - first[1]) > 1e-3


@pytest.mark.parametrize("strategy", ["lora", "prompt"])
def test_a_training_that_goes_on_is_the_same_to_the_last_bit(strategy: str, tmp_path: Path) -> None:
    class Stop(hf.TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.epoch >= 2:
                raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole", strategy=strategy, neftune_noise_alpha=ALPHA)
    whole.train()
    cut = trainer(tmp_path / "cut", strategy=strategy, neftune_noise_alpha=ALPHA)
    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut", strategy=strategy, neftune_noise_alpha=ALPHA)
    again.train(resume_from_checkpoint=True)
    ours, theirs = dict(again.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def test_a_soft_prompt_gets_none(tmp_path: Path) -> None:
    made = trainer(tmp_path, strategy="prompt", neftune_noise_alpha=ALPHA, max_steps=1)
    made.train()
    model = made.model.train()
    given = batch()
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model(**given)
    with Noise(model, ALPHA).open():
        model(**given)
    count = seen[0].shape[1] - given["input_ids"].shape[1]
    assert count > 0
    assert torch.equal(seen[0][:, :count], seen[1][:, :count])
    moved = (seen[1] - seen[0])[:, count:].detach()
    for row, length in enumerate(LENGTHS):
        bound = ALPHA / math.sqrt(length * moved.shape[-1])
        assert 0.9 * bound < float(moved[row, :length].abs().max()) <= bound * (1 + 1e-5)
