"""Deltas: what they hold, what damage they notice, and that what is handed over loads anywhere with the same logits."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from elsewhere import OURS, PLAIN, in_a_new_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hybridtune import checkpoint, export, predict
from hybridtune import model as models
from hybridtune.compose import Assembly
from hybridtune.errors import HybridtuneError, ModelError, RunError
from hybridtune.recipe import Rule, Stage, Strategy
from hybridtune.tasks.classification import Task

TASK = Task(["x", "y", "z"])
HEAD = tiny.rule("head", "full")
LORA = tiny.rule("layers", "lora", r=2)


@dataclass
class Tuned:
    """A finished stage: its folder, its model, and the model's logits; those with all that was added at zero too."""

    folder: Path
    assembly: Assembly
    logits: np.ndarray
    less: np.ndarray


def tune(home: Path, base: Path, *stages: list[Rule] | Stage) -> Tuned:
    """Puts stages on a model, as if each had been trained, and writes the last one's delta."""
    assembly, described = tiny.assembly(base, **TASK.model_config())
    TASK.prepare(assembly.model, models.load_tokenizer(str(base)))
    strategy = Strategy(name="s", stages=[one if isinstance(one, Stage) else Stage(rules=one) for one in stages])
    for stage in strategy.stages:
        composition = assembly.begin(stage)
        tiny.shake((assembly.parameter(name) for name in sorted(composition.names)), by=0.05)
    home.mkdir(parents=True, exist_ok=True)
    plan = strategy.model_dump(mode="json", exclude_none=True)
    checkpoint.write(
        home, assembly, described, task=TASK.state(), max_length=16, strategy=plan, stage=strategy.stages[-1].name
    )
    logits, added = tiny.logits(assembly.model).numpy(), {n: assembly.parameter(n).clone() for n in assembly.added}
    with torch.no_grad():
        for name in added:
            assembly.parameter(name).zero_()
        less = tiny.logits(assembly.model).numpy()
        for name, value in added.items():
            assembly.parameter(name).copy_(value)
    return Tuned(home, assembly, logits, less)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny pretrained model without a head, written once."""
    home = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        return home / name if (home / name).is_dir() else tiny.save_body(home / name, name)

    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / checkpoint.DELTA))


# --- what a delta holds


@pytest.mark.parametrize(
    ("stages", "changed", "added"),
    [
        ([[HEAD]], ["head"], ""),
        ([[tiny.rule("layers[1]", "full")]], ["layers[1]", "new"], ""),
        ([[LORA]], ["new"], ".lora_"),
        ([[tiny.rule("layers[1:]", "adapter", bottleneck=4), HEAD]], ["head"], ".adapter_"),
        ([[HEAD], [LORA]], ["head"], ".lora_"),
        ([[LORA], Stage(rules=[HEAD], previous="drop")], ["head"], ""),
        ([[tiny.rule("layers[1].mlp", "full")], [tiny.rule("layers", "freeze"), HEAD]], ["layers[1].mlp", "head"], ""),
    ],
    ids=["head", "layer", "lora", "adapter", "two stages", "dropped", "trained, then frozen"],
)
def test_a_delta_holds_only_what_changed(
    stages: list[list[Rule] | Stage], changed: list[str], added: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    tuned = tune(tmp_path, bases("bert"), *stages)
    own = {name for part in changed for name in tuned.assembly.anatomy.part(part).parameters}
    now = dict(tuned.assembly.model.named_parameters())
    there = tensors(tmp_path)
    assert set(there) == own | {name for name in now if added and added in name}
    assert (added == "") or any(added in name for name in there)
    assert all(torch.equal(tensor, tuned.assembly.parameter(name)) for name, tensor in there.items())
    manifest = json.loads((tmp_path / checkpoint.MANIFEST).read_text())
    assert manifest["changed"] == sorted(own)
    assert manifest["tensors"] == {name: ["float32", list(tensor.shape)] for name, tensor in there.items()}
    assert manifest["base"]["name"] == str(bases("bert"))
    assert [item["method"] for item in manifest["attachments"]] == ([added[1:-1]] if added else [])
    assert sorted(file.name for file in tmp_path.iterdir()) == [checkpoint.DELTA, checkpoint.MANIFEST]


def test_what_was_merged_is_in_the_matrices(bases: Callable[[str], Path], tmp_path: Path) -> None:
    merging = Stage(rules=[HEAD], previous="merge")
    tuned = tune(tmp_path, bases("bert"), [tiny.rule("layers[1].attention.q", "lora")], merging)
    head = tuned.assembly.anatomy.part("head").parameters
    assert set(tensors(tmp_path)) == {"bert.encoder.layer.1.attention.self.query.weight", *head}
    assert np.array_equal(tiny.logits(checkpoint.load(tmp_path)[0].model).numpy(), tuned.logits)


def test_a_hybrid_of_everything_is_the_same_again(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tuned = tune(tmp_path, bases("bert"), *HYBRID)
    loaded, again, manifest = checkpoint.load(tmp_path)
    assert np.array_equal(tiny.logits(loaded.model).numpy(), tuned.logits)
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert (manifest["stage"], manifest["max_length"]) == (manifest["strategy"]["stages"][-1]["name"], 16)
    assert again.attachments == tuned.assembly.attachments
    assert again.changed == tuned.assembly.changed
    checkpoint.write(tmp_path / "..", again, checkpoint.Base(**manifest["base"]))
    assert (tmp_path / ".." / checkpoint.DELTA).read_bytes() == (tmp_path / checkpoint.DELTA).read_bytes()


HYBRID: list[list[Rule] | Stage] = [
    [tiny.rule("layers", "lora", r=2, lora_dropout=0.3), tiny.rule("layers[-1:]", "full"), HEAD],
    [
        tiny.rule("layers[0:2]", "adapter", bottleneck=4, dropout=0.3),
        tiny.rule("layers[-1:].attention", "lora", r=3),
        HEAD,
    ],
]


def test_tensors_go_back_into_a_model_that_has_trained_on(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tuned = tune(tmp_path, bases("bert"), [LORA, HEAD])
    tiny.shake(tuned.assembly.parameter(name) for name in tuned.assembly.delta)
    assert not np.array_equal(tiny.logits(tuned.assembly.model).numpy(), tuned.logits)
    checkpoint.load_tensors(tmp_path, tuned.assembly)
    assert np.array_equal(tiny.logits(tuned.assembly.model).numpy(), tuned.logits)


def test_no_more_of_a_delta_is_in_memory_than_a_few_tensors(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's pages stay in memory until it is closed."""
    tuned, held = tune(tmp_path, bases("bert"), [tiny.rule("all", "full")]), list[int]()

    class Spy:
        def __init__(self, path: str, framework: str) -> None:
            self.file = safe_open(path, framework=framework)

        def __enter__(self) -> Spy:
            held.append(0)
            self.keys = self.file.__enter__().keys
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor = self.file.get_tensor(name)
            held[-1] += tensor.nbytes
            return tensor

    tiny.shake(tuned.assembly.parameter(name) for name in tuned.assembly.delta)
    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    monkeypatch.setattr(checkpoint, "_AT_ONCE", 10_000)
    checkpoint.load_tensors(tmp_path, tuned.assembly)
    largest = max(parameter.nbytes for parameter in tuned.assembly.model.parameters())
    assert sum(held) == sum(tuned.assembly.parameter(name).nbytes for name in tuned.assembly.delta)
    assert max(held) < 10_000 + largest < sum(held) / 2
    assert np.array_equal(tiny.logits(tuned.assembly.model).numpy(), tuned.logits)


# --- what it notices


def alter(folder: Path) -> None:
    data = bytearray((folder / checkpoint.DELTA).read_bytes())
    data[-5] ^= 1
    (folder / checkpoint.DELTA).write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / checkpoint.DELTA).read_bytes()
    (folder / checkpoint.DELTA).write_bytes(data[: len(data) // 2])


def edit(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / checkpoint.MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def forge(content: Callable[[Path], None]) -> Callable[[Path], None]:
    """Changes the tensors together with their hash."""

    def damage(folder: Path) -> None:
        content(folder / checkpoint.DELTA)
        edit(sha256=hashlib.sha256((folder / checkpoint.DELTA).read_bytes()).hexdigest())(folder)

    return damage


def lose_one(path: Path) -> None:
    there = load_file(str(path))
    del there["classifier.bias"]
    save_file(there, str(path))


def other_base(folder: Path) -> None:
    tiny.save_body(folder / "base", seed=1)


def no_base(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (alter, RunError, r"delta.safetensors: truncated or altered.*\n.*sha256 \w{64}\n.*mend: +copy it again"),
        (truncate, RunError, "truncated or altered"),
        (
            lambda f: (f / checkpoint.DELTA).unlink(),
            RunError,
            r"delta.safetensors: there is no such file\n.*incomplete",
        ),
        (lambda f: (f / checkpoint.MANIFEST).unlink(), RunError, r"manifest.json: there is no such file\n.*mend"),
        (lambda f: (f / checkpoint.MANIFEST).write_text("{"), RunError, "manifest.json: is not JSON"),
        (edit(format=2), RunError, r"another format\n.*found: +2\n.*expected: +1\n.*version that wrote it"),
        (edit(format=None), RunError, "another format"),
        (forge(lose_one), RunError, r"lacks tensors of this model\n.*classifier.bias"),
        (forge(lambda path: path.write_bytes(b"nothing")), RunError, "cannot be read"),
        (other_base, ModelError, r"was trained on other weights.*base has here\n.*found.*\n.*expected.*\n.*mend"),
        (no_base, ModelError, r"base: cannot be loaded from the folder"),
    ],
    ids=[
        *("altered", "truncated", "no tensors", "no manifest", "half a manifest", "newer", "no format", "too few"),
        *("not safetensors", "other base", "no base"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], None], error: type[HybridtuneError], says: str, tmp_path: Path
) -> None:
    tune(tmp_path, tiny.save_body(tmp_path / "base"), [LORA])
    checkpoint.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=says):
        checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune(tmp_path, bases("bert"), [HEAD])

    def full(*args: object, **kwargs: object) -> None:
        (tmp_path / f".{checkpoint.DELTA}.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny.shake(tuned.assembly.parameter(name) for name in tuned.assembly.delta)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"no space left on the disk\n.*\n.*mend"):
        checkpoint.write(tmp_path, tuned.assembly, checkpoint.Base("b", None, "", "", {}))
    assert np.array_equal(tiny.logits(checkpoint.load(tmp_path)[0].model).numpy(), tuned.logits)
    assert sorted(file.name for file in tmp_path.iterdir()) == [checkpoint.DELTA, checkpoint.MANIFEST]


def test_a_fingerprint_tells_weights_apart() -> None:
    model = tiny.classifier("bert")
    before = models.fingerprint(model)
    assert models.fingerprint(tiny.classifier("bert")) == before != models.fingerprint(tiny.classifier("bert", 1))
    new = ("classifier.weight", "classifier.bias")
    without = models.fingerprint(model, new)
    tiny.shake([model.classifier.weight])
    assert models.fingerprint(model) != before
    assert models.fingerprint(model, new) == without
    with torch.no_grad():
        weight = model.bert.embeddings.word_embeddings.weight
        weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(9.0))  # one bit
    assert models.fingerprint(model, new) != without


def test_a_fingerprint_is_taken_in_pieces_and_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value stands in every manifest: it must never change."""
    model, digest = torch.nn.Module(), hashlib.blake2b(digest_size=16)
    odd = {
        "turned": torch.randn(7, 5).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "rounded": torch.randn(3, 4).bfloat16(),
        "fine": torch.randn(5).double(),
        "whole": torch.arange(9),
        "truth": torch.ones(3, dtype=torch.bool),
    }
    for name, tensor in odd.items():
        model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    for piece in (2**22, 3, 1):
        monkeypatch.setattr(models, "_PIECE", piece)
        assert models.fingerprint(model) == digest.hexdigest()


# --- what can be handed over


@pytest.mark.parametrize(
    ("rules", "kinds"),
    [
        ([LORA], ["adapter", "checkpoint", "delta"]),
        ([LORA, HEAD], ["adapter", "checkpoint", "delta"]),
        ([tiny.rule("layers[0]", "lora", r=2), tiny.rule("layers[1]", "lora", r=4, lora_dropout=0.1)],
         ["adapter", "checkpoint", "delta"]),
        ([tiny.rule("layers[0]", "lora"), tiny.rule("layers[1]", "lora", use_dora=True)], ["checkpoint", "delta"]),
        ([tiny.rule("layers[0]", "lora"), tiny.rule("layers[1]", "lora", use_rslora=True)], ["checkpoint", "delta"]),
        ([LORA, tiny.rule("layers[2]", "full")], ["checkpoint", "delta", "adapter"]),
        ([LORA, tiny.rule("embeddings", "full")], ["checkpoint", "delta", "adapter"]),
        ([tiny.rule("layers", "lora", r=2, init_lora_weights="pissa")], ["checkpoint", "delta", "adapter"]),
        ([tiny.rule("layers", "ia3")], ["adapter", "checkpoint", "delta"]),
        ([tiny.rule("layers", "bias"), tiny.rule("layers", "norm")], ["checkpoint", "delta"]),
        ([tiny.rule("embeddings", "prompt")], ["delta"]),
        ([tiny.rule("layers", "prefix")], ["delta"]),
        ([tiny.rule("all", "full")], ["checkpoint", "delta"]),
        ([tiny.rule("layers", "adapter")], ["delta"]),
        ([tiny.rule("layers[0]", "adapter"), tiny.rule("layers[1]", "lora")], ["delta"]),
    ],
)  # fmt: skip
def test_the_kinds_that_are_possible(rules: list[Rule], kinds: list[str], bases: Callable[[str], Path]) -> None:
    assembly, base = tiny.assembly(bases("bert"), num_labels=3)
    assembly.begin(Stage(rules=rules))
    assert export.kinds(assembly, base) == kinds


def test_a_lora_inside_what_peft_takes_whole_is_no_peft_adapter(tmp_path: Path) -> None:
    """PEFT brings a classifier whole: LoRA below it would be lost."""
    assembly, base = tiny.assembly(tiny.save_pretrained(tmp_path, "roberta"))
    assembly.begin(Stage(rules=[LORA, tiny.rule(r"re:classifier\.dense", "lora", r=2)]))
    assert export.kinds(assembly, base) == ["checkpoint", "delta"]


def without_pad(folder: Path) -> Path:
    """GPT-2 as it is on the hub: neither config nor tokenizer knows a token to pad with."""
    config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, bos_token_id=3, eos_token_id=3)
    hf.GPT2Model(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[PAD]"
    tokenizer.save_pretrained(folder)
    return folder


def with_head(name: str, **config: object) -> Callable[[Path], Path]:
    return lambda folder: tiny.save_pretrained(folder, name, initializer_range=0.2, **config)


TWO_RANKS = [tiny.rule("layers[0:2]", "lora", r=2), tiny.rule("layers[2].mlp", "lora", r=4, lora_alpha=6), HEAD]
# what is handed over: a base where it is not a body of that name, the rules, the kind
SHIPPED: dict[str, tuple[str | Callable[[Path], Path], list[Rule], export.Kind]] = {
    "lora": ("bert", [LORA], "adapter"),
    "lora merged": ("bert", [LORA], "checkpoint"),
    "lora and head": ("bert", [LORA, HEAD], "adapter"),
    "two ranks": ("bert", TWO_RANKS, "adapter"),
    "two ranks, a head of two modules": ("roberta", TWO_RANKS, "adapter"),
    "two ranks, two stacks": ("t5", TWO_RANKS, "adapter"),
    "two ranks, transposed": ("gpt2", TWO_RANKS, "adapter"),
    "dora": ("llama", [tiny.rule("layers", "lora", r=2, use_dora=True)], "adapter"),
    "rslora": ("bert", [tiny.rule("layers.attention", "lora", r=4, use_rslora=True)], "adapter"),
    "ia3": ("bert", [tiny.rule("layers", "ia3"), HEAD], "adapter"),
    "ia3, transposed": ("gpt2", [tiny.rule("layers", "ia3")], "adapter"),
    "ia3 merged": ("t5", [tiny.rule("layers", "ia3"), HEAD], "checkpoint"),
    "lora+": ("bert", [tiny.rule("layers", "lora", r=2, loraplus_lr_ratio=16), HEAD], "adapter"),
    "changed base": ("bert", [LORA, tiny.rule("layers[-2:]", "full"), HEAD], "adapter"),
    "pissa": ("gpt2", [tiny.rule("layers", "lora", r=2, init_lora_weights="pissa"), HEAD], "adapter"),
    "olora": ("bert", [tiny.rule("layers", "lora", r=2, init_lora_weights="olora"), HEAD], "adapter"),
    "olora merged": ("llama", [tiny.rule("layers", "lora", r=2, init_lora_weights="olora")], "checkpoint"),
    "bias and norm": ("bert", [tiny.rule("layers", "bias"), tiny.rule("layers", "norm")], "checkpoint"),
    "nothing new": (with_head("distilbert", num_labels=3), [LORA], "adapter"),
    "other labels": (with_head("roberta", num_labels=5), [LORA], "adapter"),
    "full": ("bert", [tiny.rule("all", "full")], "checkpoint"),
    "top full, lora below": ("bart", [LORA, tiny.rule("layers[-2:]", "full"), HEAD], "checkpoint"),
    "no pad token": (without_pad, [LORA], "checkpoint"),
}


@pytest.fixture(scope="module")
def shipped(
    tmp_path_factory: pytest.TempPathFactory, bases: Callable[[str], Path]
) -> dict[str, tuple[Tuned, Path, list[object] | str]]:
    """All of SHIPPED, handed over and loaded by its own snippet where hybridtune cannot be imported."""
    home, ready, jobs = tmp_path_factory.mktemp("shipped"), {}, []
    for number, (name, (base, rules, kind)) in enumerate(SHIPPED.items()):
        here = home / str(number)
        tuned = tune(here / "stage", bases(base) if isinstance(base, str) else base(here / "base"), rules)
        made, snippet = export.write(here / "model", tuned.folder, kind)
        assert made == kind
        assert f"```python\n{snippet}```" in (here / "model" / "README.md").read_text()
        jobs.append((snippet.replace("FOLDER", str(here / "model")), str(here / "logits.json")))
        ready[name] = (tuned, here / "model")
    in_a_new_process(PLAIN, jobs)
    return {
        name: (*made, json.loads(Path(out).read_text()))
        for (name, made), (_, out) in zip(ready.items(), jobs, strict=True)
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_what_was_handed_over_loads_without_hybridtune(
    name: str, shipped: dict[str, tuple[Tuned, Path, list[object] | str]]
) -> None:
    tuned, folder, found = shipped[name]
    assert not isinstance(found, str), found
    (logits, model_class, training), kind = found, SHIPPED[name][2]
    assert not training
    assert str(model_class).startswith("PeftModel") == (kind == "adapter")
    np.testing.assert_allclose(np.array(logits), tuned.logits, atol=1e-5, rtol=0)
    if tuned.assembly.added:  # what was added matters, or losing it would go unseen
        assert np.abs(tuned.logits - tuned.less).max() > 1e-3
    assert np.abs(tuned.logits[0] - tuned.logits[1]).max() > 1e-3
    assert (folder / "adapter_config.json").is_file() == (kind == "adapter")
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "hybridtune.json").read_text())["kind"] == kind


def test_an_adapter_on_a_changed_base_names_it_and_refuses_the_original(
    shipped: dict[str, tuple[Tuned, Path, list[object] | str]], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Full, then LoRA: on the original base it would load without complaint, and silently wrong."""
    tuned, made, _ = shipped["changed base"]
    folder = shutil.copytree(made, tmp_path / "model")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(made / "base")
    model = checkpoint_of(folder)
    np.testing.assert_allclose(tiny.logits(model).numpy(), tuned.logits, atol=1e-5, rtol=0)
    original = hf.AutoModelForSequenceClassification.from_pretrained(bases("bert"))
    original.save_pretrained(folder / "base")
    with pytest.raises(ModelError, match="was trained on other weights"):
        checkpoint_of(folder)


def checkpoint_of(folder: Path) -> torch.nn.Module:
    """An adapter folder on the base that it names, as prediction loads it."""
    about = json.loads((folder / "hybridtune.json").read_text())
    return predict._with_peft(folder, checkpoint.Base(**about["base"]))


def test_an_adapter_is_small(shipped: dict[str, tuple[Tuned, Path, list[object] | str]]) -> None:
    tuned, folder, _ = shipped["lora"]
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        names = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118
    assert names == {name.replace(".default.", ".") for name in tuned.assembly.delta}


@pytest.mark.parametrize("name", ["two ranks", "lora merged", "no pad token"])
def test_what_was_handed_over_predicts_as_the_stage_does(
    name: str, shipped: dict[str, tuple[Tuned, Path, list[object] | str]]
) -> None:
    tuned, folder, _ = shipped[name]
    assert export.difference(tuned.folder, folder, ["a b c", "good", "bad new old z"]) <= 1e-5


def test_deltas_are_the_same_in_a_new_process(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A stage's folder, and a delta that is handed over."""
    hybrid = tune(tmp_path / "1", bases("bert"), *HYBRID)
    adapters = tune(
        tmp_path / "2", bases("llama"), [tiny.rule("layers", "adapter", bottleneck=4, mode="parallel"), HEAD]
    )
    kind, snippet = export.write(tmp_path / "model", adapters.folder)
    assert kind == "delta"
    assert 'hybridtune.load("FOLDER")' in snippet
    jobs = [
        (str(folder), str(folder / "logits.json")) for folder in (hybrid.folder, adapters.folder, tmp_path / "model")
    ]
    in_a_new_process(OURS, jobs)
    logits = [np.array(json.loads(Path(out).read_text())) for _, out in jobs]
    for found, expected in zip(logits, (hybrid, adapters, adapters), strict=True):
        assert np.abs(found - expected.logits).max() == 0.0
    assert export.difference(adapters.folder, tmp_path / "model", ["a b c", "good"]) == 0.0


def test_a_kind_that_is_not_possible_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tuned = tune(tmp_path / "stage", bases("bert"), [tiny.rule("layers", "adapter", bottleneck=4)])
    with pytest.raises(
        RunError, match=r"kind checkpoint: .* cannot be handed over so\n.*not linear.*\n +expected: +delta"
    ):
        export.write(tmp_path / "model", tuned.folder, "checkpoint")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([tiny.rule("layers[-1:]", "full")], "nothing sits on the model"),
        ([tiny.rule("layers", "adapter", bottleneck=4)], "adapter sits on it, which is no method of PEFT's"),
        ([tiny.rule("layers.attention", "lora", r=2), tiny.rule("layers.mlp", "ia3")], "ia3, lora sit on it together"),
        (
            [tiny.rule("layers[0:1]", "lora", r=2), tiny.rule("layers[1:2]", "lora", r=2, use_dora=True)],
            "rules of lora differ in use_dora",
        ),
    ],
)
def test_why_a_model_is_no_adapter_is_said(
    bases: Callable[[str], Path], tmp_path: Path, rules: list[Rule], reason: str
) -> None:
    tuned = tune(tmp_path / "stage", bases("bert"), rules)
    with pytest.raises(RunError, match="kind adapter: this model cannot be handed over so") as raised:
        export.write(tmp_path / "model", tuned.folder, "adapter")
    assert str(raised.value.found).startswith(reason)


def test_what_was_handed_over_before_is_replaced_whole(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tuned = tune(tmp_path / "stage", bases("bert"), [LORA])
    export.write(tmp_path / "model", tuned.folder)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    export.write(tmp_path / "model", tuned.folder, "checkpoint")
    assert not (tmp_path / "model" / "adapter_model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "stage"]


def test_the_last_stage_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for name in ("1-probe", "9-mix", "10-last", "11-unfinished"):
        (tmp_path / "stages" / name).mkdir(parents=True)
        if name != "11-unfinished":
            (tmp_path / "stages" / name / checkpoint.MANIFEST).write_text("{}")
    assert export.last_stage(tmp_path).name == "10-last"
    with pytest.raises(RunError, match="has no finished stage"):
        export.last_stage(tmp_path / "stages")
