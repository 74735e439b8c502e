"""Running without padding: logits and gradients of every architecture, packed against padded."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, TrainingArguments

from hybridtune import answer as answer_of
from hybridtune import engine, methods
from hybridtune.anatomy import Anatomy
from hybridtune.compose import Assembly
from hybridtune.engine import Caches, decoder, dropout, lora, products, proof
from hybridtune.engine.attention import Mask
from hybridtune.engine.layout import CALL, Layout, filled
from hybridtune.engine.patch import patch
from hybridtune.engine.seam import Seam
from hybridtune.errors import RecipeError
from hybridtune.layers import find_stacks
from hybridtune.recipe import Stage
from hybridtune.train import HybridTrainer

LENGTHS = (5, 9, 9, 3, 12)
# DeBERTa computes its attention itself; there the seam stays off.
ON = [name for name in tiny.CLASSIFIERS if name != "deberta-v2"]


def padded(side: str = "right", lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths that end with the end token."""
    pick, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        text = torch.randint(4, 30, (length,), generator=pick)
        text[0], text[-1] = 2, 3
        row[width - length :] = text if side == "left" else row[width - length :]
        row[:length] = text if side == "right" else row[:length]
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def target() -> dict[str, torch.Tensor]:
    ids = padded(lengths=(4, 3, 4, 2, 6), seed=1)
    return {f"decoder_{key}": value for key, value in ids.items()}


def shaken(model: nn.Module) -> nn.Module:
    tiny.shake(model.parameters(), by=0.2)
    return model.eval()


def seam_of(model: nn.Module) -> Seam:
    return Seam(model, find_stacks(dict(model.named_modules())))


def answer(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits where tokens are, and the gradients of their squares' mean."""
    model.zero_grad()
    logits = model(**batch).logits
    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
    if logits.dim() == 3:
        logits = logits[mask.bool()]
    (logits**2).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """In float64, though some norms compute in float32 whatever comes in."""
    model.double()
    expected, gradients = answer(model, batch)
    seam = seam_of(model)
    with seam.open():
        found, packed_gradients = answer(model, batch)
        assert seam.reached
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == packed_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-6, atol=1e-6 * largest, msg=name)
    again, _ = answer(model, batch)
    assert torch.equal(again, expected), "the seam is closed, the model is as it was"


@pytest.fixture(params=["exact", "merged", "filled up"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in groups of one length, of several, and of several with places behind the last token, as in bf16."""
    monkeypatch.setitem(CALL, "cpu", 0 if request.param == "exact" else 2**10)
    if request.param == "filled up":
        own = Layout.of
        monkeypatch.setattr(Layout, "of", lambda mask, merge, fill: own(mask, merge, fill=True))


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("name", ON)
def test_a_classifier_gives_the_same(name: str) -> None:
    check_equal(shaken(tiny.classifier(name)), padded())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_a_decoder_gives_the_same(name: str, side: str) -> None:
    check_equal(tiny.language_model(name), padded(side))


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all seen"])
@pytest.mark.parametrize("name", [*tiny.SEQ2SEQ, "encoder-decoder"])
def test_an_encoder_decoder_gives_the_same(name: str, masked: bool) -> None:
    model = shaken(tiny.encoder_decoder()) if name == "encoder-decoder" else tiny.language_model(name)
    more = target()
    if not masked:
        more = {"decoder_input_ids": more["decoder_input_ids"].clamp(min=4), "decoder_attention_mask": None}
        more["decoder_attention_mask"] = torch.ones_like(more["decoder_input_ids"])
    check_equal(model, padded() | more)


def check_used_places(
    model: Any,
    given: dict[str, Any],
    plain: dict[str, Any],
    used: Any,
    places: int | None,
    scored: torch.Tensor | None = None,
) -> None:
    """A decoder computes so many places packed, and gives for used ones what it gives padded, and gradients as then.

    Args:
        model: an encoder-decoder.
        given: in the seam.
        plain: without it.
        used: places.
        places: that the decoder computes; None: all of the batch, padded.
        scored: labels that the model is not given.
    """

    def found(batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(**batch).logits[used]
        (logits**2).mean().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, gradients = found(plain)
    seen: list[int] = []
    last = find_stacks(dict(model.named_modules()))[1].layers[-1]
    seam = seam_of(model)
    with seam.open(), seam.scoring(scored):
        look = model.get_submodule(last).register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[:2]))
        logits, packed_gradients = found(given)
        look.remove()
    assert seen == [given["decoder_input_ids"].shape if places is None else (1, places)]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[key], gradient, rtol=1e-3, atol=1e-5 * largest, msg=key)


TARGETS = {
    "as usual": [[5, 6, 7, 3], [8, 3], [9, 9, 9, 3], [3], [4, 5, 6, 7, 8, 3]],
    "a gap before the last label": [[5, 6, -100, 3], [8, 3], [9, -100, 3], [3], [4, 5, 6, 7, -100, 3]],
    "only gaps before it": [[-100, -100, 3], [8, 3], [-100, 3], [3], [4, 5, 6, 7, 8, 3]],
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("labels_given", [True, False])
@pytest.mark.parametrize("name", tiny.SEQ2SEQ)
def test_a_decoder_without_a_mask_computes_no_padding(
    name: str, labels_given: bool, targets: list[list[int]], side: str
) -> None:
    """transformers has it compute padding behind a target as it does the target."""
    model, width = tiny.language_model(name), 6
    filled = [([-100] * (width - len(row)) + row if side == "left" else row) for row in targets]
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in filled])
    made = decoder.complete(model, padded() | {"labels": labels})
    plain = {key: value for key, value in made.items() if key != "labels"}
    if labels_given:
        check_used_places(model, padded() | {"labels": labels}, plain, labels != -100, sum(map(len, filled)))
    else:  # as in a training, which computes the loss itself; the end is among the tokens
        places = sum(min(len(row) + 1, width) for row in filled)
        check_used_places(model, plain, plain, labels != -100, places, labels)


@pytest.mark.parametrize("name", [*tiny.SEQ2SEQ, "encoder-decoder"])
def test_a_mask_that_hides_what_has_a_label(name: str) -> None:
    """The model's own, of what is no padding token, or a user's: such a forward runs padded, and no other."""
    model = shaken(tiny.encoder_decoder()) if name == "encoder-decoder" else tiny.language_model(name)
    labels = torch.tensor([[5, -100, 6, 3], [8, 3, -100, -100], [9, 9, 3, -100], [3, -100, -100, -100], [4, 5, 6, 3]])
    ids = torch.tensor([[2, 5, 0, 6], [2, 8, 3, 0], [2, 9, 9, 3], [2, 3, 0, 0], [2, 4, 5, 6]])
    batch = padded() | {"decoder_input_ids": ids, "decoder_attention_mask": ids.ne(0).long()}
    check_used_places(model, batch, batch, labels != -100, None, labels)
    labels[0], ids[0] = torch.tensor([5, 6, 3, -100]), torch.tensor([2, 5, 6, 3])
    batch["decoder_attention_mask"] = ids.ne(0).long()
    check_used_places(model, batch, batch, labels != -100, int(ids.ne(0).sum()), labels)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0, 1]), torch.rand(5, 3)], ids=["none", "one", "each"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_classifier_that_reads_its_text_twice_computes_no_padding(name: str, labels: torch.Tensor | None) -> None:
    """Also where a row has a label for each class: those are no tokens."""
    model = shaken(tiny.classifier(name, num_labels=3))
    batch = padded() | ({} if labels is None else {"labels": labels})
    places = sum(min(length + 1, max(LENGTHS)) for length in LENGTHS)
    check_used_places(model, batch, batch, slice(None), places)


def test_an_answer_behind_the_text() -> None:
    """T5Gemma's decoder is asked one place further on."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    part = {**sizes, "head_dim": 8, "intermediate_size": 64, "vocab_size": 100}
    config = hf.T5GemmaConfig(encoder=part, decoder={**part, "is_decoder": True}, vocab_size=100, pad_token_id=0)
    torch.manual_seed(0)
    check_equal(shaken(hf.T5GemmaForSequenceClassification(config)), padded())


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("t5", {"decoder_input_ids": torch.zeros(5, 4, dtype=torch.long)}),  # nobody knows what for
        ("t5", {"labels": torch.zeros(5, 4, 2, dtype=torch.long)}),
        ("bert", {"labels": torch.zeros(5, 12, dtype=torch.long)}),
    ],
    ids=["tokens alone", "labels of another kind", "no decoder"],
)
def test_where_nothing_tells_what_a_decoder_reads_it_is_given_no_mask(name: str, batch: dict[str, Any]) -> None:
    model = tiny.language_model(name) if name == "t5" else tiny.classifier(name)
    whole = padded() | batch
    assert decoder.mask_of(model, whole) is None


def test_questions_are_answered_from_all_places() -> None:
    """A model's own loss puts them into one softmax, padding too."""
    model = tiny.headed("t5", "QuestionAnswering")
    ends = torch.tensor([1, 2, 1, 2, 3])
    batch = padded() | {"start_positions": ends, "end_positions": ends}
    expected = model(**batch).loss
    assert decoder.mask_of(model, batch) is None
    with seam_of(model).open():
        torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_either_implementation_is_wrapped(name: str, implementation: str) -> None:
    check_equal(shaken(tiny.classifier(name, attn_implementation=implementation)), padded())


def test_sliding_windows_are_kept() -> None:
    """Windows shorter than the rows: ModernBERT looks to both sides, Qwen3 back."""
    long = padded(lengths=(40, 25, 31))
    check_equal(shaken(tiny.classifier("modernbert", local_attention=6, global_attn_every_n_layers=2)), long)
    qwen = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = shaken(tiny.classifier("qwen3", **qwen))
    assert "sliding_attention" in model.config.layer_types
    check_equal(model, long)


def test_padding_in_the_middle_and_empty_rows() -> None:
    batch = padded()
    batch["attention_mask"][1, 4] = 0
    batch["attention_mask"][3] = torch.tensor([1] + [0] * 11)
    check_equal(shaken(tiny.classifier("bert")), batch)


@pytest.mark.parametrize(
    ("method", "part", "options"),
    [
        ("lora", "layers", {"r": 2}),
        ("lora", "layers", {"r": 2, "use_dora": True}),
        ("adapter", "layers", {"bottleneck": 4}),
        ("adapter", "layers", {"bottleneck": 4, "mode": "parallel"}),
        ("ia3", "layers", {}),
        ("prompt", "embeddings", {"num_virtual_tokens": 3}),
        ("prefix", "layers", {"num_virtual_tokens": 3}),
    ],
)
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2", "t5", "bart"])
def test_every_method_gives_the_same(name: str, method: str, part: str, options: dict[str, Any]) -> None:
    model = shaken(tiny.classifier(name))
    found = methods.load(method)
    assembly = Assembly(model, Anatomy(model))
    names = found.attach(model, assembly.anatomy.part(part), methods.options_of(found, options))
    tiny.shake((model.get_parameter(name) for name in names), by=0.3)
    check_equal(model.eval(), padded())


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_no_row_sees_another(name: str) -> None:
    model, first, second = shaken(tiny.classifier(name)), padded(), padded()
    second["input_ids"][2, 3] = 31
    with torch.no_grad(), seam_of(model).open():
        before, after = model(**first).logits, model(**second).logits
    assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])
    assert not torch.allclose(before[2], after[2])


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_layers_that_are_computed_again_give_the_same(name: str) -> None:
    """Gradient checkpointing runs the layers once more in the backward."""
    model = shaken(tiny.classifier(name, **({} if name == "t5" else {"attention_dropout": 0.0})))
    batch = padded()
    _, expected = answer(model, batch)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with seam_of(model).open():
        _, found = answer(model, batch)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_who_looks_into_layers_sees_padded_ones() -> None:
    model, batch = shaken(tiny.classifier("bert")), padded()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        with seam_of(model).open():
            found = model(**batch, output_hidden_states=True)
    for one, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_as_many_tokens_as_the_batch_is_wide(name: str) -> None:
    """A packed row must not be taken for a padded one."""
    wide = {key: nn.functional.pad(value, (0, 5)) for key, value in padded(lengths=(5, 7)).items()}
    assert wide["attention_mask"].sum() == wide["attention_mask"].shape[1] == 12
    check_equal(shaken(tiny.classifier(name)), wide)


@pytest.mark.parametrize("fill", [False, True])
def test_layout_against_a_loop(fill: bool) -> None:
    """Packing and padding against the plainest code, with padding anywhere."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    layout, values = Layout.of(mask, fill=fill), torch.randn(5, 4, 3)
    lengths = [max(int(row.sum()), 1) for row in mask]
    order = sorted(range(5), key=lambda row: lengths[row])
    mask[4, 0] = True  # a row without tokens keeps one
    expected = torch.cat([values[row][mask[row]] for row in order])
    assert torch.equal(layout.pack(values)[0, : len(expected)], expected)
    assert layout.pack(values).shape[1] == (16 if fill else len(expected))
    assert torch.equal(layout.unpack(layout.pack(values)), values * mask.unsqueeze(-1))
    groups = [(group.rows, group.length) for group in layout.apart(merge=False).groups]
    assert groups == [((4,), 1), ((0, 2), 2), ((1,), 3), ((3,), 4)]
    assert layout.longest == 4
    for one in (layout, layout.apart(merge=False)):
        packed = layout.pack(values)
        joined = one.join(one.split(packed, 1))
        assert torch.equal(joined[:, : len(expected)], packed[:, : len(expected)])
        assert not joined[:, len(expected) :].any()
        for number, row in one.rows(packed).items():
            assert torch.equal(row, values[number][mask[number]])


def test_packed_rows_have_few_sizes() -> None:
    """Never shorter, at most a sixteenth (or 16 places) longer, and 16 sizes from any length to its double."""
    for tokens in range(1, 5000):
        assert 0 <= filled(tokens) - tokens < max(16, tokens / 16 + 1)
    for low in (256, 1000, 2500):
        assert len({filled(tokens) for tokens in range(low, 2 * low)}) <= 17


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_rows_are_filled_up_in_bf16_alone(name: str) -> None:
    model, sizes = shaken(tiny.classifier(name)), []
    layer = find_stacks(dict(model.named_modules()))[0].layers[1]
    model.get_submodule(layer).register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    batch = padded(lengths=(5, 6, 10))
    with torch.no_grad(), seam_of(model).open():
        model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**batch).logits
        model.bfloat16()(**batch)
    assert sizes == [21, 32, 32]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.float()(**batch).logits
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("merge", [False, True])
def test_layouts_together_against_a_loop(merge: bool) -> None:
    """The same rows in both, each group's tokens those of its rows, and no group padded for more than a call."""
    torch.manual_seed(0)
    sizes = {name: torch.randint(1, 9, (12,)) * 12 for name in ("queries", "keys")}
    masks = {name: torch.arange(110) < size[:, None] for name, size in sizes.items()}
    values = {name: torch.randn(12, 110, 2) for name in sizes}
    own, other = (Layout.of(masks[name]) for name in sizes)
    queries, keys = own.together(other, merge)
    assert [group.rows for group in queries.groups] == [group.rows for group in keys.groups]
    assert sorted(row for group in keys.groups for row in group.rows) == list(range(12))
    assert len(keys.groups) < 12 if merge else all(group.even for group in (*queries.groups, *keys.groups))
    split = {
        "queries": queries.split(own.pack(values["queries"]), 1),
        "keys": keys.split(other.pack(values["keys"]), 1),
    }
    for name, layout in (("queries", queries), ("keys", keys)):
        for group, piece in zip(layout.groups, split[name], strict=True):
            for number, (row, length) in enumerate(zip(group.rows, group.lengths, strict=True)):
                assert length == sizes[name][row]
                assert torch.equal(piece[number, :length], values[name][row, :length])
    assert torch.equal(queries.join(split["queries"]), own.pack(values["queries"]))
    for one, two in zip(queries.groups, keys.groups, strict=True):
        work = sum(q * k for q, k in zip(one.lengths, two.lengths, strict=True))
        assert len(one.rows) * one.length * two.length - work <= CALL["cpu"] * (len(one.rows) - 1)


def test_rows_are_padded_in_attention_where_a_call_costs_more() -> None:
    """No two groups are left that would be cheaper as one."""
    lengths = torch.tensor([5, 6, 7, 30, 31, 80, 90, 91])
    layout = Layout.of(torch.arange(100) < lengths[:, None])
    assert all(
        len(before.rows) * (after.lengths[0] ** 2 - before.length**2) > CALL["cpu"]
        for before, after in itertools.pairwise(layout.groups)
    )
    assert len(layout.groups) < len(set(lengths.tolist())) == len(layout.apart(merge=False).groups)


@pytest.mark.parametrize("merge", [True, False], ids=["padded", "of one length"])
def test_what_a_row_is_padded_to_may_follow_from_its_own_length(merge: bool) -> None:
    """In whatever batch it is; nothing of it is lost."""
    torch.manual_seed(0)
    found: dict[int, set[int]] = {}
    for _ in range(5):
        lengths = torch.randint(1, 70, (12,))
        mask = torch.arange(70) < lengths[:, None]
        whole = Layout.of(mask)
        layout = whole.apart(merge)
        for group in layout.groups:
            assert group.length <= layout.widest
            assert group.even or group.length not in group.lengths, "rows without padding never need a mask"
            for length in group.lengths:
                found.setdefault(length, set()).add(group.length)
        packed = layout.pack(torch.randn(12, 70, 2))
        assert torch.equal(layout.join(layout.split(packed, 1)), packed)
    assert all(len(padded) == 1 for padded in found.values())
    assert {length: min(padded) for length, padded in found.items()} == {
        length: -(-length // 16) * 16 if merge else length for length in found
    }


def trained(name: str, folder: Path, asked: str) -> tuple[HybridTrainer, list[float]]:
    model = shaken(tiny.classifier(name))
    model._hybridtune_new = ()
    rules = [{"part": "layers", "method": "lora", "r": 2}, {"part": "head", "method": "full"}]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=8, report_to=[], use_cpu=True, logging_steps=1,
        eval_strategy="epoch", disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = HybridTrainer(
        model,
        arguments,
        train_dataset=tiny.rows(32),
        eval_dataset=tiny.rows(10, seed=1),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        strategy=[Stage.model_validate({"rules": rules})],
        engine=asked,  # type: ignore[arg-type]
    )
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer.model.config.attention_dropout = trainer.model.config.attention_probs_dropout_prob = 0.0
    for module in trainer.model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_training_gives_the_same_with_it_and_without(tmp_path: Path) -> None:
    on, fast = trained("bert", tmp_path / "on", "auto")
    off, plain = trained("bert", tmp_path / "off", "off")
    assert on.engine is not None
    assert on.engine.on
    assert off.engine is not None
    assert not off.engine.on
    assert fast == pytest.approx(plain, abs=2e-4)


def test_where_it_cannot_be_on_the_run_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="engine: rows with padding: its attention does not go through transformers'"):
        trainer, _ = trained("deberta-v2", tmp_path, "auto")
    assert trainer.engine is not None
    assert not trainer.engine.on


def test_a_model_that_gives_other_logits_is_left_alone() -> None:
    """One whose layers look at the neighbours: packed, the neighbour may be another row's."""
    model = shaken(tiny.classifier("bert"))
    output = model.bert.encoder.layer[1].output
    output.forward = _looks_beside(output.forward)
    found = engine.start(model, proof.rows_of_batch(padded()))
    assert not found.on
    assert "its logits would be others" in found.reason


def _looks_beside(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(*args: torch.Tensor) -> torch.Tensor:
        return (out := own(*args)) + out.roll(1, dims=1)

    return forward


def test_a_model_with_a_hook_of_the_users_in_a_layer_runs_as_the_hook_expects() -> None:
    model, seen = tiny.classifier("bert"), list[Any]()
    found = engine.start(model, proof.rows_of_batch(padded()))
    assert found.on
    model.bert.encoder.layer[1].output.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    found = engine.start(model, proof.rows_of_batch(padded()))
    assert not found.on
    assert "a hook would see rows without padding" in found.reason
    assert "on BertOutput" in found.reason
    seen.clear()
    with found.open():
        model(**padded())
    assert seen == [(*padded()["input_ids"].shape, 32)]


def test_a_method_of_the_users_own_says_that_its_hooks_may_see_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.classifier("bert")
    model.bert.encoder.layer[1].output.register_full_backward_hook(lambda module, *gradients: None)
    assert not engine.start(model, proof.rows_of_batch(padded())).on
    monkeypatch.setattr(sys.modules[__name__], "PER_TOKEN", True, raising=False)
    assert engine.start(model, proof.rows_of_batch(padded())).on


@pytest.mark.parametrize("half", ["autocast", "bf16"])
@pytest.mark.parametrize("name", ON)
def test_a_wrong_mask_is_seen_in_half_precision(name: str, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a fresh head are hundredths, and a right mask gives the same ones."""
    rows = proof.rows_of_batch(padded(lengths=(5, 9, 9, 3, 12, 30, 20)))
    assert rows is not None

    def started() -> engine.Engine:
        model = shaken(tiny.classifier(name))
        with torch.no_grad():
            head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
            head.weight.mul_(0.02)
            if head.bias is not None:
                head.bias.zero_()
        if half == "bf16":
            return engine.start(model.bfloat16(), rows)
        with torch.autocast("cpu", torch.bfloat16):
            return engine.start(model, rows)

    assert started().on, started().reason

    def all_seen(mask: Mask, group: int) -> torch.Tensor:
        """Also what comes after, and what is padding in a group."""
        queries, keys = mask.queries.groups[group], mask.keys.groups[group]
        return torch.ones(len(keys.rows), 1, queries.length, keys.length, dtype=torch.bool)

    monkeypatch.setattr(Mask, "of", all_seen)
    assert "its logits would be others" in started().reason


class Largest(TorchDispatchMode):
    """The most rows of so many numbers that an operation has given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return result


@pytest.mark.parametrize("name", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
def test_no_logits_of_a_language_model_are_made(name: str) -> None:
    batch = padded()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = tiny.language_model(name).requires_grad_(False)
    with Largest(width=100) as seen:
        found = engine.start(model, proof.rows_of_batch(batch), Caches())
    assert found.on, found.reason
    assert found.seam is not None
    assert found.seam.frozen is not None
    assert seen.rows == 0


def test_rows_from_all_over_the_training_data() -> None:
    """The longest stands last; numbers that a collator draws are none of the training's."""
    data = [{"input_ids": [2] * 3} for _ in range(999)] + [{"input_ids": [2] * 9}]

    def collate(rows: list[Any]) -> Any:
        torch.rand(3)
        random.random()
        return DataCollatorWithPadding(tiny.tokenizer())(rows)

    before = torch.get_rng_state(), random.getstate()
    found = proof.rows_of_dataset(data, collate)
    assert found is not None
    assert len(found["input_ids"]) == proof.LOOKED_AT
    assert found["attention_mask"].sum(1).max() == 9
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert proof.rows_of_dataset(iter(data), collate) is None
    assert proof.rows_of_dataset([], collate) is None
    assert proof.rows_of_dataset([{"text": "a"}], collate) is None, "what cannot be collated is left to the training"


def test_where_all_have_one_length_a_row_is_shortened() -> None:
    """In its middle: the end token stays, and so does what belongs to a token."""
    row = {"input_ids": [2, 4, 5, 6, 7, 3], "attention_mask": [1] * 6, "labels": [0, 1, 2, 3, 4, 5]}
    found = proof.rows_of_dataset([row] * 3, DataCollatorForTokenClassification(tiny.tokenizer()))
    assert found is not None
    assert found["input_ids"].tolist()[3] == [2, 4, 5, 3, 0, 0]
    assert found["labels"].tolist()[3] == [0, 1, 2, 5, -100, -100]
    assert found["attention_mask"].tolist()[3] == [1, 1, 1, 1, 0, 0]
    assert proof.rows_of_batch(found) is not None


def test_of_long_rows_there_are_two() -> None:
    rows = proof.rows_of_batch(padded(lengths=(2000, 5, 900, 3000)))
    assert rows is not None
    assert rows["attention_mask"].sum(1).tolist() == [5, 3000]


def test_random_layers_are_no_case_for_it() -> None:
    model = shaken(tiny.classifier("bart", encoder_layerdrop=0.1))
    assert (
        engine.start(model, proof.rows_of_batch(padded())).reason
        == "it leaves out layers at random (encoder_layerdrop)"
    )


def test_rows_of_one_length_are_no_sample() -> None:
    assert proof.rows_of_batch(padded(lengths=(5, 5, 5))) is None
    rows = proof.rows_of_batch(padded())
    assert rows is not None
    assert sorted(rows["attention_mask"].sum(1).tolist())[::3] == [3, 12]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.start(shaken(tiny.classifier("bert")), rows).on


@pytest.mark.parametrize("tokens", [3, 200], ids=["thin", "folded"])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_lora_against_the_formula(tokens: int, bias: bool) -> None:
    """Output and all gradients, in both orders of multiplication."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, tokens, 24, requires_grad=True), torch.randn(40, 24)
    b = torch.randn(40) if bias else None
    down, up = torch.randn(4, 24, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    tensors = [tensor if tensor is None else tensor.detach().double() for tensor in (x, weight, b, down, up)]
    for tensor in (tensors[0], tensors[3], tensors[4]):
        assert tensor is not None
        tensor.requires_grad_()
    found = lora._Product.apply(*tensors, 0.7)
    expected = x.double() @ weight.double().T + 0.7 * (x.double() @ down.double().T) @ up.double().T
    expected = expected + b.double() if b is not None else expected
    torch.testing.assert_close(found, expected)
    signal = torch.randn_like(found)
    found.backward(signal)
    expected.backward(signal)
    for tensor, one in ((tensors[0], x), (tensors[3], down), (tensors[4], up)):
        assert tensor is not None
        torch.testing.assert_close(tensor.grad.float(), one.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 9], ids=["thin", "folded"])
def test_gradients_of_fast_loras_gradients(tokens: int) -> None:
    """Of x, A and B."""
    torch.manual_seed(0)
    x, down, up = (
        torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in [(tokens, 5), (2, 5), (7, 2)]
    )
    weight = torch.randn(7, 5, dtype=torch.double)

    def run(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> Any:
        return lora._Product.apply(x, weight, None, down, up, 0.7)

    assert torch.autograd.gradcheck(run, (x, down, up))
    assert torch.autograd.gradgradcheck(run, (x, down, up))


def on_model(**options: Any) -> tuple[nn.Module, list[str]]:
    model, found = shaken(tiny.classifier("bert")), methods.load("lora")
    part = Anatomy(model).part("layers")
    names = found.attach(model, part, methods.options_of(found, {"r": 2, **options}))
    tiny.shake((model.get_parameter(name) for name in names), by=0.3)
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_()
    return model.eval().double(), names


@pytest.mark.parametrize(
    ("options", "fast"), [({}, 18), ({"use_rslora": True}, 18), ({"use_dora": True}, 0), ({"lora_dropout": 0.3}, 18)]
)
def test_fast_lora_gives_what_peft_gives(options: dict[str, Any], fast: int, fast_products: list[Any]) -> None:
    model, names = on_model(**options)
    expected, gradients = answer(model, padded())
    with engine.Engine(None, modules=tuple(model.modules())).open():
        found, ours = answer(model, padded())
    assert len(fast_products) == fast
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name in names:
        torch.testing.assert_close(ours[name], gradients[name], rtol=1e-4, atol=1e-6)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_what_can_be_sped_up_is_found_once_and_its_state_looked_at_every_time(fast_products: list[Any]) -> None:
    """Also within a step: a base without its adapters is what losses such as a KL to it are about."""
    model, _ = on_model()
    model.float()
    found = engine.start(model, proof.rows_of_batch(padded()))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert list(found.modules) == layers
    with torch.no_grad():
        adapted = model(**padded()).logits
        for layer in layers:
            layer.enable_adapters(False)
        base = model(**padded()).logits
        assert not torch.allclose(base, adapted, atol=1e-3)
        with found.open():
            for enabled, expected in ((True, adapted), (False, base), (True, adapted)):
                for layer in layers:
                    layer.enable_adapters(enabled)
                fast_products.clear()
                torch.testing.assert_close(model(**padded()).logits, expected, rtol=1e-5, atol=1e-5)
                assert len(fast_products) == enabled * len(layers)


@pytest.fixture
def fast_products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an entry for every product that LoRA's faster way computes."""
    found: list[Any] = []
    own = lora._Product.apply

    def counted(*args: Any) -> torch.Tensor:
        found.append(args)
        result: torch.Tensor = own(*args)
        return result

    monkeypatch.setattr(lora._Product, "apply", counted)
    return found


def test_a_dropout_that_is_anothers_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((2,), 7.0)

    monkeypatch.setattr(nn.functional, "dropout", mine)
    with dropout.fast(), dropout.fast():
        assert nn.functional.dropout is not mine
        assert nn.functional.dropout(torch.ones(2), training=False).tolist() == [7.0, 7.0]  # what is not drawn is its
    assert nn.functional.dropout is mine
    with dropout.fast():
        nn.functional.dropout = torch.dropout  # of somebody who came later
    assert nn.functional.dropout is torch.dropout


def test_lora_with_its_own_dropout_in_training_is_pefts() -> None:
    model, _ = on_model(lora_dropout=0.5)
    no_other_dropout = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p != 0.5]
    for module in no_other_dropout:
        module.p = 0.0
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    model.train()
    torch.manual_seed(3)
    expected = model(**padded()).logits
    with engine.Engine(None, modules=tuple(model.modules())).open():
        torch.manual_seed(3)
        assert torch.equal(model(**padded()).logits, expected)


def test_lora_with_an_adapter_on_the_same_matrix() -> None:
    """What else sits on the matrices goes on doing so."""
    model = shaken(tiny.classifier("bert"))
    assembly = Assembly(model, Anatomy(model))
    for method, options in (("lora", {"r": 2}), ("adapter", {"bottleneck": 4}), ("bias", {})):
        found = methods.load(method)
        names = found.attach(model, assembly.anatomy.part("layers"), methods.options_of(found, options))
        tiny.shake((model.get_parameter(name) for name in names), by=0.3)
    expected, gradients = answer(model.eval(), padded())
    with engine.Engine(None, modules=tuple(model.modules())).open():
        found_, ours = answer(model, padded())
    torch.testing.assert_close(found_, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.01])
def test_fast_dropout_is_dropout(p: float) -> None:
    """Shares, scale, independence of neighbours, gradients and the generator's state."""
    x = torch.ones(400, 500, requires_grad=True)
    torch.manual_seed(0)
    y = dropout._Dropout.apply(x, p)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 200_000) ** 0.5)
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-3, atol=0)
    for shift in (1, 2, 3, 4, 500):
        flat = kept.flatten().float()
        share = float(((1 - flat[:-shift]) * (1 - flat[shift:])).mean())
        assert share == pytest.approx(p * p, abs=5 * (p * p / 200_000) ** 0.5)
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(dropout._Dropout.apply(x, p), y)
    assert not torch.equal(dropout._Dropout.apply(x, p), y)


def test_dropout_in_evaluation_and_of_zero_is_none() -> None:
    layers = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5)).eval()
    with engine.Engine(None, draws=True).open():
        assert torch.equal(layers(torch.ones(9)), torch.ones(9))
        assert not torch.equal(layers.train()(torch.ones(99)), torch.ones(99))
        assert torch.equal(nn.functional.dropout(torch.ones(9), 1.0), torch.zeros(9))


def test_dropout_is_torchs_again_in_whatever_order_engines_are_left() -> None:
    own = nn.functional.dropout
    one, other = (engine.Engine(None, draws=True).open() for _ in range(2))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert nn.functional.dropout is not own
    other.__exit__(None, None, None)
    assert nn.functional.dropout is own


@pytest.mark.parametrize("name", ["bert", "marian", "t5"])
def test_no_dropout_of_a_step_is_drawn_by_torch(name: str) -> None:
    """Neither that of layers nor that which a model's code calls by itself."""
    model = (tiny.classifier if name == "bert" else tiny.language_model)(name).train()
    batch = padded() if name == "bert" else {**padded(), **target()}

    def torchs(way: AbstractContextManager[Any]) -> int:
        with way, torch.profiler.profile() as seen:
            answer(model, batch)
        return sum(one.count for one in seen.key_averages() if one.key == "aten::bernoulli_")

    assert torchs(nullcontext())
    assert not torchs(engine.start(model, batch).open())


@pytest.mark.parametrize("masked", ["no", "causal", "bool", "added"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("p", [0.3, 0.0])
def test_fast_attention_against_the_formula(
    masked: str, groups: int, biased: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same drawn mask, output and gradients are those of the plainest code."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 6, 8, dtype=torch.double, requires_grad=True) for heads in (4, 4 // groups, 4 // groups)
    )
    kept = torch.rand(2, 4, 6, 6) >= p
    monkeypatch.setattr(dropout, "drawn", lambda shape, p, dtype: (kept.transpose(0, 1).flatten(0, 1), 1 / (1 - p)))
    seen = {"no": None, "causal": None, "bool": torch.rand(2, 1, 6, 6) > 0.4, "added": torch.randn(2, 1, 6, 6).double()}
    mask = seen[masked]
    if masked == "bool":
        mask |= torch.eye(6, dtype=torch.bool)
    module = nn.Module()
    module.num_key_value_groups = groups
    bias = torch.randn(1, 4, 6, 6, dtype=torch.double, requires_grad=True)
    more = {"is_causal": masked == "causal", "position_bias": bias if biased else None}
    found, _ = products.attention(module, query, key, value, mask, p, 0.5, **more)
    scores = 0.5 * query @ key.repeat_interleave(groups, 1).transpose(-1, -2) + bias * biased
    if masked in ("causal", "bool"):
        see = torch.ones(6, 6, dtype=torch.bool).tril() if masked == "causal" else mask
        scores = scores.masked_fill(~see, -torch.inf)
    scores = scores + mask if masked == "added" else scores
    expected = (scores.softmax(-1) * kept / (1 - p) @ value.repeat_interleave(groups, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    signal = torch.randn_like(found)
    inputs = (query, key, value, *([bias] if biased else []))
    ours, theirs = (torch.autograd.grad(result, inputs, signal) for result in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "t5"])
def test_attention_with_dropout_goes_the_fast_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And drops: two forwards differ; with a probability of nearly nothing they are the model's own."""
    config = {"attention_dropout": 0.5}
    if name == "t5":
        config = {"dropout_rate": 0.5}
    if name == "bert":
        config = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = shaken(tiny.classifier(name, **config)).train()
    for module in model.modules() if name == "t5" else ():
        if isinstance(module, nn.Dropout):  # the seam alone leaves them
            module.p = 0.0
    calls, own = [], products.attention
    monkeypatch.setattr(products, "attention", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    with seam_of(model).open():
        first, second = model(**padded()).logits, model(**padded()).logits
    assert calls
    assert not torch.allclose(first, second)
    monkeypatch.setattr(dropout, "drawn", lambda shape, p, dtype: (torch.ones(shape, dtype=dtype), 1.0))
    with seam_of(model).open():
        whole = model(**padded()).logits
    torch.testing.assert_close(whole, model.eval()(**padded()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("half", "trained", "longest", "fast"),
    [(True, True, 12, 2), (False, True, 12, 0), (True, False, 12, 2), (True, True, 300, 1), (True, False, 300, 1)],
)
def test_short_rows_in_half_precision_go_the_fast_way_without_dropout(
    half: bool, trained: bool, longest: int, fast: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits and gradients of 32 bits, but for rounding; the rest, and longer groups, keep torch's kernel."""
    monkeypatch.setitem(CALL, "cpu", 0)  # a group for each row
    model, batch = shaken(tiny.classifier("llama", max_position_embeddings=512)), padded(lengths=(3, longest))
    calls, own = [], products.attention
    monkeypatch.setattr(products, "attention", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    found = []
    for autocast in (half, False):
        model.zero_grad()
        with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with seam_of(model).open():
                logits = model(**batch).logits.float()
        found.append(logits.detach() / logits.detach().norm())
        if trained:
            logits.square().mean().backward()
            weight = model.model.layers[0].self_attn.q_proj.weight
            found.append(weight.grad / weight.grad.norm())
    assert len(calls) == fast * model.config.num_hidden_layers
    for one, other in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.1)


def test_a_config_that_asks_for_hidden_states_gets_padded_ones() -> None:
    model, batch = shaken(tiny.classifier("bert")), padded()
    model.config.output_hidden_states = True
    with torch.no_grad():
        expected = model(**batch)
        with seam_of(model).open():
            found = model(**batch)
    for one, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(one, other)


def test_a_method_of_others_is_put_back() -> None:
    """As accelerate's hooks put their forward on a module."""
    model, calls = shaken(tiny.classifier("bert")), []
    layer = model.bert.encoder.layer[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    before = vars(layer)["forward"]
    seam = seam_of(model.requires_grad_(False))
    seam.frozen = engine.start(model, proof.rows_of_batch(padded()), Caches()).seam.frozen  # type: ignore[union-attr, arg-type]
    with seam.open():
        assert layer.forward is not before
    assert vars(layer)["forward"] is before


def test_an_interruption_before_a_method_is_replaced_is_not_hidden() -> None:
    """Ctrl-C comes between any two steps: then there is nothing to take back."""

    class Slow(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "forward":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    layer = Slow(2, 2)
    with pytest.raises(KeyboardInterrupt), ExitStack() as undo:
        patch(layer, "forward", lambda x: x, undo)
    assert "forward" not in vars(layer)


def test_half_precision_does_not_round_lora_away() -> None:
    """What is added is far below the last bit of the frozen weight."""
    x, weight = torch.ones(200, 24, dtype=torch.bfloat16), torch.full((40, 24), 1.0, dtype=torch.bfloat16)
    down, up = torch.full((4, 24), 1e-2, dtype=torch.bfloat16), torch.full((40, 4), 1e-2, dtype=torch.bfloat16)
    whole = lora._Product.apply(x, torch.zeros_like(weight), None, down, up, 1.0)
    assert float((lora._Product.apply(x, weight, None, down, up, 1.0) - 24).abs().max()) <= 0.125
    assert whole.float().mean() == pytest.approx(24 * 4e-4, rel=0.02)
    big = torch.full((40, 24), 1.0 / 24, dtype=torch.bfloat16)
    without = torch.nn.functional.linear(x, big)
    difference = lora._Product.apply(x, big, None, down * 10, up * 10, 1.0) - without
    assert float(difference.float().mean()) == pytest.approx(24 * 4e-2, rel=0.05)


def test_attention_with_dropout_under_autocast() -> None:
    """Rotated queries come in another type than values."""
    model = shaken(tiny.classifier("llama", attention_dropout=0.3)).train()
    with torch.autocast("cpu", torch.bfloat16), seam_of(model).open():
        loss = model(**padded()).logits.float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", ["QuestionAnswering", "TokenClassification"])
@pytest.mark.parametrize("name", list(tiny.CLASSIFIERS))
def test_heads_that_answer_for_every_token(name: str, head: str) -> None:
    """The engine proves itself on them with the labels that their tasks have, which are not always the models' own."""
    try:
        model = shaken(tiny.headed(name, head)).double()
    except ValueError:
        pytest.skip(f"transformers has no such head for {name}")
    batch = padded()
    labels = torch.tensor([[1, 2]] * len(LENGTHS)) if head == "QuestionAnswering" else batch["input_ids"] % 2
    labels = labels.masked_fill(~batch["attention_mask"].bool(), -100) if labels.shape[1] > 2 else labels
    started = engine.start(model, {**batch, "labels": labels})
    if name == "deberta-v2":
        assert not started.on
        return
    assert started.on, started.reason
    where = batch["attention_mask"].bool()

    def answers() -> torch.Tensor:
        output = model(**batch)
        if head == "QuestionAnswering":
            return torch.stack([output.start_logits, output.end_logits], -1)[where]
        return output.logits[where]

    expected = answers()
    with started.open():
        torch.testing.assert_close(answers(), expected, rtol=1e-6, atol=1e-6)


# --- used in other ways than by a plain forward


@pytest.fixture
def started() -> Iterator[tuple[nn.Module, engine.Engine]]:
    model = shaken(tiny.classifier("bert"))
    found = engine.start(model, proof.rows_of_batch(padded()))
    assert found.on
    yield model, found
    assert model.config._attn_implementation == "sdpa"
    hooks = [
        hook
        for one in model.modules()
        for table in (one._forward_pre_hooks, one._forward_hooks)
        for hook in table.values()
    ]
    assert not [hook for hook in hooks if hook.__module__.startswith("hybridtune")]
    assert not any("forward" in vars(one) for one in model.modules())


def test_a_body_that_is_called_by_itself(started: tuple[nn.Module, engine.Engine]) -> None:
    """With what its layers see asked for or not, on other rows than the model before it."""
    model, found = started
    other = padded(lengths=(3, 7), seed=4)
    with torch.no_grad():
        expected = model.bert(**other, output_hidden_states=True)
        with found.open():
            model(**padded())
            plain = model.bert(**other)
            looked_into = model.bert(**other, output_hidden_states=True)
    places = other["attention_mask"].bool()
    torch.testing.assert_close(plain[0][places], expected[0][places], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(looked_into.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_body_that_is_called_by_itself_gets_nothing_that_is_kept_of_other_rows() -> None:
    model = shaken(tiny.classifier("bert"))
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    found = engine.start(model, proof.rows_of_batch(padded()), Caches())
    assert found.seam is not None
    assert found.seam.frozen is not None
    one, other = padded(lengths=(3, 7), seed=4), padded(lengths=(3, 7), seed=5)
    with torch.no_grad():
        expected = model.bert(**other)[0]
        with found.open():
            model(**one)
            ours = model.bert(**other)[0]
    places = other["attention_mask"].bool()
    torch.testing.assert_close(ours[places], expected[places], rtol=1e-5, atol=1e-5)


def test_keys_that_are_asked_for_have_a_place_for_each_row() -> None:
    model, rows = tiny.language_model("llama"), padded()
    found = engine.start(model, proof.rows_of_batch(rows))
    assert found.on
    with torch.no_grad():
        expected = model(**rows, use_cache=True).past_key_values.layers[0].keys
        with found.open():
            torch.testing.assert_close(model(**rows, use_cache=True).past_key_values.layers[0].keys, expected)


def test_one_that_is_open_may_be_opened_again(started: tuple[nn.Module, engine.Engine]) -> None:
    """As where a step evaluates the model that it trains."""
    model, found = started
    another = engine.start(model, proof.rows_of_batch(padded()))
    with torch.no_grad():
        expected = model(**padded()).logits
        with found.open():
            for within in (found, another):
                with within.open():
                    torch.testing.assert_close(model(**padded()).logits, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(**padded()).logits, expected, rtol=1e-5, atol=1e-5)


def test_threads_wait_for_each_other(started: tuple[nn.Module, engine.Engine]) -> None:
    """As those of a server that predicts."""
    model, _ = started
    tokenizer, wrong = tiny.tokenizer(), list[str]()
    items = [Dataset.from_list(tiny.rows(20, seed=seed)).select_columns(["input_ids"]) for seed in range(4)]

    def logits(number: int) -> list[Any]:
        return answer_of.run(model, items[number], tokenizer, 8, lambda batch: model(**batch).logits)

    expected = [logits(number) for number in range(4)]

    def ask(number: int) -> None:
        try:
            for ours, theirs in zip(logits(number), expected[number], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=ask, args=(number % 4,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_model_with_the_same_configuration(started: tuple[nn.Module, engine.Engine]) -> None:
    """As a teacher that was made of the student's: it runs as it is."""
    model, found = started
    teacher = shaken(type(model)(model.config))
    with torch.no_grad():
        expected = teacher(**padded()).logits
        with found.open():
            model(**padded())
            torch.testing.assert_close(teacher(**padded()).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_layers_that_we_know_runs_as_it_is() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(100, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.table(input_ids)}

    found = engine.start(Sums(), proof.rows_of_batch(padded()))
    assert not found.on
    assert "Sums: no stack of layers was found" in str(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_of_peft_on_a_base_in_half_precision(dtype: torch.dtype, fast_products: list[Any]) -> None:
    """PEFT has its own matrices in 32 bits there, and casts."""
    model = get_peft_model(tiny.classifier("bert").to(dtype), LoraConfig(r=2, target_modules=["query", "value"]))
    assert next(one for name, one in model.named_parameters() if "lora_A" in name).dtype == torch.float32
    found = engine.start(model, proof.rows_of_batch(padded()))
    with torch.no_grad():
        expected = model(**padded()).logits
        with found.open():
            torch.testing.assert_close(model(**padded()).logits, expected, rtol=0.05, atol=0.05)
    assert not fast_products


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_attention_by_products_has_second_derivatives(p: float, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences of the first ones, with the same places dropped every time."""
    kept = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(1)) > p
    monkeypatch.setattr(products.dropout, "drawn", lambda shape, p, dtype: (kept.to(dtype), 1 / (1 - p)))
    pick = torch.Generator().manual_seed(0)
    query, key, value, bias = (
        torch.randn(*shape, generator=pick, dtype=torch.float64).requires_grad_()
        for shape in ((6, 4, 3), (6, 4, 3), (6, 4, 3), (3, 1, 4, 4))
    )
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril() if masked else None

    def attention(query: Any, key: Any, value: Any, bias: Any) -> Any:
        return products._Attention.apply(query, key, value, bias, mask, 2, 0.5, p)

    assert torch.autograd.gradcheck(attention, (query, key, value, bias))
    assert torch.autograd.gradgradcheck(attention, (query, key, value, bias))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"engine": "fast"}, r"engine: is not 'auto' or 'off'\n  found: +'fast'"),
        ({"engine": False}, "engine: is not 'auto' or 'off'"),
        ({"max_tokens_per_micro_batch": 0}, r"max_tokens_per_micro_batch: is no number of tokens\n  found: +0"),
        ({"max_tokens_per_micro_batch": "50"}, "max_tokens_per_micro_batch: is no number of tokens"),
    ],
)
def test_arguments_that_a_recipe_would_refuse(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        HybridTrainer(tiny.classifier("bert"), TrainingArguments(str(tmp_path), use_cpu=True), **given)
