"""Instruction data: which tokens are learnt, rows in all their forms, their check, packing, and whole runs."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset
from typer.testing import CliRunner

import hybridtune
from hybridtune import api, prepare, tasks
from hybridtune.cli import app
from hybridtune.console import Console
from hybridtune.data.checking.check import check_instruction
from hybridtune.data.checking.turns import as_one_text, settled, turns_of
from hybridtune.data.reading.read import Notes
from hybridtune.errors import DataError, ModelError, RecipeError
from hybridtune.recipe import Recipe, built_in_strategies, load_strategy
from hybridtune.tasks.instruction import IGNORED, Task
from hybridtune.train import HybridTrainer

QUIET = Console(quiet=True)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: what was thought is left out of earlier answers, and the last one always has a place for it.
THINKING = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "good"},
    {"role": "user", "content": "a b c"},
    {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f g"},
    {"role": "assistant", "content": "h"},
]


def known(template: str | None = CHATML) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>", "system", "user", "assistant"])
    tokenizer.chat_template = template
    return tokenizer


def ready(chat_template: str | None = CHATML, name: str = "llama", **more: Any) -> tuple[Task, Any, Any]:
    task, model, tokenizer = Task(**more), tiny.language_model(name), known(chat_template)
    task.prepare(model, tokenizer)
    return task, model, tokenizer


def table(*talks: Any) -> Dataset:
    return Task().gather(Dataset.from_list([{"messages": talk, "_row": n} for n, talk in enumerate(talks, 1)]))


def learnt(item: dict[str, Any], tokenizer: Any) -> list[str]:
    """The stretches of tokens that are learnt, in words."""
    found: list[list[int]] = []
    for at, (token, label) in enumerate(zip(item["input_ids"], item["labels"], strict=True)):
        assert label in (IGNORED, token)
        if label == IGNORED:
            continue
        if at == 0 or item["labels"][at - 1] == IGNORED:
            found.append([])
        found[-1].append(token)
    return [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in found]


# --- which tokens are learnt


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_and_its_end_is_learnt_and_nothing_else(template: str) -> None:
    task, _, tokenizer = ready(template)
    (item,) = task.encode(table(TALK), tokenizer, 64).to_list()
    assert learnt(item, tokenizer) == ["d e <|im_end|>", "h <|im_end|>"]
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert whole[: len(item["input_ids"])] == item["input_ids"]
    asked = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    (question,) = task.questions(task.encode(table(TALK), tokenizer, 64), tokenizer)["input_ids"]
    assert question == asked == item["input_ids"][: item["prompt"]]


def test_a_template_for_each_turn_where_there_is_no_chat_template() -> None:
    task, _, tokenizer = ready(None, template="user {instruction} assistant")
    (item,) = task.encode(table(TALK), tokenizer, 64).to_list()
    assert learnt(item, tokenizer) == ["d e [SEP]", "h [SEP]"]
    words = " ".join(tokenizer.convert_ids_to_tokens(item["input_ids"]))
    assert words == "user good a b c assistant d e [SEP] user f g assistant h [SEP]"
    asked = task.encode(table(TALK[:-1]).remove_columns("answer"), tokenizer, 64)
    assert task.questions(asked, tokenizer)["input_ids"][0] == item["input_ids"][: item["prompt"]]


def test_answers_that_a_template_writes_otherwise_later_are_learnt_one_at_a_time() -> None:
    thought = [dict(turn) for turn in TALK]
    thought[2]["content"] = "<think>\nx y\n</think>\n\nd e"
    task, _, tokenizer = ready(THINKING)
    items = task.encode(table(thought, TALK[:3]), tokenizer, 64)
    assert items["row"][:] == [0, 0, 1]
    told = [learnt(item, tokenizer) for item in items.to_list()]
    assert told == [
        ["<think> </think> h <|im_end|>"],
        ["<think> x y </think> d e <|im_end|>"],
        ["<think> </think> d e <|im_end|>"],
    ]
    for item, turns in zip(items.to_list(), (thought[:4], thought[:2], TALK[:2]), strict=True):
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert item["labels"][: len(asked)] == [IGNORED] * len(asked)
        assert item["input_ids"][: len(asked)] == asked
        assert item["labels"][len(asked)] != IGNORED
    answered = task.answered(items)
    assert answered["row"][:] == [0, 1]
    assert len(task.questions(items, tokenizer)) == 2
    _, findings = task.sifted(items, table(thought, TALK[:3]), "train", 64)
    assert [(one.kind, one.count) for one in findings] == [("one_by_one", 1)]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>user\n' }}{% endif"), "is not what"),
        (CHATML.replace("{% for", "{% if messages | length > 1 %}{{ 'x ' }}{% endif %}{% for"), "is not what"),
        (MARKED.replace("{{ m.content }}{% endgeneration", "{% endgeneration").replace(
            "assistant\n' }}{% gen", "assistant\n' + m.content }}{% gen"), "does not mark"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_learnt_are_refused(template: str, says: str) -> None:
    task, _, tokenizer = ready()
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as refused:
        task.encode(table(TALK[1:3]), tokenizer, 64)
    assert says in str(refused.value)
    assert "chat_template: FILE" in str(refused.value)


def test_tokens_that_lie_across_the_end_of_a_prompt_are_parted() -> None:
    """Words are pieces of text without spaces here: the answer would be one token with what stands before it."""
    tokenizer = known(
        "{% for m in messages %}{{ m.content + (' ' if m.role == 'user' and false else '') }}{% endfor %}"
    )
    task = Task()
    task.prepare(tiny.language_model("llama"), tokenizer)
    (item,) = task.encode(
        table([{"role": "user", "content": "go"}, {"role": "assistant", "content": "od"}]), tokenizer, 64
    ).to_list()
    assert tokenizer("good", add_special_tokens=False)["input_ids"] != item["input_ids"][:-1]
    assert item["prompt"] == 1
    assert item["labels"][0] == IGNORED
    assert item["labels"][1:] == item["input_ids"][1:]


# --- the loss


def loss_of(model: Any, task: Task, tokenizer: Any, items: list[dict[str, Any]]) -> float:
    keys = ("input_ids", "attention_mask", "labels")
    batch = task.collator(tokenizer)([{key: item[key] for key in keys} for item in items])
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return float(task.loss(outputs, batch["labels"]))


def test_the_loss_is_that_of_the_answers_alone() -> None:
    task, model, tokenizer = ready()
    (item,) = task.encode(table(TALK), tokenizer, 64).to_list()
    ids, labels = torch.tensor([item["input_ids"]]), item["labels"]
    with torch.no_grad():
        chances = model(input_ids=ids).logits.log_softmax(-1)[0]
    each = [-float(chances[at - 1, label]) for at, label in enumerate(labels) if label != IGNORED]
    assert loss_of(model, task, tokenizer, [item]) == pytest.approx(np.mean(each), rel=1e-5)
    assert len(each) == 5
    # another answer token as a target is another loss; every other place has no target to change
    for at, label in enumerate(labels):
        if label != IGNORED:
            other = {**item, "labels": [*labels[:at], label - 1, *labels[at + 1 :]]}
            assert loss_of(model, task, tokenizer, [other]) != pytest.approx(np.mean(each), rel=1e-5)
    assert sum(label != IGNORED for label in labels) == 5  # d, e, the end, h, the end


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_rows_of_a_micro_batch_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    """Beside each other without padding they have the padded loss and gradients; and no row moves another's."""
    task, model, tokenizer = ready(CHATML, name)
    model._hybridtune_new = ()
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0
    chance = random.Random(0)

    def talk(turns: int) -> list[dict[str, str]]:
        return [
            {"role": role, "content": " ".join(chance.choices("abcdefgh", k=chance.randint(1, 6)))}
            for role in ("user", "assistant") * turns
        ]

    items = task.encode(table(*(talk(1 + at % 3) for at in range(8))), tokenizer, 64)
    data = tasks.for_the_model(items, tokenizer, labels=True)
    other = data.to_list()
    other[0]["input_ids"] = [5 + one % 20 for one in other[0]["input_ids"]]
    results = {}
    for how, rows in (("auto", data), ("off", data), ("changed", Dataset.from_list(other))):
        arguments = hf.TrainingArguments(
            str(tmp_path / how), use_cpu=True, report_to="none", per_device_train_batch_size=8, max_steps=1,
            disable_tqdm=True, optim="sgd", learning_rate=1.0, max_grad_norm=0, weight_decay=0,
        )  # fmt: skip
        trainer = HybridTrainer(
            model, arguments, train_dataset=rows, data_collator=task.collator(tokenizer), compute_loss_func=task.loss,
            strategy=[{"rules": [{"part": "layers", "method": "full"}]}], engine="off" if how == "off" else "auto",
            max_tokens_per_micro_batch=60 if how == "auto" else None,
        )  # fmt: skip
        model.eval()
        batch = task.collator(tokenizer)(rows.to_list())
        trainer._begin(0, trainer.strategy.stages[0])  # type: ignore[union-attr]
        trainer._try_on_data()
        if how != "off":
            assert trainer.engine is not None
            assert trainer.engine.on, trainer.engine.reason
        with torch.no_grad():
            _, logits, _ = trainer.prediction_step(model, batch, prediction_loss_only=False)
        loss = trainer.training_step(model, batch, batch["labels"].ne(IGNORED).sum())
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        results[how] = logits[0] if isinstance(logits, tuple) else logits, float(loss), gradients
        lengths = batch["attention_mask"].sum(1).tolist()
    for row in range(1, 8):  # the changed row is the first
        length = lengths[row]
        torch.testing.assert_close(
            results["changed"][0][row, :length], results["auto"][0][row, :length], rtol=1e-4, atol=1e-4
        )
    assert not torch.allclose(results["changed"][0][0, : lengths[0]], results["auto"][0][0, : lengths[0]], atol=1e-3)
    assert results["auto"][1] == pytest.approx(results["off"][1], rel=1e-5)
    for parameter, gradient in results["off"][2].items():
        torch.testing.assert_close(results["auto"][2][parameter], gradient, rtol=1e-3, atol=1e-5)


# --- lengths


def test_a_long_conversation_loses_its_end_where_it_is_learnt_and_its_beginning_where_it_is_asked() -> None:
    task, _, tokenizer = ready(settings={"max_new_tokens": 4})
    whole = task.encode(table(TALK), tokenizer, 64).to_list()[0]
    (item,) = task.encode(table(TALK), tokenizer, 20).to_list()
    assert item["length"] == len(whole["input_ids"]) > 20
    assert item["input_ids"] == whole["input_ids"][:20]
    (question,) = task.questions(task.encode(table(TALK), tokenizer, 20), tokenizer)["input_ids"]
    shorter = [TALK[0], *TALK[3:4]]
    assert question == tokenizer.apply_chat_template(shorter, add_generation_prompt=True, return_dict=False)
    long = [{"role": "user", "content": "a " * 40 + "b"}]
    (ids,) = task.encode(table(long).remove_columns("answer"), tokenizer, 20)["input_ids"]
    assert len(ids) <= 16
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["<|im_end|>", "<|im_start|>", "assistant"]


def test_a_row_of_which_nothing_is_left_to_learn_is_said_and_left_out() -> None:
    task, _, tokenizer = ready(settings={"max_new_tokens": 4})
    long = [{"role": "user", "content": "a " * 30}, {"role": "assistant", "content": "b"}]
    rows = table(TALK[:3], long)
    items = task.encode(rows, tokenizer, 16)
    kept, findings = task.sifted(items, rows, "train", 16)
    assert kept["row"][:] == [0]
    assert [(one.kind, one.count, one.level) for one in findings] == [("answer_cut_away", 1, "warning")]
    assert findings[0].examples[0]["row"] == 2
    kept, findings = task.sifted(items, rows, "validation", 16)
    assert kept["row"][:] == [0, 1]
    assert findings[0].did.startswith("kept, without a part in the loss")
    with pytest.raises(DataError, match="nothing of any answer"):
        task.sifted(items.select([1]), rows, "train", 16)


# --- rows in all their forms


FORMS = [
    {"messages": TALK},
    {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]),
                        "value": turn["content"]} for turn in TALK]},
    {"messages": json.dumps(TALK)},
    {"messages": [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]},
    {"instruction": "f g", "input": "", "output": "h", "system": "good", "history": [["a b c", "d e"]]},
    {"prompt": TALK[:-1], "completion": TALK[-1:]},
]  # fmt: skip


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "list"])
def test_rows_of_every_form_are_the_same_conversation(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    source: Any = [row, row]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(one) for one in source))
    elif kind == "json":
        path.write_text(json.dumps(source))
    elif kind == "parquet":
        Dataset.from_list(source).to_parquet(str(path))
    source = source if kind == "list" else str(path)
    task = Task()
    recipe = Recipe.make(model="m", task="instruction", train=source)
    found = prepare._read(recipe, task, Notes())[0]["train"]
    assert found["messages"][0] == TALK[:-1]
    assert found["answer"][:] == ["h", "h"]
    assert found["conversation"][0] == "system: good\nuser: a b c\nassistant: d e\nuser: f g"


def test_instruction_with_input_and_named_columns() -> None:
    rows = [{"q": "a", "input": "b", "label": "c"}]
    recipe = Recipe.make(model="m", task="instruction", train=rows, columns={"instruction": "q", "output": "label"})
    task = tasks.of(recipe)
    found = prepare._read(recipe, task, Notes())[0]["train"]
    assert found["messages"][0] == [{"role": "user", "content": "a\nb"}]
    assert found["answer"][0] == "c"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a"}], "there is no column for instruction"),
        ([{"instruction": "a"}], "there is no column for output"),
        ([{"messages": [{"content": "a"}]}], "row 1: a turn has no role"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}],
            "row 1: a turn of the assistant's is marked",
        ),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}], "no texts"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(rows: Any, says: str) -> None:
    recipe = Recipe.make(model="m", task="instruction", train=rows)
    with pytest.raises(DataError, match=says):
        prepare._read(recipe, tasks.of(recipe), Notes())


def messages(**row: Any) -> list[dict[str, str]]:
    """What a row of columns becomes, the answer included."""
    recipe = Recipe.make(model="m", task="instruction", train=[row])
    made = prepare._read(recipe, tasks.of(recipe), Notes())[0]["train"]
    return [*made["messages"][0], {"role": "assistant", "content": made["answer"][0]}]


@pytest.mark.parametrize(
    "output",
    ['{"from": "Berlin", "to": "Rome"}', '{"role": "user", "name": "Ann"}', '[{"role": "user", "content": "x"}]', "[]"],
)
def test_an_answer_may_be_json(output: str) -> None:
    assert messages(instruction='{"from": "here"} as JSON?', output=output) == [
        {"role": "user", "content": '{"from": "here"} as JSON?'},
        {"role": "assistant", "content": output},
    ]


def test_numbers_are_said_too() -> None:
    said = [turn["content"] for turn in messages(instruction="Double it", input=21, output=42)]
    assert said == ["Double it\n21", "42"]


PAIRS = [["hi", "hello"], ["one", "2"]]


@pytest.mark.parametrize(
    "history",
    [
        PAIRS,
        json.dumps(PAIRS),
        [{"role": role, "content": text} for pair in PAIRS for role, text in zip(("user", "gpt"), pair, strict=True)],
    ],
)
def test_what_went_before(history: Any) -> None:
    said = [(turn["role"], turn["content"]) for turn in messages(instruction="a", output="b", history=history)]
    roles = ["user", "assistant"] * 3
    assert said == list(zip(roles, ["hi", "hello", "one", "2", "a", "b"], strict=True))
    assert len(messages(instruction="a", output="b", history="[]")) == 2


@pytest.mark.parametrize("history", [["hi", "yo"], "hi", [["a", "b", "c"]]])
def test_what_cannot_have_gone_before_is_refused(history: Any) -> None:
    with pytest.raises(DataError, match="row 1: the history"):
        messages(instruction="a", output="b", history=history)


def test_an_encoder_decoder_has_no_use_for_a_chat_template() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    with pytest.raises(ModelError, match="chat_template: an encoder-decoder"):
        Task(chat_template=CHATML).prepare(tiny.language_model("t5"), tokenizer)


def test_own_metrics_see_no_thoughts() -> None:
    rows = table(talk("u:a", "a:<think> x </think> b"))
    assert Task().gold(rows) == ["b"]


def test_forms_of_turns() -> None:
    assert turns_of("hello") == [{"role": "user", "content": "hello"}]
    assert turns_of({"role": "Human", "content": "x"}) == [{"role": "user", "content": "x"}]
    assert turns_of([{"role": "system", "content": " "}, {"role": "user", "content": "x"}]) == turns_of("x")
    thought = {"role": "assistant", "content": "y", "reasoning_content": "z"}
    assert turns_of([thought])[0]["content"] == "<think>\nz\n</think>\n\ny"
    assert turns_of("[1, 2] are numbers") == [{"role": "user", "content": "[1, 2] are numbers"}]
    assert as_one_text(turns_of("x")) == "x"


def test_files_with_weights_and_parts_that_are_held_out(tmp_path: Path) -> None:
    """Rows of one file count twice, of the other half, each in its form; no conversation stands on both sides."""
    theirs = [turns_as_sharegpt(talk(f"u:q {n} {n * n}", f"a:{n}")) for n in range(40)]
    for name, rows in (("ours", toy(60, 5)), ("theirs", theirs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    asked = [
        {"path": str(tmp_path / "ours.jsonl"), "weight": 2.0},
        {"path": str(tmp_path / "theirs.jsonl"), "weight": 0.5},
    ]
    recipe = Recipe.make(model="m", task="instruction", train=asked, data={"survey": False, "train": asked})
    rows, about = prepare.rows_of(recipe, tasks.of(recipe), QUIET)
    read = about["splits"]["train"]["rows_read"]
    assert read + sum(len(rows[name]) for name in ("validation", "test")) == 100
    sources = rows["train"]["_source"][:]
    counts = {name: sum(name in source for source in sources) for name in ("ours", "theirs")}
    assert counts["ours"] > 2 * counts["theirs"] > 0
    mine = rows["train"].filter(lambda row: "ours" in row["_source"])["conversation"][:]
    assert len(mine) == 2 * len(set(mine))
    sides = [set(rows[name]["conversation"][:]) for name in ("train", "validation", "test")]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


# --- the check


def talk(*said: str) -> list[dict[str, str]]:
    """u:hello a:hi s:be kind"""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles.get(one[:1], one.partition(":")[0]), "content": one.partition(":")[2]} for one in said]


def turns_as_sharegpt(turns: list[dict[str, str]]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in turns]}


GOOD = [talk(f"u:question {n}", f"a:answer {n}") for n in range(12)]


def checked(train: list[Any], **more: list[Any]) -> tuple[dict[str, Dataset], dict[str, Any]]:
    splits = {name: table(*rows) for name, rows in {"train": train, **more}.items()}
    made, findings = check_instruction(splits, sources={name: f"{name}.jsonl" for name in splits})
    return made, {(one.split, one.kind): one for one in findings}


def test_check_of_files_with_several_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    forms = {
        "talks": [{"messages": talk, "id": 1}] * 30,
        "pairs": [{"instruction": f"d {at}", "output": "e"} for at in range(30)],
        "halves": [{"instruction": f"f {at}"} for at in range(30)],
        "others": [{"ask": "g", "reply_": "h"}] * 30,
    }
    files = {}
    for name, rows in forms.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    # each file has what a row needs, in a form of its own; no model is packaged that could count tokens
    told = api.check(task="instruction", train=[str(files["talks"]), str(files["pairs"])])
    said = capsys.readouterr().out
    assert "as rows of other files have" not in said and "no model is given: tokens are not counted" in said
    assert sum(split["rows_read"] for split in told["splits"].values()) == 60 and "lengths" not in told
    api.check(task="instruction", train=[str(files["pairs"]), str(files["halves"])], validation=forms["pairs"][:3])
    assert (
        "halves.jsonl: none of its rows has a value for answer, as rows of other files have" in capsys.readouterr().out
    )
    with pytest.raises(DataError, match="no column for instruction") as refused:
        api.check(task="instruction", train=str(files["others"]))
    assert "or messages, a column of conversations" in str(refused.value)
    assert "--column instruction=ask" in str(refused.value)


def test_turns_are_repaired_where_no_word_is_lost() -> None:
    odd = [
        talk("u:a", "u:b", "a:c"),
        talk("a:welcome", "u:d", "a:e"),
        talk("u:f", "a:g", "u:h"),
        talk("u:i", "a:j", "a:k"),
    ]
    made, found = checked([*odd, *GOOD])
    rows = made["train"].to_list()
    assert rows[0]["messages"] == talk("u:a\n\nb")
    assert rows[1]["messages"] == talk("u:d")
    assert (rows[2]["messages"], rows[2]["answer"]) == (talk("u:f"), "g")
    assert (rows[3]["messages"], rows[3]["answer"]) == (talk("u:i"), "j\n\nk")
    assert rows[3]["conversation"] == "i"
    kinds = {kind: (one.count, one.level) for (_, kind), one in found.items()}
    warned = dict.fromkeys(("leading_answer", "cut_back"), (1, "warning"))
    assert kinds == {"joined_turns": (2, "warning"), **warned}
    assert made["train"]["messages"][4:] == [turns[:1] for turns in GOOD]


def test_rows_that_teach_nothing_are_dropped_from_train() -> None:
    odd = [
        talk("u:a"),
        talk("u:b", "a: "),
        talk("u: ", "a:c"),
        talk("u:d", "a: ", "u:e", "a:f"),
        talk("u:g", "tool:h", "a:i"),
        talk("u:j", "a:k", "s:l", "u:m", "a:n"),
        GOOD[0],
    ]
    made, found = checked([*GOOD, *odd])
    assert made["train"]["conversation"][:] == [turns[0]["content"] for turns in GOOD]
    assert {kind: one.count for (_, kind), one in found.items()} == {
        "unknown_role": 1, "late_system": 1, "empty_turn": 2, "missing_label": 2, "duplicate": 1,
    }  # fmt: skip
    assert found["train", "unknown_role"].examples[0]["role"] == "tool"


@pytest.mark.parametrize(
    "odd",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}]}, *talk("a:q")]},
        {"messages": "not turns"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q", "weight": "1"}]},
    ],
)  # fmt: skip
def test_rows_of_another_form_hide_nothing(odd: dict[str, Any], tmp_path: Path) -> None:
    alien = [{"role": "alien", "content": "a"}, {"role": "assistant", "content": "b"}]
    calls = [talk("u:a")[0], {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]}]
    rows = [*({"messages": turns} for turns in (*GOOD, alien, calls)), odd]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.make(model="m", task="instruction", train=str(path))
    task = tasks.of(recipe)
    train = prepare._read(recipe, task, Notes())[0]["train"]
    made, found = task.check({"train": train}, {"train": str(path)})
    (unknown,) = (one for one in found if one.kind == "unknown_role")
    assert [one["role"] for one in unknown.examples] == ["alien", "assistant with tool_calls"]
    assert not {"a"} & set(made["train"]["conversation"][:])
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], rows[-3], odd]))
    again = Recipe.make(model="m", task="instruction", train=[{"messages": turns} for turns in GOOD], test=str(path))
    splits = prepare._read(again, tasks.of(again), Notes())[0]
    with pytest.raises(DataError, match=r"a\.jsonl:3: a turn has a role that is unknown\n.*alien"):
        tasks.of(again).check(splits, {"train": "train", "test": str(path)})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (talk("u:a"), "the row has no answer"),
        (talk("u:a", "a:b", "u:c"), "the row has no answer"),
        (talk("u:a", "a: "), "the row has no answer"),
        (talk("u:a", "tool:h", "a:i"), "a role that is unknown"),
        (talk("u:a", "s:h", "a:i"), "a system turn stands behind others"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_test(row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        checked(GOOD, test=[talk("u:x", "a:y"), row])
    assert "test.jsonl:2" in str(refused.value)


def test_leaks_and_conflicts() -> None:
    multi = talk("u:one", "a:two", "u:three", "a:four")
    made, found = checked([*GOOD, multi, talk("u:question 1", "a:another")], test=[multi, GOOD[3]])
    assert found["train", "leak"].count == 2
    assert found["train", "conflict"].count == 2
    assert len(made["train"]) == 12
    assert len(made["test"]) == 2
    # the same last words after others are no leak
    made, found = checked([*GOOD, multi], test=[talk("u:zero", "a:two", "u:three", "a:four")])
    assert ("train", "leak") not in found


def test_settled_turns_stay() -> None:
    for turns in (*GOOD, TALK):
        assert settled(turns) == (turns, [])
        assert settled(settled(turns)[0])[0] == turns


# --- scores


def test_scores() -> None:
    rows = table(talk("u:a", "a:The old boat."), talk("u:b", "a:<think>\nx\n</think>\n\nnew boats"))
    task = Task(script="latin")
    stats = task.stats(["old boat", "boats are new"], rows)
    assert task.metric == "rougeL"
    assert stats["exact_match"].tolist() == [1.0, 0.0]
    found = task.aggregate(stats)
    # "the old boat" against "old boat": precision 1, recall 2/3. "boats new" have one word in common in order.
    assert found["rougeL"] == pytest.approx(100 * np.mean([0.8, 0.4]))
    assert found["exact_match"] == 50
    assert task.intervals(stats)["exact_match"].method == "wilson"


def test_baselines() -> None:
    train = table(talk("u:what is a boat", "a:ship"), talk("u:what is a cat", "a:pet"), talk("u:who are you", "a:pet"))
    test = table(talk("u:is a boat", "a:ship"))
    found = {name: stats for name, _, stats, _ in Task(script="latin").baselines(train, test, None)}
    assert {name: stats["exact_match"].tolist() for name, stats in found.items()} == {
        "frequent answer": [0.0], "echo": [0.0], "likest row": [1.0],
    }  # fmt: skip


def test_thoughts_are_told_apart() -> None:
    task, _, tokenizer = ready(THINKING)
    ids = [np.array(tokenizer("<think> x y </think> d e <|im_end|> a", add_special_tokens=False)["input_ids"])]
    assert task.decode(ids, table(TALK), table(TALK)) == [{"text": "d e", "thinking": "x y"}]
    plain = [np.array(tokenizer("d e <|im_end|>", add_special_tokens=False)["input_ids"])]
    assert task.decode(plain, table(TALK), table(TALK)) == [{"text": "d e"}]


# --- recipes


def test_packing_is_told_what_does_it() -> None:
    for key in ("packing", "sample_packing"):
        with pytest.raises(RecipeError, match="max_tokens_per_micro_batch") as refused:
            Recipe.make(model="m", task="instruction", train="x", **{key: True})
        assert "without padding" in str(refused.value)


def test_templates_of_recipes(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    for given in (CHATML, str(path)):
        recipe = Recipe.make(model="m", task="instruction", train="x", chat_template=given)
        task = tasks.of(recipe)
        assert task.chat_template == CHATML
        assert tasks.from_state(task.state()).state() == task.state()
    with pytest.raises(RecipeError, match="neither Jinja nor a file"):
        tasks.of(Recipe.make(model="m", task="instruction", train="x", chat_template="chatml"))
    with pytest.raises(RecipeError, match="no place for the instruction"):
        tasks.of(Recipe.make(model="m", task="instruction", train="x", template="{messages}"))
    with pytest.raises(RecipeError, match="is not of the task"):
        tasks.of(Recipe.make(model="m", task="summarization", train="x", chat_template=CHATML))


# --- whole runs


MEANT = {"new": "t u", "old": "v", "good": "w x", "bad": "y"}


def toy(count: int, seed: int) -> list[dict[str, Any]]:
    """A word among letters says what to answer: alone, or in the second turn of a conversation."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        turns = []
        for _ in range(chance.choice((1, 1, 2))):
            word = chance.choice(list(MEANT))
            letters = [word, *chance.choices("abcdefghijkl", k=3)]
            turns += talk(f"u:{' '.join(chance.sample(letters, 4))}", f"a:{MEANT[word]}")
        rows.append({"messages": turns})
    return rows


TEST = toy(24, 2)
DATA = {
    "train": toy(240, 0),
    "validation": [row for row in toy(30, 1) if row not in TEST],
    "test": TEST,
}
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 16, "max_new_tokens": 5, "console": QUIET}


def save(folder: Path, name: str, template: str | None = CHATML) -> str:
    tiny.save_writer(folder, name)
    known(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hybridtune.Run:
    home = tmp_path_factory.mktemp("instruction")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return api.tune(
            model=save(home / "model", "qwen3"), task="instruction", **DATA, strategy="full", learning_rate=1e-2,
            num_train_epochs=6, output=str(home / "run"), neftune_noise_alpha=1, **SETTINGS,
        )  # fmt: skip


def test_a_whole_run_learns_the_toy_instructions(run: hybridtune.Run) -> None:
    told = run.evaluation
    assert told["goal"] == {"metric": "rougeL", "direction": "maximize"}
    assert [one["name"] for one in told["baselines"]] == ["frequent answer", "echo", "likest row"]
    best = max(one["metrics"]["exact_match"]["value"] for one in told["baselines"])
    assert told["metrics"]["exact_match"]["value"] > best
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["gold"] for line in lines] == [row["messages"][-1]["content"] for row in TEST]
    right = [line["gold"] == line["text"] for line in lines]
    assert told["metrics"]["exact_match"]["value"] == pytest.approx(100 * np.mean(right))
    metrics = json.loads(next((run.folder / "stages").glob("*/metrics.json")).read_text())
    assert metrics["engine"].startswith("rows without padding")
    assert told["model_difference"] == 0
    page = (run.folder / "report.html").read_text()
    assert "Texts, in characters" in page
    assert "Best rows" in page


def test_predict_takes_every_form(run: hybridtune.Run) -> None:
    single = [row for row in TEST if len(row["messages"]) == 2]
    bare = [row["messages"][0]["content"] for row in single]
    said = [one["text"] for one in run.predict(bare)]
    assert said == [one["text"] for one in run.predict([row["messages"][:1] for row in single])]
    assert said == [one["text"] for one in run.predict(single)]  # with the answers that are to be given
    assert said == [one["text"] for one in run.predict([{"instruction": text} for text in bare])]
    assert said == [run.predict([text])[0]["text"] for text in bare]
    assert len(set(said)) > 2
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert [one["text"] for one in run.predict([{"messages": row["messages"][:-1]} for row in TEST])] == [
        line["text"] for line in lines
    ]
    again = hybridtune.load(run.folder / "model")
    assert [one["text"] for one in again.predict(bare)] == said
    with pytest.raises(DataError, match="row 1: messages has a turn of the role tool"):
        run.predict([[{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}]])
    with pytest.raises(DataError, match="no turn of a user"):
        run.predict([[{"role": "system", "content": "x"}]])


def test_transformers_alone_writes_the_same(run: hybridtune.Run) -> None:
    folder = str(run.folder / "model")
    plain, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    for row in TEST[:6]:
        given = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        given.pop("token_type_ids", None)
        ids = plain.generate(**given)[0, given["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == run.predict([row])[0]["text"]


def test_the_commands(run: hybridtune.Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in TEST[:5]))
    found = CliRunner().invoke(app, ["predict", str(run.folder), "--input", str(rows), "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)["predictions"]
    assert [{key: one[key] for key in one if key not in ("row", "input")} for one in told] == run.predict(TEST[:5])
    assert [one["row"] for one in told] == [1, 2, 3, 4, 5]
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text(json.dumps({"instruction": "new a b c", "output": "a"}) + "\n")
    for path in (rows, alpaca):
        found = CliRunner().invoke(app, ["evaluate", str(run.folder), "--data", str(path), "--json"])
        assert found.exit_code == 0, found.output
        assert set(json.loads(found.stdout)["metrics"]) == {"rougeL", "exact_match"}
    found = CliRunner().invoke(app, ["compare", str(run.folder), str(run.folder)])
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(app, ["export", str(run.folder), "--output", str(tmp_path / "delta"), "--kind", "delta"])
    assert found.exit_code == 0, found.output
    assert hybridtune.load(tmp_path / "delta").predict(["new a b c"]) == run.predict(["new a b c"])
    assert "chat template" in (tmp_path / "delta" / "README.md").read_text()
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    found = CliRunner().invoke(app, ["evaluate", str(run.folder), "--data", str(rows)])
    assert found.exit_code == 2
    assert "has no answer" in found.output


DIFFERENT = ("full", "adapter", "prompt", "prefix", "ia3", "top-full-lora-below", "full-then-lora")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5", "bart", "marian"])
def test_strategies_on_every_architecture(name: str, tmp_path: Path) -> None:
    """They are raced, and every one's model, built anew from what was saved of it, answers the test rows.

    All where a decoder and an encoder-decoder stand for their kind, else those whose mechanisms differ.
    """
    template = None if name in ("gpt2", *tiny.SEQ2SEQ) else (THINKING if name == "qwen3" else CHATML)
    names = built_in_strategies() if name in ("llama", "t5") else DIFFERENT
    chosen = [load_strategy(strategy) for strategy in names]
    for stage in (stage for strategy in chosen for stage in strategy.stages):
        stage.num_train_epochs, stage.max_steps, stage.repeat = None, 1, None
    run = api.tune(
        model=save(tmp_path / "model", name, template), task="instruction", train=DATA["train"][:16],
        validation=DATA["validation"][:4], test=TEST[:4], output=str(tmp_path / "run"), baselines=False,
        strategy=[strategy.model_dump(exclude_none=True) for strategy in chosen], data={"survey": False},
        template="user {instruction} assistant" if name == "gpt2" else None, eval_strategy="no", **SETTINGS,
    )  # fmt: skip
    candidates = run.evaluation["candidates"]
    assert {one["strategy"] for one in candidates} == set(names)
    assert all(one["trainable"] > 0 for one in candidates)
    assert run.evaluation["model_difference"] == 0
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    again = hybridtune.load(run.folder).predict(TEST[:4])
    assert [line["text"] for line in lines] == [one["text"] for one in again]
