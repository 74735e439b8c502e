"""Where a tuning starts: a plain model, an adapter that PEFT has written, or what an earlier run has handed over.

What an adapter or a run has put on its base is on the model as if a stage before the first had put it there: the first
stage's `previous: keep / merge / drop` says whether it is trained further, folded in, or taken off.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from . import checkpoint, methods, vocabulary
from . import model as models
from .anatomy import Anatomy
from .checkpoint import ABOUT, MANIFEST, Base
from .compose import Assembly, Attachment
from .errors import ModelError, PartError, first_line
from .files import read_json
from .methods import lora
from .methods._peft import name_in_file
from .model import PACKAGED, Loaded
from .recipe import Recipe

_PEFT, _PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ODD = ("lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens")
_MERGED = "merge it with PEFT's merge_and_unload and give the merged folder"
_PARTS = ("layers", "layers.attention", "layers.mlp", "layers.attention.q", "layers.attention.v", "all")


@dataclass(frozen=True)
class Start:
    """A model that can be tuned.

    Attributes:
        loaded: the base with all that is on it, and its tokenizer.
        assembly: the same, as rules see it.
        base: how a checkpoint names the base.
    """

    loaded: Loaded
    assembly: Assembly
    base: Base


def load(
    name: str,
    auto_class: str,
    config: dict[str, Any],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Start:
    """Loads a model to be tuned.

    Args:
        name: hub id, folder, name of a packaged model, a PEFT adapter folder, or a run.
        auto_class: name of the transformers Auto class that fits the task.
        config: values that the configuration gets, such as num_labels.
        revision: commit, tag or branch on the hub.
        trust_remote_code: whether code that comes with the model may run.
        tokenizer: that the model's vocabulary is to follow, where it is not its own.

    Raises:
        ModelError: it cannot be loaded, cannot do the task or have another vocabulary, or is an adapter that cannot be
            gone on with.
        RunError: a run's files are damaged.
    """
    folder = Path(name) / "model" if (Path(name) / "model" / ABOUT).is_file() else Path(name)
    asked = Base(name, revision, "", auto_class, config, trust_remote_code)
    if tokenizer is not None and ((folder / MANIFEST).is_file() or (folder / _PEFT).is_file()):
        raise ModelError(
            f"model {name}: an adapter or a delta belongs to a vocabulary, which cannot be changed under it",
            expected="a plain model",
            mend="`hybridtune export RUN --kind checkpoint`, and give that folder; or leave vocabulary away",
        )
    if (folder / MANIFEST).is_file():
        return _from_delta(folder, asked)
    if (folder / _PEFT).is_file():
        return _from_peft(folder, asked)
    asked = replace(asked, name=str(folder) if folder != Path(name) else name)
    own, head = _own(folder), set[str]()
    loaded = checkpoint.load_base(asked)
    base = replace(asked, auto_class=loaded.auto_class, fingerprint=models.fingerprint(loaded.model, loaded.new))
    if own and _labels(own) != _labels(asked):
        loaded, head = _with_fresh_head(loaded)
    if tokenizer is not None:
        loaded = vocabulary.follow(loaded, copy.deepcopy(tokenizer))
        base = replace(base, vocabulary=vocabulary.digest(tokenizer))
    new = tuple(sorted(head.union(loaded.new)))
    return Start(replace(loaded, new=new), Assembly(loaded.model, Anatomy(loaded.model, new)), base)


def refuse_no_model(recipe: Recipe) -> None:
    """Refuses a recipe whose model is not there, before time is spent on the data.

    Raises:
        ModelError: it is not.
    """
    others = (ABOUT, MANIFEST, _PEFT, f"model/{ABOUT}")  # than a plain model
    if not any((Path(recipe.model) / file).is_file() for file in others):
        models.load_configuration(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)


def _from_delta(folder: Path, asked: Base) -> Start:
    manifest = checkpoint.read_manifest(folder)
    told = Base(**manifest["base"])
    loaded, base = _load_base(told, asked, folder)
    head = set[str]()
    if _labels(told) != _labels(asked):
        loaded, head = _with_fresh_head(loaded)
    loaded = checkpoint.with_vocabulary(loaded, told, folder)
    new = tuple(sorted(set(loaded.new) - set(manifest["changed"]) | head))
    assembly = checkpoint.rebuild(folder, manifest, loaded, new, without=new)
    assembly.changed.update(new)
    return Start(replace(loaded, new=new), assembly, base)


def _from_peft(folder: Path, asked: Base) -> Start:
    """An adapter of PEFT's kind as attachments.

    Raises:
        ModelError: of a kind, with an option, or of a shape, that cannot be gone on with.
    """
    told, own = read_json(folder / _PEFT), _own(folder)
    if own:
        loaded, base = _load_base(own.beside(folder), asked, folder)
    else:
        hub = {hub_id: name for name, (_, _, hub_id) in PACKAGED.items()}
        name = str(told["base_model_name_or_path"])
        base = replace(asked, name=hub.get(name, name), revision=told.get("revision"))
        loaded = checkpoint.load_base(base, tokenizer_from=_tokenizer(folder))
        fingerprint = models.fingerprint(loaded.model, loaded.new)
        base = replace(base, auto_class=loaded.auto_class, fingerprint=fingerprint)
    tensors = dict(_read(folder / _PEFT_TENSORS))
    shapes = {name: parameter.shape for name, parameter in loaded.model.named_parameters()}
    whole, head = {name: tensor for name, tensor in tensors.items() if name in shapes}, set[str]()
    if (own and _labels(own) != _labels(asked)) or any(t.shape != shapes[name] for name, t in whole.items()):
        loaded, head = _with_fresh_head(loaded)
    brought = {name: tensor for name, tensor in whole.items() if name not in head}
    new = tuple(sorted(set(loaded.new) - set(brought) | head))
    assembly = Assembly(loaded.model, Anatomy(loaded.model, new))
    assembly.put_again(_attachments(folder, told, tensors, assembly.anatomy))
    wanted = {name_in_file(name): name for name in assembly.added}
    wanted |= {name.removesuffix(".weight"): here for name, here in wanted.items() if "magnitude" in name}
    left = sorted(set(tensors) - set(whole) - set(wanted))
    if left or not wanted.keys() & tensors.keys():
        raise ModelError(
            f"model {folder}: an adapter with tensors that hybridtune does not know",
            found=", ".join(left[:3]) or "no tensor of an adapter",
            expected="LoRA or (IA)3 on linear layers, and modules_to_save",
            mend=_MERGED,
        )
    for name, tensor in {**brought, **{wanted[n]: t for n, t in tensors.items() if n in wanted}}.items():
        parameter = assembly.parameter(name)
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"model {folder}: {name} of the adapter does not fit the model {base.name}",
                found=f"shape {tuple(tensor.shape)}",
                expected=f"shape {tuple(parameter.shape)}",
                mend=_MERGED,
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    assembly.changed.update(brought)
    return Start(replace(loaded, new=new), assembly, base)


def _own(folder: Path) -> Base | None:
    """The base of a model that a run has handed over, with the labels that it was tuned for.

    Raises:
        RunError: one of its files is damaged.
    """
    return Base(**checkpoint.read_about(folder)["base"]) if (folder / ABOUT).is_file() else None


def _load_base(told: Base, asked: Base, folder: Path) -> tuple[Loaded, Base]:
    """Loads what a delta or an adapter was trained on, for the task that is asked, and checks that it is the same.

    Raises:
        ModelError: it cannot be found, has other weights, or what was trained on it is of another task.
    """
    if told.auto_class not in (asked.auto_class, models.DECODERS.get(asked.auto_class)):
        raise ModelError(
            f"model {folder}: was tuned for another task",
            found=f"a model of the class {told.auto_class}",
            expected=asked.auto_class,
            mend="export it with --kind checkpoint, whose layers any task can start from, or give its base: "
            f"model: {told.name}",
        )
    base = replace(told, auto_class=asked.auto_class, config=asked.config, trust_remote_code=asked.trust_remote_code)
    tokenizer = None if told.vocabulary else _tokenizer(folder)
    as_told = replace(base, config=told.config)
    same = len(_labels(told)) == len(_labels(asked))
    if not same:  # a head that the base has of its own is new for other numbers of labels: another fingerprint
        checkpoint.check_fingerprint(checkpoint.load_base(as_told, tokenizer), as_told, folder)
    loaded = checkpoint.load_base(base, tokenizer)
    base = replace(base, auto_class=loaded.auto_class)
    if same:
        checkpoint.check_fingerprint(loaded, base, folder)
        return loaded, base
    return loaded, replace(base, fingerprint=models.fingerprint(loaded.model, loaded.new))


def _with_fresh_head(loaded: Loaded) -> tuple[Loaded, set[str]]:
    """The model with a head for other labels, which transformers starts as one that a checkpoint lacks.

    Returns:
        The model, on the same tensors but for the head's; and the names of those: their shape follows the number of
        labels.
    """
    model, config = loaded.model, copy.deepcopy(loaded.model.config)
    config.num_labels += 1
    with torch.device("meta"):
        twin = dict(type(model)(config).named_parameters())
    head = {name for name, parameter in model.named_parameters() if parameter.shape != twin[name].shape}
    if head <= set(loaded.new):
        return loaded, head
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in head}
    with models.quiet():
        fresh = type(model).from_pretrained(None, config=model.config, state_dict=kept, dtype=torch.float32)
    fresh.name_or_path = fresh.config.name_or_path = model.name_or_path
    return replace(loaded, model=fresh.eval()), head


def _attachments(
    folder: Path, told: dict[str, Any], tensors: dict[str, torch.Tensor], anatomy: Anatomy
) -> Iterator[Attachment]:
    """The adapter's rules: one for each rank and scaling."""
    kind = str(told.get("peft_type"))
    if kind not in ("LORA", "IA3"):
        raise ModelError(
            f"model {folder}: an adapter of the kind {kind} cannot be gone on with",
            expected="LORA or IA3",
            mend="give the base model, or a merged folder",
        )
    if kind == "IA3":
        yield _attachment(
            "ia3", {}, [name.removesuffix(".ia3_l") for name in tensors if name.endswith(".ia3_l")], anatomy
        )
        return
    odd = [key for key in _ODD if told.get(key)]
    if odd or told.get("bias", "none") != "none":
        raise ModelError(f"model {folder}: {_PEFT}: {', '.join(odd or ['bias'])} cannot be gone on with")
    init = told.get("init_lora_weights")
    if lora.moves(init):
        raise ModelError(
            f"model {folder}: the adapter belongs to other weights than its base has on disk",
            found=f"init_lora_weights: {init}, which has changed them",
            mend=f"where it was trained, {_MERGED}"
            + ("" if init == "loftq" else ", or save it with path_initial_model_for_weight_conversion"),
        )
    shared: dict[str, Any] = {key: told[key] for key in ("lora_dropout", "use_rslora", "use_dora") if key in told}
    groups: dict[tuple[int, float], list[str]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            alpha = _of_pattern(told.get("alpha_pattern") or {}, path, told["lora_alpha"])
            groups.setdefault((tensor.shape[0], float(alpha)), []).append(path)
    for (rank, alpha), paths in groups.items():
        yield _attachment("lora", {"r": rank, "lora_alpha": alpha, **shared}, paths, anatomy)


def _attachment(method: str, options: dict[str, Any], paths: list[str], anatomy: Anatomy) -> Attachment:
    """A rule for exactly these matrices, by the name of a part where one has the same."""
    found = methods.load(method)
    full = methods.options_of(found, options)
    exact = "re:" + "|".join(map(re.escape, paths))
    wanted = set(found.claims(anatomy.part(exact), full))
    for name in _PARTS:
        try:
            if set(found.claims(anatomy.part(name), full)) == wanted:
                exact = name
                break
        except PartError:
            continue
    return Attachment(method, exact, full.model_dump())


def _of_pattern(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """As PEFT reads its patterns: keys are regular expressions for the end of a name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                yield name.removeprefix("base_model.model."), file.get_tensor(name)
    except Exception as error:
        raise ModelError(f"model {path}: cannot be read", found=first_line(error)) from None


def _labels(base: Base) -> dict[str, str]:
    """Names of the labels by number; JSON has strings for numbers."""
    told = json.loads(json.dumps(base.config.get("id2label") or {}))
    return {str(number): str(label) for number, label in told.items()}


def _tokenizer(folder: Path) -> str | None:
    return str(folder) if (folder / "tokenizer_config.json").is_file() else None
