"""Models whose files are truncated, altered or incomplete: one clear error, whatever reads them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import texts
import tiny
import torch
from safetensors.torch import load_file

import hybridtune
from hybridtune import api
from hybridtune import model as models
from hybridtune.console import Console
from hybridtune.errors import HybridtuneError, ModelError, RunError

FULL, LORA = {"part": "layers[-1:]", "method": "full"}, {"part": "layers", "method": "lora"}
KINDS = {
    "checkpoint": ([{"rules": [FULL]}], "model.safetensors"),
    "adapter": ([{"rules": [LORA]}], "adapter_model.safetensors"),
    "changed base": ([{"name": "a", "rules": [FULL]}, {"name": "b", "rules": [LORA]}], "base/model.safetensors"),
    "delta": ([{"rules": [{"part": "layers", "method": "adapter"}]}], "delta.safetensors"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each kind, tuned once."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("runs") / kind.replace(" ", "-")
            keys = {"model": str(base), "task": "classification", "strategy": KINDS[kind][0], "baselines": False}
            quiet = Console(quiet=True)
            tuned = api.tune(console=quiet, output=str(folder), num_train_epochs=1, **keys, **texts.splits(24, 8, 8))
            if kind in ("adapter", "changed base"):
                tuned.export(folder / "adapter", "adapter")
                shutil.rmtree(folder / "model")
                (folder / "adapter").rename(folder / "model")
            made[kind] = folder
        return made[kind]

    return run


def tune_on(folder: Path, output: Path) -> None:
    keys = {"model": str(folder), "task": "classification", "strategy": "head", "output": str(output)}
    api.tune(console=Console(quiet=True), num_train_epochs=1, baselines=False, **keys, **texts.splits(24, 8, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_file_of_tensors_is_named(
    runs: Callable[[str], Path], tmp_path: Path, kind: str, damage: Callable[[Path], object]
) -> None:
    folder = Path(shutil.copytree(runs(kind), tmp_path / "run"))
    assert hybridtune.load(folder).predict(["a good b"])
    file = folder / "model" / KINDS[kind][1]
    damage(file)
    said = "there is no such file" if damage is Path.unlink else "truncated or altered since it was written"
    for use in (lambda: hybridtune.load(folder), lambda: tune_on(folder, tmp_path / "more")):
        with pytest.raises(RunError) as raised:
            use()
        assert raised.value.problem == f"{file}: {said}"
        assert "copy it again" in str(raised.value.mend)


def test_the_hashes_are_those_of_sha256sum(runs: Callable[[str], Path]) -> None:
    model = runs("changed base") / "model"
    told = json.loads((model / "hybridtune.json").read_text())["sha256"]
    assert set(told) == {"adapter_model.safetensors", "base/model.safetensors"}
    for name, digest in told.items():
        assert digest == hashlib.sha256((model / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("key", ["kind", "base", "task", "max_length", "sha256"])
def test_a_description_that_lacks_a_key_is_refused(runs: Callable[[str], Path], tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(runs("checkpoint"), tmp_path / "run"))
    about = folder / "model" / "hybridtune.json"
    told = json.loads(about.read_text())
    del told[key]
    about.write_text(json.dumps(told))
    for use in (
        lambda: hybridtune.load(folder),
        lambda: tune_on(folder, tmp_path / "more"),
        lambda: api.compare(folder, folder),
        lambda: api.export_run(folder, tmp_path / "out"),
    ):
        with pytest.raises(RunError, match="is damaged, it does not say all") as raised:
            use()
        assert raised.value.found == f"no {key}"


@pytest.mark.parametrize(
    "key", ["format", "base", "attachments", "changed", "tensors", "sha256", "task", "max_length", "strategy", "stage"]
)
def test_a_manifest_that_lacks_a_key_is_refused(runs: Callable[[str], Path], tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(runs("delta"), tmp_path / "run"))
    (stage,) = (folder / "stages").iterdir()
    for home in (stage, folder / "model"):
        told = json.loads((home / "manifest.json").read_text())
        del told[key]
        (home / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=rf"manifest\.json: is damaged[\s\S]*no {key}\n"):
        api.export_run(folder, tmp_path / "out")
    if key in ("task", "max_length", "strategy", "stage"):  # only what is written anew of it needs these
        return
    for use in (lambda: hybridtune.load(folder), lambda: tune_on(folder, tmp_path / "more")):
        with pytest.raises(RunError, match=rf"manifest\.json: is damaged[\s\S]*no {key}\n"):
            use()


def test_a_base_that_is_none_is_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs("delta"), tmp_path / "run"))
    path = folder / "model" / "manifest.json"
    told = json.loads(path.read_text())
    told["base"] = {**told["base"], "nick": "x"}
    del told["base"]["fingerprint"]
    path.write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"no base\.fingerprint, base\.nick, which is unknown"):
        hybridtune.load(folder)


def as_bin(folder: Path) -> Path:
    """The same weights as torch wrote them before there were safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("form", [lambda folder: folder / "model.safetensors", as_bin])
def test_half_a_plain_checkpoint_is_named(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    folder = tiny.save_pretrained(tmp_path / "m")
    file = form(folder)
    models.load(str(folder), tiny.AUTO)  # whole, it loads
    cut(file)
    with pytest.raises(ModelError, match=r"its weights cannot be read: a file is truncated or altered") as raised:
        tune_on(folder, tmp_path / "run")
    assert isinstance(raised.value, HybridtuneError) and str(folder) in str(raised.value.mend)
    assert not (tmp_path / "run").exists()
