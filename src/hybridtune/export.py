"""Hands over what the user ships, as one of three kinds.

    checkpoint   a plain Hugging Face folder; everything that was added is merged in
    adapter      a plain PEFT folder that names its base; where one of PEFT's methods has added all that was added. A
                 base that was changed too (full, then LoRA) lies in the folder `base` beside it
    delta        hybridtune's own: what was trained or changed, on top of the base it names

Each holds `hybridtune.json` (kind, task, base) and a README.md that says how to load it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from . import __version__, checkpoint, methods, own_file, predict, tasks, vocabulary
from .checkpoint import ABOUT, BASE, Base
from .compose import Assembly, Attachment
from .errors import RunError
from .files import new_folder, write_json, write_text
from .methods._peft import name_in_file
from .model import PACKAGED, Loaded, fingerprint, quiet
from .tasks import Task

Kind = Literal["checkpoint", "adapter", "delta"]
KINDS: tuple[Kind, ...] = ("checkpoint", "adapter", "delta")
# The options that one LoraConfig can give each matrix its own value of, and the keys that do so.
_PATTERNED = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
_OF_TRAINING = {"lora_dropout", "init_lora_weights", "loraplus_lr_ratio"}
# What PEFT keeps whole of models of a task, asked or not.
_KEPT_BY_PEFT = {
    "SequenceClassification": ("classifier", "score"),
    "TokenClassification": ("classifier", "score"),
    "QuestionAnswering": ("qa_outputs",),
}


def kinds(assembly: Assembly, base: Base) -> list[Kind]:
    """The kinds that this model can be handed over as, the best first."""
    found: list[Kind] = ["delta"] if assembly.unmergeable() else ["checkpoint", "delta"]
    if _no_adapter(assembly) is None:
        found.insert(len(found) if _other_base(assembly, base) else 0, "adapter")
    return found


def write(folder: Path, stage: Path, kind: Kind | None = None, task: Task | None = None) -> tuple[Kind, str]:
    """Writes the model of a finished stage.

    Args:
        folder: where to; replaced as a whole.
        stage: the stage's folder, with its delta.
        kind: one of `kinds`; None takes the first.
        task: with what was fitted after the stage had ended; the stage's own where not given.

    Returns:
        The kind, and a snippet of Python that loads the model.

    Raises:
        RunError: the model cannot be handed over as that kind.
    """
    loaded, assembly, manifest = checkpoint.load(stage)
    checkpoint.require(stage / checkpoint.MANIFEST, manifest, ("task", "max_length", "strategy", "stage"))
    base = Base(**manifest["base"])
    possible = kinds(assembly, base)
    if kind is not None and kind not in possible:
        raise RunError(
            f"kind {kind}: this model cannot be handed over so",
            found=_no_adapter(assembly) if kind == "adapter" else _said(assembly.unmergeable()),
            expected=" or ".join(possible),
        )
    kind = kind or possible[0]
    task = task or tasks.from_state(manifest["task"])
    task.prepare(loaded.model, loaded.tokenizer)
    if kind != "delta":
        vocabulary.fold(loaded.model)
    with new_folder(folder) as home:
        if kind == "delta":
            told = {key: manifest[key] for key in ("max_length", "strategy", "stage")}
            checkpoint.write(home, assembly, base, task=task.state(), **told)
            loaded.model.config.save_pretrained(home)
        elif kind == "adapter":
            if _other_base(assembly, base):
                base = _write_base(home / BASE, loaded, assembly, base)
            _write_peft(home, assembly, base, folder)
            loaded.model.config.save_pretrained(home)  # the names of the labels, which no adapter holds
        else:
            assembly.merge()
            with quiet():
                loaded.model.save_pretrained(home)
        loaded.tokenizer.save_pretrained(home)
        if task.writes:  # a checkpoint has it already
            loaded.model.generation_config.save_pretrained(home)
        about = {
            "hybridtune": __version__,
            "kind": kind,
            "base": vars(base),
            "task": task.state(),
            "max_length": manifest["max_length"],
            "sha256": checkpoint.hashes(home),
        }
        write_json(home / ABOUT, about)
        snippet = _snippet(kind, base, task)
        write_text(home / "README.md", _readme(kind, base, manifest, snippet, task))
    return kind, snippet


def last_stage(run: Path) -> Path:
    """The folder of a run's last stage, whose delta is the tuned model.

    Raises:
        RunError: the run has none.
    """
    stages = [folder for folder in (run / "stages").glob("*-*") if (folder / checkpoint.MANIFEST).is_file()]
    if not stages:
        raise RunError(f"{run}: has no finished stage", mend="give the folder of a finished run")
    return max(stages, key=lambda folder: int(folder.name.partition("-")[0]))


def difference(stage: Path, folder: Path, texts: list[Any]) -> float:
    """By how much the answers of a stage's model and of what was handed over differ, on some rows."""
    loaded, _, _ = checkpoint.load(stage)
    other = predict.load(folder, "cpu")
    items = other.encode(other.task.rows_from(texts))
    other.task.prepare(loaded.model, loaded.tokenizer)
    theirs, ours = other.logits(items), replace(other, model=loaded.model, tokenizer=loaded.tokenizer).logits(items)
    return other.task.difference(ours, theirs)


def _no_adapter(assembly: Assembly) -> str | None:
    """Why one configuration of PEFT's cannot say all that was added, or None where it can."""
    used = sorted({own_file.shown(attachment.method) for attachment in assembly.attachments})
    if not used:
        return "nothing sits on the model: weights of its own were trained, or what was added is merged into them"
    if len(used) > 1:
        return f"{', '.join(used)} sit on it together, an adapter of PEFT's is of one method"
    if methods.load(assembly.attachments[0].method).config is None:
        return f"{used[0]} sits on it, which is no method of PEFT's"
    kept = tuple(f"{name}." for name in _kept_whole(assembly))
    inside = next((name for name in assembly.added if name.startswith(kept)), None)
    if inside is not None:
        return f"{used[0]} sits on a module that PEFT keeps whole: {inside}"
    free = {*_PATTERNED, *_OF_TRAINING}
    shared = [{k: v for k, v in item.options.items() if k not in free} for item in assembly.attachments]
    odd = sorted({key for options in shared for key in options if options[key] != shared[0][key]})
    return f"rules of {used[0]} differ in {', '.join(odd)}" if odd else None


def _said(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _other_base(assembly: Assembly, base: Base) -> bool:
    """Whether more than the head was changed of the model's own weights, or its vocabulary."""
    if base.vocabulary:
        return True
    anatomy = assembly.anatomy
    body = {*anatomy.part("layers").parameters, *anatomy.part("embeddings").parameters} - set(anatomy.new)
    return bool(assembly.changed & (body | anatomy.tied))


def _write_base(folder: Path, loaded: Loaded, assembly: Assembly, base: Base) -> Base:
    """The changed base of an adapter, as a plain checkpoint; returns how the adapter names it."""
    plain = copy.deepcopy(assembly)
    for attachment in plain.attachments:
        methods.load(attachment.method).detach(plain.model, list(attachment.parameters))
    with quiet():
        plain.model.save_pretrained(folder)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(folder)
    return replace(base, name=BASE, revision=None, fingerprint=fingerprint(plain.model), vocabulary=None)


def _kept_whole(assembly: Assembly) -> list[str]:
    """The outermost modules that a PEFT adapter brings whole: those changed, and a classifier, as PEFT does."""
    changed, kept = assembly.changed, list[str]()
    kind = assembly.anatomy.model_class.rpartition("For")[2]
    endings = _KEPT_BY_PEFT.get(kind, ())
    for name, module in assembly.model.named_modules():
        inside = {f"{name}.{inner}" for inner, _ in module.named_parameters()}
        own = {f"{name}.{inner}" for inner, _ in module.named_parameters(recurse=False)}
        wanted = inside <= changed or own & changed or name.endswith(endings)
        if inside and wanted and not name.startswith(tuple(f"{whole}." for whole in kept)):
            kept.append(name)
    return kept


def _write_peft(home: Path, assembly: Assembly, base: Base, final: Path) -> None:
    """One configuration for all rules, with patterns where ranks differ, so that plain PEFT loads all of it."""
    kept, first = _kept_whole(assembly), assembly.attachments[0]
    method = methods.load(first.method)
    assert method.config is not None
    own = {path: item.options for item in assembly.attachments for path in _matrices(assembly, item)}
    patterns = {
        pattern: {path: options[key] for path, options in own.items() if options[key] != first.options[key]}
        for key, pattern in _PATTERNED.items()
        if key in first.options
    }
    every = assembly.anatomy.part("all")
    config = method.config(
        method.Options(**{key: value for key, value in first.options.items() if key != "init_lora_weights"}),
        replace(every, matrices=tuple(name for name in every.matrices if name in own)),
        target_modules=list(own),
        modules_to_save=kept or None,
        base_model_name_or_path=str(final / BASE) if base.name == BASE else _known_as(base),
        revision=base.revision,
        inference_mode=True,
        task_type=tasks.peft_type(base.auto_class),
        **patterns,
    )
    config.save_pretrained(str(home))
    tensors = {name_in_file(name): assembly.parameter(name) for name in assembly.added}
    for path in kept:
        module = assembly.model.get_submodule(path)
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    save_file(
        {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        str(home / "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )


def _matrices(assembly: Assembly, attachment: Attachment) -> list[str]:
    """Names of the matrices that an attachment sits on, from those of what it added."""
    every = assembly.anatomy.part("all").matrices
    return [name for name in every if any(added.startswith(f"{name}.") for added in attachment.parameters)]


def _known_as(base: Base) -> str:
    """What others call the base: a packaged model by its name on the hub."""
    return PACKAGED[base.name][2] if base.name in PACKAGED else base.name


def _snippet(kind: Kind, base: Base, task: Task) -> str:
    if kind == "checkpoint":
        return (
            f"from transformers import AutoTokenizer, {base.auto_class}\n\n"
            f'model = {base.auto_class}.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        )
    if kind == "adapter":
        name = f"FOLDER/{BASE}" if base.name == BASE else _known_as(base)
        # In float32, as it was tuned: transformers would take a base of half precision as it is.
        keys = 'config=config, dtype="float32", ignore_mismatched_sizes=True'
        return (
            f"from peft import PeftModel\nfrom transformers import AutoConfig, AutoTokenizer, {base.auto_class}\n\n"
            'config = AutoConfig.from_pretrained("FOLDER")\n'
            f'base = {base.auto_class}.from_pretrained("{name}", {keys})\n'
            'model = PeftModel.from_pretrained(base, "FOLDER").eval()\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        )
    example = dict.fromkeys(task.inputs, "...")
    return f'import hybridtune\n\nrun = hybridtune.load("FOLDER")\nprint(run.predict([{example}]))\n'


def _readme(kind: Kind, base: Base, manifest: dict[str, Any], snippet: str, task: Task) -> str:
    needs = f"{base.name} (fingerprint {base.fingerprint})"
    says = {
        "checkpoint": "a plain Hugging Face checkpoint; nothing but transformers is needed to load it",
        "adapter": f"a PEFT adapter; it needs its base model, {needs}, and the peft library",
        "delta": f"a delta on {needs}; it needs that model and the hybridtune library",
    }
    stages = "\n".join(
        f"- {stage['name']}: " + "; ".join(f"`{r['part']}: {r['method']}`" for r in stage["rules"])
        for stage in manifest["strategy"]["stages"]
    )
    return (
        f"# {base.name}, tuned for {manifest['task']['name']}\n\nThis folder is {says[kind]}.\n\n"
        f"```python\n{snippet}```\n\n"
        + (f"{task.reading}\n\n" if task.reading else "")
        + f"What it was tuned on was {'read in windows of' if task.windowed else 'cut after'} {manifest['max_length']} "
        + "tokens.\n\n"
        + f"Tuned with hybridtune {__version__}, strategy {manifest['strategy']['name']}:\n\n{stages}\n"
    )
