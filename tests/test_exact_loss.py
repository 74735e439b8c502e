"""The loss is that of the whole global batch of examples, whatever its split; and what is split is put together again.

`torchrun --nproc_per_node 2 tests/test_exact_loss.py FOLDER` runs the cases below in two processes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch.nn import functional

from hybridtune import train, update
from hybridtune.engine import microbatch
from hybridtune.engine.microbatch import MIN_ROWS, by_length
from hybridtune.tasks.classification import Task
from hybridtune.train import HybridTrainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False}
TWO_STAGES = [
    {"name": "probe", "rules": [{"part": "head", "method": "full"}]},
    {"name": "mix", "rules": [{"part": "layers", "method": "lora"}, {"part": "layers[-1:]", "method": "full"}]},
]
# name: rows, labels, several labels a row, class weights, strategy
CASES: dict[str, tuple[int, int, bool, list[float] | None, Any]] = {
    "full batches": (24, 2, False, None, None),
    "last batch of 6": (22, 2, False, None, None),
    "last batch of 1": (17, 2, False, None, None),
    "fewer rows than a batch": (5, 2, False, None, None),
    "several labels a row": (22, 3, True, None, None),
    "several labels a row, last batch of 1": (17, 3, True, None, None),
    "class weights": (22, 3, False, [0.5, 2.0, 1.0], None),
    "two stages": (22, 2, False, None, TWO_STAGES),
    "tokens, last batch of 6": (22, 2, False, None, None),
    "tokens, last batch of 1": (17, 2, False, None, None),
}
SPLITS = [(8, 1), (1, 8), (2, 4)]
PROCESSES = [(name, 4, 1) for name in CASES] + [(name, 2, 2) for name in ("last batch of 6", "last batch of 1")]


class Recorder(hf.TrainerCallback):
    """Keeps every logged loss and gradient norm."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(logs["grad_norm"])


def arguments(folder: Path, batch: int = 8, accumulation: int = 1, **more: Any) -> hf.TrainingArguments:
    """Plain SGD, every step logged, nothing saved."""
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return hf.TrainingArguments(**given | more)


def train_case(name: str, folder: Path, batch: int, accumulation: int) -> dict[str, Any]:
    """Trains one case; returns what every split must have in common."""
    count, labels, multi_label, weights, strategy = CASES[name]
    kind = "multi_label_classification" if multi_label else "single_label_classification"
    model = tiny.classifier("bert", num_labels=labels, problem_type=kind, **NO_DROPOUT)
    rows, seen = tiny.rows(count, labels=labels, multi_label=multi_label), Recorder()
    collator: Any = hf.DataCollatorWithPadding(tiny.tokenizer())
    if name.startswith("tokens"):  # all but the first two are labelled
        model = tiny.language_model("llama", use_cache=False).double()
        rows = [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]
        collator = hf.DataCollatorForTokenClassification(tiny.tokenizer())
    more = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True} if strategy else {}
    trainer = HybridTrainer(
        model,
        arguments(folder, batch, accumulation, **more),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=tiny.rows(8, seed=1, labels=labels) if strategy else None,
        compute_loss_func=Task(range(labels), weights=weights).loss if weights else None,
        strategy=strategy,
        callbacks=[seen],
    )
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()
    return {"losses": seen.losses, "norms": seen.norms, "weights": weights_of(model)}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights as they are now."""
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, gradient norms and final weights agree to 1e-6."""
    assert len(found["losses"]) == len(expected["losses"]) >= 1
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6, rel=0)
    assert found["norms"] == pytest.approx(expected["norms"], abs=1e-6, rel=1e-6)
    assert list(found["weights"]) == list(expected["weights"])
    gap = max(float((value - expected["weights"][key]).abs().max()) for key, value in found["weights"].items())
    assert gap <= 1e-6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case with batches of 8 in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: train_case(name, folder / str(number), 8, 1) for number, name in enumerate(CASES)}


@pytest.mark.parametrize(("batch", "accumulation"), SPLITS[1:])
@pytest.mark.parametrize("name", CASES)
def test_accumulation_changes_nothing(
    name: str, batch: int, accumulation: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    check_equal(train_case(name, tmp_path, batch, accumulation), whole[name])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `main` below has written in two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parents[1])}
    done = subprocess.run(
        [*command, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def main(folder: Path) -> None:
    """Runs every case in this process of several, and writes what came of it."""
    gc.freeze()
    for name, batch, accumulation in PROCESSES:
        home = folder / f"{name} {batch}x{accumulation}"
        found = train_case(name, home, batch, accumulation)
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.save(found, folder / f"{home.name}.{rank}.pt")
        (folder / f"world.{rank}.json").write_text(json.dumps({"size": size, "process": os.getpid()}))


def test_two_processes_really_ran(two_processes: Path) -> None:
    worlds = [json.loads((two_processes / f"world.{rank}.json").read_text()) for rank in range(2)]
    assert [world["size"] for world in worlds] == [2, 2]
    assert worlds[0]["process"] != worlds[1]["process"]


@pytest.mark.parametrize(("name", "batch", "accumulation"), PROCESSES)
def test_two_processes_change_nothing(
    name: str, batch: int, accumulation: int, two_processes: Path, whole: dict[str, Any]
) -> None:
    """The rows that Accelerate repeats to fill the last batch do not count."""
    found = [torch.load(two_processes / f"{name} {batch}x{accumulation}.{rank}.pt") for rank in range(2)]
    check_equal(found[0], whole[name])
    for key, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][key]), f"{key} differs between the processes"


def test_two_processes_write_one_delta(two_processes: Path) -> None:
    stage = two_processes / "two stages 4x1" / "stages" / "2-mix"
    assert {file.name for file in stage.iterdir()} == {
        "delta.safetensors",
        "manifest.json",
        "metrics.json",
        "log.jsonl",
    }
    assert [json.loads(line)["step"] for line in (stage / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_plain_trainer_doubles_the_loss(tmp_path: Path) -> None:
    """Fact 1: fails when transformers mends it; then our own loss is not needed any more."""

    def first(batch: int, accumulation: int) -> tuple[float, float]:
        seen = Recorder()
        trainer = hf.Trainer(
            tiny.classifier("bert", **NO_DROPOUT),
            arguments(tmp_path, batch, accumulation, max_steps=1),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            train_dataset=tiny.rows(8),
            callbacks=[seen],
        )
        trainer.train()
        return seen.losses[0], seen.norms[0]

    one, two = first(8, 1), first(4, 2)
    assert two == pytest.approx((2 * one[0], 2 * one[1]), rel=1e-5)


def plain_loop(model: torch.nn.Module, rows: list[dict[str, Any]], steps: int, seed: int) -> list[float]:
    """Twenty steps as a textbook writes them: AdamW, warm-up, linear decay, clipping. Nothing of ours, no Trainer."""
    collate = hf.DataCollatorWithPadding(tiny.tokenizer())
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    rest = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    losses: list[float] = []
    epoch = 0
    model.train()
    while len(losses) < steps:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(rows), 8):
            if len(losses) == steps:
                break
            step = len(losses)
            rate = 1e-3 * min(1.0, step / 4, (steps - step) / (steps - 4))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = collate([rows[number] for number in order[start : start + 8]])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = functional.cross_entropy(logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        epoch += 1
    return losses


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "strategy", [None, [{"rules": [{"part": "all", "method": "full"}]}]], ids=["plain", "strategy"]
)
def test_twenty_losses_equal_a_plain_loop(strategy: Any, accumulation: int, tmp_path: Path) -> None:
    rows, seen = tiny.rows(30), Recorder()
    more = {
        "learning_rate": 1e-3,
        "weight_decay": 0.02,
        "warmup_steps": 4,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
    }
    trainer = HybridTrainer(
        tiny.classifier("bert", **NO_DROPOUT),
        arguments(tmp_path, 8 // accumulation, accumulation, max_steps=20, seed=7, **more),
        data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
        train_dataset=rows,
        strategy=strategy,
        callbacks=[seen],
    )
    trainer.train()
    assert seen.losses == pytest.approx(plain_loop(tiny.classifier("bert", **NO_DROPOUT), rows, 20, 7), abs=2e-5)
    assert seen.losses[-1] < seen.losses[0]


@pytest.mark.parametrize(("batch", "accumulation"), SPLITS)
def test_regression(batch: int, accumulation: int, tmp_path: Path) -> None:
    """One label a row, a number: the squared error, as transformers decides from the configuration."""
    rows = [row | {"labels": row["labels"] + 0.25} for row in tiny.rows(22)]
    seen, model = Recorder(), tiny.classifier("bert", num_labels=1, **NO_DROPOUT)
    collate = hf.DataCollatorWithPadding(tiny.tokenizer())
    with torch.no_grad():
        expected = [model(**collate(rows[start : start + 8])).loss.item() for start in (0, 8, 16)]
    trainer = HybridTrainer(
        model,
        arguments(
            tmp_path, batch, accumulation, learning_rate=1e-12, num_train_epochs=1, train_sampling_strategy="sequential"
        ),
        data_collator=collate,
        train_dataset=rows,
        callbacks=[seen],
    )
    trainer.train()
    assert seen.losses == pytest.approx(expected, abs=1e-6)


class TestPieces:
    """microbatch.by_length."""

    @staticmethod
    def batch(count: int = 32, **more: Any) -> dict[str, torch.Tensor]:
        collate = hf.DataCollatorWithPadding(tiny.tokenizer())
        return dict(collate(tiny.rows(count, longest=30))) | more

    @pytest.mark.parametrize("count", [16, 17, 23, 32, 64, 100])
    def test_every_row_stands_in_one_piece(self, count: int) -> None:
        batch = self.batch(count, number=torch.arange(count))
        pieces = by_length(batch)
        assert sorted(int(n) for piece in pieces for n in piece["number"]) == list(range(count))
        assert all(len(piece["number"]) >= MIN_ROWS for piece in pieces)
        for piece in pieces:
            longest = int(piece["attention_mask"].sum(1).max())
            assert piece["input_ids"].shape == piece["attention_mask"].shape == (len(piece["number"]), longest)
            for at, number in enumerate(piece["number"]):
                length = int(batch["attention_mask"][number].sum())
                assert torch.equal(piece["input_ids"][at, :length], batch["input_ids"][number, :length])
                assert piece["labels"][at] == batch["labels"][number]

    def test_less_padding_is_computed(self) -> None:
        batch = self.batch(64)
        pieces = by_length(batch)
        assert len(pieces) > 1
        assert sum(piece["input_ids"].numel() for piece in pieces) < 0.8 * batch["input_ids"].numel()

    @pytest.mark.parametrize("architecture", ["bert", "llama"])
    def test_gradients_equal_those_of_the_whole_batch(self, architecture: str) -> None:
        model, batch, task = tiny.classifier(architecture, **NO_DROPOUT), self.batch(40), Task([0, 1])

        def gradients(pieces: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
            model.zero_grad()
            for piece in pieces:
                inputs = {key: value for key, value in piece.items() if key != "labels"}
                task.loss(model(**inputs), piece["labels"], 40).backward()
            return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

        pieces = by_length(batch)
        assert len(pieces) > 1
        for one, two in zip(gradients([batch]), gradients(pieces), strict=True):
            assert torch.allclose(one, two, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("count", [1, 2 * MIN_ROWS - 1])
    def test_few_rows_stay_whole(self, count: int) -> None:
        batch = self.batch(count)
        assert by_length(batch) == [batch]

    def test_rows_of_one_length_stay_whole(self) -> None:
        batch = self.batch(32)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        assert len(by_length(batch)) == 1

    def test_without_a_mask_stays_whole(self) -> None:
        batch = self.batch()
        del batch["attention_mask"]
        assert by_length(batch) == [batch]

    def test_padded_on_the_left_stays_whole(self) -> None:
        batch = {key: value.flip(1) if value.dim() > 1 else value for key, value in self.batch().items()}
        assert by_length(batch) == [batch]

    def test_a_mask_with_holes_stays_whole(self) -> None:
        """Its sum is no length: tokens behind the hole would be lost."""
        batch = self.batch()
        batch["attention_mask"][:, 1] = 0
        assert by_length(batch) == [batch]

    def test_entries_without_rows_stay_whole(self) -> None:
        batch = self.batch()
        for odd in (torch.tensor(3), torch.zeros(5), None, "text"):
            assert len(by_length(batch | {"odd": odd})) == 1

    def test_labels_as_wide_as_the_text_by_chance_stay_whole(self) -> None:
        """One column for each class, not for each token."""
        batch = self.batch()
        batch["labels"] = torch.rand(batch["input_ids"].shape).round()
        pieces = by_length(batch)
        assert len(pieces) > 1
        assert all(piece["labels"].shape[1] == batch["input_ids"].shape[1] for piece in pieces)
        decoder = by_length(batch | {"decoder_input_ids": batch["input_ids"]})
        assert all(piece["decoder_input_ids"].shape[1] == batch["input_ids"].shape[1] for piece in decoder)

    def test_labels_of_tokens_lose_what_is_ignored(self) -> None:
        batch = self.batch()
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for piece in by_length(batch):
            assert piece["labels"].shape == piece["input_ids"].shape

    def test_deeper_entries_are_cut_too(self) -> None:
        batch = self.batch()
        batch["inputs_embeds"] = torch.rand(*batch["input_ids"].shape, 4)
        for piece in by_length(batch):
            assert piece["inputs_embeds"].shape[:2] == piece["input_ids"].shape

    def test_trainer_cuts_and_gets_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With dropout off, a training in pieces has the losses, norms and weights of one without."""
        cut = 0

        def counted(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            nonlocal cut
            pieces = microbatch.by_length(batch)
            cut += len(pieces) > 1
            return pieces

        def run(cutter: Any) -> dict[str, Any]:
            monkeypatch.setattr(update, "by_length", cutter)
            seen, model = Recorder(), tiny.classifier("bert", **NO_DROPOUT)
            trainer = HybridTrainer(
                model,
                arguments(tmp_path, 32),
                data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
                train_dataset=tiny.rows(80, longest=30),
                callbacks=[seen],
                engine="off",
            )
            trainer.train()
            return {"losses": seen.losses, "norms": seen.norms, "weights": weights_of(model)}

        check_equal(run(counted), run(lambda batch: [batch]))
        assert cut >= 2

    @pytest.mark.parametrize("batch", [4, 32])
    def test_a_loss_of_the_users_own_is_never_cut(self, batch: int, tmp_path: Path) -> None:
        """It may be a mean, which pieces would add up."""

        def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            return functional.cross_entropy(outputs["logits"], labels)

        def first(trainer_class: type[hf.Trainer]) -> float:
            seen = Recorder()
            trainer_class(
                tiny.classifier("bert", **NO_DROPOUT),
                arguments(tmp_path, batch, max_steps=1),
                data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
                train_dataset=tiny.rows(32, longest=30),
                compute_loss_func=mean,
                callbacks=[seen],
            ).train()
            return seen.losses[0]

        assert first(HybridTrainer) == pytest.approx(first(hf.Trainer), abs=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
