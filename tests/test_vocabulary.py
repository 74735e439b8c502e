"""The loss of language models from the labelled tokens alone, in chunks: against the models' own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers as hf
from test_engine import padded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtune import engine
from hybridtune.engine import decoder, vocabulary
from hybridtune.engine.vocabulary import Vocabulary
from hybridtune.recipe import Stage
from hybridtune.train import HybridTrainer

WIDTH = 100  # of the tiny vocabulary
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def encoder_decoder() -> hf.PreTrainedModel:
    model = tiny.encoder_decoder()
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    return model


def masked(**config: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(hf.BertConfig(**SIZE, vocab_size=WIDTH, pad_token_id=0, **config)).eval()


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    **{name: (lambda name=name: tiny.language_model(name)) for name in (*tiny.CAUSAL, *tiny.SEQ2SEQ)},
    "tied": lambda: tiny.language_model("llama", tie_word_embeddings=True),
    "encoder-decoder": encoder_decoder,
    "masked": masked,
    "masked, untied": lambda: masked(tie_word_embeddings=False),
}


def labelled(prompt: int = 2) -> dict[str, torch.Tensor]:
    """Padded rows with random labels, but for padding and the first tokens."""
    batch = padded()
    labels = torch.randint(4, WIDTH, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    labels[batch["attention_mask"] == 0] = -100
    labels[:, :prompt] = -100
    return batch | {"labels": labels}


def started(model: nn.Module, batch: dict[str, torch.Tensor]) -> Vocabulary:
    head = decoder.head_of(model)
    assert head is not None
    return vocabulary.start(model, head, batch)


def chunked(found: Vocabulary, batch: dict[str, torch.Tensor], items: int | None = None) -> torch.Tensor:
    rest = decoder.complete(found.model, batch)
    labels = rest["labels"]
    with found.open(labels):
        outputs = found.model(**{key: value for key, value in rest.items() if key != "labels"})
    assert outputs["logits"].shape[1] == 0
    return found.loss(outputs, labels, items)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.fixture(autouse=True)
def _few_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.CHUNK, "cpu", 3 * 4 * WIDTH)


def check_equal(model: nn.Module, batch: dict[str, torch.Tensor]) -> Vocabulary:
    """In float64, though most models turn their logits into 32-bit floats first."""
    model.double()
    found = started(model, batch)
    assert found.on, found.reason
    own = model(**batch)["loss"]
    expected, loss = gradients(model, own), chunked(found, batch)
    torch.testing.assert_close(loss.float(), own.float(), rtol=1e-6, atol=0)
    gradient = gradients(model, loss)
    assert gradient.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-5, atol=1e-6 * largest, msg=name)
    again = model(**batch)
    assert torch.equal(again["loss"], own) and again["logits"].shape[1] > 0, "closed, the model is as it was"
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name: str) -> None:
    found = check_equal(MODELS[name](), labelled())
    assert found.shift == (name in (*tiny.CAUSAL, "tied"))


@pytest.mark.parametrize("name", MODELS)
def test_it_can_be_proven_on_rows_longer_than_what_is_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "WINDOW", 4)
    model, batch = MODELS[name](), labelled()
    found = started(model, batch)
    assert found.on, found.reason
    torch.testing.assert_close(chunked(found, batch), model(**batch)["loss"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side: str) -> None:
    batch = padded(side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    check_equal(tiny.language_model("llama"), batch | {"labels": labels})


def test_against_a_loop() -> None:
    """The plainest code: every labelled token's logarithm, one by one."""
    model, batch = tiny.language_model("qwen3").double(), labelled()
    logits, total, count = model(**{**batch, "labels": None}).logits, 0.0, 0
    for row, labels in enumerate(batch["labels"].tolist()):
        for column, label in enumerate(labels[1:]):
            if label != -100:
                total -= float(logits[row, column].detach().log_softmax(-1)[label])
                count += 1
    found = started(model, batch)
    assert chunked(found, batch).item() == pytest.approx(total / count, rel=1e-12)
    assert chunked(found, batch, items=70).item() == pytest.approx(total / 70, rel=1e-12)
    assert found.loss({"logits": logits}, batch["labels"], 70).item() == pytest.approx(total / 70, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "tied", "t5", "masked"])
def test_lora_on_the_head(name: str, options: dict[str, Any]) -> None:
    model = MODELS[name]()
    head = next(key for key, module in model.named_modules() if module is decoder.head_of(model))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=[head], **options), model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tiny.shake(trained, by=0.3)
    check_equal(model, labelled())
    assert len(gradients(model, chunked(started(model, labelled()), labelled()))) == len(trained) >= 2


@pytest.mark.parametrize("trained", ["head", "body", "bias"])
def test_what_is_frozen_gets_no_gradient(trained: str) -> None:
    model = masked(tie_word_embeddings=False)
    tiny.shake(model.parameters(), by=0.2)
    for name, parameter in model.named_parameters():
        inside = name.startswith("cls.predictions.decoder")
        parameter.requires_grad_({"head": inside, "body": not inside, "bias": inside and "bias" in name}[trained])
    check_equal(model, labelled())


def test_hooks_on_the_head_are_called_once_for_every_token() -> None:
    model = tiny.language_model("llama")
    model.lm_head.added = nn.Parameter(torch.randn(WIDTH))
    model.lm_head.register_forward_pre_hook(lambda head, args: (2 * args[0],))
    model.lm_head.register_forward_hook(lambda head, args, output: output + head.added)
    check_equal(model, labelled())


def test_with_autocast() -> None:
    model, batch = tiny.language_model("gemma"), labelled()
    found = started(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**batch)["loss"]
        expected = gradients(model, own)
        loss = chunked(found, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, own, rtol=1e-2, atol=0)
    gradient = gradients(model, loss)
    for name, value in expected.items():
        assert gradient[name].dtype == value.dtype
        assert float((gradient[name] - value).norm()) <= 2e-2 * float(value.norm()), name


def test_in_half_precision_no_chunk_is_lost() -> None:
    """Hundreds of chunks' gradients in a row would be rounded hundreds of times."""
    model, batch = tiny.language_model("llama").bfloat16(), labelled()
    found = started(model, batch)
    assert found.on, found.reason
    many = {key: value.repeat(40, 1) for key, value in batch.items()}
    expected = gradients(model, model(**many)["loss"])["lm_head.weight"].float()
    gradient = gradients(model, chunked(found, many))["lm_head.weight"]
    assert gradient.dtype == torch.bfloat16
    assert float((gradient.float() - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_all_but_sure(dtype: torch.dtype) -> None:
    """Loss and gradient beside autograd's in 64 bits: of a target that is far off, of a certain one, of others.

    Of the certain one 32 bits are not enough for more, torch's own either.
    """
    logits = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    logits[0, 7], logits[1, 8], logits[2, 9] = 300.0, 12.0, -300.0
    logits, targets = logits.to(dtype), torch.tensor([3, 8, 9, 10])
    whole = logits.double().requires_grad_()
    expected = nn.functional.cross_entropy(whole, targets, reduction="none")
    (along,) = torch.autograd.grad(expected.sum(), whole)
    found, gradient = vocabulary.scored(logits, targets)
    assert float(found) == pytest.approx(float(expected.detach().sum()), rel=1e-6)
    assert gradient.dtype == dtype
    for row, other in zip(gradient.double(), along, strict=True):  # each by itself: one of them is tiny
        assert float((row - other).norm() / other.norm()) < (1e-3 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("name", ["llama", "t5", "masked"])
def test_without_a_label_the_loss_is_zero(name: str) -> None:
    model, batch = MODELS[name](), labelled()
    found = started(model, batch)
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for items in (None, 0, torch.tensor(0), 12):
        loss = chunked(found, nothing, items)
        assert float(loss) == 0
        found_gradients = gradients(model, loss)
        assert found_gradients
        assert all(not value.any() for value in found_gradients.values())


@pytest.mark.parametrize("name", ["llama", "t5", "masked"])
def test_it_can_be_proven_on_rows_without_a_label(name: str) -> None:
    batch = labelled()
    assert started(MODELS[name](), batch | {"labels": torch.full_like(batch["labels"], -100)}).on


def test_only_what_is_predicted_counts() -> None:
    """No token stands before a row's first; where nothing is asked for, hidden states do not matter."""
    model, batch = tiny.language_model("llama"), labelled()
    found = started(model, batch)
    expected = chunked(found, batch)
    first = batch | {"labels": batch["labels"].clone()}
    first["labels"][:, 0] = 7
    assert torch.equal(chunked(found, first), expected)
    end = batch | {"input_ids": batch["input_ids"].clone()}
    end["input_ids"][4, -1] = 9  # predicted, but predicts nothing
    assert torch.equal(chunked(found, end), expected)


class Largest(TorchDispatchMode):
    """The most rows of logits that an operation has given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == WIDTH:
                self.rows = max(self.rows, tensor.numel() // WIDTH)
        return result


@pytest.mark.parametrize("trained", ["all", "body"])
@pytest.mark.parametrize("name", ["qwen3", "bart", "masked, untied"])
def test_there_are_never_more_logits_than_a_chunk(name: str, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows in a chunk than the hidden width, since the head's weight, transposed, looks like logits."""
    monkeypatch.setitem(vocabulary.CHUNK, "cpu", 40 * 4 * WIDTH)
    model, batch = MODELS[name](), {key: value.repeat(8, 1) for key, value in labelled().items()}
    head = decoder.head_of(model)
    assert head is not None
    head.requires_grad_(trained == "all")
    found = started(model, batch)
    with Largest() as all_at_once:
        model(**batch)["loss"].backward()
    with Largest() as in_chunks:
        chunked(found, batch).backward()
    assert all_at_once.rows == batch["labels"].numel()
    assert in_chunks.rows == 40


def with_a_bias_behind_its_head() -> nn.Module:
    """A parameter of the model's own, zero as yet, that is added to what its head gives."""
    model = tiny.language_model("bart")
    buffer = model.final_logits_bias
    del model.final_logits_bias
    model.final_logits_bias = nn.Parameter(buffer.clone())
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a cap on logits": (
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**SIZE, vocab_size=WIDTH, num_key_value_heads=1, head_dim=8, pad_token_id=0)
        ),
        "its own loss is not the cross-entropy of what its head gives",
    ),
    "a scale on logits": (
        lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZE, vocab_size=WIDTH, pad_token_id=0, eos_token_id=3)),
        "its own loss is not the cross-entropy of what its head gives",
    ),
    "a loss of its experts": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(
                **SIZE, vocab_size=WIDTH, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
            )
        ),
        "its loss depends on more that is trained than its head gives",
    ),
    "a bias behind the head": (
        with_a_bias_behind_its_head,
        "its loss depends on more that is trained than its head gives",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_models_do_behind_their_heads_is_seen(what: str) -> None:
    """Also where it makes no difference yet: logits of a fresh model are far below any cap."""
    make, reason = OTHERS[what]
    torch.manual_seed(0)
    assert started(make().eval(), labelled()).reason == reason


def test_other_structures_are_left_alone() -> None:
    batch = labelled()
    twice = tiny.language_model("llama")

    def ask_before(body: nn.Module, args: Any, output: Any) -> None:
        twice.lm_head(output[0])

    twice.model.register_forward_hook(ask_before)
    assert "cannot run without logits" in started(twice, batch).reason
    flat = {**batch, "labels": torch.tensor([0, 1, 0, 1, 0])}
    assert started(tiny.language_model("llama"), flat).reason == "its batches are no rows with a label for each token"
    assert decoder.head_of(tiny.classifier("bert")) is None
    assert decoder.head_of(nn.Linear(2, 2)) is None


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows whose labels are their own tokens, the first two left out, of different lengths."""
    return [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in tiny.rows(count, seed=seed)]


def trainer(
    model: nn.Module, folder: Path, asked: str = "auto", batch: int = 8, accumulation: int = 1, **more: Any
) -> HybridTrainer:
    model.config.use_cache = False
    for module in model.modules():  # dropout would draw other numbers
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    model._hybridtune_new = ()
    arguments = hf.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        report_to=[], use_cpu=True, logging_steps=1, eval_strategy="steps", eval_steps=3, save_strategy="no",
        disable_tqdm=True, seed=1, learning_rate=0.01, optim="sgd", prediction_loss_only=True,
    )  # fmt: skip
    return HybridTrainer(
        model,
        arguments,
        train_dataset=rows(24),
        eval_dataset=rows(10, seed=1),
        data_collator=hf.DataCollatorForTokenClassification(tiny.tokenizer()),
        engine=asked,  # type: ignore[arg-type]
        **more,
    )


class Losses(hf.TrainerCallback):
    """Of all stages."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.seen += [logs[key] for key in ("loss", "eval_loss") if logs and key in logs]


def losses(trained: HybridTrainer) -> list[float]:
    logged = Losses()
    trained.add_callback(logged)
    trained.train()
    return logged.seen


LORA = {"part": "layers", "method": "lora", "r": 2}
PROBE = [[{"part": "head", "method": "full"}], [{"part": "layers[-1:]", "method": "full"}]]
ADAPTED = [[LORA], [{"part": "head", "method": "lora", "r": 2}, LORA]]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        *((name, rules) for name in ("llama", "t5", "masked") for rules in ([], PROBE)),
        *((name, ADAPTED) for name in ("llama", "masked")),
    ],
)
def test_a_training_gives_the_same_with_it_and_without(name: str, rules: list[Any], tmp_path: Path) -> None:
    stages = {"strategy": [Stage.model_validate({"rules": stage}) for stage in rules]} if rules else {}
    on, off = (trainer(MODELS[name](), tmp_path / asked, asked, **stages) for asked in ("auto", "off"))
    found, expected = losses(on), losses(off)
    assert on._loss.chunked
    assert on.engine is not None
    assert on.engine.on, "rows are packed in the layers, and the head sees them padded again"
    assert not off._loss.chunked
    assert len(found) == 4 * max(len(rules), 1)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_the_split_of_a_batch_changes_nothing(name: str, tmp_path: Path) -> None:
    """Rows have unequally many labels: means of micro-batches would weigh them by chance."""
    whole = losses(trainer(MODELS[name](), tmp_path / "whole", batch=8))
    for batch, accumulation in ((2, 4), (1, 8)):
        split = losses(trainer(MODELS[name](), tmp_path / str(batch), batch=batch, accumulation=accumulation))
        assert split == pytest.approx(whole, rel=1e-4)


def test_who_wants_logits_gets_them(tmp_path: Path) -> None:
    on, off = (trainer(tiny.language_model("bart"), tmp_path / asked, asked) for asked in ("auto", "off"))
    for one in (on, off):
        one.args.prediction_loss_only = False
    found, expected = on.predict(rows(6, seed=2)), off.predict(rows(6, seed=2))
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    logits, own = found.predictions[0], expected.predictions[0]
    assert logits.shape == own.shape
    labelled = found.label_ids != -100  # what is behind a row's last label is padding, which is not computed
    assert not labelled.all()
    assert torch.allclose(torch.tensor(logits[labelled]), torch.tensor(own[labelled]), atol=1e-5)


def test_where_it_cannot_be_on_the_run_says_so_and_trains_as_trainer_does(tmp_path: Path) -> None:
    make = OTHERS["a cap on logits"][0]
    torch.manual_seed(0)
    on = trainer(make(), tmp_path / "on")
    with pytest.warns(UserWarning, match="engine: logits of all tokens at once: its own loss is not the cross-entropy"):
        found = losses(on)
    assert not on._loss.chunked
    assert on._loss.reason
    torch.manual_seed(0)
    assert found == pytest.approx(losses(trainer(make(), tmp_path / "off", "off")), rel=1e-4)


class Stream(torch.utils.data.IterableDataset):
    """Rows without numbers, and without a length."""

    def __iter__(self) -> Any:
        return iter(rows(48))


def test_rows_without_numbers_are_tried_before_a_batch_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the losses of its pieces, which are means, would be added up."""
    monkeypatch.setattr(engine, "start", lambda *_: engine.Engine(None, "padding, so that there is something to cut"))

    def made(asked: str) -> HybridTrainer:
        torch.manual_seed(0)
        one = trainer(OTHERS["a bias behind the head"][0](), tmp_path / asked, asked, batch=24)
        one.train_dataset = Stream()
        return one

    with pytest.warns(UserWarning, match="engine: logits of all tokens at once"):
        found = losses(made("auto"))
    assert found == pytest.approx(losses(made("off")), rel=1e-4)


def test_a_loss_of_the_users_own_stays(tmp_path: Path) -> None:
    seen = []

    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        seen.append(outputs["logits"].shape[1])
        return outputs["logits"].float().square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one = trainer(tiny.language_model("llama"), tmp_path, compute_loss_func=own)
        one.train()
    assert not one._loss.chunked
    assert min(seen) > 0
