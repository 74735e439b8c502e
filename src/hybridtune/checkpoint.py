"""Checkpoints: every tensor that was trained or changed, and a manifest that says on what and how to put them.

What a run hands over says in `hybridtune.json` of what kind it is, and the hash of every file of tensors in it.

`delta.safetensors` holds the tensors, `manifest.json` the base model (id, revision, fingerprint of its weights), the
task, what is attached where, and the hash of the tensor file. Rebuilding the structure from the manifest and loading
the tensors gives the same model to the last bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import model as models
from . import vocabulary
from .anatomy import Anatomy
from .compose import Assembly, Attachment
from .errors import ModelError, RunError
from .files import disk_errors, read_json, write_json

FORMAT = 1
DELTA, MANIFEST = "delta.safetensors", "manifest.json"
ABOUT = "hybridtune.json"  # in whatever a run hands over
BASE = "base"  # folder of the changed base, beside an adapter that was trained on it
_IN_MANIFEST = ("base", "attachments", "changed", "tensors", "sha256")
_IN_ABOUT = ("kind", "base", "task", "max_length", "sha256")
_AT_ONCE = 2**26  # bytes of a tensor file that are read before it is opened anew


@dataclass(frozen=True)
class Base:
    """The model that a delta belongs to.

    Attributes:
        name: as the user named it.
        revision: on the hub, or None.
        fingerprint: of its weights, new ones left out.
        auto_class: the transformers Auto class.
        config: values set in its configuration.
        vocabulary: digest of another tokenizer than its own, that lies beside the delta; None where it has its own.
    """

    name: str
    revision: str | None
    fingerprint: str
    auto_class: str
    config: dict[str, Any]
    trust_remote_code: bool = False
    vocabulary: str | None = None

    def beside(self, folder: Path) -> Base:
        """The base as an adapter in a folder means it: a changed one lies there."""
        return replace(self, name=str(folder / BASE)) if self.name == BASE else self


def write(folder: Path, assembly: Assembly, base: Base, **more: Any) -> None:
    """Writes delta and manifest into an existing folder, each whole or not at all, the manifest last.

    Args:
        folder: where.
        assembly: the model and what is on it.
        base: what it was loaded from.
        **more: what else the manifest should say (task, strategy, stage).
    """
    tensors = {name: assembly.parameter(name).detach().to("cpu").contiguous() for name in assembly.delta}
    temporary = folder / f".{DELTA}.tmp"
    with disk_errors(folder):
        try:
            save_file(tensors, str(temporary), metadata={"format": "pt"})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, folder / DELTA)
        except SafetensorError as error:  # the writer's own wrapping of an operating system error
            raise RunError(
                f"{folder / DELTA}: cannot be written",
                found=str(error),
                mend="free some space or choose another output",
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "base": vars(base),
            **more,
            "attachments": [attachment.as_dict() for attachment in assembly.attachments],
            "changed": sorted(assembly.changed),
            "tensors": {
                name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()
            },
            "sha256": _sha256(folder / DELTA),
        },
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a delta folder.

    Raises:
        RunError: missing, of another format, incomplete, or not of this tensor file.
    """
    manifest = _read_whole(folder / MANIFEST, ("format",))
    if manifest["format"] != FORMAT:
        raise RunError(
            f"{folder / MANIFEST}: of another format",
            found=manifest.get("format"),
            expected=FORMAT,
            mend="load it with the hybridtune version that wrote it",
        )
    _read_whole(folder / MANIFEST, _IN_MANIFEST)
    _check_file(folder / DELTA, manifest["sha256"])
    return manifest


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of tensors in a folder, by their paths in it; a delta's stands in its manifest."""
    files = sorted(file for file in folder.rglob("*.safetensors") if file != folder / DELTA)
    return {file.relative_to(folder).as_posix(): _sha256(file) for file in files}


def read_about(folder: Path, files: bool = True) -> dict[str, Any]:
    """What a folder that was handed over says of itself: kind, task, base, `max_length`, hashes.

    Args:
        folder: with `hybridtune.json`.
        files: whether the files of tensors are compared with their hashes.

    Raises:
        RunError: it is missing or incomplete, or a file is missing, truncated or altered.
    """
    told = _read_whole(folder / ABOUT, _IN_ABOUT)
    for name, expected in told["sha256"].items() if files else ():
        _check_file(folder / name, expected)
    return told


def _read_whole(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Reads JSON that has to have these keys.

    Raises:
        RunError: one is missing.
    """
    told = read_json(path)
    require(path, told, keys)
    return dict(told)


def require(path: Path, told: Any, keys: Sequence[str]) -> None:
    """Refuses what was read of a manifest where it lacks one of these keys, or in `base` what a `Base` is.

    Raises:
        RunError: it does.
    """
    lacks = [key for key in keys if not isinstance(told, dict) or key not in told]
    if "base" in keys and not lacks:
        base = told["base"] if isinstance(told["base"], dict) else {}
        needed = [one.name for one in fields(Base) if one.default is MISSING]
        lacks = [f"base.{key}" for key in needed if key not in base]
        lacks += [f"base.{key}, which is unknown" for key in base if key not in {one.name for one in fields(Base)}]
    if lacks:
        raise RunError(
            f"{path}: is damaged, it does not say all that hybridtune writes there",
            found=f"no {', '.join(lacks)}",
            mend="copy it again, or write it anew with `hybridtune export`",
        )


def _check_file(path: Path, expected: str) -> None:
    """Refuses a file that is not what it was when its hash was taken.

    Raises:
        RunError: it is missing, or has another hash.
    """
    if not path.is_file():
        raise RunError(f"{path}: there is no such file", mend="the folder is incomplete: copy it again, whole")
    if _sha256(path) != expected:
        raise RunError(
            f"{path}: truncated or altered since it was written", expected=f"sha256 {expected}", mend="copy it again"
        )


def load_tensors(folder: Path, assembly: Assembly) -> None:
    """Puts the tensors of a delta folder into a model that has the same structure.

    Raises:
        RunError: the file is damaged or is not of this structure.
    """
    try:
        with safe_open(str(folder / DELTA), framework="pt") as file:
            lacks = sorted(set(assembly.delta) - set(file.keys()))
        if lacks:
            raise RunError(f"{folder / DELTA}: lacks tensors of this model", found=", ".join(lacks[:5]))
        for names in _batches(assembly):
            # what has been read stays in memory, mapped, until the file is closed: all of it would double a full delta
            with safe_open(str(folder / DELTA), framework="pt") as file, torch.no_grad():
                for name in names:
                    assembly.parameter(name).copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise RunError(f"{folder / DELTA}: cannot be read", found=str(error)) from None


def _batches(assembly: Assembly) -> Iterator[list[str]]:
    """Names of a delta's tensors, in batches of about as many bytes as may be in memory at once."""
    batch, size = list[str](), 0
    for name in assembly.delta:
        batch.append(name)
        size += assembly.parameter(name).nbytes
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


def load(folder: Path) -> tuple[models.Loaded, Assembly, dict[str, Any]]:
    """Rebuilds the tuned model from a delta folder and its base.

    Returns:
        The loaded base (its model is the tuned one now), the assembly, and the manifest.

    Raises:
        RunError: the folder is damaged.
        ModelError: the base cannot be found, or its weights are not those that the delta was trained on.
    """
    manifest = read_manifest(folder)
    base = Base(**manifest["base"])
    loaded = load_base(base)
    check_fingerprint(loaded, base, folder)
    loaded = with_vocabulary(loaded, base, folder)
    return loaded, rebuild(folder, manifest, loaded, loaded.new), manifest


def rebuild(
    folder: Path, manifest: dict[str, Any], loaded: models.Loaded, new: Sequence[str], without: Collection[str] = ()
) -> Assembly:
    """Puts what a delta folder holds on its loaded base.

    Args:
        folder: of the delta.
        manifest: its manifest.
        loaded: its base.
        new: names of what counts as new on it.
        without: names of tensors that stay as the base has them, with nothing on them.

    Raises:
        RunError: the file is damaged or is not of this structure.
    """
    assembly = Assembly(loaded.model, Anatomy(loaded.model, new))
    assembly.put_again(map(Attachment.from_dict, manifest["attachments"]), without)
    assembly.changed = set(manifest["changed"]) - set(without)
    load_tensors(folder, assembly)
    return assembly


def check_fingerprint(loaded: models.Loaded, base: Base, folder: Path) -> None:
    """Refuses a base whose weights are not those that were tuned.

    Raises:
        ModelError: they are others.
    """
    found = models.fingerprint(loaded.model, loaded.new)
    if found != base.fingerprint:
        raise ModelError(
            f"{folder}: was trained on other weights than {base.name} has here",
            found=f"fingerprint {found}",
            expected=f"fingerprint {base.fingerprint}" + (f", revision {base.revision}" if base.revision else ""),
            mend="give the base model that was tuned",
        )


def load_base(base: Base, tokenizer_from: str | None = None) -> models.Loaded:
    """Loads the model that a delta or adapter belongs to, configured as it was tuned.

    Raises:
        ModelError: it cannot be found.
    """
    config = dict(base.config)
    if "id2label" in config:  # JSON has no integer keys
        config["id2label"] = {int(number): label for number, label in config["id2label"].items()}
    return models.load(
        base.name,
        base.auto_class,
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
        tokenizer_from=tokenizer_from,
        **config,
    )


def with_vocabulary(loaded: models.Loaded, base: Base, folder: Path) -> models.Loaded:
    """A base, loaded with its own tokenizer, with the vocabulary that the delta in a folder was trained with.

    Raises:
        ModelError: the folder has no tokenizer.
        RunError: it has another one.
    """
    if base.vocabulary is None:
        return loaded
    tokenizer = models.load_tokenizer(str(folder))
    found = vocabulary.digest(tokenizer)
    if found != base.vocabulary:
        raise RunError(
            f"{folder}: its tokenizer is not the one that the model was trained with",
            found=f"pieces with digest {found}",
            expected=f"digest {base.vocabulary}",
            mend="copy the folder again, whole",
        )
    return vocabulary.follow(loaded, tokenizer)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
