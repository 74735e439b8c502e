"""Models that write: against one row at a time, the exact loss, prompts, and what cannot write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset

from hybridtune import answer, engine, tasks
from hybridtune import model as models
from hybridtune.engine import proof
from hybridtune.errors import ModelError, RecipeError
from hybridtune.recipe import Recipe
from hybridtune.tasks.translation import Task
from hybridtune.train import HybridTrainer

ROWS = [
    {"source": "a b c d e f g h i j", "target": "k l"},
    {"source": "b", "target": "m n o p q"},
    {"source": "c d e", "target": "r"},
    {"source": "f g h i", "target": "s t u"},
    {"source": "old new good", "target": "bad bad"},
]
WRITERS = (*tiny.SEQ2SEQ, *tiny.CAUSAL, "encoder-decoder")


def known() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def writer(name: str, **more: Any) -> tuple[Task, Any, Any]:
    """A task with its model, whose weights are so large that texts differ, and its tokenizer."""
    model = tiny.encoder_decoder() if name == "encoder-decoder" else tiny.language_model(name)
    if name == "encoder-decoder":
        tiny.shake(model.parameters(), by=0.2)
    template = None if model.config.is_encoder_decoder else "{source} good "
    task = Task(template=template, **more)
    tokenizer = known()
    task.prepare(model, tokenizer)
    return task, model, tokenizer


def test_who_watches_is_told_after_every_batch() -> None:
    task, model, tokenizer = writer("t5", settings={"max_new_tokens": 2})
    items, told = task.encode(Dataset.from_list(ROWS), tokenizer, 64), list[tuple[int, int]]()
    answer.answers(model, task, items, tokenizer, 2, lambda *done: told.append(done))
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_writes_what_each_row_by_itself_does(name: str, labelled: bool) -> None:
    task, model, tokenizer = writer(name, settings={"max_new_tokens": 9})
    rows = Dataset.from_list(ROWS if labelled else [{"source": row["source"]} for row in ROWS])
    items = task.encode(rows, tokenizer, 64)
    together = answer.answers(model, task, items, tokenizer, 4)
    written = set()
    for row, ids in zip(ROWS, together, strict=True):
        words = row["source"] if model.config.is_encoder_decoder else f"{row['source']} good"
        asked = tokenizer(words, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=9)
        own = alone[0, 1 if model.config.is_encoder_decoder else asked.shape[1] :].tolist()
        own = own[: own.index(3)] if 3 in own else own
        assert task._own(ids) == own
        written.add(tuple(own))
    assert len(written) > 1


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_beams_of_a_batch_score_what_those_of_each_row_do(name: str) -> None:
    task, model, tokenizer = writer(name, settings={"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.8})
    items = task.encode(Dataset.from_list(ROWS), tokenizer, 64)
    together = answer.answers(model, task, items, tokenizer, 5)
    for ids, row in zip(together, task.questions(items, tokenizer), strict=True):
        asked = torch.tensor([row["input_ids"]])
        one = model.generate(
            asked, attention_mask=torch.ones_like(asked), return_dict_in_generate=True, output_scores=True
        )
        own = task._own(one.sequences[0, 1 if model.config.is_encoder_decoder else asked.shape[1] :].numpy())
        assert score(task, model, asked, task._own(ids)) == pytest.approx(score(task, model, asked, own), abs=1e-4)


def score(task: Task, model: Any, asked: torch.Tensor, ids: list[int]) -> float:
    """What beam search raises: the log-probability of a text with its end, over its length to the power of 0.8."""
    most = task.settings["max_new_tokens"]
    ids = [*ids, 3][:most]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            first = model.generation_config.decoder_start_token_id
            logits = model(input_ids=asked, decoder_input_ids=torch.tensor([[first, *ids]])).logits[0, : len(ids)]
        else:
            whole = torch.cat([asked, torch.tensor([ids])], 1)
            logits = model(input_ids=whole).logits[0, asked.shape[1] - 1 : -1]
    chosen = logits.log_softmax(-1)[range(len(ids)), ids].sum()
    return float(chosen) / len(ids) ** 0.8


@pytest.mark.parametrize("name", WRITERS)
def test_the_engine_leaves_writing_alone(name: str) -> None:
    task, model, tokenizer = writer(name, settings={"max_new_tokens": 7})
    items = task.encode(Dataset.from_list(ROWS), tokenizer, 64)
    batch = task.collator(tokenizer)(tasks.for_the_model(items, tokenizer, labels=True).to_list())
    before = answer.answers(model, task, items, tokenizer, 5)
    fast = engine.start(model, proof.rows_of_batch(dict(batch)))
    with torch.no_grad(), fast.open():
        model(**batch)  # what the seam has seen of it must not come back
        during = answer.answers(model, task, items, tokenizer, 5)
        again = model(**batch).logits
    assert [ids.tolist() for ids in during] == [ids.tolist() for ids in before]
    torch.testing.assert_close(again[batch["labels"] != -100], model(**batch).logits[batch["labels"] != -100])


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_that_does_not_suffice_halves_the_batch(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision a single item is tried without the copies of weights, too."""
    task, model, tokenizer = writer("gpt2", settings={"max_new_tokens": 5})
    items = task.encode(Dataset.from_list(ROWS), tokenizer, 64)
    expected = [ids.tolist() for ids in answer.answers(model, task, items, tokenizer, 8)]
    own, sizes = task.respond, []

    def respond(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(batch["input_ids"]))
        written = own(model, batch)
        if sizes[-1] > 2 or (bf16 and sizes.count(1) == 1 == sizes[-1]):
            raise torch.OutOfMemoryError("out of memory")
        return written

    monkeypatch.setattr(task, "respond", respond)
    found = [task._own(ids) for ids in answer.answers(model, task, items, tokenizer, 8, bf16=bf16)]
    assert sizes == ([5, 3, 2, 2, 1, 1] if bf16 else [5, 3, 2, 2, 1])
    assert bf16 or found == [ids[: ids.index(3)] if 3 in ids else ids for ids in expected]


def gradients(task: Task, model: Any, tokenizer: Any, items: Dataset, pieces: int, folder: Path, how: str) -> Any:
    """The loss and the gradients of one update, computed in pieces."""
    trainer = HybridTrainer(
        model,
        hf.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=items,
        data_collator=task.collator(tokenizer),
        compute_loss_func=task.loss,
        processing_class=tokenizer,
        engine=how,
    )
    model.eval()
    model.train = lambda mode=True: model  # no dropout
    rows = tasks.for_the_model(items, tokenizer, labels=True).to_list()
    size = len(rows) // pieces
    batches = [task.collator(tokenizer)(rows[at : at + size]) for at in range(0, len(rows), size)]
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    model.zero_grad()
    assert trainer._loss.chunked == (how == "auto")
    losses = [trainer.training_step(model, dict(batch), torch.tensor(count)) for batch in batches]
    return sum(map(float, losses)), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["auto", "off"])
@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_the_loss_is_that_of_the_whole_update_however_it_is_split(name: str, how: str, tmp_path: Path) -> None:
    task, model, tokenizer = writer(name)
    model.double()
    items = task.encode(Dataset.from_list(ROWS[:4]), tokenizer, 64)
    loss, whole = gradients(task, model, tokenizer, items, 1, tmp_path, how)
    parts, pieces = gradients(task, model, tokenizer, items, 4, tmp_path, how)
    assert parts == pytest.approx(loss, rel=1e-9)
    assert whole.keys() == pieces.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(pieces[key], gradient, rtol=1e-9, atol=1e-12)
    # by hand: the mean over the tokens of all answers and their ends, each row by itself
    total, count = 0.0, 0
    for row in items:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            own = model(input_ids=ids, labels=labels).loss
        tokens = int((labels != -100).sum())
        total, count = total + float(own) * tokens, count + tokens
    assert loss == pytest.approx(total / count, rel=1e-6)
    assert count == sum(len(row["target"].split()) + 1 for row in ROWS[:4])


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_what_a_decoder_is_told_is_not_learnt(name: str, tmp_path: Path) -> None:
    task, model, tokenizer = writer(name)
    items = task.encode(Dataset.from_list(ROWS[:4]), tokenizer, 64)
    for item, row in zip(items, ROWS, strict=False):
        learnt = [label for label in item["labels"] if label != -100]
        assert tokenizer.convert_ids_to_tokens(learnt) == [*row["target"].split(), "[SEP]"]
        assert item["labels"][: item["prompt"]] == [-100] * item["prompt"]
        assert item["input_ids"][item["prompt"] :] == learnt
    # other targets in the place of the prompt's tokens: the loss looks at none of them
    batch = task.collator(tokenizer)(tasks.for_the_model(items, tokenizer, labels=True).to_list())
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = task.loss(outputs, batch["labels"])
        prompt = torch.arange(batch["labels"].shape[1]) < torch.tensor(items["prompt"][:])[:, None]
        flooded = outputs.logits.clone()
        flooded[:, :-1][prompt[:, 1:]] = 50 * torch.randn(int(prompt[:, 1:].sum()), flooded.shape[-1])
        assert task.loss({"logits": flooded}, batch["labels"]) == loss


def test_the_end_is_learnt_but_of_a_text_that_is_cut() -> None:
    task, _, tokenizer = writer("t5", settings={"max_new_tokens": 4})
    items = task.encode(Dataset.from_list(ROWS), tokenizer, 64)
    assert items["target_length"][:] == [3, 6, 2, 4, 3]
    assert [labels[-1] == 3 for labels in items["labels"][:]] == [True, False, True, True, True]
    assert max(map(len, items["labels"][:])) == 4


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_long_text_is_cut_and_never_its_template(name: str) -> None:
    model = tiny.language_model(name)
    tokenizer = known()
    task = Task(template="new {source} old x", settings={"max_new_tokens": 8})
    task.prepare(model, tokenizer)
    rows = Dataset.from_list([{"source": "a b c d e f g " * 20, "target": "k"}, *ROWS])
    items = task.encode(rows, tokenizer, 24)
    asked = task.questions(items, tokenizer)["input_ids"][:]
    assert all(tokenizer.decode(ids).startswith("new a b c") for ids in asked[:1])
    assert all(tokenizer.decode(ids).endswith("old x") for ids in asked)
    room = 24 if name == "t5" else 16
    assert room - 6 <= len(asked[0]) <= room
    assert items["length"][0] > 24
    assert all(length <= 24 for length in items["length"][1:])
    assert max(map(len, items["input_ids"][:])) <= 24


def test_a_chat_template_is_used_and_its_own_end() -> None:
    model, tokenizer = tiny.language_model("llama"), known()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[CLS] {{ m.content }} new {% else %}{{ m.content }} [UNK] "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}old{% endif %}"
    )
    task = Task(template="good {source}")
    task.prepare(model, tokenizer)
    items = task.encode(Dataset.from_list(ROWS[2:3]), tokenizer, 64)
    tokens = tokenizer.convert_ids_to_tokens(items["input_ids"][0])
    assert tokens == ["[CLS]", "good", "c", "d", "e", "new", "old", "r", "[UNK]"]
    assert items["labels"][0][-2:] == items["input_ids"][0][-2:]
    assert set(model.generation_config.eos_token_id) == {3, 1}


def test_what_cannot_write_is_told_so(tmp_path: Path) -> None:
    loaded = models.load(str(tiny.save_pretrained(tmp_path / "bert", "bert")), Task.auto_class)
    with pytest.raises(ModelError, match="a bert cannot write"):
        Task(template="{source} x").prepare(loaded.model, known())
    with pytest.raises(ModelError, match="where its answer begins"):
        Task().prepare(tiny.language_model("gpt2"), known())
    with pytest.raises(ModelError, match="where its answer begins"):
        Task(template="x {source}").prepare(tiny.language_model("gpt2"), known())
    endless = tiny.tokenizer()
    endless.sep_token = None
    with pytest.raises(ModelError, match="no token that ends a text"):
        Task(template="{source} x").prepare(tiny.language_model("gpt2"), endless)
    with pytest.raises(ModelError, match="early_stopping: is of beam search"):
        Task(settings={"early_stopping": True}).prepare(tiny.language_model("t5"), known())


def test_recipes_that_cannot_be_kept_are_refused() -> None:
    least = {"model": "x", "task": "translation", "data": {"train": "x"}}
    with pytest.raises(RecipeError, match="no place for the source"):
        tasks.of(Recipe.make(least, template="Translate: {text}"))
    with pytest.raises(RecipeError, match="length_penalty: is of beam search"):
        tasks.of(Recipe.make(least, num_beams=1, length_penalty=2.0))
    with pytest.raises(RecipeError, match="num_beams: is not of the task classification"):
        tasks.of(Recipe.make({**least, "task": "classification"}, num_beams=4))


def test_how_it_writes_stands_in_the_generation_config() -> None:
    settings = {
        "num_beams": 4,
        "max_new_tokens": 30,
        "length_penalty": 0.6,
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "early_stopping": True,
    }
    model = tiny.language_model("t5")
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_length=99, min_length=5)
    made = tasks.of(
        Recipe.make({"model": "x", "task": "translation", "data": {"train": "x"}}, **settings, generate_on=7)
    )
    task = tasks.from_state(json.loads(json.dumps(made.state())))
    assert task.generate_on == 7
    task.prepare(model, known())
    told = model.generation_config
    assert {key: getattr(told, key) for key in settings} == settings
    assert told.do_sample is False
    assert (told.temperature, told.top_p, told.top_k, told.max_length, told.min_length) == (None,) * 5
    told.validate(strict=True)
