"""Micro-batches of no more than so many tokens: the same gradients, weights and checkpoints as of whole batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

from hybridtune.engine.microbatch import MIN_ROWS, by_length, by_tokens
from hybridtune.errors import RecipeError
from hybridtune.recipe import Recipe
from hybridtune.train import HybridTrainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STAGES = [
    {"name": "lora", "rules": [{"part": "layers", "method": "lora"}, {"part": "head", "method": "full"}]},
    {"name": "top", "previous": "keep", "rules": [{"part": "layers[-1:]", "method": "full"}]},
]
LIMIT = 20


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    lengths = [5, 12, 3, 9, 9, 2, 25, 7]
    mask = torch.zeros(len(lengths), 25, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[25 - length :] = 1 if side == "left" else row[25 - length :]
        row[:length] = 1 if side == "right" else row[:length]
    ids = torch.arange(mask.numel()).view(mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths))}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_cut_by_hand(side: str) -> None:
    """Rows by length: 2 3 5 7, then 9 9, then 12, and 25 alone though it is too long."""
    whole = batch(side)
    pieces = by_tokens(whole, LIMIT)
    assert [piece["labels"].tolist() for piece in pieces] == [[5, 2, 0, 7], [3, 4], [1], [6]]
    widths = [7, 9, 12, 25] if side == "right" else [25] * 4
    assert [piece["input_ids"].shape[1] for piece in pieces] == widths
    for piece in pieces:
        width = piece["input_ids"].shape[1]
        assert torch.equal(piece["input_ids"], whole["input_ids"][piece["labels"]][:, :width])


def test_what_is_not_cut() -> None:
    whole = batch("left")
    assert by_tokens(whole, 1000) == [whole]
    assert len(by_tokens(whole | {"odd": torch.zeros(3)}, 1000)) == 1
    del whole["attention_mask"]
    assert [len(piece["labels"]) for piece in by_tokens(whole, 50)] == [2] * 4, "every place is a token"


def test_labels_that_are_as_wide_as_the_text_by_chance_stay_as_wide_as_the_decoders_tokens() -> None:
    whole = batch() | {"labels": torch.full((8, 25), -100), "decoder_input_ids": torch.zeros(8, 25, dtype=torch.long)}
    whole["labels"][:, 0] = torch.arange(8)
    for piece in by_tokens(whole, LIMIT):
        assert piece["labels"].shape == piece["decoder_input_ids"].shape
        assert torch.equal(piece["labels"], whole["labels"][piece["labels"][:, 0]])
    del whole["decoder_input_ids"]
    assert [piece["labels"].shape[1] for piece in by_tokens(whole, LIMIT)] == [7, 9, 12, 25]


class Recorder(hf.TrainerCallback):  # type: ignore[misc]
    """Losses and norms that are logged, and an interruption at a step."""

    def __init__(self, stop: int = 0) -> None:
        self.seen: list[tuple[float, float]] = []
        self.stop = stop

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.seen.append((logs["loss"], logs["grad_norm"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop and state.global_step == self.stop:
            raise KeyboardInterrupt


Build = Callable[..., HybridTrainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(
        limit: int | None,
        folder: str = "out",
        stages: Any = STAGES,
        kind: str = "bert",
        model: Any = None,
        stop: int = 0,
        **more: Any,
    ) -> HybridTrainer:
        rows: Any = tiny.rows(22, longest=14)
        collator: Any = hf.DataCollatorWithPadding(tiny.tokenizer())
        made = model or (
            tiny.classifier("bert", **NO_DROPOUT) if kind == "bert" else tiny.language_model(kind, use_cache=False)
        )
        if kind != "bert":
            rows = [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]
            collator = hf.DataCollatorForTokenClassification(tiny.tokenizer())
        made._hybridtune_new = ()
        keys = {key: more.pop(key) for key in ("engine", "compute_loss_func") if key in more}
        given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "seed": 3}
        fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "optim": "sgd"}
        trainer = HybridTrainer(
            made.double(),
            hf.TrainingArguments(str(tmp_path / folder), learning_rate=0.05, **given | fixed | more),
            data_collator=collator,
            train_dataset=rows,
            strategy=stages,
            max_tokens_per_micro_batch=limit,
            callbacks=[Recorder(stop)],
            **keys,
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def widths_of(trainer: HybridTrainer) -> list[int]:
    """Tokens of each forward of a training step."""
    seen: list[int] = []

    def look(model: Any, args: Any, kwargs: Any) -> None:
        if model.training:
            seen.append(int(kwargs["attention_mask"].sum()))

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def recorded(trainer: HybridTrainer) -> list[tuple[float, float]]:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder)).seen


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_gradients_and_weights_are_those_of_whole_batches(build: Build, engine: str, accumulation: int) -> None:
    more = {"engine": engine, "gradient_accumulation_steps": accumulation}
    whole, cut = build(None, "whole", **more), build(LIMIT, "cut", **more)
    tokens = widths_of(cut)
    whole.train()
    cut.train()
    assert 0 < max(tokens) <= LIMIT
    assert cut.engine is not None
    assert cut.engine.on is (engine == "auto")
    assert len(recorded(cut)) == len(recorded(whole)) > 3
    for (loss, norm), (expected, expected_norm) in zip(recorded(cut), recorded(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-6), "Trainer adds losses up in 32 bits"
        assert norm == pytest.approx(expected_norm, rel=1e-9)
    for name, value in cut.model.named_parameters():
        torch.testing.assert_close(value, whole.model.get_parameter(name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_tokens_with_labels_of_their_own(build: Build, kind: str) -> None:
    whole, cut = (build(limit, str(limit), None, kind, max_steps=3, prediction_loss_only=True) for limit in (None, 15))
    for trainer in (whole, cut):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for key in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, 0.0)
        trainer.train()
    for found, expected in zip(recorded(cut), recorded(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_stages_own_limit_comes_first(build: Build) -> None:
    stages = [STAGES[0] | {"max_tokens_per_micro_batch": 30}, STAGES[1]]
    trainer = build(LIMIT, stages=stages)
    tokens = widths_of(trainer)
    trainer.train()
    assert max(tokens) > LIMIT
    assert max(tokens) <= 30
    assert trainer.strategy is not None
    assert [stage.max_tokens_per_micro_batch for stage in trainer.strategy.stages] == [30, LIMIT]


def test_a_recipe_has_it_for_all_stages() -> None:
    keys = {"model": "m", "task": "classification", "train": "a.csv"}
    assert Recipe.make(**keys, max_tokens_per_micro_batch=4096).max_tokens_per_micro_batch == 4096
    with pytest.raises(RecipeError, match="max_tokens_per_micro_batch"):
        Recipe.make(**keys, max_tokens_per_micro_batch=0)


def test_it_goes_on_to_the_last_bit(build: Build) -> None:
    """With dropout: random numbers are drawn in the same order."""
    stages = [STAGES[0] | {"save_steps": 1, "save_strategy": "steps"}]

    def made(folder: str, stop: int = 0) -> HybridTrainer:
        return build(LIMIT, folder, stages, model=tiny.classifier("bert"), stop=stop)

    whole = made("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        made("out", 3).train()
    resumed = made("out")
    resumed.train(resume_from_checkpoint=True)
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name


def test_out_of_memory_halves_it(build: Build) -> None:
    whole, cut = build(None, "whole", STAGES[:1]), build(40, "cut", STAGES[:1], engine="off")
    forward, sizes = cut.model.forward, []

    def scarce(input_ids: torch.Tensor, **keys: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        sizes.append(len(input_ids))
        return forward(input_ids, **keys)

    cut.model.forward = scarce
    whole.train()
    with pytest.warns(UserWarning, match="out of memory at step 1"):
        cut.train()
    assert max(sizes) == 2
    metrics = json.loads((cut.stage_folders[0] / "metrics.json").read_text())
    assert metrics["micro_batch_halvings"] >= 1
    for name, value in cut.model.named_parameters():
        torch.testing.assert_close(value, whole.model.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_where_losses_do_not_add_up_it_is_refused(build: Build) -> None:
    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = build(LIMIT, compute_loss_func=own)
    with pytest.raises(RecipeError, match="max_tokens_per_micro_batch: a batch can only be cut"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_where_a_models_own_loss_is_another_it_is_refused(build: Build) -> None:
    config = tiny.language_model("gemma").config.to_dict() | {"model_type": "gemma2"}
    torch.manual_seed(0)
    capped = hf.Gemma2ForCausalLM(hf.Gemma2Config(**{k: v for k, v in config.items() if k != "model_type"}))
    with (
        pytest.warns(UserWarning, match="logits of all tokens at once"),
        pytest.raises(RecipeError, match="the model's own loss .its own loss is not the cross-entropy"),
    ):
        build(LIMIT, stages=None, kind="gemma", model=capped).train()


def test_targets_of_a_decoder_count() -> None:
    batch = {
        "input_ids": torch.ones(4, 5, dtype=torch.long),
        "attention_mask": torch.ones(4, 5, dtype=torch.long),
        "labels": torch.where(torch.arange(30) < torch.tensor([[30], [2], [30], [2]]), 7, -100),
    }
    assert len(by_tokens(batch, 20)) == 1
    pieces = by_tokens(batch, 20, writes=True)
    assert [len(piece["labels"]) for piece in pieces] == [2, 1, 1]
    for piece in pieces:
        assert len(piece["labels"]) == 1 or 5 * len(piece["labels"]) + int(piece["labels"].ne(-100).sum()) <= 20


def test_a_batch_whose_tokens_or_rows_cannot_be_told_is_refused() -> None:
    ids = torch.ones(3, 4, dtype=torch.long)
    shared = {"input_ids": ids, "position_ids": torch.arange(4)[None]}
    with pytest.raises(RecipeError, match=r"position_ids: has no entry for each row.*\n.*3 entries"):
        by_tokens(shared, 4)
    with pytest.raises(RecipeError, match="the tokens of a batch cannot be counted"):
        by_tokens({"pixels": ids}, 4)
    assert [len(piece["inputs_embeds"]) for piece in by_tokens({"inputs_embeds": torch.ones(3, 4, 8)}, 8)] == [2, 1]


@pytest.mark.parametrize("cut", [by_length, lambda batch: by_tokens(batch, 24)], ids=["length", "tokens"])
def test_what_is_as_wide_as_the_batch_by_chance_stays_whole(cut: Any) -> None:
    """Features of a row, of whose places padding says nothing."""
    lengths = torch.tensor([*[3] * MIN_ROWS, *[10] * MIN_ROWS])
    mask = (torch.arange(10) < lengths[:, None]).long()
    features, places = torch.zeros(len(mask), 10), torch.arange(10).expand(len(mask), 10)
    features[:, 0] = torch.arange(len(mask))
    pieces = cut({"input_ids": mask * 5, "attention_mask": mask, "features": features, "position_ids": places})
    assert len(pieces) > 1
    assert pieces[0]["input_ids"].shape[1] == pieces[0]["position_ids"].shape[1] == 3
    assert torch.equal(torch.cat([piece["features"] for piece in pieces]), features)
