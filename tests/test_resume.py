"""A stage that was interrupted goes on as if it had not been: what is saved, what is kept, when a stage is over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import texts
import tiny
import torch
import transformers as hf

import hybridtune
from hybridtune import api, staging, trial
from hybridtune.console import Console
from hybridtune.errors import RunError, TrainingError
from hybridtune.recipe import Recipe, Stage, Strategy, Training
from hybridtune.resolve import resolve
from hybridtune.train import HybridTrainer

HEAD = {"part": "head", "method": "full"}
LORA = {"part": "layers", "method": "lora", "r": 4}
KILL = Path(__file__).parents[1] / "benchmarks" / "kill.py"
# Five steps an epoch.
LONG = {"rules": [HEAD, LORA], "num_train_epochs": 3, "learning_rate": 5e-3}
EVALUATED = {"eval_strategy": "epoch", "load_best_model_at_end": True}


class Stop(hf.TrainerCallback):
    """Interrupts at a step; after an evaluation where asked; counts steps."""

    def __init__(self, step: int = 0, event: str = "on_step_end", stage: str = "") -> None:
        self.steps: list[int] = []

        def at(args: Any, state: Any, control: Any, **_: Any) -> None:
            if event == "on_step_end":
                self.steps.append(state.global_step)
            if state.global_step == step and args.output_dir.endswith(stage):
                raise KeyboardInterrupt

        setattr(self, event, at)


Build = Callable[..., HybridTrainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds a trainer over 40 rows, five steps an epoch."""
    tiny.save_body(tmp_path / "body")

    def make(stages: Any, *callbacks: Any, metric: Any = None, rows: Any = None, **arguments: Any) -> HybridTrainer:
        torch.manual_seed(0)
        given = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "logging_steps": 1, "seed": 3}
        fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "per_device_eval_batch_size": 8}
        trainer = HybridTrainer(
            hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body"),
            hf.TrainingArguments(**given | fixed | arguments),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            train_dataset=rows or tiny.rows(40),
            eval_dataset=tiny.rows(16, seed=1),
            strategy=stages,
            compute_metrics=metric,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def found(trainer: HybridTrainer) -> tuple[Any, ...]:
    """All that must not depend on interruptions."""
    folders = trainer.stage_folders
    metrics = [{key: value for key, value in told(folder).items() if key != "seconds"} for folder in folders]
    return [(f / "delta.safetensors").read_bytes() for f in folders], list(map(log_of, folders)), metrics


def interrupted(build: Build, stages: Any, step: int, event: str = "on_step_end", **more: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(stages, Stop(step, event), **more).train()


class TestSaves:
    """When a checkpoint is written, and which ones stay."""

    @staticmethod
    def saved(build: Build, stage: dict[str, Any], **arguments: Any) -> list[int]:
        steps: list[int] = []

        class Look(hf.TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                assert [c.name for c in staging.checkpoints(Path(args.output_dir))][
                    -1
                ] == f"checkpoint-{steps_now(state)}"

        def steps_now(state: Any) -> int:
            steps.append(state.global_step)
            return int(state.global_step)

        build([LONG | stage], Look(), **arguments).train()
        return steps

    def test_a_users_own_steps_beside_the_best(self, build: Build) -> None:
        stage = {"save_strategy": "steps", "save_steps": 7, **EVALUATED}
        assert self.saved(build, stage) == [5, 7, 10, 14, 15]

    def test_save_steps_alone_mean_steps(self, build: Build) -> None:
        assert self.saved(build, {"save_steps": 4}, save_strategy="epoch") == [4, 8, 12, 15]

    def test_epochs_stay_epochs(self, build: Build) -> None:
        assert self.saved(build, EVALUATED, save_strategy="epoch") == [5, 10, 15]

    def test_every_evaluation_that_may_be_the_best(self, build: Build) -> None:
        stage = {"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True, "save_strategy": "epoch"}
        assert self.saved(build, stage) == [5, 6, 10, 12, 15]

    def test_nothing_where_nothing_is_to_be_saved(self, build: Build) -> None:
        assert self.saved(build, {"eval_strategy": "epoch", "save_strategy": "no"}) == []

    def test_the_best_and_the_last_stay(self, build: Build, tmp_path: Path) -> None:
        scores = iter([0.9, 0.1, 0.2])
        seen: list[list[int]] = []

        class Look(hf.TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                seen.append([staging.step_of(c) for c in staging.checkpoints(Path(args.output_dir))])
                kept = json.loads(
                    (Path(args.output_dir) / f"checkpoint-{state.global_step}" / staging.STATE).read_text()
                )
                assert kept["best_model_checkpoint"] == str(
                    tmp_path / "out" / "stages" / "1-full-lora" / "checkpoint-5"
                )

        more = {"metric_for_best_model": "score", "greater_is_better": True}
        stage = LONG | EVALUATED | {"save_steps": 4}
        metric: Any = lambda _: {"score": next(scores)}  # noqa: E731
        # The first save comes before the first evaluation: there is no best yet.
        build([stage | {"save_steps": 6}], Look(), metric=metric, **more).train()
        assert seen == [[5], [5, 6], [5, 10], [5, 12], [5, 15]]

    def test_recipe_and_stage_alike(self, tmp_path: Path) -> None:
        """In a recipe the default, the end of an epoch, would let `save_steps` count for nothing."""
        tiny.save_body(tmp_path / "body")
        rules = {"stages": [{"rules": [HEAD]}, {"rules": [HEAD], "save_strategy": "epoch"}]}
        keys = {"model": str(tmp_path / "body"), "task": "classification", "data": {"train": "a.csv"}}
        recipe = Recipe.make(**keys, save_steps=9, strategy={"name": "two", **rules})
        made, _ = tiny.assembly(tmp_path / "body")
        training = Training(save_steps=recipe.save_steps)
        full, defaults = resolve(recipe.strategies()[0], training, made, 32)
        assert [stage.save_strategy for stage in full.stages] == ["steps", "epoch"]
        assert not [path for path in defaults if path.endswith("save_strategy")]


# The stage's keys, and where it is interrupted.
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, str]]]] = {
    "in the middle of an epoch": ({"save_steps": 4}, [(6, "on_step_end"), (13, "on_step_end")]),
    "losses over several steps": ({"save_steps": 4, "logging_steps": 3}, [(10, "on_step_end")]),
    "the evaluation after a saved step": (EVALUATED | {"save_steps": 5}, [(10, "on_evaluate")]),
    "after the last step": (EVALUATED | {"save_steps": 5}, [(15, "on_train_end")]),
    "accumulation": ({"save_steps": 1, "gradient_accumulation_steps": 2}, [(2, "on_step_end")]),
    "steps, not epochs": ({"save_steps": 3, "max_steps": 8, "num_train_epochs": None}, [(8, "on_train_end")]),
    "epochs that end first": (
        {"save_steps": 4, "max_steps": 99},
        [(9, "on_step_end"), (15, "on_train_end")],
    ),
    "evaluations by steps": (
        {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True},
        [(7, "on_step_end"), (15, "on_train_end")],
    ),
    "early stopping": (
        EVALUATED
        | {"num_train_epochs": 6, "early_stopping_patience": 2, "early_stopping_threshold": 9.0, "save_steps": 3},
        [(12, "on_step_end")],
    ),
}


class TestGoingOn:
    """Bit for bit, whatever a checkpoint lies between."""

    @pytest.mark.parametrize("case", CASES)
    def test_all_is_the_same(self, build: Build, tmp_path: Path, case: str) -> None:
        stage, stops = CASES[case]
        stages = [LONG | stage]
        whole = build(stages, output_dir=str(tmp_path / "whole"))
        whole.train()
        if case == "early stopping":
            assert told(whole.stage_folders[0])["stopped"] == "early_stopping"
        for at, event in stops:
            for stale in (tmp_path / "out").rglob("*.json"):
                stale.unlink()
            for stage_folder in (tmp_path / "out" / "stages").glob("*"):
                staging.forget(stage_folder)
            interrupted(build, stages, at, event)
            counted = Stop()
            resumed = build(stages, counted)
            resumed.train(resume_from_checkpoint=True)
            assert found(resumed) == found(whole)
            if event == "on_train_end":
                assert counted.steps == [], "a stage that was over was trained on"

    @pytest.mark.parametrize("batch", [1, 2])
    def test_whatever_batch_comes_first(self, build: Build, tmp_path: Path, batch: int) -> None:
        """Rows by themselves, or beside others of their length, say nothing about padding; those after them do."""
        rows = sorted(tiny.rows(9, longest=8), key=lambda row: len(row["input_ids"]))
        assert len({len(row["input_ids"]) for row in rows[:batch]}) == 1
        more = {"per_device_train_batch_size": batch, "train_sampling_strategy": "sequential", "rows": rows}
        stages = [LONG | {"num_train_epochs": 2, "save_steps": 1, "eval_strategy": "epoch"}]
        whole = build(stages, output_dir=str(tmp_path / "whole"), **more)
        whole.train()
        assert whole.engine is not None
        assert whole.engine.on
        for step in range(2, whole.state.max_steps + 1, 3 - batch):
            interrupted(build, stages, step, **more)
            resumed = build(stages, **more)
            resumed.train(resume_from_checkpoint=True)
            assert found(resumed) == found(whole), step
            for folder in resumed.stage_folders:
                shutil.rmtree(folder)

    def test_frozen_layers_that_a_checkpoint_writes_again(self, build: Build, tmp_path: Path) -> None:
        """Those that an earlier stage has trained: their hidden states are kept after a resume as before it."""
        stages = [{"name": "all", "rules": [{"part": "all", "method": "full"}], "num_train_epochs": 1}]
        stages.append({"name": "head", "rules": [HEAD], "num_train_epochs": 2, "save_steps": 1})
        whole = build(stages, output_dir=str(tmp_path / "whole"))
        whole.train()
        with pytest.raises(KeyboardInterrupt):
            build(stages, Stop(3, stage="2-head")).train()
        resumed = build(stages)
        resumed.train(resume_from_checkpoint=True)
        assert "3 frozen layers computed once a row" in told(resumed.stage_folders[1])["engine"]
        assert found(resumed) == found(whole)

    def test_seconds_go_on(self, build: Build) -> None:
        stages = [LONG | {"save_steps": 4}]
        interrupted(build, stages, 9)
        (folder,) = build(stages).stage_folders
        state_file = folder / "checkpoint-8" / staging.STATE
        state = json.loads(state_file.read_text())
        state["stateful_callbacks"]["hybridtune"]["seconds"] = 1000.0
        state_file.write_text(json.dumps(state))
        build(stages).train(resume_from_checkpoint=True)
        seconds = [json.loads(line)["seconds"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert max(seconds[:8]) < 1000 < min(seconds[8:])
        assert 1000 < told(folder)["seconds"] < 1100

    def test_a_torn_line_of_the_log(self, build: Build) -> None:
        stages = [LONG | {"save_steps": 4}]
        interrupted(build, stages, 10)
        log = build(stages).stage_folders[0] / "log.jsonl"
        log.write_bytes(log.read_bytes()[:-15])
        build(stages).train(resume_from_checkpoint=True)
        assert [line["step"] for line in log_of(log.parent)] == list(range(1, 16))

    def test_a_folder_that_was_moved(self, build: Build, tmp_path: Path) -> None:
        """The best checkpoint is found where it is now."""
        stages = [LONG | EVALUATED | {"learning_rate": 0.5, "save_steps": 4}]
        whole = build(stages, output_dir=str(tmp_path / "whole"))
        whole.train()
        interrupted(build, stages, 14)
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        moved = build(stages, output_dir=str(tmp_path / "elsewhere"))
        moved.train(resume_from_checkpoint=True)
        assert found(moved) == found(whole)

    def test_a_new_start_leaves_nothing_of_the_old_one(self, build: Build) -> None:
        """Else a second interruption would be resumed from the first training's files."""
        stages = [LONG | {"name": "one"}, LONG | {"name": "two", "save_steps": 4}]
        build(stages, save_total_limit=5).train()
        interrupted(build, stages, 2, save_total_limit=5)
        one, two = build(stages).stage_folders
        for folder in (one, two):
            assert not (folder / "metrics.json").exists()
            assert not staging.checkpoints(folder)

    def test_a_users_own_copies_are_left_alone(self, build: Build) -> None:
        """They are not gone on from unasked, not counted, not removed; asked, they are checkpoints as others are."""
        stages = [LONG | {"save_steps": 4}]
        whole = build(stages)
        whole.train()
        expected = found(whole)
        interrupted(build, stages, 9, save_total_limit=2)
        (folder,) = build(stages).stage_folders
        own = [folder / name for name in ("checkpoint-best", "checkpoint-8-copy", ".checkpoint-best.tmp")]
        for copy in own:
            shutil.copytree(folder / "checkpoint-8", copy)
        assert [path.name for path in staging.checkpoints(folder)] == ["checkpoint-4", "checkpoint-8"]
        with pytest.raises(KeyboardInterrupt):
            build(stages, Stop(11), save_total_limit=2).train(resume_from_checkpoint=str(own[0]))
        assert [path.name for path in staging.checkpoints(folder)] == ["checkpoint-4", "checkpoint-8"]
        resumed = build(stages, save_total_limit=2)
        resumed.train(resume_from_checkpoint=True)
        assert found(resumed) == expected
        assert [path.name for path in staging.checkpoints(folder)] == ["checkpoint-12", "checkpoint-15"]
        build(stages).train()
        assert [path.name for path in staging.checkpoints(folder)] == []
        assert all((copy / staging.STATE).is_file() for copy in own)

    def test_half_written_folders_are_removed(self, build: Build) -> None:
        stages = [LONG | {"save_steps": 4}]
        interrupted(build, stages, 9)
        (folder,) = build(stages).stage_folders
        (folder / ".checkpoint-12.tmp" / "checkpoint-12").mkdir(parents=True)
        build(stages).train(resume_from_checkpoint=True)
        assert sorted(path.name for path in folder.iterdir()) == [
            "delta.safetensors",
            "log.jsonl",
            "manifest.json",
            "metrics.json",
        ]

    def test_a_disk_that_is_full_leaves_the_checkpoint_before(
        self, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(value: Any, path: Any, *_: Any, **__: Any) -> None:
            if "checkpoint-8" in str(path):
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            save(value, path)

        save = torch.save
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(RunError, match="no space left"):
            build([LONG | {"save_steps": 4}]).train()
        (folder,) = build([LONG]).stage_folders
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["checkpoint-4"]


class TestTime:
    """`max_seconds`."""

    @staticmethod
    def strategy(seconds: float, **more: Any) -> Strategy:
        stage = Stage(**LONG | EVALUATED | {"save_steps": 4} | more)
        return Strategy(name="short", stages=[stage.model_copy(update={"max_seconds": seconds})])

    def test_the_stage_ends_at_the_first_step_after_it(self, build: Build) -> None:
        counted = Stop()
        trainer = build(self.strategy(1e-6), counted)
        trainer.train()
        metrics = told(trainer.stage_folders[0])
        assert counted.steps == [1]
        assert (metrics["stopped"], metrics["steps"]) == ("max_seconds", 1)
        assert [point["step"] for point in metrics["evaluations"]] == [1], "what was trained was not evaluated"
        assert metrics["best_step"] == 1
        again = build(self.strategy(1e-6), Stop(1))
        again.train(resume_from_checkpoint=True)  # it is finished

    def test_evaluations_by_steps(self, build: Build) -> None:
        trainer = build(self.strategy(1e-6, eval_strategy="steps", eval_steps=3))
        trainer.train()
        assert [point["step"] for point in told(trainer.stage_folders[0])["evaluations"]] == [1]

    def test_killed_before_it_was_written_down(self, build: Build) -> None:
        with pytest.raises(KeyboardInterrupt):
            build(self.strategy(1e-6), Stop(1, "on_train_end")).train()
        counted = Stop()
        trainer = build(self.strategy(1e-6), counted)
        trainer.train(resume_from_checkpoint=True)
        assert counted.steps == []
        assert told(trainer.stage_folders[0])["stopped"] == "max_seconds"

    def test_time_before_an_interruption_counts(self, build: Build) -> None:
        with pytest.raises(KeyboardInterrupt):
            build(self.strategy(3600.0), Stop(6)).train()
        (folder,) = build([LONG]).stage_folders
        file = folder / "checkpoint-5" / staging.STATE
        state = json.loads(file.read_text())
        state["stateful_callbacks"]["hybridtune"]["seconds"] = 3600.0
        file.write_text(json.dumps(state))
        trainer = build(self.strategy(3600.0))
        trainer.train(resume_from_checkpoint=True)
        assert (told(folder)["stopped"], told(folder)["steps"]) == ("max_seconds", 6)

    @pytest.mark.parametrize(("keys", "why"), [({}, "epochs"), ({"max_steps": 3}, "max_steps")])
    def test_what_comes_first(self, build: Build, keys: dict[str, Any], why: str) -> None:
        trainer = build(self.strategy(3600.0, **keys))
        trainer.train()
        assert told(trainer.stage_folders[0])["stopped"] == why


class TestRuns:
    """`tune(resume=True)`."""

    @pytest.fixture
    def tune(self, tmp_path: Path) -> Callable[..., hybridtune.Run]:
        base = tiny.save_body(tmp_path / "base")

        def run(**keys: Any) -> hybridtune.Run:
            least = {"model": str(base), "task": "classification", **texts.splits(48, 16, 8), "logging_steps": 1}
            least |= {"per_device_train_batch_size": 8, "baselines": False, "output": str(tmp_path / "run")}
            return api.tune(**least | {"console": Console(quiet=True)} | keys)

        return run

    STAGES = [  # noqa: RUF012
        {"name": "one", "rules": [HEAD], "num_train_epochs": 2},
        {"name": "two", "rules": [LORA], "num_train_epochs": 2},
    ]

    def test_an_unfinished_trial_goes_on(self, tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
        keys = {"strategy": self.STAGES, "save_steps": 4}
        with pytest.raises(KeyboardInterrupt):
            tune(**keys, callbacks=[Stop(9, stage="2-two")])
        one = tmp_path / "run" / "trials" / "custom" / "stages" / "1-one"
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in one.iterdir()}
        counted = Stop()
        tune(**keys, resume=True, callbacks=[counted])
        assert counted.steps == [9, 10, 11, 12]
        one = tmp_path / "run" / "stages" / "1-one"
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in one.iterdir()} == before
        whole = tune(**keys, output=str(tmp_path / "whole"))
        for name in ("1-one", "2-two"):
            assert log_of(tmp_path / "run" / "stages" / name) == log_of(whole.folder / "stages" / name)
        trials = [
            json.loads((folder / "trials/custom/trial.json").read_text()) for folder in (one.parents[1], whole.folder)
        ]
        assert trials[0]["validation"] == trials[1]["validation"]
        assert trials[0]["seconds"] == pytest.approx(sum(told(one.with_name(n))["seconds"] for n in ("1-one", "2-two")))

    def test_another_choice_than_before_scores_the_right_models(
        self, tune: Callable[..., hybridtune.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The stages of the first choice were handed over; a trial that failed then is the better one now."""
        run = trial.run

        def fails(setting: Any, strategy: Any, *more: Any) -> Any:
            if strategy.name == "head":
                raise TrainingError("out of memory")
            return run(setting, strategy, *more)

        rules = [{"part": "layers", "method": "lora"}, {"part": "new", "method": "full"}]
        idle = {"name": "lora", "stages": [{"name": "lora", "learning_rate": 1e-9, "rules": rules}]}
        keys = {"strategy": ["head", idle], "num_train_epochs": 4, "goal": {"minimize": "loss"}}
        with monkeypatch.context() as broken:
            broken.setattr(trial, "run", fails)
            assert tune(**keys).decision["chosen"] == "lora"
        resumed = tune(**keys, resume=True)
        whole = tune(**keys, output=str(tmp_path / "whole"))
        assert resumed.decision["chosen"] == whole.decision["chosen"] == "head"
        scores = [[c["metrics"] for c in one.evaluation["candidates"]] for one in (resumed, whole)]
        assert scores[0] == scores[1]
        assert (tmp_path / "run" / "trials" / "lora" / "stages" / "1-lora").is_dir()

    def test_no_memory_for_a_single_row(
        self, tune: Callable[..., hybridtune.Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

        monkeypatch.setattr(hf.Trainer, "training_step", fails)
        with pytest.warns(UserWarning, match="halved to 1"), pytest.raises(TrainingError, match="lora: out of memory"):
            tune(strategy="lora", num_train_epochs=1)

    def test_killed_at_its_first_file(self, tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".asked.json.tmp").write_text("{")
        tune(strategy="head", num_train_epochs=1)
        assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


def test_kills(tmp_path: Path) -> None:
    """A few of the moments of benchmarks/kill.py."""
    names = ["half of the trainer's state", "before the rename of a checkpoint", "after a stage's metrics"]
    source = str(Path(hybridtune.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(KILL), "--results", str(tmp_path / "kill.jsonl"), "--only", *names],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["3 of 3"], done.stdout + done.stderr[-3000:]
