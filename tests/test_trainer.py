"""HybridTrainer: what a user of transformers.Trainer finds in it, stage by stage."""

from __future__ import annotations

import fnmatch
import inspect
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from hybridtune import checkpoint, select, trial
from hybridtune import model as models
from hybridtune.cli import app
from hybridtune.engine.precision import Choice
from hybridtune.errors import MethodError, ModelError, RecipeError, RunError, TrainingError
from hybridtune.recipe import Recipe, Stage, Strategy, Training, load_strategy
from hybridtune.resolve import resolve
from hybridtune.tasks.classification import Task
from hybridtune.train import HybridTrainer
from hybridtune.trial import Trial
from hybridtune.update import UpdateTrainer

HEAD = {"part": "head", "method": "full"}
LORA = {"part": "layers", "method": "lora", "r": 4}
TOP = {"part": "layers[-1:]", "method": "full"}
HEAD_NAMES = {f"{module}.{kind}" for module in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
TWO_STAGES = [
    {"name": "probe", "rules": [HEAD], "learning_rate": 5e-3, "num_train_epochs": 1},
    {"name": "mix", "rules": [LORA, TOP | {"learning_rate": 1e-4}], "num_train_epochs": 2},
]
STOPPING = {
    "num_train_epochs": 8,
    "early_stopping_patience": 2,
    "eval_strategy": "epoch",
    "load_best_model_at_end": True,
    "learning_rate": 1e-2,
}
BEST = {"metric_for_best_model": "score", "greater_is_better": True}
TO_RESUME = [
    {"name": "one", "rules": [HEAD, {"part": "layers[-1:]", "method": "adapter"}], "num_train_epochs": 2},
    {"name": "two", "rules": [LORA], "num_train_epochs": 2},
]
SAVING = {"save_strategy": "steps", "save_steps": 1, "seed": 5}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that has no head."""
    folder = tmp_path_factory.mktemp("model") / "body"
    tiny.classifier("bert").bert.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


Build = Callable[..., HybridTrainer]


@pytest.fixture
def build(bodies: Path, tmp_path: Path) -> Build:
    """Builds a trainer over 16 rows, two steps an epoch."""

    def make(strategy: Any = None, *, model: Any = None, arguments: Any = (), **more: Any) -> HybridTrainer:
        given = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        } | dict(arguments)
        trainer = HybridTrainer(
            model or load(bodies),
            hf.TrainingArguments(**given),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            train_dataset=more.pop("train_dataset", tiny.rows(16)),
            strategy=strategy,
            **more,
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def load(folder: Path, **more: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.AutoModelForSequenceClassification.from_pretrained(folder, **more)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return list(one) == list(two) and all(torch.equal(value, two[name]) for name, value in one.items())


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    batch = hf.DataCollatorWithPadding(tiny.tokenizer())(tiny.rows(5, seed=9))
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class Watcher(hf.TrainerCallback):
    """Calls a function at every event that it is asked for."""

    def __init__(self, **at: Callable[..., None]) -> None:
        for event, function in at.items():
            setattr(self, event, self._caller(function))

    @staticmethod
    def _caller(function: Callable[..., None]) -> Callable[..., None]:
        return lambda args, state, control, **kwargs: function(args=args, state=state, control=control, **kwargs)


class TestContract:
    """It is a transformers.Trainer, and stays one."""

    def test_it_is_a_trainer(self, build: Build) -> None:
        trainer = build()
        assert isinstance(trainer, hf.Trainer)
        output = trainer.train()
        assert output.global_step == 2
        trainer.save_model()
        assert (Path(trainer.args.output_dir) / "model.safetensors").is_file()

    def test_overridden_methods_have_the_signatures_of_the_installed_trainer(self) -> None:
        overridden = [
            name
            for name, value in (vars(UpdateTrainer) | vars(HybridTrainer)).items()
            if inspect.isfunction(value) and hasattr(hf.Trainer, name) and name != "__init__"
        ]
        assert {"train", "training_step", "create_optimizer", "_save", "_load_best_model"} <= set(overridden)
        # Guards and resuming hang on these: a Trainer without them would not say so.
        assert {"_save_checkpoint", "_get_output_dir", "_init_training_state", "_get_grad_norm"} <= set(overridden)
        for name in overridden:
            ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (HybridTrainer, hf.Trainer))
            assert list(ours) == list(theirs), name
            for key, parameter in ours.items():
                assert parameter.kind == theirs[key].kind, (name, key)
                assert parameter.default == theirs[key].default, (name, key)

    def test_init_adds_names_and_takes_none_away(self) -> None:
        ours, below, theirs = (
            inspect.signature(c.__init__).parameters for c in (HybridTrainer, UpdateTrainer, hf.Trainer)
        )
        added = {*ours, *below} - {"self", "args", "kwargs"}
        assert added == {"strategy", "base", "manifest", "engine", "caches", "max_tokens_per_micro_batch", "measure"}
        assert not added & set(theirs)
        assert ours["args"].kind == below["args"].kind == inspect.Parameter.VAR_POSITIONAL

    def test_a_compiled_model_is_run_as_it_is(self, build: Build) -> None:
        trainer = build(arguments={"torch_compile": True, "torch_compile_backend": "eager"})
        with pytest.warns(UserWarning, match="not under torch_compile yet"):
            assert trainer.train().global_step == 2

    @pytest.mark.parametrize("name", ["get_learning_rates", "save_metrics", "predict", "hyperparameter_search"])
    def test_the_rest_is_inherited(self, name: str) -> None:
        assert getattr(HybridTrainer, name) is getattr(hf.Trainer, name)


class TestStrategy:
    """`strategy=`: its forms, its rates, its refusals."""

    def test_by_name(self, build: Build) -> None:
        trainer = build("lp-ft")
        assert trainer.strategy is not None
        assert [stage.name for stage in trainer.strategy.stages] == ["probe", "full"]

    def test_by_file(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": TWO_STAGES}))
        trainer = build(str(tmp_path / "mine.yaml"))
        assert trainer.strategy is not None
        assert trainer.strategy.name == "mine"
        assert [stage.name for stage in trainer.strategy.stages] == ["probe", "mix"]

    @pytest.mark.parametrize("form", [dict, lambda stage: Stage(**stage)], ids=["dicts", "stages"])
    def test_by_stages(self, build: Build, form: Any) -> None:
        trainer = build([form(stage) for stage in TWO_STAGES])
        assert trainer.strategy is not None
        assert [str(rule) for rule in trainer.strategy.stages[0].rules] == ["new: full", "head: full"]

    def test_by_strategy(self, build: Build) -> None:
        asked = load_strategy("head")
        trainer = build(asked)
        assert trainer.strategy is not None
        assert trainer.strategy.name == "head"
        assert asked == load_strategy("head"), "what the user gave was changed"

    def test_unknown(self, build: Build) -> None:
        with pytest.raises(RecipeError, match='did you mean "lora"'):
            build("lorra")

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            ([{"rules": [HEAD], "num_epochs": 1}], "unknown key stages.0.num_epochs"),
            ([{"rules": [HEAD]}, {"rules": []}], "stages.1.rules"),
            ([{"rules": [{"part": "head"}]}], "stages.0.rules.0.method is missing"),
            ([], "stages"),
        ],
    )
    def test_stages_that_cannot_be_read(self, build: Build, stages: list[Any], message: str) -> None:
        """Are refused as a recipe's are."""
        with pytest.raises(RecipeError, match=f'strategy "custom": .*{re.escape(message)}'):
            build(stages)

    def test_rates_reach_the_optimizer(self, build: Build) -> None:
        """Every rule its own rate; biases and norms are not decayed."""
        found: list[dict[str, Any]] = []

        def look(optimizer: Any, **_: Any) -> None:
            found.extend(optimizer.param_groups)

        rules = [LORA | {"learning_rate": 2e-3}, TOP | {"learning_rate": 1e-4, "weight_decay": 0.1}, HEAD]
        trainer = build([{"rules": rules, "lr_scheduler_type": "constant"}], callbacks=[Watcher(on_train_begin=look)])
        trainer.train()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        rates = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}
        assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        lower, top = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.2.intermediate.dense"
        assert rates[f"{lower}.lora_A.default.weight"] == (2e-3, 0.0)
        assert rates[f"{top}.weight"] == (1e-4, 0.1)
        assert rates[f"{top}.bias"] == (1e-4, 0.0)
        assert rates["bert.encoder.layer.2.output.LayerNorm.weight"] == (1e-4, 0.0)
        assert rates["classifier.weight"] == (1e-3, 0.01)

    @pytest.mark.parametrize(
        ("arguments", "lora"),
        [({}, (1e-3, 0.0)), ({"learning_rate": 5e-5}, (1e-3, 0.0)), ({"learning_rate": 3e-4}, (3e-4, 0.0))],
        ids=["nothing", "the library's default", "another"],
    )
    def test_what_equals_the_librarys_default_was_not_given(
        self, build: Build, arguments: dict[str, Any], lora: tuple[float, float]
    ) -> None:
        trainer = build([{"rules": [LORA]}], arguments=arguments)
        assert trainer.strategy is not None
        rule = trainer.strategy.stages[0].rules[1]
        assert (rule.learning_rate, rule.weight_decay) == lora

    def test_explicit_arguments_are_honoured_and_a_rules_own_wins(self, build: Build) -> None:
        arguments = {"learning_rate": 3e-4, "weight_decay": 0.05, "max_grad_norm": 0.3, "warmup_steps": 1}
        trainer = build([{"rules": [LORA, TOP | {"learning_rate": 1e-5}]}], arguments=arguments)
        assert trainer.strategy is not None
        assert [(r.learning_rate, r.weight_decay) for r in trainer.strategy.stages[0].rules] == [
            (3e-4, 0.05),
            (3e-4, 0.05),
            (1e-5, 0.05),
        ]
        trainer.train()
        log = log_of(trainer.stage_folders[0])
        assert [line["learning_rate"] for line in log] == pytest.approx([0.0, 3e-4])

    def test_a_stages_own_keys_win(self, build: Build) -> None:
        keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
        trainer = build([{"rules": [HEAD], **keys}, {"rules": [HEAD], "max_steps": 1}])
        trainer.train()
        first, second = map(log_of, trainer.stage_folders)
        assert len(first) == 4
        assert {line["learning_rate"] for line in first} == {1e-3}
        assert len(second) == 1
        assert trainer.args.per_device_train_batch_size == 8

    @pytest.mark.parametrize(
        ("keys", "steps", "stopped"),
        [
            ({"num_train_epochs": 2}, 4, "epochs"),
            ({"max_steps": 5}, 5, "max_steps"),
            ({"num_train_epochs": 2, "max_steps": 3}, 3, "max_steps"),
            ({"num_train_epochs": 1, "max_steps": 3}, 2, "epochs"),
            ({}, 1, "max_steps"),
        ],
    )
    def test_a_stages_own_length_wins(self, build: Build, keys: dict[str, Any], steps: int, stopped: str) -> None:
        """Of epochs and steps that it has both, what comes first; its schedule is of that length."""
        trainer = build([{"rules": [HEAD], **keys}], arguments={"max_steps": 1, "num_train_epochs": 3})
        trainer.train()
        (folder,) = trainer.stage_folders
        assert [line["learning_rate"] for line in log_of(folder)] == pytest.approx(
            [1e-3 * (steps - step) / steps for step in range(steps)]
        )
        assert json.loads((folder / "metrics.json").read_text())["stopped"] == stopped

    def test_rows_without_an_end_have_no_epochs(self, build: Build) -> None:
        rows = Dataset.from_list(tiny.rows(16)).to_iterable_dataset()
        arguments = {"max_steps": 4}
        with pytest.raises(RecipeError, match=r"stage full: num_train_epochs cannot be counted[\s\S]*max_steps"):
            build([{"rules": [HEAD], "num_train_epochs": 1}], arguments=arguments, train_dataset=rows)
        stage = {"rules": [HEAD], "num_train_epochs": 1, "max_steps": 1}
        assert build([stage], arguments=arguments, train_dataset=rows).train().global_step == 1

    def test_an_optimizer_class_of_the_users(self, build: Build) -> None:
        kinds: list[Any] = []
        trainer = build(
            [{"rules": [HEAD]}],
            optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"alpha": 0.9}),
            callbacks=[Watcher(on_train_begin=lambda optimizer, **_: kinds.append(optimizer.optimizer))],
        )
        trainer.train()
        assert isinstance(kinds[0], torch.optim.RMSprop)
        assert kinds[0].param_groups[0]["alpha"] == 0.9

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ({"optim": "adamm"}, "optim cannot be adamm"),
            ({"lr_scheduler_type": "lineer"}, "lr_scheduler_type cannot be lineer"),
            ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
        ],
    )
    def test_a_stage_that_cannot_be(self, build: Build, stage: dict[str, Any], message: str) -> None:
        trainer = build([{"rules": [HEAD], **stage}])
        with pytest.raises(RecipeError, match=message):
            trainer.train()

    def test_what_would_go_wrong_in_silence_is_refused(self, build: Build, bodies: Path) -> None:
        model = load(bodies)
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(RecipeError, match="optimizers"):
            build("head", model=model, optimizers=(optimizer, None))
        with pytest.raises(RecipeError, match="model_init"):
            HybridTrainer(model_init=lambda: load(bodies), args=hf.TrainingArguments(use_cpu=True), strategy="head")
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)
        with pytest.raises(RecipeError, match="PEFT sits on the model already"):
            build("head", model=model)


class TestStages:
    """One after the other, each with its own optimizer, schedule and folder."""

    def test_each_has_its_own_schedule(self, build: Build) -> None:
        optimizers: list[Any] = []

        def look(optimizer: Any, **_: Any) -> None:
            optimizers.append(optimizer)
            assert not optimizer.state, "the optimizer of the stage before goes on"

        trainer = build(TWO_STAGES, callbacks=[Watcher(on_train_begin=look)])
        trainer.train()
        assert optimizers[0] is not optimizers[1]
        first, second = map(log_of, trainer.stage_folders)
        assert [(line["stage"], line["step"]) for line in first] == [("probe", 1), ("probe", 2)]
        assert [line["learning_rate"] for line in first] == pytest.approx([5e-3, 2.5e-3])
        assert [(line["stage"], line["step"]) for line in second] == [("mix", step) for step in range(1, 5)]
        assert [line["learning_rate"] for line in second] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        for line in first + second:
            assert set(line) == {"stage", "step", "loss", "learning_rate", "grad_norm", "seconds"}
            assert line["loss"] > 0
            assert line["grad_norm"] > 0

    def test_each_has_its_own_folder(self, build: Build) -> None:
        trainer = build(TWO_STAGES, eval_dataset=tiny.rows(8, seed=1), arguments={"eval_strategy": "epoch"})
        trainer.train()
        assert [folder.name for folder in trainer.stage_folders] == ["1-probe", "2-mix"]
        for folder, stage in zip(trainer.stage_folders, TWO_STAGES, strict=True):
            assert {file.name for file in folder.iterdir()} == {
                "delta.safetensors",
                "manifest.json",
                "metrics.json",
                "log.jsonl",
            }
            metrics, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "manifest"))
            assert metrics["name"] == manifest["stage"] == stage["name"]
            assert metrics["steps"] == 2 * stage["num_train_epochs"]
            assert [point["step"] for point in metrics["evaluations"]] == list(range(2, metrics["steps"] + 1, 2))
            assert set(metrics["evaluations"][0]) == {"step", "epoch", "loss"}
            assert metrics["trainable"] > 0
            assert [stage["name"] for stage in manifest["strategy"]["stages"]] == ["probe", "mix"]
        probe = json.loads((trainer.stage_folders[0] / "manifest.json").read_text())
        assert set(probe["tensors"]) == HEAD_NAMES

    def test_what_is_trained_is_what_the_rules_name(self, build: Build) -> None:
        """`requires_grad` is exactly the composition's names in each stage, and nothing else changes."""
        trained: list[set[str]] = []
        before: list[dict[str, torch.Tensor]] = []

        def look(model: torch.nn.Module, **_: Any) -> None:
            assert trainer.assembly is not None
            assert trainer.composition is not None
            wanted = {id(trainer.assembly.parameter(name)) for name in trainer.composition.names}
            assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
            trained.append({name for name, p in model.named_parameters() if p.requires_grad})
            before.append(weights_of(model))

        def compare(model: torch.nn.Module, **_: Any) -> None:
            changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[-1][name])}
            assert changed == trained[-1]

        trainer = build(TWO_STAGES, callbacks=[Watcher(on_train_begin=look, on_train_end=compare)])
        trainer.train()
        assert trained[0] == HEAD_NAMES
        assert not trained[1] & HEAD_NAMES
        assert {name for name in trained[1] if "lora_" not in name} == {
            name for name in trained[1] if name.startswith("bert.encoder.layer.2")
        }
        assert any("layer.1" in name and "lora_A" in name for name in trained[1])

    def test_callbacks_of_the_user_see_every_stage(self, build: Build) -> None:
        seen: list[str] = []
        events = ("on_train_begin", "on_epoch_end", "on_step_end", "on_evaluate", "on_save", "on_train_end")
        watcher = Watcher(**{event: lambda event=event, **_: seen.append(event) for event in events})
        more = {"eval_strategy": "epoch", "save_strategy": "epoch"}
        trainer = build(TWO_STAGES, callbacks=[watcher], eval_dataset=tiny.rows(8), arguments=more)
        before = list(trainer.callback_handler.callbacks)
        trainer.train()
        assert {event: seen.count(event) for event in events} == dict(zip(events, (2, 3, 6, 3, 3, 2), strict=True))
        assert trainer.callback_handler.callbacks == before

    def test_an_interrupted_training_leaves_the_trainer_usable(self, build: Build) -> None:
        def stop(state: Any, **_: Any) -> None:
            if interrupting and state.global_step == 2:
                raise KeyboardInterrupt

        interrupting = True
        trainer = build(TWO_STAGES, callbacks=[Watcher(on_step_end=stop)])
        before, arguments = list(trainer.callback_handler.callbacks), trainer.args
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.callback_handler.callbacks == before
        assert trainer.args is arguments
        interrupting = False
        trainer.train()
        assert [line["step"] for line in log_of(trainer.stage_folders[0])] == [1, 2]

    def test_compute_metrics(self, build: Build) -> None:
        def accuracy(prediction: hf.EvalPrediction) -> dict[str, Any]:
            right = prediction.predictions.argmax(-1) == prediction.label_ids
            return {"accuracy": right.astype("float32").mean()}

        trainer = build(
            TWO_STAGES, compute_metrics=accuracy, eval_dataset=tiny.rows(8), arguments={"eval_strategy": "epoch"}
        )
        trainer.train()
        points = json.loads((trainer.stage_folders[1] / "metrics.json").read_text())["evaluations"]
        assert all(0 <= point["accuracy"] <= 1 for point in points)
        assert trainer.evaluate()["eval_accuracy"] == points[-1]["accuracy"]

    def test_a_stage_that_merges(self, build: Build, bodies: Path) -> None:
        """LoRA folded into the weights, then the top in full: reloaded, the logits are the same."""
        stages = [{"name": "one", "rules": [LORA]}, {"name": "two", "rules": [TOP], "previous": "merge"}]
        trainer = build(stages)
        trainer.train()
        assert not [name for name, _ in trainer.model.named_parameters() if "lora" in name]
        loaded = checkpoint.load(trainer.stage_folders[1])[0].model
        assert torch.equal(logits_of(loaded), logits_of(trainer.model))

    def test_a_loss_that_is_no_number(self, build: Build) -> None:
        """Says so, instead of writing NaN into JSON after all is done."""

        def poison(model: torch.nn.Module, **_: Any) -> None:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))

        trainer = build(
            [{"rules": [HEAD]}],
            callbacks=[Watcher(on_step_end=poison)],
            eval_dataset=tiny.rows(8),
            arguments={"eval_strategy": "epoch"},
        )
        with pytest.raises(TrainingError, match="not a number at step 2"):
            trainer.train()

    def test_a_second_trainer_goes_on_from_the_first(self, build: Build) -> None:
        """The checkpoint still names the model that all of it started from."""
        first = build([{"rules": [LORA]}])
        first.train()
        second = build([{"rules": [{"part": "layers[-1:]", "method": "adapter"}]}], model=first.model)
        second.train()
        loaded = checkpoint.load(second.stage_folders[0])[0].model
        assert torch.equal(logits_of(loaded), logits_of(second.model))
        third = build(model=second.model)
        third.train()
        trained = {name for name, parameter in third.model.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if "adapter_" not in name} == {"classifier.weight", "classifier.bias"}
        assert all("layer.2" in name for name in trained if "adapter_" in name)


class Script:
    """compute_metrics that says what it is told to; keeps the weights of each evaluation."""

    def __init__(self, *stages: list[float]) -> None:
        self.stages, self.stage, self.at = stages, -1, 0
        self.weights: list[list[dict[str, torch.Tensor]]] = []
        self.started: list[dict[str, torch.Tensor]] = []

    def __call__(self, prediction: hf.EvalPrediction) -> dict[str, float]:
        self.at += 1
        return {"score": self.stages[self.stage][self.at - 1]}

    def begin(self, model: torch.nn.Module, **_: Any) -> None:
        self.stage, self.at = self.stage + 1, 0
        self.weights.append([])
        self.started.append(weights_of(model))

    def keep(self, model: torch.nn.Module, **_: Any) -> None:
        self.weights[-1].append(weights_of(model))

    @property
    def callback(self) -> hf.TrainerCallback:
        return Watcher(on_train_begin=self.begin, on_evaluate=self.keep)


class TestBest:
    """Early stopping, the best checkpoint, and which checkpoints stay."""

    def test_early_stopping_restores_the_best(self, build: Build) -> None:
        script = Script([0.1, 0.9, 0.2, 0.3], [0.5, 0.6, 0.4, 0.3])
        stages = [STOPPING | {"name": "one", "rules": [HEAD]}, STOPPING | {"name": "two", "rules": [LORA, HEAD]}]
        trainer = build(
            stages,
            compute_metrics=script,
            callbacks=[script.callback],
            eval_dataset=tiny.rows(8),
            arguments=BEST,
        )
        trainer.train()
        assert [len(weights) for weights in script.weights] == [4, 4], "patience is two, and fresh in each stage"
        assert not same(script.weights[0][1], script.weights[0][3])
        for name in HEAD_NAMES:
            assert torch.equal(script.started[1][name], script.weights[0][1][name]), "stage two starts elsewhere"
        assert same(weights_of(trainer.model), script.weights[1][1])
        metrics = json.loads((trainer.stage_folders[1] / "metrics.json").read_text())
        assert (metrics["best_step"], metrics["best_metric"], metrics["steps"]) == (4, 0.6, 8)
        assert [point["score"] for point in metrics["evaluations"]] == [0.5, 0.6, 0.4, 0.3]
        loaded = checkpoint.load(trainer.stage_folders[1])[0].model
        assert torch.equal(logits_of(loaded), logits_of(trainer.model))

    def test_of_equal_scores_the_lower_loss_is_kept(self, build: Build) -> None:
        script = Script([0.5, 0.5, 0.5, 0.5])
        rules = [{**HEAD, "learning_rate": 0.5}]
        trainer = build(
            [{"rules": rules, "num_train_epochs": 4, "eval_strategy": "epoch", "load_best_model_at_end": True}],
            compute_metrics=script,
            callbacks=[script.callback],
            eval_dataset=tiny.rows(8, seed=1),
            arguments=BEST,
        )
        trainer.train()
        metrics = json.loads((trainer.stage_folders[0] / "metrics.json").read_text())
        losses = [point["loss"] for point in metrics["evaluations"]]
        best = losses.index(min(losses))
        assert best > 0  # else Trainer's own would do
        assert metrics["best_step"] == metrics["evaluations"][best]["step"]
        assert metrics["best_metric"] == 0.5
        assert same(weights_of(trainer.model), script.weights[0][best])

    def test_a_callback_of_the_users_stays(self, build: Build) -> None:
        """Of the same class as the stage's own."""
        own, script = hf.EarlyStoppingCallback(5), Script([0.5, 0.4, 0.3, 0.2])
        trainer = build(
            [STOPPING | {"rules": [HEAD]}],
            compute_metrics=script,
            callbacks=[own, script.callback],
            eval_dataset=tiny.rows(8),
            arguments=BEST,
        )
        trainer.train()
        assert len(script.weights[0]) == 3
        assert [c for c in trainer.callback_handler.callbacks if isinstance(c, hf.EarlyStoppingCallback)] == [own]

    def test_a_stage_that_asks_for_the_best_by_itself(self, build: Build) -> None:
        """TrainingArguments said nothing of it: the loss on validation data decides, as in transformers."""
        keep = Script()
        trainer = build(
            [STOPPING | {"rules": [HEAD], "num_train_epochs": 3, "learning_rate": 3.0}],
            callbacks=[keep.callback],
            eval_dataset=tiny.rows(8, seed=1),
        )
        trainer.train()
        metrics = json.loads((trainer.stage_folders[0] / "metrics.json").read_text())
        losses = [point["loss"] for point in metrics["evaluations"]]
        assert metrics["best_metric"] == min(losses)
        assert same(weights_of(trainer.model), keep.weights[0][losses.index(min(losses))])

    def test_evaluations_by_steps_are_saved_by_steps(self, build: Build) -> None:
        script = Script([0.1, 0.2, 0.9, 0.3])
        keys = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "num_train_epochs": 2}
        trainer = build(
            [{"rules": [HEAD], **keys}],
            compute_metrics=script,
            callbacks=[script.callback],
            eval_dataset=tiny.rows(8),
            arguments=BEST,
        )
        trainer.train()
        assert json.loads((trainer.stage_folders[0] / "metrics.json").read_text())["best_step"] == 3
        assert same(weights_of(trainer.model), script.weights[0][2])

    @pytest.mark.parametrize("limit", [None, 2])
    def test_save_total_limit(self, build: Build, limit: int | None) -> None:
        more = {"save_strategy": "epoch", "num_train_epochs": 4, "save_total_limit": limit}
        trainer = build([{"rules": [HEAD]}, {"rules": [LORA]}], arguments=more)
        trainer.train()
        for folder in trainer.stage_folders:
            kept = sorted(file.name for file in folder.glob("checkpoint-*"))
            assert kept == ([] if limit is None else ["checkpoint-6", "checkpoint-8"])
            assert (folder / "delta.safetensors").is_file()

    def test_a_checkpoint_holds_what_changed_and_no_pickled_arguments(self, build: Build) -> None:
        more = {"save_strategy": "epoch", "save_total_limit": 1}
        trainer = build([{"rules": [LORA]}], arguments=more)
        trainer.train()
        (kept,) = trainer.stage_folders[0].glob("checkpoint-*")
        assert {file.name for file in kept.iterdir()} == tiny.CHECKPOINT_FILES
        assert not list(Path(trainer.args.output_dir).rglob("training_args.bin"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(kept / name, weights_only=True)


class TestSeeds:
    """Dropout on."""

    def test_same_seed_same_weights(self, build: Build) -> None:
        found = []
        for seed in (3, 3, 4):
            trainer = build(TWO_STAGES, arguments={"seed": seed})
            assert trainer.model.config.hidden_dropout_prob > 0
            trainer.train()
            found.append(weights_of(trainer.model))
        assert same(found[0], found[1])
        assert not same(found[0], found[2])


class TestResume:
    """Bit for bit, dropout on."""

    def interrupted(self, build: Build, stage: str, step: int) -> None:
        def stop(args: Any, state: Any, **_: Any) -> None:
            if args.output_dir.endswith(stage) and state.global_step == step:
                raise KeyboardInterrupt

        trainer = build(TO_RESUME, arguments=SAVING, callbacks=[Watcher(on_step_end=stop)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    @pytest.fixture
    def uninterrupted(self, build: Build) -> dict[str, torch.Tensor]:
        trainer = build(TO_RESUME, arguments=SAVING)
        trainer.train()
        shutil.rmtree(trainer.args.output_dir)
        return weights_of(trainer.model)

    @pytest.mark.parametrize(("stage", "step"), [("1-one", 2), ("1-one", 4), ("2-two", 1), ("2-two", 4)])
    def test_going_on(
        self, build: Build, uninterrupted: dict[str, torch.Tensor], stage: str, step: int, tmp_path: Path
    ) -> None:
        """Also at a stage's very first step, which has no checkpoint yet."""
        self.interrupted(build, stage, step)
        trainer = build(TO_RESUME, arguments=SAVING)
        trainer.train(resume_from_checkpoint=True)
        assert same(weights_of(trainer.model), uninterrupted)
        for folder in trainer.stage_folders:
            assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4]

    def test_from_a_checkpoint_by_name(self, build: Build, uninterrupted: dict[str, torch.Tensor]) -> None:
        self.interrupted(build, "2-two", 4)
        trainer = build(TO_RESUME, arguments=SAVING)
        trainer.train(str(trainer.stage_folders[1] / "checkpoint-2"))
        assert same(weights_of(trainer.model), uninterrupted)

    def test_nothing_to_go_on_with(self, build: Build, tmp_path: Path) -> None:
        trainer = build(TO_RESUME, arguments=SAVING)
        with pytest.raises(RunError, match="has no checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(RunError, match="no checkpoint of this strategy"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_all_done_already(self, build: Build) -> None:
        done = build(TO_RESUME, arguments=SAVING)
        done.train()
        again = build(TO_RESUME, arguments=SAVING)
        assert again.train(resume_from_checkpoint=True).global_step == 0
        assert same(weights_of(again.model), weights_of(done.model))

    def test_a_damaged_stage_is_noticed(self, build: Build) -> None:
        self.interrupted(build, "2-two", 2)
        trainer = build(TO_RESUME, arguments=SAVING)
        (trainer.stage_folders[0] / "delta.safetensors").write_bytes(b"x")
        with pytest.raises(RunError, match="truncated or altered"):
            trainer.train(resume_from_checkpoint=True)


class TestSaving:
    """save_model, whatever the model was loaded from."""

    @pytest.mark.parametrize("lacks", ["nothing", "head", "head and pooler"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_round_trip(self, build: Build, tmp_path: Path, lacks: str, dtype: torch.dtype) -> None:
        """A head that the checkpoint had is part of the base; what it had not is new, trained, and saved."""
        model = tiny.classifier("bert").to(dtype)
        if lacks == "head and pooler":
            model.bert.pooler = None
        (model if lacks == "nothing" else model.bert).save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
        trainer = build([{"rules": [LORA]}], model=load(tmp_path / "base"))
        assert trainer.strategy is not None
        assert [rule.part for rule in trainer.strategy.stages[0].rules] == (
            ["layers"] if lacks == "nothing" else ["new", "layers"]
        )
        trainer.train()
        trainer.save_model()
        folder = tmp_path / "out"
        assert {"delta.safetensors", "manifest.json", "config.json", "tokenizer.json", "stages"} <= {
            file.name for file in folder.iterdir()
        }
        loaded, assembly, manifest = checkpoint.load(folder)
        assert torch.equal(logits_of(loaded.model.to(dtype)), logits_of(trainer.model))
        names = {name for name in assembly.delta if "lora" not in name}
        assert (
            names
            == {
                "nothing": set(),
                "head": {"classifier.weight", "classifier.bias"},
                "head and pooler": HEAD_NAMES,
            }[lacks]
        )
        assert manifest["base"]["name"] == str(tmp_path / "base")

    def test_the_models_own_save_pretrained(self, build: Build, tmp_path: Path) -> None:
        """What transformers would write, `base_layer` in every name, would be loaded as random weights."""
        trainer = build([{"rules": [LORA]}])
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "final")
        loaded = checkpoint.load(tmp_path / "final")[0].model
        assert torch.equal(logits_of(loaded), logits_of(trainer.model))

    def test_another_base_is_refused(self, build: Build, bodies: Path, tmp_path: Path) -> None:
        shutil.copytree(bodies, tmp_path / "base")
        trainer = build([{"rules": [LORA]}], model=load(tmp_path / "base"))
        trainer.train()
        tiny.classifier("bert", seed=1).bert.save_pretrained(tmp_path / "base")
        with pytest.raises(ModelError, match="was trained on other weights"):
            checkpoint.load(trainer.stage_folders[0])


class TestTrackers:
    """report_to and push_to_hub."""

    @pytest.mark.parametrize("named", [False, True], ids=["default folder", "TENSORBOARD_LOGGING_DIR"])
    def test_tensorboard(self, build: Build, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each stage has a curve of its own."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if named:
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        trainer = build(TWO_STAGES, arguments={"report_to": "tensorboard"})
        trainer.train()
        for folder in trainer.stage_folders:
            files = list((tmp_path / "events" / folder.name if named else folder).rglob("events.out.tfevents.*"))
            assert len(files) == 1
            events = EventAccumulator(str(files[0])).Reload()
            shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
            logged = [(line["step"], line["loss"]) for line in log_of(folder)]
            assert [step for step, _ in shown] == [step for step, _ in logged]
            assert [loss for _, loss in shown] == pytest.approx([loss for _, loss in logged])

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """Stands in for the hub: keeps a copy of what would be uploaded. Nothing can leave the machine."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("something wanted to leave the machine")

        def create_repo(name: str, token: str | None = None, private: bool | None = None, **_: Any) -> SimpleNamespace:
            hub.repositories.append((name, token, private))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(
            *, repo_id: str, folder_path: str, ignore_patterns: Any = (), run_as_future: bool = False, **more: Any
        ) -> Any:
            files = [str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()]
            kept = [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in ignore_patterns)]
            target = tmp_path / "hub" / str(len(hub.uploads))
            for file in kept:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder_path) / file, target / file)
            hub.uploads.append((repo_id, more["commit_message"], target))
            done: Future[str] = Future()
            done.set_result("url")
            return done if run_as_future else "url"

        hub = SimpleNamespace(repositories=[], uploads=[])
        monkeypatch.setattr(socket.socket, "connect", refuse)
        api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
        return hub

    def test_push_to_hub(self, build: Build, hub: SimpleNamespace) -> None:
        more = {"push_to_hub": True, "hub_token": "secret", "hub_private_repo": True, "save_strategy": "epoch"}
        trainer = build(TWO_STAGES, arguments=more | {"save_total_limit": 3})
        trainer.train()
        assert hub.repositories == [("out", "secret", True)]
        assert [message for _, message, _ in hub.uploads] == [
            "Training in progress, step 2",
            "Training in progress, step 2",
            "Training in progress, step 4",
        ]
        assert trainer.push_to_hub() == "url"
        repository, message, target = hub.uploads[-1]
        assert (repository, message) == ("me/out", "End of training")
        expected = {"delta.safetensors", "manifest.json", "config.json", "README.md"}
        expected |= {"tokenizer.json", "tokenizer_config.json"}
        for _, _, uploaded in hub.uploads:
            assert {str(file.relative_to(uploaded)) for file in uploaded.rglob("*")} == expected
            assert "secret" not in "".join(file.read_text("utf-8", "ignore") for file in uploaded.iterdir())
        assert "hybridtune" in (target / "README.md").read_text()
        assert torch.equal(logits_of(checkpoint.load(target)[0].model), logits_of(trainer.model))

    def test_push_at_the_end_only(self, build: Build, hub: SimpleNamespace) -> None:
        more = {"push_to_hub": True, "hub_strategy": "end", "hub_model_id": "mine", "save_strategy": "epoch"}
        trainer = build([{"rules": [HEAD]}], arguments=more)
        trainer.train()
        assert hub.uploads == []
        trainer.save_model()
        assert [(repository, message) for repository, message, _ in hub.uploads] == [("me/mine", "Model save")]

    def test_push_without_a_strategy(self, build: Build, hub: SimpleNamespace) -> None:
        trainer = build(arguments={"push_to_hub": True, "hub_strategy": "end"})
        trainer.train()
        trainer.push_to_hub()
        assert (hub.uploads[0][2] / "model.safetensors").is_file()


class TestOffline:
    """HF_HUB_OFFLINE=1, and a hub name that is not in the cache."""

    def test_model_error_at_once(self) -> None:
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        started = time.perf_counter()
        with pytest.raises(
            ModelError, match="nobody/nothing-of-that-name: no such folder, and the hub did not give it"
        ):
            models.load("nobody/nothing-of-that-name", "AutoModelForSequenceClassification")
        assert time.perf_counter() - started < 5

    def test_command_line(self, tmp_path: Path) -> None:
        """Two sentences and exit code 2, no traceback."""
        lines = "".join(f"it is {word} {number},{word}\n" for number in range(10) for word in ("good", "bad"))
        for name in ("train", "validation", "test"):
            (tmp_path / f"{name}.csv").write_text("text,label\n" + lines.replace("it is", f"{name} is"))
        recipe = {
            "model": "nobody/nothing-of-that-name",
            "task": "classification",
            "data": {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        started = time.perf_counter()
        said = CliRunner().invoke(app, ["tune", str(tmp_path / "recipe.yaml")])
        assert said.exit_code == 2, said.output
        assert isinstance(said.exception, SystemExit), "a traceback"
        assert "the hub did not give it" in said.output
        assert "Traceback" not in said.output
        assert time.perf_counter() - started < 20


def resolved(setting: trial.Setting, name: str) -> Strategy:
    """A built-in strategy with every value, as a race gets it."""
    start = setting.load().assembly
    return resolve(load_strategy(name), Training(num_train_epochs=2), start, models.width(start.model))[0]


class TestTrial:
    """trial.run: one strategy with one seed."""

    @pytest.fixture
    def setting(self, tmp_path: Path) -> trial.Setting:
        """Over a checkpoint without head and pooler: both are new, and both must come back."""
        body = tiny.classifier("bert").bert
        body.pooler = None
        body.save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
        task, names = Task(["a", "b"]), ("train", "validation")
        recipe = Recipe.make(
            model=str(tmp_path / "base"),
            task="classification",
            data={name: f"{name}.csv" for name in names},
            num_train_epochs=2,
            device="cpu",
        )
        rows = {name: tiny.rows(24, seed=seed) for seed, name in enumerate(names)}
        encoded = {
            name: Dataset.from_list([row | {"length": len(row["input_ids"]), "unknown": 0} for row in table])
            for name, table in rows.items()
        }
        fp32 = Choice(False, True, "")
        return trial.Setting(
            recipe, task, "accuracy", encoded["train"], encoded["validation"], encoded["validation"], 64, (), fp32
        )

    def test_what_it_found_is_what_its_checkpoint_gives(self, setting: trial.Setting, tmp_path: Path) -> None:
        found = trial.run(setting, resolved(setting, "lora"), 3, tmp_path / "trial")
        assert found.seed == 3
        assert 0 < found.trainable < found.total
        assert found.seconds > 0
        assert set(setting.task.metrics) | {"loss"} <= set(found.validation)
        (stage,) = found.stages
        model = checkpoint.load(stage)[0].model
        batch = hf.DataCollatorWithPadding(tiny.tokenizer())(tiny.rows(24, seed=1))
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"]).item()
        assert loss == pytest.approx(found.validation["loss"], abs=1e-5)
        assert not list(stage.glob("checkpoint-*"))

    def test_a_finished_one_is_not_run_again(
        self, setting: trial.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = trial.run(setting, resolved(setting, "head"), 0, tmp_path / "trial")
        monkeypatch.setattr(trial, "HybridTrainer", None)
        assert trial.run(setting, resolved(setting, "head"), 0, tmp_path / "trial") == found

    def test_what_an_interrupted_one_left_is_removed(self, setting: trial.Setting, tmp_path: Path) -> None:
        stray = tmp_path / "trial" / "stages" / "1-head" / "checkpoint-9"
        stray.mkdir(parents=True)
        trial.run(setting, resolved(setting, "head"), 0, tmp_path / "trial")
        assert not stray.exists()

    def test_the_same_twice(self, setting: trial.Setting, tmp_path: Path) -> None:
        one, two = (trial.run(setting, resolved(setting, "lora"), 0, tmp_path / name) for name in "ab")
        assert one.validation == two.validation


class TestRace:
    """A candidate that cannot be trained does not take the others with it."""

    @staticmethod
    def race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scores: dict[str, float | None]) -> select.Decision:
        def run(setting: Any, strategy: Strategy, seed: int, folder: Path, fold: int | None) -> Trial:
            score = scores[strategy.name]
            if score is None:
                raise TrainingError("the loss is not a number")
            return Trial(strategy.name, seed, str(folder), {"accuracy": score}, 1.0, None, 10, 100)

        monkeypatch.setattr(trial, "run", run)
        setting: Any = SimpleNamespace(metric="accuracy", direction="maximize", folds=())
        return select.race(setting, [load_strategy(name) for name in scores], [0], tmp_path)

    def test_it_drops_out(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        decision = self.race(monkeypatch, tmp_path, {"full": None, "lora": 0.8, "head": 0.7})
        assert decision.chosen.strategy == "lora"
        assert [candidate.strategy for candidate in decision.candidates] == ["lora", "head"]
        assert decision.reasons[-1] == "full is out: the loss is not a number"

    def test_nobody_is_left(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with pytest.raises(TrainingError):
            self.race(monkeypatch, tmp_path, {"full": None, "lora": None})

    def test_a_mistake_of_the_users_ends_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def run(*args: Any) -> Trial:
            raise MethodError("cannot sit there")

        monkeypatch.setattr(trial, "run", run)
        setting: Any = SimpleNamespace(metric="accuracy", direction="maximize", folds=())
        with pytest.raises(MethodError):
            select.race(setting, [load_strategy("lora")], [0], tmp_path)
