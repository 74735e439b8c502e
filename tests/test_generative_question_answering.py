"""Generative question answering: what the model is told and learns, scores against the reference, whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from torchmetrics.functional.text import squad as reference

from hybridtune import api, tasks
from hybridtune.console import Console
from hybridtune.data.checking.check import check_question_answering
from hybridtune.errors import DataError, ModelError, RecipeError
from hybridtune.recipe import Recipe
from hybridtune.tasks import _squad
from hybridtune.tasks.generative_question_answering import Task

QUIET = Console(quiet=True)
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prepared(name: str, chat: str | None = None, **given: Any) -> tuple[Task, Any]:
    """The task, told by a tiny model what it is, and its tokenizer."""
    task, tokenizer = Task(**given), tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.chat_template = chat
    task.prepare(tiny.language_model(name), tokenizer)
    return task, tokenizer


def rows(*some: tuple[str, str, list[str]]) -> Dataset:
    names = ("question", "context")
    return Dataset.from_list(
        [
            {**dict(zip(names, texts, strict=True)), "answers": {"text": golds, "answer_start": [-1] * len(golds)}}
            for *texts, golds in some
        ]
    )


@pytest.mark.parametrize(
    ("name", "chat", "context", "told"),
    [
        ("t5", None, True, "question: Q context: C"),
        ("t5", None, False, "Q"),
        ("llama", None, True, "C\n\nQuestion: Q\nAnswer: "),
        ("llama", None, False, "Question: Q\nAnswer: "),
        ("llama", CHAT, True, "C\n\nQ"),
        ("llama", CHAT, False, "Q"),
    ],
)
def test_what_the_model_is_told(name: str, chat: str | None, context: bool, told: str) -> None:
    task, tokenizer = prepared(name, chat, with_context=context)
    assert task._prompts(tokenizer).template.format(question="Q", context="C") == told
    assert (told in task.reading.replace("{question}", "Q").replace("{context}", "C")) is (told != "Q")


def test_words_in_braces_in_a_text_are_not_places() -> None:
    task, tokenizer = prepared("t5", template="{question} new {context}")
    table = rows(("a {context} b", "c {question}", ["a"]))
    (ids,) = task.encode(table, tokenizer, 64)["input_ids"][:]
    alone = tokenizer("a {context} b new c {question}")["input_ids"]
    assert ids == alone


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_of_a_long_row_the_end_of_the_context_is_cut(name: str) -> None:
    task, tokenizer = prepared(name, template="good {context} new {question} old ", settings={"max_new_tokens": 4})
    table = rows(("a b c", "d e f g h i j k l m", ["o", "p"]), ("a", "d", []))
    items = task.encode(table, tokenizer, 18 if name == "llama" else 14)
    given = items["input_ids"][:] if name == "t5" else task.questions(items, tokenizer)["input_ids"][:]
    said = tokenizer.decode(given[0], skip_special_tokens=True)
    assert said.startswith("good d e f")
    assert said.endswith("new a b c old")
    assert len(given[0]) <= 14
    assert items["length"][0] > items["length"][1]
    learnt = [[token for token in ids if token != -100] for ids in items["labels"][:]]
    (answer,) = tokenizer("o", add_special_tokens=False)["input_ids"]
    assert learnt == [[answer, tokenizer.eos_token_id], [tokenizer.eos_token_id]]


def test_scores_are_squads() -> None:
    table = rows(
        ("q", "c", ["the Old Mill", "a mill"]),
        ("q", "c", []),
        ("q", "c", []),
        ("q", "c", ["1887"]),
        ("q", "c", ["rye."]),
    )
    said = ["Mill", "", "rye", "in 1887", "Rye"]
    task = Task()
    stats = task.stats(said, table)
    assert stats["exact_match"].tolist() == [1, 1, 0, 0, 1]
    answered = [0, 3, 4]
    expected = reference(
        [{"prediction_text": said[at], "id": str(at)} for at in answered],
        [{"answers": {"text": table[at]["answers"]["text"], "answer_start": [0]}, "id": str(at)} for at in answered],
    )
    found = task.aggregate({name: values[answered] for name, values in stats.items()})
    assert found == {
        "f1": pytest.approx(float(expected["f1"])),
        "exact_match": pytest.approx(float(expected["exact_match"])),
    }
    assert task.intervals(stats)["exact_match"].value == pytest.approx(60)
    assert task.right(stats).tolist() == [True, True, False, False, True]
    assert task.say({"answer": ""}) == "no answer"


def test_baselines() -> None:
    train = rows(
        ("who built it", "It was built and burns", ["Ann"]),
        ("when was it built", "c", ["1887"]),
        ("what is sold", "c", []),
    )
    test = rows(
        ("when was the school built", "It burns. It was built in 1887!", ["1887"]), ("what is sold here", "No.", [])
    )
    found = {name: stats["f1"].tolist() for name, _, stats, _ in Task().baselines(train, test, None)}
    assert found == {"likest sentence": [pytest.approx(1 / 3), 0], "likest question": [1, 1], "no answer": [0, 1]}
    told = [name for name, *_ in Task(with_context=False).baselines(train, test.select([0]), None)]
    assert told == ["likest question"]


def test_answers_in_other_words_are_kept_as_they_are() -> None:
    train = [
        {"question": "Who?", "context": "It was Ann.", "answers": {"text": ["the baker "], "answer_start": [3]}},
        {"question": "Who?", "context": "It was Ann.", "answers": {"text": ["the baker"], "answer_start": [7]}},
        {"question": "Where?", "context": "It was Ann.", "answers": {"text": [], "answer_start": []}},
        {"question": "When?", "context": "", "answers": {"text": ["now"], "answer_start": [0]}},
        {"question": "Why?", "context": "Rain.", "answers": {"text": ["rain"], "answer_start": [0]}},
    ]
    splits = {"train": Dataset.from_list(train), "test": Dataset.from_list([train[4]])}
    made, found = check_question_answering(splits, sources={}, extracted=False)
    assert [row["answers"]["text"] for row in made["train"]] == [["the baker"], []]
    assert {one.kind for one in found} == {"duplicate", "empty_text", "leak", "no_answer"}
    closed, _ = check_question_answering(splits, sources={}, texts=("question",), extracted=False)
    assert [row["question"] for row in closed["train"]] == ["Who?", "Where?", "When?"]
    bad = Dataset.from_list([{"question": "Who?", "context": "x", "answers": {"words": ["y"]}}])
    with pytest.raises(DataError, match="answers cannot be read"):
        check_question_answering({"train": bad}, sources={}, extracted=False)


@pytest.mark.parametrize(
    ("template", "context", "error", "words"),
    [
        ("{context} old", True, RecipeError, "no place for the question"),
        ("{question} old {context}", True, ModelError, "where its answer begins"),
        ("{question} {context} old ", False, DataError, "no column for context"),
    ],
)
def test_templates_that_cannot_be(
    template: str, context: bool, error: type[Exception], words: str, tmp_path: Path
) -> None:
    tiny.save_writer(tmp_path / "model", "llama")
    some = [{"question": f"a {n}", **({"context": f"b {n}"} if context else {}), "answer": "c"} for n in range(30)]
    asked = {"model": str(tmp_path / "model"), "task": Task.name, "data": {"train": some}, "template": template}
    with pytest.raises(error, match=words):
        api.check(asked, QUIET)


def test_train_says_whether_there_is_a_context(tmp_path: Path) -> None:
    tiny.save_writer(tmp_path / "model", "t5")
    with_context = [{"question": f"a {n}", "context": f"b {n}", "answer": "c"} for n in range(30)]
    without = [{"question": f"d {n}", "answer": "c"} for n in range(40)]
    asked = {"model": str(tmp_path / "model"), "task": Task.name}
    with pytest.raises(DataError, match=r"\(test\): there is no column for context"):
        api.check({**asked, "data": {"train": with_context, "test": without}}, QUIET)
    data = {"train": without[:20], "validation": without[20:], "test": with_context}
    told = api.check({**asked, "data": data}, QUIET)
    assert "contexts" not in told["answers"][0]


def test_settings_are_its_own() -> None:
    least = {"model": "x", "task": Task.name, "data": {"train": "x"}}
    assert tasks.of(Recipe.make(least)).settings == {"max_new_tokens": 30}
    with pytest.raises(RecipeError, match="doc_stride"):
        tasks.of(Recipe.make(least, doc_stride=3))


@pytest.mark.parametrize(
    ("name", "context"),
    [("t5", True), ("llama", True), ("qwen3", False), ("gpt2", True), ("bart", False), ("encoder-decoder", True)],
)
def test_a_whole_run(name: str, context: bool, tmp_path: Path) -> None:
    """Of letters the first is the answer; there is none where they begin with an a."""
    chance = random.Random(1)
    found = {" ".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(600)}
    letters = sorted(found)
    chance.shuffle(letters)
    some = [
        {"question": "good" if context else text, **({"context": text} if context else {})}
        | {
            "answers": {
                "text": [] if text[0] == "a" else [text[0], "old"],
                "answer_start": [] if text[0] == "a" else [0, 0],
            }
        }
        for text in letters[:330]
    ]
    wide = {"bart": {"init_std": 0.1}, "gpt2": {"initializer_range": 0.1}}  # as small as they are, else they learn late
    epochs = 8 if name == "encoder-decoder" else 4  # in bf16 it has learnt little after 4
    tiny.save_writer(tmp_path / "model", name, **wide.get(name, {}))
    run = api.tune(
        model=str(tmp_path / "model"), task=Task.name, train=some[:270], validation=some[270:290], test=some[290:],
        strategy="full", learning_rate=3e-3, num_train_epochs=epochs, per_device_train_batch_size=8, max_new_tokens=4,
        output=str(tmp_path / "run"), console=QUIET,
    )  # fmt: skip
    said = run.predict(some[290:])
    golds = [row["answers"]["text"] for row in some[290:]]
    scores = [_squad.score(one["answer"], gold) for one, gold in zip(said, golds, strict=True)]
    measured = run.evaluation["metrics"]
    assert measured["f1"]["value"] == pytest.approx(100 * sum(f1 for _, f1 in scores) / len(scores))
    assert measured["f1"]["value"] > 30  # a letter by chance is right in one of eight
    manifest = json.loads((run.folder / "model" / "hybridtune.json").read_text())
    assert manifest["task"]["with_context"] is context
    assert tasks.from_state(manifest["task"]).inputs == (("question", "context") if context else ("question",))
    report = (run.folder / "report.html").read_text()
    assert "likest question" in report
    assert ("likest sentence" in report) is context


@pytest.mark.parametrize("none", ["", [], None])
def test_questions_without_an_answer_are_held_out_too(none: Any) -> None:
    def answers(at: int) -> Any:
        given = none if at % 3 == 0 else f"c {at}"
        return ([given] if given else []) if none == [] else given

    train = [{"question": f"a b {at}", "context": f"c {at}", "answers": answers(at)} for at in range(120)]
    asked = {"task": "generative_question_answering", "data": {"train": train, "survey": False}}
    told = api.check(asked, console=QUIET)
    assert {name: of["rows_read"] for name, of in told["splits"].items()} == {"train": 86, "validation": 10, "test": 24}
    found = {one["split"]: one["count"] for one in told["findings"] if one["kind"] == "no_answer"}
    assert found["test"] == 8
    assert sum(found.values()) == 40
