"""bf16: measured, chosen, said and recorded; and frozen weights that are cast once and never changed."""

from __future__ import annotations

import copy
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import tiny
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hybridtune
from hybridtune import checkpoint, environment
from hybridtune.console import Console
from hybridtune.engine import Caches, precision
from hybridtune.engine.casts import Casts, _Joined
from hybridtune.engine.precision import FASTER, FEW, LONGEST, REPEATS, ROWS, Choice, Probe, choose, compare
from hybridtune.errors import RecipeError
from hybridtune.recipe import Recipe, Stage, Strategy
from hybridtune.run import evaluate_run
from hybridtune.train import HybridTrainer

CPU = torch.device("cpu")
LORA = [{"part": "layers", "method": "lora", "r": 2}, {"part": "head", "method": "full"}]
FULL = [{"part": "all", "method": "full"}]


def recipe(**keys: Any) -> Recipe:
    return Recipe.make(model="m", task="classification", train="a.csv", **keys)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's measurements are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hybridtune" / "precision.json"


@pytest.fixture
def measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[torch.device]]:
    """Says what the machine measures; gives the devices that were."""

    def fake(speedup: float) -> list[torch.device]:
        asked: list[torch.device] = []
        monkeypatch.setattr(precision, "measure", lambda device: asked.append(device) or speedup)
        return asked

    return fake


# The measurement


class TestMeasuring:
    """How many times as fast, and in how long a time."""

    @staticmethod
    def clocked(single: float, half: float, late: float = 0.0) -> tuple[list[tuple[int, bool, float]], Any]:
        """Seconds a row in fp32 and in bf16; every other product takes longer, and the first two much longer."""
        calls: list[tuple[int, bool, float]] = []

        def seconds(rows: int, bf16: bool) -> float:
            noise = 5 * late if len(calls) < 2 else late * (len(calls) % 2)
            took = rows * (half if bf16 else single) + noise
            calls.append((rows, bf16, took))
            return took

        return calls, seconds

    @pytest.mark.parametrize("late", [0.0, 0.01, 0.08])
    @pytest.mark.parametrize(("single", "half"), [(2e-5, 1e-5), (1e-5, 2e-5), (1e-4, 1e-5)])
    def test_the_best_of_several(self, single: float, half: float, late: float) -> None:
        calls, seconds = self.clocked(single, half, late)
        assert compare(seconds) == pytest.approx(single / half)
        assert calls[-1][:2] == (ROWS, False)
        assert max(sum(call[:2] == (ROWS, bf16) for call in calls) for bf16 in (False, True)) <= REPEATS

    @pytest.mark.parametrize("half", [1e-4, 1e-3, 1e-2])
    def test_a_slow_machine_is_not_waited_for(self, half: float) -> None:
        calls, seconds = self.clocked(3e-4, half)
        assert compare(seconds) == pytest.approx(3e-4 / half)
        assert ((ROWS, True) in [call[:2] for call in calls]) is (half * ROWS <= LONGEST)
        assert max(took for rows, bf16, took in calls if bf16) <= max(LONGEST, half * FEW)
        assert sum(took for _, _, took in calls) < 1.5

    def test_what_a_product_takes_whatever_its_rows(self) -> None:
        """A cast of the weight, say, or a busy machine: 12 ms beside rows that take 0.04 ms each in fp32."""
        assert compare(lambda rows, bf16: 0.012 + rows * 1e-5 if bf16 else rows * 4e-5) > 1

    def test_for_real(self) -> None:
        state, begin = torch.get_rng_state(), time.perf_counter()
        with torch.no_grad():
            found = precision.measure(CPU)
        assert time.perf_counter() - begin < 30  # seconds; a hundredth of it on a machine of its own
        assert 0 < found < 1000
        assert torch.equal(torch.get_rng_state(), state), "a training after it has the same random numbers"
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("speedup", "faster"), [(0.03, False), (1.29, False), (FASTER, True), (8.0, True)])
def test_what_counts_as_faster(speedup: float, faster: bool) -> None:
    assert Probe(speedup).faster is faster


class TestCache:
    """Once a machine."""

    def test_measured_once(self, cache: Path, measured: Any) -> None:
        asked = measured(2.31)
        assert precision.probe(CPU) == precision.probe(CPU) == Probe(2.31)
        assert asked == [CPU]
        ((key, value),) = json.loads(cache.read_text("utf-8")).items()
        assert value == 2.31
        described = environment.describe(CPU)
        assert key == " | ".join(str(described[name]) for name in ("torch", "device", "processor", "threads"))

    def test_another_machine_in_the_same_home(self, cache: Path, measured: Any, monkeypatch: Any) -> None:
        measured(2.0)
        precision.probe(CPU)
        for name, value in (("processor", "another"), ("threads", 77), ("torch", "9.9"), ("device", "a GPU")):
            there = precision.machine(CPU) | {name: value}
            with monkeypatch.context() as patch:
                patch.setattr(precision, "machine", lambda device, there=there: there)
                asked = measured(1.1)
                assert precision.probe(CPU).speedup == 1.1
                assert len(asked) == 1
        measured(9.0)
        assert precision.probe(CPU).speedup == 2.0, "what was known before is still there"

    @pytest.mark.parametrize(
        "broken", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"7", b"null", b'{"KEY": "fast"}', b'{"KEY": -1}', b'{"KEY": 0}']
    )
    def test_a_broken_file_is_measured_anew(self, cache: Path, measured: Any, broken: bytes) -> None:
        key = " | ".join(map(str, precision.machine(CPU).values()))
        cache.parent.mkdir(parents=True)
        cache.write_bytes(broken.replace(b"KEY", key.encode()))
        asked = measured(1.5)
        assert precision.probe(CPU) == precision.probe(CPU) == Probe(1.5)
        assert len(asked) == 1

    def test_where_nothing_can_be_kept(self, tmp_path: Path, measured: Any, monkeypatch: Any) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        asked = measured(1.5)
        assert precision.probe(CPU) == precision.probe(CPU) == Probe(1.5)
        assert len(asked) == 2

    def test_in_the_home_folder(self, tmp_path: Path, measured: Any, monkeypatch: Any) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        measured(1.5)
        precision.probe(CPU)
        assert (tmp_path / ".cache" / "hybridtune" / "precision.json").is_file()


# The choice


@pytest.mark.parametrize(
    ("keys", "begun", "bf16", "default", "reason"),
    [
        ({}, None, True, True, "4.00x as fast as fp32 here"),
        ({"bf16": True}, None, True, False, "as asked for"),
        ({"bf16": False}, None, False, False, "as asked for"),
        ({"bf16": True, "engine": "off"}, None, True, False, "as asked for"),
        ({"engine": "off"}, None, False, True, "engine: off"),
        ({}, False, False, True, "as the run was begun"),
        ({}, True, True, True, "as the run was begun"),
    ],
)
def test_the_choice(measured: Any, keys: Any, begun: bool | None, bf16: bool, default: bool, reason: str) -> None:
    asked = measured(4.0)
    assert choose(recipe(**keys), CPU, begun) == Choice(bf16, default, reason)
    assert len(asked) == ("here" in reason), "nothing is measured that does not count"


def test_fp16_is_for_a_gpu(measured: Any, tmp_path: Path) -> None:
    asked = measured(4.0)
    assert choose(recipe(fp16=True), torch.device("cuda")) == Choice(False, True, "fp16 is asked for")
    with pytest.raises(RecipeError, match="fp16: true, but a CPU is not trained in it"):
        choose(recipe(fp16=True), CPU)
    assert not asked
    arguments = hf.TrainingArguments(str(tmp_path), fp16=True, use_cpu=True, report_to="none")
    strategy = {"stages": [{"rules": [{"part": "head", "method": "full"}]}]}
    model = tiny.classifier("bert")
    with pytest.raises(RecipeError, match="fp16: true, but a CPU"):
        HybridTrainer(model, arguments, train_dataset=tiny.rows(8), strategy=strategy).train()


def test_where_it_is_slower(measured: Any) -> None:
    measured(0.21)
    assert str(choose(recipe(), CPU)) == "off, default: 0.21x as fast as fp32 here"


def test_a_device_without_it(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(4.0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    old = torch.device("cuda")
    assert choose(recipe(), old) == Choice(False, True, "this device has none")
    assert precision.say(old) == "not on this device"
    for keys, begun in (({"bf16": True}, None), ({}, True)):
        with pytest.raises(RecipeError, match="bf16 is asked for, but this device cannot") as caught:
            choose(recipe(**keys), old, begun)
        assert caught.value.found == "Old GPU"
    assert not asked


def test_a_gpu_that_has_it_is_measured(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(5.0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "New GPU")
    assert choose(recipe(), torch.device("cuda")).bf16
    assert asked == [torch.device("cuda")]


# Never silently


@pytest.fixture
def tune(base: Path, tmp_path: Path) -> Callable[..., tuple[hybridtune.Run, str]]:
    """Tunes a tiny model; gives the run and what was printed."""

    def run(name: str = "run", **keys: Any) -> tuple[hybridtune.Run, str]:
        stream = io.StringIO()
        fixed = {"model": str(base), "task": "classification", "device": "cpu", "num_train_epochs": 1}
        rows = {"train": texts.labelled(24), "validation": texts.labelled(8, 1), "test": texts.labelled(8, 2)}
        given = {"strategy": "lora", "baselines": False, "output": str(tmp_path / name)}
        return hybridtune.tune(**fixed | rows | given | keys, console=Console(stream=stream)), stream.getvalue()

    return run


@pytest.mark.parametrize(
    ("keys", "speedup", "bf16", "said"),
    [
        ({}, 3.0, True, "on, default: 3.00x as fast as fp32 here"),
        ({}, 0.2, False, "off, default: 0.20x as fast as fp32 here"),
        ({"bf16": True}, 0.2, True, "on, as asked for"),
    ],
)
def test_it_is_said_and_recorded(tune: Any, measured: Any, keys: Any, speedup: float, bf16: bool, said: str) -> None:
    measured(speedup)
    seen: set[bool] = set()

    class Look(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, *more: Any, optimizer: Any, **kwargs: Any) -> None:
            seen.add(args.bf16)
            held = [tensor for state in optimizer.state.values() for tensor in state.values()]
            assert {tensor.dtype for tensor in held if tensor.dim()} == {torch.float32}

    run, printed = tune(**keys, callbacks=[Look()])
    assert seen == {bf16}
    assert f"  bf16 {said}\n" in printed.partition("3/5 strategy")[2].partition("4/5")[0]
    resolved = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert resolved["bf16"] is bf16
    assert ("bf16" in resolved["defaults"]) is (not keys)
    assert json.loads((run.folder / "environment.json").read_text())["bf16"] == said
    assert {tensor.dtype for tensor in load_file(run.folder / "stages" / "1-lora" / "delta.safetensors").values()} == {
        torch.float32
    }


def test_a_resumed_run_keeps_to_what_it_was_begun_in(tune: Any, cache: Path, measured: Any) -> None:
    measured(3.0)
    tune()
    cache.unlink()
    asked = measured(0.5)
    run, printed = tune(resume=True)
    assert "  bf16 on, default: as the run was begun\n" in printed
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["bf16"] is True
    assert not asked


def test_a_mistake_is_one_error(tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    with pytest.raises(RecipeError, match="bf16 is asked for, but this device cannot compute in it"):
        tune(bf16=True)
    assert not (tmp_path / "run").exists()


def test_predictions_in_bf16_are_those_of_autocast(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed as well; what is asked for is refused where it cannot be had, and fp32 stays the default."""
    run, _ = tune(bf16=False)
    texts = ["the parcel was lost", "a refund", "where is it, and when does it come?", "thanks"]
    half, whole = (hybridtune.load(run.folder, bf16=bf16) for bf16 in (True, False))
    items = half.predictor.encode(half.predictor.task.rows_from(texts))
    found, single = np.stack(half.predictor.logits(items)), np.stack(whole.predictor.logits(items))
    collate = hf.DataCollatorWithPadding(run.tokenizer)
    batch = collate([{key: row[key] for key in ("input_ids", "attention_mask")} for row in items.to_list()])
    with torch.inference_mode():
        plain = run.model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            expected = run.model(**batch).logits.float()
    scale = float(plain.abs().max())
    torch.testing.assert_close(torch.tensor(single), plain, rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=0.02 * scale)
    assert not np.allclose(found, single, rtol=1e-5, atol=0), "bf16 rounds"
    matrix = run.model.get_submodule("bert.encoder.layer.0.intermediate.dense").weight
    half.predictor.batch_size = 1
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which nothing can be counted
    with Count(tuple(matrix.shape)) as counted:
        half.predictor.logits(items)
    assert counted.casts == len(run.model.bert.encoder.layer), "once for all batches"
    with pytest.raises(RecipeError, match="bf16 without rows"):
        evaluate_run(run.folder, None, bf16=True)
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    with pytest.raises(RecipeError, match="this device cannot compute in it"):
        hybridtune.load(run.folder, bf16=True)


def test_doctor(cache: Path, measured: Any) -> None:
    for speedup, said in (
        (2.3, "2.30x as fast as fp32 here: used by default"),
        (0.2, "0.20x as fast as fp32 here: not used"),
    ):
        measured(speedup)
        cache.unlink(missing_ok=True)
        stream = io.StringIO()
        assert environment.examine(Console(stream=stream))["bf16"] == said
        assert f"  bf16             {said}\n" in stream.getvalue()


# Frozen weights


class Count(TorchDispatchMode):
    """Counts casts of tensors of a shape to bf16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.casts = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape:
            self.casts += (kwargs or {}).get("dtype") is torch.bfloat16
        return func(*args, **(kwargs or {}))


class TestCasts:
    """On a layer of its own."""

    @staticmethod
    def layer() -> tuple[nn.Linear, torch.Tensor]:
        torch.manual_seed(0)
        return nn.Linear(7, 5).requires_grad_(False), torch.randn(3, 7, requires_grad=True)

    @staticmethod
    def under_autocast(
        layer: nn.Module, inputs: torch.Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype):
            outputs = layer(inputs)
        return [outputs, *torch.autograd.grad(outputs.float().square().sum(), inputs)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_same_as_autocast_to_the_last_bit(self, dtype: torch.dtype) -> None:
        layer, inputs = self.layer()
        plain = self.under_autocast(layer, inputs, dtype)
        casts = Casts(layer)
        for _ in range(2):
            with casts.open():
                found = self.under_autocast(layer, inputs, dtype)
            assert all(map(torch.equal, found, plain))
            assert found[0].dtype == dtype

    def test_once(self) -> None:
        layer, inputs = self.layer()
        with Count((5, 7)) as plain:
            for _ in range(4):
                self.under_autocast(layer, inputs)
        casts = Casts(layer)
        with Count((5, 7)) as counted:
            for _ in range(4):
                with casts.open():
                    self.under_autocast(layer, inputs)
        assert (plain.casts, counted.casts) == (4, 1)

    @pytest.mark.parametrize(("still", "casts"), [(True, 1), (False, 4)], ids=["predicting", "training"])
    def test_what_could_be_trained_only_where_nothing_is(self, still: bool, casts: int) -> None:
        layer, inputs = self.layer()
        layer.requires_grad_(True).eval()
        copies = Casts(layer, still)
        with Count((5, 7)) as counted:
            for _ in range(4):
                with copies.open(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    layer(inputs)
        assert counted.casts == casts

    def test_an_optimizer_that_hides_its_writes(self) -> None:
        """Evaluations between updates see what was written to `.data`, which counts no versions."""
        layer, inputs = self.layer()
        layer.requires_grad_(True).eval()
        copies = Casts(layer)
        seen = []
        for _ in range(2):
            with copies.open(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                seen.append(layer(inputs))
            layer.weight.data.mul_(2)
        before, after = seen
        torch.testing.assert_close(after - layer.bias, 2 * (before - layer.bias), rtol=0.02, atol=0.02)

    def test_given_up_where_memory_is_short(self) -> None:
        layer, inputs = self.layer()
        copies = Casts(layer)
        assert not copies.give_up(), "there were none"
        copies = Casts(layer)
        with Count((5, 7)) as counted:
            for number in range(4):
                with copies.open(), torch.autocast("cpu", torch.bfloat16):
                    layer(inputs)
                if number == 1:
                    assert copies.give_up()
        assert counted.casts == 3, "once, and then in every forward"

    def test_the_layer_is_as_it_was(self) -> None:
        layer, inputs = self.layer()
        before, weight = set(vars(layer)), layer.weight
        with Casts(layer).open():
            self.under_autocast(layer, inputs)
            assert layer.weight is weight
            assert weight.dtype == torch.float32
            copied = copy.deepcopy(layer.state_dict())
        assert set(vars(layer)) == before
        assert torch.equal(copied["weight"], weight)

    def test_without_autocast_nothing_is_cast(self) -> None:
        layer, inputs = self.layer()
        expected, casts = layer(inputs), Casts(layer)
        with casts.open(), Count((5, 7)) as counted:
            assert torch.equal(layer(inputs), expected)
        assert counted.casts == 0

    def test_in_double_precision_nothing_is_cast(self) -> None:
        layer, inputs = self.layer()
        layer.double()
        inputs = inputs.detach().double().requires_grad_(True)
        plain = self.under_autocast(layer, inputs)
        with Casts(layer).open():
            assert all(map(torch.equal, self.under_autocast(layer, inputs), plain))

    def test_a_weight_that_is_loaded_anew(self) -> None:
        layer, inputs = self.layer()
        casts = Casts(layer)
        with casts.open():
            self.under_autocast(layer, inputs)
            layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()})
            found = self.under_autocast(layer, inputs)
        assert all(map(torch.equal, found, self.under_autocast(layer, inputs)))
        layer.weight.data = layer.weight.data * 2
        with casts.open():
            found = self.under_autocast(layer, inputs)
        assert all(map(torch.equal, found, self.under_autocast(layer, inputs)))

    def test_a_weight_that_is_trained_for_a_while(self) -> None:
        layer, inputs = self.layer()
        casts = Casts(layer)
        with casts.open():
            self.under_autocast(layer, inputs)
            layer.weight.requires_grad_(True)
            plain = self.under_autocast(layer, inputs)
            with torch.autocast("cpu", torch.bfloat16):
                layer(inputs).float().sum().backward()
            assert layer.weight.grad is not None
            assert layer.weight.grad.dtype == torch.float32
            layer.weight.data.add_(1.0)  # as some optimizers do: autograd does not notice
            layer.weight.requires_grad_(False)
            found = self.under_autocast(layer, inputs)
        assert not torch.equal(found[0], plain[0])
        assert all(map(torch.equal, found, self.under_autocast(layer, inputs)))

    def test_a_layer_with_a_forward_of_its_own_is_left_alone(self) -> None:
        layer, inputs = self.layer()
        layer.forward = lambda inputs: inputs * 2  # type: ignore[method-assign]
        with Casts(layer).open():
            assert torch.equal(layer(inputs), inputs * 2)
        assert torch.equal(layer(inputs), inputs * 2)


class TestCastsTogether:
    """As on a GPU: trained weights many in a call, and what several layers are given once."""

    @staticmethod
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias=False), nn.Linear(5, 3))

    @staticmethod
    def gradients(model: nn.Module, rows: Any) -> list[torch.Tensor]:
        """Added up over rows that are computed one after the other."""
        model.zero_grad()
        for row in rows:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(row)
            output.float().square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    @pytest.mark.parametrize("frozen", [(), ("0.weight",), ("0.bias", "2.weight", "3.weight", "3.bias")])
    def test_the_same_as_autocast_to_the_last_bit(self, frozen: tuple[str, ...]) -> None:
        model, rows = self.model(), torch.randn(3, 4, 6)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        expected = self.gradients(model, rows)
        casts = Casts(model, together=True)
        for _ in range(2):
            with casts.open(), Count((8, 6)) as counted:
                found = self.gradients(model, rows)
            assert len(found) == 5 - len(frozen)
            assert all(map(torch.equal, found, expected))
            assert {one.dtype for one in found} == {torch.float32}
            assert "0.weight" in frozen or not counted.casts, "but for those that are made together"

    def test_in_one_call_a_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, rows = self.model(), torch.randn(2, 4, 6)
        expected, apply = self.gradients(model, rows), _Joined.apply
        for limit, calls in ((10**6, 1), (95, 2), (1, 5)):  # 48, 8, 40, 15 and 3 numbers
            made: list[int] = []
            monkeypatch.setattr(_Joined, "apply", lambda *given, made=made: made.append(len(given)) or apply(*given))
            monkeypatch.setattr("hybridtune.engine.casts.GROUP", limit)
            casts = Casts(model, together=True)
            with casts.open():
                assert all(map(torch.equal, self.gradients(model, rows), expected))
                assert not casts._trained
                assert not casts._shared
            assert len(made) == 2 * calls, "two forwards"
            assert sum(made) == 2 * (calls + 5)

    def test_what_is_trained_but_not_used_gets_no_gradient(self) -> None:
        model, x = self.model(), torch.randn(4, 6)
        with Casts(model, together=True).open(), torch.autocast("cpu", torch.bfloat16):
            model[:1](x).float().sum().backward()
        assert [one.grad is not None for one in model.parameters()] == [True, True, False, False, False]

    @pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part by itself"])
    def test_weights_that_change_between_two_forwards(self, whole: bool) -> None:
        """As adversarial ones do, within one step: through `.data` too, but where a part is called by itself."""
        model, rows = self.model(), torch.randn(1, 4, 6)
        part = model if whole else model[0]

        def twice() -> list[torch.Tensor]:
            first, weight = self.gradients(part, rows), model[0].weight
            with torch.no_grad():
                (weight.data if whole else weight).mul_(2)
            second = self.gradients(part, rows)
            with torch.no_grad():
                weight.div_(2)
            return [*first, *second]

        expected = twice()
        with Casts(model, together=True).open():
            assert all(map(torch.equal, twice(), expected))

    def test_what_layers_share_is_cast_once(self) -> None:
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                inner = x + 1  # autocast itself keeps the casts of leaves
                return sum(part(inner) * number for number, part in enumerate(self.parts, 1))  # type: ignore[return-value]

        model, x = Branches(), torch.randn(7, 6, requires_grad=True)

        def run(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: torch.Tensor = model(x)
            return torch.autograd.grad(output.float().square().sum(), x)[0]

        with Count((7, 6)) as plain:
            expected = run(x)
        with Casts(model, together=True).open(), Count((7, 6)) as counted:
            found = run(x)
            assert (plain.casts, counted.casts) == (3, 1)
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    def test_what_is_shared_is_not_shared_with_what_differs(self) -> None:
        """One layer that is given one tensor: with gradients, without, after it was written to, in inference."""
        layer, x = nn.Linear(6, 4).requires_grad_(False), torch.randn(7, 6)
        with Casts(layer, together=True).open(), torch.autocast("cpu", torch.bfloat16):
            casts_of = layer.forward

            def seen(given: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = casts_of(given)  # without the hooks that end a forward
                torch.testing.assert_close(found, nn.functional.linear(given, layer.weight, layer.bias))
                return found

            seen(x)
            x.mul_(3)
            seen(x)
            x.requires_grad_()
            with torch.no_grad():
                seen(x)
            assert seen(x).requires_grad
            with torch.inference_mode():
                fixed = torch.randn(7, 6)
                seen(fixed)
                fixed.mul_(3)
                seen(fixed)

    def test_a_head_over_a_vocabulary_is_left_alone(self) -> None:
        """Its loss looks for what its graph leads to, and a module that shares its weight is no other weight."""
        model = tiny.language_model("llama")
        model.draft = nn.Linear(32, 100, bias=False)
        model.draft.weight = model.lm_head.weight
        casts = Casts(model, together=True)
        with casts.open():
            grouped = set(casts._groups)
        assert model.lm_head.weight not in grouped
        assert grouped == {
            one
            for name, module in model.named_modules()
            if type(module) is nn.Linear and name not in ("lm_head", "draft")
            for one in module.parameters()
        }

    def test_functions_of_torch_func(self) -> None:
        model, x = self.model(), torch.randn(4, 6)

        def loss(parameters: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: torch.Tensor = torch.func.functional_call(model, parameters, (x,))
            return output.float().square().sum()

        given = {name: one.detach() for name, one in model.named_parameters()}
        expected = torch.func.grad(loss)(given)
        with Casts(model, together=True).open():
            found = torch.func.grad(loss)(given)
        assert all(torch.equal(found[name], one) for name, one in expected.items())

    def test_gradients_of_gradients(self) -> None:
        model, x = self.model(), torch.randn(4, 6)

        def penalty() -> list[torch.Tensor]:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            weights = [model[0].weight, model[2].weight]
            sum(
                one.square().sum()
                for one in torch.autograd.grad(output.float().square().sum(), weights, create_graph=True)
            ).backward()
            return [one.grad for one in weights]  # type: ignore[misc]

        expected = penalty()
        with Casts(model, together=True).open():
            assert all(map(torch.equal, penalty(), expected))


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., HybridTrainer]:
    """Builds a trainer of a tiny model under bf16, three steps an epoch."""
    made = 0
    still = tiny.classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tiny.shake(still.parameters(), by=0.2)
    still.save_pretrained(tmp_path / "whole")
    tiny.tokenizer().save_pretrained(tmp_path / "whole")

    def make(*rules: Any, name: str = "bert", **more: Any) -> HybridTrainer:
        nonlocal made
        made += 1
        model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
        if name != "bert":
            model = tiny.classifier(name)
            tiny.shake(model.parameters(), by=0.2)
            model._hybridtune_new = ()
        keys = {key: more.pop(key) for key in ("caches", "engine") if key in more}
        stages = [stage if isinstance(stage, Stage) else Stage(rules=stage) for stage in rules]
        fixed = {
            "use_cpu": True,
            "bf16": True,
            "disable_tqdm": True,
            "report_to": "none",
            "logging_steps": 1,
            "seed": 1,
        }
        given = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "eval_strategy": "epoch"}
        trainer = HybridTrainer(
            model,
            hf.TrainingArguments(**{"output_dir": str(tmp_path / str(made))} | fixed | given | more),
            train_dataset=tiny.rows(24),
            eval_dataset=tiny.rows(10, seed=1),
            data_collator=hf.DataCollatorWithPadding(tiny.tokenizer()),
            strategy=Strategy(name="s", stages=stages),
            **keys,
        )
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    return make


def losses(trainer: HybridTrainer, **keys: Any) -> list[float]:
    trainer.train(**keys)
    return [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]


def weights(trainer: HybridTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adapter", "bias"])
def test_a_training_gives_what_plain_autocast_gives(
    build: Callable[..., HybridTrainer], monkeypatch: pytest.MonkeyPatch, method: str, name: str, engine: str
) -> None:
    """Losses and weights, to the last bit; frozen weights are those that were there before, in fp32."""
    options = {"lora": {"r": 2}, "dora": {"r": 2, "use_dora": True}}.get(method, {})
    rules = [{"part": "layers", "method": "lora" if method == "dora" else method, **options}, LORA[1]]
    trainer, plain = (build(rules, name=name, engine=engine) for _ in range(2))
    before = weights(trainer)
    found = losses(trainer)
    monkeypatch.setattr("hybridtune.update.Casts", lambda model, together: None)
    assert found == losses(plain)
    after, expected = weights(trainer), weights(plain)
    assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    frozen = [key for key, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) > 10
    for key in frozen:
        assert torch.equal(after[key], before[key.replace(".base_layer", "")]), key


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", ["full", "lora", "bias"])
def test_a_training_with_casts_together(
    build: Callable[..., HybridTrainer], monkeypatch: pytest.MonkeyPatch, method: str, name: str, more: dict[str, Any]
) -> None:
    """As on a GPU: to the last bit but for sums of gradients that layers share, and near with them."""
    rules = FULL if method == "full" else [{"part": "layers", "method": method}, LORA[1]]
    plain = losses(build(rules, name=name, **more))
    monkeypatch.setattr("hybridtune.update.Casts", lambda model, together: Casts(model, together=True))
    near = losses(build(rules, name=name, **more))
    assert near == pytest.approx(plain, rel=0.05)
    monkeypatch.setattr(Casts, "given", lambda self, inputs, dtype: inputs)
    assert losses(build(rules, name=name, **more)) == plain


def test_what_is_trained_is_in_fp32_and_casts_end_with_the_stage(build: Callable[..., HybridTrainer]) -> None:
    trainer, seen = build(LORA), []

    class Look(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
            seen.append(len(trainer._casts._copies))  # type: ignore[union-attr]
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
            held = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
            assert {tensor.dtype for tensor in held} == {torch.float32}

    trainer.add_callback(Look())
    trainer.train()
    frozen = [m for m in trainer.model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    assert set(seen) == {len(frozen)}
    assert trainer._casts is None


def test_every_stage_is_in_bf16(build: Callable[..., HybridTrainer]) -> None:
    trainer, seen = build(Stage(name="all", rules=FULL), Stage(name="lora", rules=LORA), Stage(rules=[LORA[1]])), []
    inner = trainer.model.bert.encoder.layer[0].intermediate
    inner.register_forward_hook(lambda module, inputs, output: seen.append((trainer._log.stage.name, output.dtype)))
    trainer.train()
    assert set(seen) == {(name, torch.bfloat16) for name in ("all", "lora", "full")}


def test_a_checkpoint_in_the_middle_of_a_stage(build: Callable[..., HybridTrainer], tmp_path: Path) -> None:
    """Of a stage whose frozen weights an earlier one has trained: the checkpoint holds them, in fp32."""
    stages = [Stage(name="all", rules=FULL), Stage(name="lora", rules=LORA)]
    trainer = build(*stages, save_strategy="epoch", save_total_limit=5)
    found = losses(trainer)
    (first, second) = trainer.stage_folders
    tuned = load_file(first / "delta.safetensors")
    middle = load_file(second / "checkpoint-3" / "delta.safetensors")
    same = [name for name in tuned if ".encoder." in name]
    assert "bert.encoder.layer.0.attention.self.query.weight" in same
    for name in same:
        assert middle[name].dtype == torch.float32
        assert torch.equal(middle[name], tuned[name]), name
    loaded = checkpoint.load(second / "checkpoint-3")[1]
    assert set(loaded.delta) == set(middle)
    for name, tensor in middle.items():
        assert torch.equal(loaded.parameter(name), tensor), name
    (second / "metrics.json").unlink()
    for later in second.glob("checkpoint-6"):
        later.rename(tmp_path / "aside")
    resumed = build(*stages, save_strategy="epoch", save_total_limit=5, output_dir=str(first.parents[1]))
    assert losses(resumed, resume_from_checkpoint=True) == found
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(trainer).items())


def test_a_merge_is_into_the_original(build: Callable[..., HybridTrainer]) -> None:
    stages = [Stage(name="lora", rules=LORA), Stage(name="head", rules=[LORA[1]], previous="merge")]
    trainer = build(*stages)
    before = weights(trainer)
    trainer.train()
    delta = load_file(trainer.stage_folders[0] / "delta.safetensors")
    after = weights(trainer)
    matrix = "bert.encoder.layer.0.attention.self.query"
    pair = [delta[f"{matrix}.lora_{side}.default.weight"] for side in "BA"]
    update = 2.0 * pair[0] @ pair[1]
    assert float(update.abs().max()) > 1e-4
    torch.testing.assert_close(after[f"{matrix}.weight"], before[f"{matrix}.weight"] + update, rtol=0, atol=1e-6)
    assert not torch.equal(after[f"{matrix}.weight"], after[f"{matrix}.weight"].bfloat16().float())


def test_layers_that_take_turns(build: Callable[..., HybridTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"part": "layers", "method": "full", "active": {"layers": 1, "every": 1, "order": "cycle"}}, LORA[1]]
    found = losses(build(rules))
    monkeypatch.setattr("hybridtune.update.Casts", lambda model, together: None)
    assert found == losses(build(rules))


def test_without_bf16_there_are_none(build: Callable[..., HybridTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtune.update.Casts", pytest.fail)
    build(LORA, bf16=False).train()


def test_alone_the_trainer_keeps_to_its_arguments(
    build: Callable[..., HybridTrainer], measured: Callable[[float], list[torch.device]]
) -> None:
    asked = measured(9.0)
    trainer = build(LORA, bf16=False)
    trainer.train()
    assert not trainer.accelerator.native_amp
    assert not asked


# The engine under bf16


def test_rows_run_without_padding(build: Callable[..., HybridTrainer]) -> None:
    """Logits in bf16 are compared as coarsely as they are rounded."""
    packed, padded = build(LORA), build(LORA, engine="off")
    assert losses(packed) == pytest.approx(losses(padded), abs=0.02)
    assert packed.engine is not None
    assert packed.engine.on


def test_what_frozen_layers_give_is_kept_apart(build: Callable[..., HybridTrainer]) -> None:
    caches, rules = Caches(), [{"part": "layers[-1]", "method": "full"}, LORA[1]]
    for bf16 in (True, False):
        trainer = build(rules, caches=caches, bf16=bf16)
        assert all(map(math.isfinite, losses(trainer)))
    assert len(caches._stores) == 2
