"""What is handed over, where there is no hybridtune: every strategy that merges, and every kind of PEFT adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from elsewhere import PLAIN, in_a_new_process
from safetensors.torch import load_file
from test_checkpoint import TASK, Tuned, tune

from hybridtune import export
from hybridtune.recipe import Rule, Training, built_in_strategies, load_strategy
from hybridtune.resolve import resolve

Bases = Callable[[str], Path]
HEAD = tiny.rule("head", "full")
# Strategies that end with something that plain files have no place for: Llama's have none for biases.
STAY_DELTAS = {"bert": {"adapter", "full-then-adapter", "mam", "prefix", "prompt"}}
STAY_DELTAS["llama"] = STAY_DELTAS["bert"] | {"bitfit"}
# Strategies whose result is one PEFT adapter and a head, maybe with a base of its own.
PEFT_ONLY = {"ia3", "lora", "lp-lora", "full-then-lora", "relora", "top-full-lora-below"}

RANKS = [tiny.rule("layers[0:2]", "lora", r=2), tiny.rule("layers[2].mlp", "lora", r=4, lora_alpha=6), HEAD]
ADAPTERS: dict[str, tuple[str, list[Rule]]] = {
    "a rank for each part, BERT": ("bert", RANKS),
    "a rank for each part, Llama": ("llama", RANKS),
    "dora": ("bert", [tiny.rule("layers", "lora", r=2, use_dora=True), HEAD]),
    "dora, transposed": ("gpt2", [tiny.rule("layers", "lora", r=2, use_dora=True), HEAD]),
    "rslora": ("llama", [tiny.rule("layers", "lora", r=4, use_rslora=True), HEAD]),
    "orthogonal": ("bert", [tiny.rule("layers", "lora", r=4, init_lora_weights="orthogonal")]),
    "mica": ("bert", [tiny.rule("layers", "lora", r=4, init_lora_weights="mica"), HEAD]),
    **{f"ia3, {name}": (name, [tiny.rule("layers", "ia3"), HEAD]) for name in ("bert", "llama", "gpt2", "t5", "bart")},
    "ia3 on values and the feed-forward blocks": (
        "bert",
        [tiny.rule("layers[1:].attention.v", "ia3"), tiny.rule("layers.mlp", "ia3"), HEAD],
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Gives the folder of a tiny pretrained model without a head, written once."""
    home = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        return home / name if (home / name).is_dir() else tiny.save_body(home / name, name)

    return folder


def handed_over(tuned: Iterable[tuple[Tuned, export.Kind]]) -> list[float]:
    """Writes tuned models as some kind, loads each by its snippet in a process without hybridtune.

    Returns:
        How far the logits are from the tuned model's, as a part of its largest where that is above 1.
    """
    jobs, expected = [], []
    for made, kind in tuned:
        written, snippet = export.write(made.folder / "model", made.folder, kind)
        assert written == kind
        jobs.append((snippet.replace("FOLDER", str(made.folder / "model")), str(made.folder / "logits.json")))
        expected.append(made.logits)
    in_a_new_process(PLAIN, jobs)
    found = [json.loads(Path(out).read_text()) for _, out in jobs]
    assert [told for told in found if isinstance(told, str)] == []
    return [
        float(np.abs(np.array(logits) - own).max() / max(1.0, np.abs(own).max()))
        for (logits, _, _), own in zip(found, expected, strict=True)
    ]


def test_every_strategy_that_merges_is_a_plain_checkpoint(bases: Bases, tmp_path: Path) -> None:
    ready: dict[str, Tuned] = {}
    for architecture in ("bert", "llama"):
        base, kinds = bases(architecture), {}
        start, plain = tiny.assembly(base, **TASK.model_config())
        for name in built_in_strategies():
            stages, where = resolve(load_strategy(name), Training(), start, 32)[0].stages, f"{architecture} {name}"
            made = tune(tmp_path / where, base, *stages)
            kinds[name] = export.kinds(made.assembly, plain)
            if "checkpoint" in kinds[name]:
                ready[where] = made
        assert {name for name, found in kinds.items() if found == ["delta"]} == STAY_DELTAS[architecture]
        assert {name for name, found in kinds.items() if "adapter" in found} == PEFT_ONLY
    differences = handed_over((made, "checkpoint") for made in ready.values())
    assert {n: d for n, d in zip(ready, differences, strict=True) if d > 1e-5} == {}


def test_every_peft_adapter_is_plain_pefts(bases: Bases, tmp_path: Path) -> None:
    ready = {
        name: tune(tmp_path / str(number), bases(architecture), rules)
        for number, (name, (architecture, rules)) in enumerate(ADAPTERS.items())
    }
    for made in ready.values():  # what was added matters, or losing it would go unseen
        assert np.abs(made.logits - made.less).max() > 1e-3
    differences = handed_over((made, "adapter") for made in ready.values())
    assert {n: d for n, d in zip(ready, differences, strict=True) if d > 1e-6} == {}


def test_a_base_of_half_precision_is_tuned_and_handed_over_in_float32(tmp_path: Path) -> None:
    """Merging rounds nothing, and an adapter's snippet loads its base in float32 too."""
    body = tiny.classifier("bert").base_model
    tiny.shake(body.parameters(), by=0.2)
    body.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    kinds: tuple[export.Kind, ...] = ("checkpoint", "adapter")
    ready = [(tune(tmp_path / kind, tmp_path / "base", RANKS), kind) for kind in kinds]
    assert max(handed_over(ready)) <= 1e-6
    for kind, file in zip(kinds, ("model.safetensors", "adapter_model.safetensors"), strict=True):
        tensors = load_file(str(tmp_path / kind / "model" / file))
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
