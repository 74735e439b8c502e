"""Soft prompts, against PEFT's, embeddings put together by hand, and a plain loop of greedy decoding."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset
from torch import nn

from hybridtune import checkpoint, methods, predict
from hybridtune.anatomy import Anatomy
from hybridtune.errors import MethodError, ModelError, RecipeError
from hybridtune.methods import prompt
from hybridtune.recipe import Stage

COUNT = 4
LANGUAGE_MODELS = (*tiny.CAUSAL, *tiny.SEQ2SEQ)
STACKED = [name for name in tiny.CLASSIFIERS if name not in tiny.SEQ2SEQ]

on_every_architecture = pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
on_every_language_model = pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
on_every_causal_model = pytest.mark.parametrize("architecture", tiny.CAUSAL)


def attach(model: nn.Module, part: str = "embeddings", **options: object) -> nn.Parameter:
    """Puts a prompt on a model and returns it."""
    options = {"num_virtual_tokens": COUNT, **options}
    (name,) = prompt.attach(model, Anatomy(model).part(part), methods.options_of(methods.load("prompt"), options))
    return model.get_parameter(name)


def classifier(architecture: str) -> hf.PreTrainedModel:
    model = tiny.classifier(architecture).double()
    tiny.shake(model.parameters(), by=0.2)
    return model


def language_model(architecture: str) -> hf.PreTrainedModel:
    return tiny.language_model(architecture).double()


def inputs(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    batch = tiny.batch()
    return batch | ({"decoder_input_ids": batch["input_ids"][:, :5]} if model.config.is_encoder_decoder else {})


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def widened(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([mask.new_ones(len(mask), COUNT), mask], dim=1)


def by_hand(model: nn.Module, vectors: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a plain model has to be given so that it sees the prompt."""
    embedded = model.get_input_embeddings()(batch["input_ids"])
    return {
        "inputs_embeds": torch.cat([vectors.expand(len(embedded), -1, -1), embedded], dim=1),
        "attention_mask": widened(batch["attention_mask"]),
    }


# --- the same numbers as elsewhere


@on_every_language_model
def test_logits_are_those_of_peft(architecture: str) -> None:
    model = language_model(architecture)
    kind = "SEQ_2_SEQ_LM" if architecture in tiny.SEQ2SEQ else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=COUNT)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    vectors = attach(model)
    weight = theirs.prompt_encoder.default.embedding.weight
    weight.data = weight.data.double()
    weight.data[:COUNT] = vectors.data
    given = inputs(model)
    with torch.no_grad():
        ours, expected = model(**given).logits, theirs(**given).logits
    rows = given.get("decoder_input_ids", given["input_ids"])
    assert ours.shape == (*rows.shape, 100)
    seen = (rows != 0).unsqueeze(-1)  # what stands at padding means nothing
    close(ours * seen, expected[:, -rows.shape[1] :] * seen)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_the_body_sees_the_prompt_and_the_head_its_own_rows(architecture: str) -> None:
    model = classifier(architecture)
    plain = copy.deepcopy(model)
    vectors = attach(model)
    given = by_hand(plain, vectors, tiny.batch())
    with torch.no_grad():
        hidden = plain.base_model(**given).last_hidden_state
        close(model.base_model(**tiny.batch()).last_hidden_state, hidden[:, COUNT:])
        if architecture == "bert":
            logits = plain.classifier(torch.tanh(plain.bert.pooler.dense(hidden[:, COUNT])))
            close(tiny.logits(model), logits)


@on_every_architecture
def test_features_are_means_over_a_rows_own_tokens(architecture: str) -> None:
    """Also where the encoder's output has the prompt's places in front."""
    model = classifier(architecture)
    plain, vectors = copy.deepcopy(model), attach(model)
    body = plain.get_encoder() if model.config.is_encoder_decoder else plain.base_model
    rows = [row | {"labels": 0} for row in tiny.rows(3)]
    found = predict.features(model, Dataset.from_list(rows), tiny.tokenizer(), batch_size=2)
    for row, mean in zip(rows, found, strict=True):
        batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = body(**by_hand(plain, vectors, batch)).last_hidden_state
        np.testing.assert_allclose(mean, hidden[0, COUNT:].mean(0).numpy(), rtol=1e-5, atol=1e-6)


def test_robertas_positions_go_on_behind_the_prompt_and_skip_padding() -> None:
    model = classifier("roberta")
    plain, vectors = copy.deepcopy(model), attach(model)
    with torch.no_grad():
        for side in ("right", "left"):
            batch = tiny.batch()
            if side == "left":
                batch = {key: torch.cat([rows[:, 5:], rows[:, :5]], dim=1)[1:] for key, rows in batch.items()}
            mask = widened(batch["attention_mask"])
            given = by_hand(plain, vectors, batch) | {"position_ids": mask.cumsum(1) * mask}  # padding is 0, first is 1
            close(
                model.roberta(**batch).last_hidden_state,
                plain.roberta(**given).last_hidden_state[:, COUNT:],
            )


@pytest.mark.parametrize("architecture", STACKED)
def test_shapes_stay(architecture: str) -> None:
    model = tiny.classifier(architecture)
    before = model(**tiny.batch(), output_hidden_states=True)
    attach(model)
    after = model(**tiny.batch(), output_hidden_states=True)
    assert [h.shape for h in after.hidden_states] == [h.shape for h in before.hidden_states]
    assert after.logits.shape == before.logits.shape
    first, *_ = model.base_model(**tiny.batch(), return_dict=False)
    assert first.shape == (*tiny.batch()["input_ids"].shape, 32)


@on_every_architecture
def test_padding_and_a_mask_that_is_left_out_change_nothing(architecture: str) -> None:
    model = classifier(architecture)
    attach(model)
    whole = tiny.logits(model)
    short = {key: rows[1:, :5] for key, rows in tiny.batch().items()}
    with torch.no_grad():
        close(model(**short).logits, whole[1:])
        close(model(input_ids=short["input_ids"]).logits, whole[1:])


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_embedded_text_and_token_types_are_taken_too(architecture: str) -> None:
    model = classifier(architecture)
    plain, vectors = copy.deepcopy(model), attach(model)
    batch = tiny.batch()
    with torch.no_grad():
        embedded = batch | {"inputs_embeds": plain.get_input_embeddings()(batch["input_ids"])}
        body = model.get_encoder() if architecture == "t5" else model.base_model
        del embedded["input_ids"]
        close(body(**embedded).last_hidden_state, body(**batch).last_hidden_state)
        close(body(batch["input_ids"], batch["attention_mask"])[0], body(**batch)[0])
        if architecture == "bert":
            types = torch.ones_like(batch["input_ids"])
            given = by_hand(plain, vectors, batch)
            given["token_type_ids"] = torch.cat([types.new_zeros(2, COUNT), types], dim=1)
            found = body(**batch, token_type_ids=types).last_hidden_state
            close(found, plain.bert(**given).last_hidden_state[:, COUNT:])


# --- generation


def greedy(model: nn.Module, vectors: torch.Tensor, batch: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Greedy decoding of a plain decoder, everything anew in every step."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        given = by_hand(model, vectors, {"input_ids": ids, "attention_mask": mask})
        text = (mask.cumsum(1) - 1).clamp(min=0) + COUNT
        positions = torch.cat([torch.arange(COUNT).expand(len(ids), -1), text], dim=1)
        with torch.no_grad():
            logits = model(**given, position_ids=positions).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def left_padded() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 5, 6, 7, 8], [0, 0, 2, 10, 11]])
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


@on_every_causal_model
def test_generation_is_a_plain_loop_with_a_cache_and_without(architecture: str) -> None:
    model = language_model(architecture)
    plain, vectors = copy.deepcopy(model), attach(model)
    expected = greedy(plain, vectors, left_padded(), steps=8)
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for cached in (True, False):
        assert torch.equal(model.generate(**left_padded(), **how, use_cache=cached), expected)
    alone = {"input_ids": left_padded()["input_ids"][1:, 2:]}  # no padding, no mask
    assert torch.equal(model.generate(**alone, **how), expected[1:, 2:])
    assert not torch.equal(plain.generate(**left_padded(), **how), expected)


@on_every_language_model
def test_beams_are_the_same_with_a_cache_and_without(architecture: str) -> None:
    model = language_model(architecture)
    attach(model)
    batch = tiny.batch() if architecture in tiny.SEQ2SEQ else left_padded()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    found = model.generate(**batch, **how, use_cache=True)
    assert torch.equal(found, model.generate(**batch, **how, use_cache=False))
    assert len(found) == 2


@pytest.mark.parametrize("architecture", tiny.SEQ2SEQ)
def test_a_decoder_attends_to_the_prompt(architecture: str) -> None:
    model = language_model(architecture)
    plain, vectors = copy.deepcopy(model), attach(model)
    how = {"max_new_tokens": 6, "do_sample": False}
    given = by_hand(plain.get_encoder(), vectors, tiny.batch())
    with torch.no_grad():
        hidden = plain.get_encoder()(**given)
        start = torch.tensor([[model.config.decoder_start_token_id, 5, 6]] * 2)
        expected = plain(encoder_outputs=hidden, attention_mask=given["attention_mask"], decoder_input_ids=start).logits
        close(model(**tiny.batch(), decoder_input_ids=start).logits, expected)
        close(model.get_encoder()(**tiny.batch()).last_hidden_state, hidden.last_hidden_state)
    found = model.generate(**tiny.batch(), **how)
    assert torch.equal(found, plain.generate(encoder_outputs=hidden, attention_mask=given["attention_mask"], **how))


def test_an_encoder_decoder_of_two_models() -> None:
    model = tiny.encoder_decoder()
    tiny.shake(model.parameters(), by=0.2)
    model.double()
    plain, vectors = copy.deepcopy(model), attach(model)
    given, decoded = by_hand(plain.encoder, vectors, tiny.batch()), {"decoder_input_ids": tiny.batch()["input_ids"]}
    with torch.no_grad():
        close(model(**tiny.batch(), **decoded).logits, plain(**given, **decoded).logits)
    how = {"max_new_tokens": 4, "decoder_start_token_id": 2, "pad_token_id": 0}
    assert model.generate(**tiny.batch(), **how).shape == (2, 5)


# --- training


def loss_by_hand(plain: nn.Module, architecture: str, vectors: torch.Tensor) -> torch.Tensor:
    batch = tiny.batch()
    hidden = plain.base_model(**by_hand(plain, vectors, batch)).last_hidden_state
    if architecture == "bert":
        logits = plain.classifier(torch.tanh(plain.bert.pooler.dense(hidden[:, COUNT])))
    else:
        logits = plain.score(hidden[torch.arange(2), batch["attention_mask"].sum(1) - 1 + COUNT])
    return nn.functional.cross_entropy(logits, torch.tensor([0, 1]))


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "gemma"])
def test_one_step_is_down_the_gradient(architecture: str, checkpointing: bool | None) -> None:
    model = classifier(architecture)
    plain, vectors = copy.deepcopy(model), attach(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    leaf = vectors.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_by_hand(plain, architecture, leaf), leaf)
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    tiny.train(model, [vectors], steps=1, rate=0.1)
    assert gradient.abs().max() > 1e-6
    close(vectors.detach(), leaf.detach() - 0.1 * gradient)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) == 1
    assert changed[0].endswith("soft_prompt.prompt")
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != changed[0])


@on_every_architecture
def test_all_of_it_is_trained_and_nothing_else(architecture: str) -> None:
    model = classifier(architecture)
    own, vectors = list(model.parameters()), attach(model)
    before = [parameter.detach().clone() for parameter in own]
    start = vectors.detach().clone()
    tiny.train(model, [vectors], steps=2, rate=1.0)
    assert all(torch.equal(now, then) for now, then in zip(own, before, strict=True))
    assert ((vectors - start).abs().amax(1) > 0).all()


# --- on and off


@on_every_architecture
def test_detached_the_model_is_what_it_was(architecture: str) -> None:
    def anatomy_of(model: nn.Module) -> dict[str, object]:
        hooks = {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs))
            for n, m in model.named_modules()
        }
        there = {**dict(model.named_modules()), **dict(model.named_parameters())}
        return {"hooks": hooks, "objects": {n: id(x) for n, x in there.items()}, "keys": list(model.state_dict())}

    model = tiny.classifier(architecture)
    before, logits = anatomy_of(model), tiny.logits(model)
    part = Anatomy(model).part("all")
    names = prompt.attach(model, part, prompt.Options(num_virtual_tokens=COUNT))
    tiny.shake([model.get_parameter(names[0])])
    assert not torch.equal(tiny.logits(model), logits)
    prompt.detach(model, names)
    assert anatomy_of(model) == before
    assert torch.equal(tiny.logits(model), logits)


@on_every_architecture
def test_a_copy_is_independent(architecture: str) -> None:
    model = tiny.classifier(architecture)
    tiny.shake(model.parameters(), by=0.2)
    vectors = attach(model)
    other, before = copy.deepcopy(model), tiny.logits(model)
    assert torch.equal(tiny.logits(other), before)
    copied = dict(other.named_parameters())[next(n for n, p in model.named_parameters() if p is vectors)]
    tiny.shake([copied], by=1.0)
    assert torch.equal(tiny.logits(model), before)
    assert not torch.allclose(tiny.logits(other), before, atol=1e-6)


@on_every_architecture
def test_saved_and_loaded_the_logits_are_equal(architecture: str, tmp_path: Path) -> None:
    assembly, base = tiny.assembly(tiny.save_pretrained(tmp_path / "base", architecture), num_labels=5)
    rules = [tiny.rule("new", "full"), tiny.rule("embeddings", "prompt", num_virtual_tokens=COUNT)]
    composition = assembly.begin(Stage(rules=rules))
    tiny.shake(assembly.parameter(name) for name in composition.names)
    checkpoint.write(tmp_path, assembly, base)
    loaded, again, _ = checkpoint.load(tmp_path)
    assert np.array_equal(tiny.logits(loaded.model).numpy(), tiny.logits(assembly.model).numpy())
    assert again.attachments == assembly.attachments


@on_every_architecture
def test_a_meta_model_gets_the_same_parameters(architecture: str) -> None:
    with torch.device("meta"):
        meta = tiny.classifier(architecture)
    for options in ({}, {"prompt_tuning_init": "RANDOM"}):
        vectors = attach(copy.deepcopy(meta), **options)
        assert vectors.is_meta
        assert vectors.shape == (COUNT, 32)


# --- where it starts


@pytest.mark.parametrize("architecture", ["bert", "gemma"])
def test_it_starts_as_tokens_noise_or_a_text(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_pretrained(tmp_path, architecture)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    scale = 32**0.5 if architecture == "gemma" else 1.0
    table = model.get_input_embeddings().weight * scale
    sampled = attach(copy.deepcopy(model))
    assert all((row == table).all(1).any() for row in sampled)
    noise = attach(copy.deepcopy(model), prompt_tuning_init="RANDOM", num_virtual_tokens=400)
    assert 0.8 < noise.std() / table.std() < 1.2
    ids = [tiny.WORDS.index(word) for word in ("good", "old", "a", "good", "old", "a", "good")]
    text = attach(copy.deepcopy(model), prompt_tuning_init_text="good old a", num_virtual_tokens=7)
    assert torch.equal(text, table[ids])
    assert torch.equal(attach(model, prompt_tuning_init_text="good old a", num_virtual_tokens=2), table[ids[:2]])


def test_a_text_implies_its_init() -> None:
    assert prompt.Options(prompt_tuning_init_text="a").prompt_tuning_init == "TEXT"
    again = prompt.Options(prompt_tuning_init_text="a")
    assert prompt.Options(**again.model_dump()) == again
    for options in ({"prompt_tuning_init": "TEXT"}, {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": "a"}):
        with pytest.raises(RecipeError, match="prompt_tuning_init_text"):
            methods.options_of(methods.load("prompt"), options)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="the model was loaded from nowhere"):
        attach(tiny.classifier("bert"), prompt_tuning_init_text="good")
    tiny.classifier("bert").save_pretrained(tmp_path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        attach(model, prompt_tuning_init_text="good")
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="has no tokens"):
        attach(model, prompt_tuning_init_text=" ")


# --- what cannot be


@pytest.mark.parametrize(
    ("architecture", "key", "room"),
    [
        ("bert", "max_position_embeddings", 11),
        ("roberta", "max_position_embeddings", 12),  # its positions begin behind that of padding, 0 here
        ("distilbert", "max_position_embeddings", 11),
        ("bart", "max_position_embeddings", 11),
        ("gpt2", "n_positions", 11),
    ],
)
def test_too_long_for_the_table_of_positions(architecture: str, key: str, room: int) -> None:
    model = tiny.classifier(architecture, **{key: room})
    attach(model)
    assert tiny.logits(model).isfinite().all()  # 4 and 7 positions
    model = tiny.classifier(architecture, **{key: room - 1})
    attach(model)
    with pytest.raises(MethodError, match=r"than the model has positions\n.*11 positions\n.*10\n.*max_length: 6"):
        tiny.logits(model)


@pytest.mark.parametrize("part", ["layers", "head", "layers.attention.q", "norms"])
def test_a_part_without_embeddings_is_refused(part: str) -> None:
    with pytest.raises(
        MethodError, match=rf"prompt on {part}: it goes in where the text is embedded\n.*\n.*embeddings:"
    ):
        attach(tiny.classifier("bert"), part)


def test_a_second_prompt_is_refused() -> None:
    model = tiny.classifier("bert")
    attach(model, r"re:bert\.embeddings")
    with pytest.raises(MethodError, match="BertModel has one already"):
        attach(model)


def test_a_mask_of_another_form_is_refused() -> None:
    model = tiny.classifier("llama")
    attach(model)
    with pytest.raises(MethodError, match=r"not of the form \[batch, length\]"):
        model(tiny.batch()["input_ids"], attention_mask=torch.ones(2, 1, 7, 7))


def test_it_takes_positions() -> None:
    assert prompt.positions(prompt.Options(num_virtual_tokens=7)) == 7
