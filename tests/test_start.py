"""Starting points: PEFT's own adapters and earlier runs, gone on with, stacked upon or taken off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import texts
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file
from test_checkpoint import HEAD, LORA, TASK, tune

from hybridtune import api, checkpoint, export, start
from hybridtune import model as models
from hybridtune.console import Console
from hybridtune.errors import ModelError
from hybridtune.recipe import Stage, Strategy, Training
from hybridtune.resolve import resolve
from hybridtune.tasks.classification import Task

LABELS = Task(["a", "b"]).model_config()
CLASSIFIER = ("classifier.bias", "classifier.weight")


def adapter(base: Path, folder: Path, config: Any, auto: str = tiny.AUTO) -> torch.Tensor:
    """Writes an adapter as PEFT does, with other weights than at the start; returns the model's logits."""
    model = getattr(hf, auto).from_pretrained(base, **LABELS)
    tuned = peft.get_peft_model(model, config)
    tiny.shake((p for n, p in tuned.named_parameters() if "lora_" in n or "ia3_" in n or "classifier" in n), by=0.2)
    tuned.save_pretrained(folder)
    return tiny.logits(tuned.eval())


CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"], lora_dropout=0.1),
    "patterns": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "dense"], rank_pattern={"layer.1.*query": 4},
        alpha_pattern={"layer.0.intermediate.dense": 5}, exclude_modules=r"bert\.pooler.*|classifier.*",
    ),
    "dora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"], use_dora=True),
    "rslora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"], use_rslora=True),
    **{
        f"init {init}": lambda init=init: peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query", "dense"], init_lora_weights=init,
        )
        for init in (False, "gaussian", "orthogonal", "eva", "mica")  # the base stays as it was
    },
    "ia3": lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"],
        exclude_modules=r".*attention\.output\.dense",
    ),
}  # fmt: skip


def hidden(model: Any) -> torch.Tensor:
    """What a tiny BERT's body gives its head."""
    with torch.no_grad():
        return model.bert(**tiny.batch()).last_hidden_state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_body(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_body_that_would_begin_with_random_weights_is_refused(name: str, tmp_path: Path) -> None:
    """Transformers' question-answering classes of decoders look for the body under another name than checkpoints."""
    tiny.language_model(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"none of its weights fits \w+ForQuestionAnswering") as raised:
        models.load(str(tmp_path), "AutoModelForQuestionAnswering")
    assert raised.value.expected == "weights such as transformer.embed_tokens.weight"
    assert raised.value.mend == "task: generative_question_answering, if it is to write the answer"
    assert models.load(str(tmp_path), "AutoModelForSequenceClassification").new == ("score.weight",)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_is_the_same_model_and_round_trips(name: str, base: Path, tmp_path: Path) -> None:
    theirs = adapter(base, tmp_path / "peft", CONFIGS[name]())
    begun = start.load(str(tmp_path / "peft"), tiny.AUTO, LABELS)
    torch.testing.assert_close(tiny.logits(begun.loaded.model), theirs, atol=1e-6, rtol=0)
    assert begun.base.name == str(base)
    (tmp_path / "delta").mkdir()
    checkpoint.write(tmp_path / "delta", begun.assembly, begun.base)
    again, _, _ = checkpoint.load(tmp_path / "delta")
    assert torch.equal(tiny.logits(again.model), tiny.logits(begun.loaded.model))


@pytest.mark.parametrize("previous", ["keep", "merge", "drop"])
def test_the_first_stage_says_what_becomes_of_it(previous: str, base: Path, tmp_path: Path) -> None:
    theirs = adapter(base, tmp_path / "peft", CONFIGS["lora"]())
    begun = start.load(str(tmp_path / "peft"), tiny.AUTO, LABELS)
    before = {name: p.detach().clone() for name, p in begun.loaded.model.named_parameters() if "lora" in name}
    parts = ["layers.attention.q", "layers.attention.v"]
    rules = [{"part": part, "method": "lora"} for part in parts] if previous != "keep" else [
        {"part": "re:.*(query|value)", "method": "lora"}
    ]  # fmt: skip
    asked = Strategy(name="s", stages=[Stage(rules=rules, previous=previous)])
    full, defaults = resolve(asked, Training(), begun.assembly, 32)
    kept = previous == "keep"
    ranks = {rule.options["r"] for rule in full.stages[0].rules if rule.method == "lora"}
    assert ranks == ({3} if kept else {16})  # its own rank, not the default
    assert "stages.0.rules.0.r" in defaults
    composition = begun.assembly.begin(full.stages[0])
    names = {name for name in composition.names if "lora" in name}
    if kept:
        assert names == set(before)
        assert all(torch.equal(begun.assembly.parameter(name), value) for name, value in before.items())
    else:
        assert len(names) == len(before)
        assert {begun.assembly.parameter(n).shape[0] for n in names if "lora_A" in n} == {16}
    if previous != "drop":
        torch.testing.assert_close(tiny.logits(begun.loaded.model), theirs, atol=1e-5, rtol=0)
    else:
        assert (tiny.logits(begun.loaded.model) - theirs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
            "kind PROMPT_TUNING cannot",
        ),
        (lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all"), "bias cannot be gone on"),
        (
            lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["word_embeddings"]),
            "tensors that hybridtune does not know.*\\n.*word_embeddings",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(config: Any, says: str, base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "peft", config())
    with pytest.raises(ModelError, match=says):
        start.load(str(tmp_path / "peft"), tiny.AUTO, LABELS)


# --- an adapter whose initialisation has changed its base


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_an_adapter_that_belongs_to_changed_weights_is_refused(init: str, base: Path, tmp_path: Path) -> None:
    from_weights = init.startswith("pissa") or init == "olora"
    made = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=init if from_weights else True
    )
    adapter(base, tmp_path, made)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    assert told["init_lora_weights"] == (init if from_weights else True)
    file.write_text(json.dumps(told | {"init_lora_weights": init}))  # the others need data or a GPU
    says = rf"other weights than its base has[\s\S]*found: +init_lora_weights: {init}[\s\S]*merge_and_unload"
    with pytest.raises(ModelError, match=says) as refused:
        start.load(str(tmp_path), tiny.AUTO, LABELS)
    assert ("path_initial_model_for_weight_conversion" in str(refused.value)) == (init != "loftq")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_as_pefts_conversion_saves_it_it_is_the_same_model(init: str, base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=init)
    tuned = peft.get_peft_model(getattr(hf, tiny.AUTO).from_pretrained(base, **LABELS), config).eval()
    tuned.save_pretrained(tmp_path / "first")
    start_at = hidden(tuned)
    tiny.shake((p for n, p in tuned.named_parameters() if "lora_" in n), by=0.2)
    theirs = hidden(tuned)
    tuned.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    begun = start.load(str(tmp_path / "peft"), tiny.AUTO, LABELS)
    torch.testing.assert_close(hidden(begun.loaded.model), theirs, atol=1e-5, rtol=0)
    assert (theirs - start_at).abs().max() > 1e-2
    assert begun.loaded.new == CLASSIFIER  # PEFT's conversion leaves the head out


def test_one_of_our_own_brings_its_changed_base(base: Path, tmp_path: Path) -> None:
    made = tune(tmp_path / "stage", base, [tiny.rule("layers", "lora", r=2, init_lora_weights="pissa"), HEAD])
    export.write(tmp_path / "model", tmp_path / "stage", "adapter")
    begun = start.load(str(tmp_path / "model"), tiny.AUTO, TASK.model_config())
    torch.testing.assert_close(tiny.logits(begun.loaded.model).numpy(), made.logits, atol=1e-6, rtol=0)


# --- other labels, other shapes

WITH_HEAD: dict[str, tuple[export.Kind, list[list[Any]]]] = {
    "adapter": ("adapter", [[LORA, HEAD]]),
    "adapter and base": ("adapter", [[tiny.rule("layers[1:]", "full"), HEAD], [LORA]]),
    "checkpoint": ("checkpoint", [[tiny.rule("layers[1:]", "full"), HEAD]]),
    "delta": ("delta", [[tiny.rule("layers[1:]", "adapter"), HEAD]]),
}


@pytest.mark.parametrize("labels", [["x", "y", "z"], ["x", "y", "w"], ["x", "y"], ["x", "y", "z", "w", "v"]])
@pytest.mark.parametrize("base_has_one", [False, True], ids=["body", "classifier"])
@pytest.mark.parametrize("what", WITH_HEAD)
def test_a_head_for_other_labels_is_a_fresh_one(
    what: str, base_has_one: bool, labels: list[str], base: Path, tmp_path: Path
) -> None:
    if base_has_one:
        base = tiny.save_pretrained(tmp_path / "base", num_labels=3)
    kind, stages = WITH_HEAD[what]
    made = tune(tmp_path / "stage", base, *stages)
    export.write(tmp_path / "model", tmp_path / "stage", kind)
    torch.manual_seed(0)
    begun = start.load(str(tmp_path / "model"), tiny.AUTO, Task(labels).model_config())
    model, tuned = begun.loaded.model, made.assembly.model
    torch.testing.assert_close(hidden(model), hidden(tuned), atol=1e-5, rtol=0)
    trained, head = tuned.classifier, model.classifier
    if labels == ["x", "y", "z"]:
        assert begun.loaded.new == begun.assembly.anatomy.new == ()
        assert torch.equal(head.weight, trained.weight)
    else:
        assert begun.loaded.new == begun.assembly.anatomy.new == CLASSIFIER
        assert head.weight.shape == (len(labels), 32)
        assert not head.bias.any()
        assert not torch.isclose(head.weight[:2], trained.weight[:2], atol=1e-3).all(1).any()
        assert set(CLASSIFIER) <= set(begun.assembly.delta)
    assert model.name_or_path == begun.base.name
    assert not model.training
    (tmp_path / "again").mkdir()
    checkpoint.write(tmp_path / "again", begun.assembly, begun.base)
    again, _, _ = checkpoint.load(tmp_path / "again")
    assert torch.equal(tiny.logits(again.model), tiny.logits(model))


@pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
def test_a_fresh_head_is_what_transformers_would_start_with(architecture: str, tmp_path: Path) -> None:
    base = tiny.save_pretrained(tmp_path / "base", architecture, num_labels=3)
    tune(tmp_path / "stage", base, [HEAD])
    torch.manual_seed(0)
    begun = start.load(str(tmp_path / "stage"), tiny.AUTO, Task(["x", "y", "w"]).model_config())
    lacks = models.load(str(base), tiny.AUTO, num_labels=4)
    assert begun.loaded.new == lacks.new
    for name in lacks.new:
        found, theirs = (one.model.get_parameter(name).std().item() for one in (begun.loaded, lacks))
        assert found == pytest.approx(theirs, rel=0.3)


def test_what_of_a_head_does_not_depend_on_the_labels_stays(tmp_path: Path) -> None:
    base = tiny.save_body(tmp_path / "base", "roberta")
    made = tune(tmp_path / "stage", base, [LORA, HEAD])
    for kind in ("adapter", "delta"):
        export.write(tmp_path / kind, tmp_path / "stage", kind)
        begun = start.load(str(tmp_path / kind), tiny.AUTO, Task(["v", "w"]).model_config())
        assert begun.loaded.new == ("classifier.out_proj.bias", "classifier.out_proj.weight")
        assert torch.equal(
            begun.loaded.model.classifier.dense.weight, made.assembly.parameter("classifier.dense.weight")
        )


@pytest.mark.parametrize("labels", [["x", "y", "w"], ["x", "y"]])
@pytest.mark.parametrize(("part", "left"), [("all", "all"), ("re:classifier", None)])
def test_what_sat_on_the_head_for_other_labels_is_gone(
    part: str, left: str | None, labels: list[str], tmp_path: Path
) -> None:
    base = tiny.save_pretrained(tmp_path / "base", num_labels=3)
    tune(tmp_path / "stage", base, [tiny.rule(part, "lora", r=2)])
    begun = start.load(str(tmp_path / "stage"), tiny.AUTO, Task(labels).model_config())
    assert [attachment.part for attachment in begun.assembly.attachments] == ([left] if left else [])
    assert not any("classifier" in name for name in begun.assembly.added)
    (tmp_path / "again").mkdir()
    checkpoint.write(tmp_path / "again", begun.assembly, begun.base)
    again, _, _ = checkpoint.load(tmp_path / "again")
    assert torch.equal(tiny.logits(again.model), tiny.logits(begun.loaded.model))


def test_an_adapter_of_peft_for_another_number_of_labels_gets_a_new_head(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path, CONFIGS["lora"]())
    same, begun = (start.load(str(tmp_path), tiny.AUTO, Task(list(labels)).model_config()) for labels in ("ab", "abc"))
    assert same.loaded.new == ()
    assert begun.loaded.new == CLASSIFIER
    assert torch.equal(hidden(begun.loaded.model), hidden(same.loaded.model))


@pytest.mark.parametrize("kept", [None, ["word_embeddings"]])
def test_what_an_adapter_brings_in_another_shape_is_refused(kept: list[str] | None, base: Path, tmp_path: Path) -> None:
    model = getattr(hf, tiny.AUTO).from_pretrained(base, **LABELS)
    model.resize_token_embeddings(104)  # PEFT saves them then, asked or not
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=kept)
    embeddings = False if kept else "auto"
    peft.get_peft_model(model, config).save_pretrained(tmp_path, save_embedding_layers=embeddings)
    says = r"bert\.embeddings\.word_embeddings\.weight of the adapter does not fit.*\n.*\(104, 32\)\n.*\(100, 32\)"
    with pytest.raises(ModelError, match=says):
        start.load(str(tmp_path), tiny.AUTO, LABELS)


@pytest.mark.parametrize(("first", "then"), [("abc", "abcde"), ("abcde", "abc"), ("abc", "xyz")])
def test_a_base_with_a_head_of_its_own_is_the_same_base_for_other_labels(first: str, then: str, tmp_path: Path) -> None:
    base = tiny.save_pretrained(tmp_path / "base", num_labels=3)
    tuned = start.load(str(base), tiny.AUTO, Task(list(first)).model_config())
    tuned.assembly.begin(Stage(rules=[tiny.rule("layers[2]", "full"), HEAD]))
    (tmp_path / "delta").mkdir()
    checkpoint.write(tmp_path / "delta", tuned.assembly, tuned.base)
    asked = Task(list(then)).model_config()
    assert start.load(str(tmp_path / "delta"), tiny.AUTO, asked).loaded.new == CLASSIFIER
    tiny.save_pretrained(base, num_labels=3, seed=1)
    with pytest.raises(ModelError, match="was trained on other weights"):
        start.load(str(tmp_path / "delta"), tiny.AUTO, asked)


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "c"], ["a", "b", "c"]])
def test_a_delta_is_gone_on_with_and_other_labels_get_a_new_head(labels: list[str], base: Path, tmp_path: Path) -> None:
    first = start.load(str(base), tiny.AUTO, LABELS)
    rules = [tiny.rule("layers[0]", "adapter"), tiny.rule("layers[1:].mlp", "full"), tiny.rule("head", "full")]
    composition = first.assembly.begin(Stage(rules=rules))
    tiny.shake(first.assembly.parameter(name) for name in composition.names)
    (tmp_path / "delta").mkdir()
    checkpoint.write(tmp_path / "delta", first.assembly, first.base)
    begun = start.load(str(tmp_path / "delta"), tiny.AUTO, Task(labels).model_config())
    same = labels == ["a", "b"]
    assert begun.loaded.new == (() if same else CLASSIFIER)
    assert begun.assembly.attachments == first.assembly.attachments
    assert begun.loaded.model.config.num_labels == len(labels)
    if same:
        assert torch.equal(tiny.logits(begun.loaded.model), tiny.logits(first.loaded.model))
    assert torch.equal(hidden(begun.loaded.model), hidden(first.loaded.model))
    assert begun.base.name == first.base.name and begun.base.fingerprint == first.base.fingerprint
    (tmp_path / "again").mkdir()
    checkpoint.write(tmp_path / "again", begun.assembly, begun.base)
    reloaded, _, _ = checkpoint.load(tmp_path / "again")
    assert torch.equal(tiny.logits(reloaded.model), tiny.logits(begun.loaded.model))


def words(count: int) -> list[dict[str, Any]]:
    return [{"tokens": ["a", "good", letter], "tags": ["O", "B-X", "O"]} for letter in "bcdefghijklmnopqrst"[:count]]


@pytest.mark.parametrize("kind", ["delta", "adapter", "checkpoint"])
def test_a_run_of_another_task(kind: str, base: Path, tmp_path: Path) -> None:
    method = {"delta": "adapter", "adapter": "lora", "checkpoint": "full"}[kind]
    quiet = {"console": Console(quiet=True), "baselines": False, "num_train_epochs": 1}
    run = api.tune(
        **quiet,
        model=str(base),
        task="classification",
        strategy=[{"rules": [{"part": "layers", "method": method}]}],
        output=str(tmp_path / "a"),
        **texts.splits(16, 8, 8),
    )
    run.export(tmp_path / "out", kind)
    rows = {"train": words(12), "validation": words(15)[12:], "test": words(19)[15:]}
    asked = {"model": str(tmp_path / "out"), "task": "tagging", "strategy": "head", "output": str(tmp_path / "b")}
    asked |= rows
    if kind == "checkpoint":  # what the mend says: its layers are any task's
        there = api.tune(**quiet, **asked)
        tuned = load_file(tmp_path / "out" / "model.safetensors")
        name = next(name for name in tuned if name.endswith("layer.2.output.dense.weight"))
        assert torch.equal(there.model.state_dict()[name], tuned[name])
        return
    with pytest.raises(ModelError, match="was tuned for another task") as raised:
        api.tune(**quiet, **asked)
    assert "--kind checkpoint" in str(raised.value.mend) and str(base) in str(raised.value.mend)
    if kind == "adapter":  # the labels' names stand beside it
        told = hf.AutoConfig.from_pretrained(tmp_path / "out")
        assert told.id2label == {0: "ham", 1: "spam"}
