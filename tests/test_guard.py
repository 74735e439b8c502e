"""What a training does when a loss is no number, and when memory does not suffice."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

from hybridtune import guard
from hybridtune.errors import TrainingError
from hybridtune.train import HybridTrainer

STAGES = [{"name": "mix", "rules": [{"part": "layers", "method": "lora"}, {"part": "head", "method": "full"}]}]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)

Build = Callable[..., HybridTrainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds a trainer over 40 rows without dropout, five steps an epoch."""

    def make(
        stages: Any = STAGES, rows: Any = None, loss: Any = None, engine: Any = "auto", **arguments: Any
    ) -> HybridTrainer:
        given = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "logging_steps": 1, "seed": 3}
        fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "num_train_epochs": 1}
        model = tiny.classifier("bert", **NO_DROPOUT)
        model.save_pretrained(tmp_path / "base")
        model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        trainer = HybridTrainer(
            model,
            hf.TrainingArguments(**given | fixed | arguments),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            train_dataset=rows or tiny.rows(40),
            strategy=stages,
            compute_loss_func=loss,
            engine=engine,
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class TestNumbers:
    """A loss or gradient that is no number."""

    @staticmethod
    def poison(trainer: HybridTrainer, at: int, value: float = math.nan) -> None:
        """Has the first word of one row, which no other has, give a number that is none."""
        row = trainer.train_dataset[at]
        row["input_ids"][2] = 33  # "old"
        with torch.no_grad():
            trainer.model.bert.embeddings.word_embeddings.weight[33] = value

    @pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}])
    def test_names_stage_step_and_row(self, build: Build, more: dict[str, Any]) -> None:
        trainer = build(save_strategy="steps", save_steps=1, num_train_epochs=2, **more)
        self.poison(trainer, 17)
        before: list[dict[str, torch.Tensor]] = []

        class Look(hf.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                before[:] = [weights_of(trainer.model)]

        trainer.add_callback(Look())
        with pytest.raises(TrainingError, match=r"stage mix: the loss is not a number at step \d+") as caught:
            trainer.train()
        step = trainer.state.global_step + 1
        assert f"at step {step}" in caught.value.problem
        found = str(caught.value.found)
        assert found.startswith('train[17] "') and found.count("train[") == 1 and "old" in found
        last = trainer.stage_folders[0] / f"checkpoint-{step - 1}"
        assert ("there was no checkpoint yet" if step == 1 else f"kept: {last}") in str(caught.value.mend)
        after = weights_of(trainer.model)
        assert all(torch.equal(before[0][name].nan_to_num(), after[name].nan_to_num()) for name in after)

    def test_all_weights_are_lost(self, build: Build) -> None:
        """A bad weight is found with the last checkpoint whose weights are numbers."""
        trainer = build(save_strategy="steps", save_steps=1)

        class Poison(hf.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if state.global_step == 2:
                    with torch.no_grad():
                        model.classifier.bias.fill_(math.inf)

        trainer.add_callback(Poison())
        with pytest.raises(TrainingError, match="not a number at step 3") as caught:
            trainer.train()
        assert "every row of the batch gives such a loss: the weights are no numbers any more" in str(
            caught.value.found
        )
        assert str(caught.value.mend).endswith("checkpoint-1")

    def test_a_gradient(self, build: Build) -> None:
        """The loss is one, its gradient is not."""

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            return (outputs["logits"].sum() * 0).sqrt() + 0

        with pytest.raises(TrainingError, match="the gradient is not a number at step 1") as caught:
            build(loss=loss).train()
        assert str(caught.value.found).startswith("no row gives such a loss by itself")
        assert "and 3 more" in str(caught.value.found)

    def test_rows_without_tokens_or_reader(self) -> None:
        batch = {"pixels": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}
        assert guard.name_rows([batch], [], None) == ["row 0 of the batch", "row 1 of the batch"]
        assert guard.name_rows([{"input_ids": torch.tensor([[7, 8]])}], [{"input_ids": [7, 8]}], None) == ["train[0]"]

    def test_one_look_an_update(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        """On an accelerator every look waits for it."""
        looks = []
        isfinite = torch.isfinite
        monkeypatch.setattr(torch, "isfinite", lambda value: looks.append(1) or isfinite(value))
        trainer = build(gradient_accumulation_steps=4, per_device_train_batch_size=2)
        trainer.train()
        assert len(looks) == trainer.state.global_step == 5


class TestMemory:
    """Out of memory: the micro-batch is halved, the batch stays."""

    @staticmethod
    def scarce(trainer: HybridTrainer, rows: int, error: Callable[[], Exception], when: str = "forward") -> list[int]:
        """Has a forward or backward pass of more than so many rows fail; gives the sizes of those that passed."""
        sizes: list[int] = []
        forward = trainer.model.forward

        class Fail(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
                return value.clone()

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
                raise error()

        @functools.wraps(forward)
        def guarded(*args: Any, **keys: Any) -> Any:
            count = len(keys["input_ids"])
            if count > rows and when == "forward":
                raise error()
            outputs = forward(*args, **keys)
            if count > rows:  # half of the gradients are there already when it fails
                layer = outputs["logits"]
                outputs["logits"] = layer + 0 * Fail.apply(layer)
            sizes.append(count)
            return outputs

        trainer.model.forward = guarded
        return sizes

    @pytest.mark.parametrize("when", ["forward", "backward"])
    @pytest.mark.parametrize("batch", [8, 4, 32])
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, lambda: RuntimeError(CPU_ERROR)], ids=["gpu", "cpu"])
    def test_the_weights_are_those_of_enough_memory(
        self, build: Build, tmp_path: Path, when: str, batch: int, error: Callable[[], Exception]
    ) -> None:
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": max(8 // batch, 1), "optim": "sgd"}
        enough = build(learning_rate=0.1, output_dir=str(tmp_path / "enough"), **more)
        enough.train()
        trainer = build(learning_rate=0.1, **more)
        sizes = self.scarce(trainer, 2, error, when)
        with pytest.warns(UserWarning, match=r"stage mix: out of memory at step 1: \d+ rows at a time are halved"):
            trainer.train()
        expected = weights_of(enough.model)
        for name, value in weights_of(trainer.model).items():
            assert torch.allclose(value, expected[name], atol=1e-6), name
        logs = [
            [json.loads(line)["loss"] for line in (one.stage_folders[0] / "log.jsonl").read_text().splitlines()]
            for one in (enough, trainer)
        ]
        assert logs[0] == pytest.approx(logs[1], abs=1e-6)
        metrics = json.loads((trainer.stage_folders[0] / "metrics.json").read_text())
        assert metrics["micro_batch_halvings"] >= 1
        assert max(sizes[-3:]) <= 2

    def test_memory_that_runs_out_later_in_an_update(self, build: Build, tmp_path: Path) -> None:
        """What the update's earlier micro-batches have added counts once."""
        more = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "optim": "sgd",
            "learning_rate": 0.1,
            "engine": "off",  # which would try itself on a few rows first
        }
        enough = build(output_dir=str(tmp_path / "enough"), **more)
        enough.train()
        trainer, calls = build(**more), []
        forward = trainer.model.forward

        @functools.wraps(forward)
        def guarded(*args: Any, **keys: Any) -> Any:
            calls.append(len(keys["input_ids"]))
            if len(calls) == 4:
                raise torch.OutOfMemoryError
            return forward(*args, **keys)

        trainer.model.forward = guarded
        with pytest.warns(UserWarning, match="at step 2"):
            trainer.train()
        assert calls[:8] == [4, 4, 4, 4, 2, 2, 2, 2]
        expected = weights_of(enough.model)
        for name, value in weights_of(trainer.model).items():
            assert torch.allclose(value, expected[name], atol=1e-6), name

    def test_one_row_does_not_fit(self, build: Build) -> None:
        trainer = build()
        self.scarce(trainer, 0, torch.OutOfMemoryError)
        with pytest.warns(UserWarning, match="halved to 1"), pytest.raises(torch.OutOfMemoryError):
            trainer.train()

    def test_a_loss_that_cannot_be_cut(self, build: Build) -> None:
        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(outputs["logits"], labels)

        trainer = build(loss=loss)
        self.scarce(trainer, 4, torch.OutOfMemoryError)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()

    def test_other_errors_pass(self, build: Build) -> None:
        trainer = build()
        self.scarce(trainer, 4, lambda: RuntimeError("shapes do not fit"))
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            trainer.train()

    def test_a_stage_that_goes_on_remembers(self, build: Build, recwarn: pytest.WarningsRecorder) -> None:
        class Stop(hf.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 3:
                    raise KeyboardInterrupt

        trainer = build(save_strategy="steps", save_steps=2)
        self.scarce(trainer, 4, torch.OutOfMemoryError)
        trainer.add_callback(Stop())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        recwarn.clear()
        again = build(save_strategy="steps", save_steps=2)
        self.scarce(again, 4, torch.OutOfMemoryError)
        again.train(resume_from_checkpoint=True)
        assert not [warning for warning in recwarn if "out of memory" in str(warning.message)]
        assert json.loads((again.stage_folders[0] / "metrics.json").read_text())["micro_batch_halvings"] == 1

    def test_a_cut(self) -> None:
        batch = {"input_ids": torch.arange(14).view(7, 2), "labels": torch.arange(7)}
        pieces = guard.cut(batch, 2)
        assert [piece["labels"].tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6]]
        assert [len(piece["labels"]) for piece in guard.cut(batch, 64)] == [1] * 7
        assert guard.cut(batch, 1) == [batch]
        whole = {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(5)}
        assert guard.cut(whole, 4) == [whole]

    @pytest.mark.parametrize(
        ("error", "answer"),
        [(torch.OutOfMemoryError(), True), (RuntimeError(CPU_ERROR), True), (RuntimeError("shapes"), False)],
    )
    def test_what_counts(self, error: Exception, answer: bool) -> None:
        assert guard.is_out_of_memory(error) is answer
