"""Classification: labels stay the user's, texts are read as the model needs them, and the loss is that of the book."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import tiny
import torch
import transformers as hf
from datasets import Dataset
from sklearn import metrics as sklearn_metrics
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import hybridtune
from hybridtune import api, predict
from hybridtune.console import Console
from hybridtune.errors import DataError, ModelError, RecipeError
from hybridtune.recipe import Recipe
from hybridtune.tasks.classification import Task


@pytest.fixture
def tune(base: Path, tmp_path: Path) -> Callable[..., hybridtune.Run]:
    """Tunes the head of the tiny model for one epoch."""

    def run(console: Console | None = None, **keys: Any) -> hybridtune.Run:
        least = {"model": str(base), "task": "classification", "strategy": "head", "num_train_epochs": 1}
        least |= {"baselines": False, "output": str(tmp_path / "run")}
        return api.tune(**least | keys, console=console or Console(quiet=True))

    return run


def checked(rows: list[dict[str, Any]], **keys: Any) -> tuple[Task, Dataset]:
    """The task of a recipe after it has looked at its training rows, and these."""
    data = {"train": rows} | {key: keys.pop(key) for key in ("columns",) if key in keys}
    task = Task.from_recipe(Recipe.make(model="m", task="classification", data=data, **keys))
    table = Dataset.from_list([{**row, "_row": number} for number, row in enumerate(rows, 1)])
    splits, _ = task.check({"train": table}, {"train": "rows"})
    assert isinstance(task, Task)
    return task, splits["train"]


def lines(run: hybridtune.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text("utf-8").splitlines()]


# Labels


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (["spam", "ham"], ["ham", "spam"]),
        ([7, -1, 3], [-1, 3, 7]),
        (["yes", "no", "¿quizás?", "否"], ["no", "yes", "¿quizás?", "否"]),
        ([True, False], [False, True]),
        ([1.0, 0.0], [0, 1]),
        (["10", "9"], ["10", "9"]),
    ],
)
def test_labels_stay_the_users(tune: Callable[..., hybridtune.Run], labels: list[Any], kept: list[Any]) -> None:
    run = tune(**texts.splits(24, 12, 12, labels=labels), baselines=len(labels) == 3)
    assert run.predictor.task.labels == kept  # type: ignore[attr-defined]
    assert [type(label) for label in run.predictor.task.labels] == [type(label) for label in kept]  # type: ignore[attr-defined]
    config = run.model.config
    assert config.id2label == {number: str(label) for number, label in enumerate(kept)}
    assert config.label2id == {str(label): number for number, label in enumerate(kept)}
    assert config.num_labels == len(kept)
    for line, row in zip(lines(run), texts.splits(24, 12, 12, labels=labels)["test"], strict=True):
        assert line["gold"] == row["label"]
        assert line["label"] in kept
        assert list(line["scores"]) == [str(label) for label in kept]
        assert sum(line["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert line["scores"][str(line["label"])] == max(line["scores"].values())
    evaluation = run.evaluation
    assert [row["label"] for row in evaluation["per_class"]] == evaluation["confusion"]["labels"] == kept
    data = json.loads((run.folder / "data.json").read_text("utf-8"))
    assert [row["label"] for row in data["labels"]] == kept
    page = (run.folder / "report.html").read_text("utf-8")
    assert all(str(label) in page for label in kept)
    scored = api.evaluate_run(run.folder, [{"text": "good", "label": str(kept[0])}])  # as a CSV file gives it
    assert scored["rows"] == 1


def test_integers_in_csv_files_are_texts(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    rows = texts.splits(24, 8, 8, labels=[0, 1])
    files = {name: str(texts.save_csv(tmp_path / f"{name}.csv", rows[name])) for name in rows}
    run = tune(**files)
    assert run.predict(["good"])[0]["label"] in ("0", "1")
    assert api.evaluate_run(run.folder, rows["test"])["metrics"] == run.evaluation["metrics"]


def several(seed: int, count: int, form: Callable[[list[str]], Any]) -> list[dict[str, Any]]:
    """Rows with none, one or two of the labels a, b and c."""
    sets = [["a"], ["b"], ["a", "c"], [], ["c"]]
    rows = texts.labelled(count, seed)
    return [{"text": row["text"], "label": form(sets[number % 5])} for number, row in enumerate(rows)]


def test_the_separator_of_train_is_kept_in_the_state() -> None:
    rows = [{"text": f"a {n}", "label": "red, green|blue" if n % 2 else "blue"} for n in range(20)]
    task, _ = checked(rows, multi_label=True)
    again = Task.from_state(json.loads(json.dumps(task.state())))
    new = Dataset.from_list([{"text": "a", "label": "red, green", "_row": 1}])
    assert again.encode(new, tiny.tokenizer(), 9)["labels"][:] == [
        [1.0 if name == "red, green" else 0.0 for name in again.labels]
    ]


@pytest.mark.parametrize("form", [list, "|".join, ";".join, lambda labels: str(list(labels))])
def test_several_labels_a_row(form: Callable[[list[str]], Any]) -> None:
    task, rows = checked(several(1, 20, form), multi_label=True)
    assert task.labels == ["a", "b", "c"]
    encoded = task.encode(rows, tiny.tokenizer(), 64)
    assert encoded["labels"][:5] == [[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_a_whole_run_with_several_labels(tune: Callable[..., hybridtune.Run]) -> None:
    data = {name: several(seed, 20, "|".join) for seed, name in enumerate(("train", "validation", "test"), 1)}
    run = tune(**data, multi_label=True, baselines=True)
    assert run.model.config.problem_type == "multi_label_classification"
    found = lines(run)
    assert [line["gold"] for line in found[:4]] == [["a"], ["b"], ["a", "c"], []]
    for line in found:
        assert line["label"] == [name for name, score in line["scores"].items() if score >= 0.5]
    gold = np.array([[name in line["gold"] for name in "abc"] for line in found])
    said = np.array([[name in line["label"] for name in "abc"] for line in found])
    expected = {
        "macro_f1": sklearn_metrics.f1_score(gold, said, average="macro", zero_division=0),
        "micro_f1": sklearn_metrics.f1_score(gold, said, average="micro", zero_division=0),
        "accuracy": sklearn_metrics.accuracy_score(gold, said),
    }
    assert {name: metric["value"] for name, metric in run.evaluation["metrics"].items()} == pytest.approx(expected)
    assert api.evaluate_run(run.folder, data["test"])["metrics"] == run.evaluation["metrics"]
    with torch.no_grad():
        scores = run.model(**run.tokenizer(["good a"], return_tensors="pt")).logits.sigmoid()[0].tolist()
    assert list(run.predict(["good a"])[0]["scores"].values()) == pytest.approx(scores, abs=1e-5)


def test_baselines_where_a_label_stands_on_every_row() -> None:
    rows = [{"text": row["text"], "label": ["always", row["label"]]} for row in texts.labelled(20)]
    task, table = checked(rows, multi_label=True)
    found = task.baselines(table, table, None)
    assert [name for name, *_ in found] == ["majority class", "bag of words"]
    assert all(stats["predicted"][:, 0].all() for _, _, stats, _ in found)


# What the model reads


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    rows = texts.labelled(count, seed)
    return [{"premise": row["text"], "hypothesis": f"old {row['text'][:5]}", "label": row["label"]} for row in rows]


def test_text_pairs(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune(train=pairs(24, 1), validation=pairs(8, 2), test=pairs(8, 3))
    rows = [{"premise": "a good b", "hypothesis": "c"}, {"premise": "bad", "hypothesis": "d e f g h"}]
    for row, said in zip(rows, run.predict(rows), strict=True):
        batch = run.tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
        with torch.no_grad():
            scores = run.model(**batch).logits.softmax(-1)[0].tolist()
        assert list(said["scores"].values()) == pytest.approx(scores, abs=1e-5)
    assert run.predict([{"text": "a good b", "text_pair": "c"}]) == run.predict(rows[:1])
    with pytest.raises(DataError, match="one value, but a row has text and text_pair"):
        run.predict(["a good b"])
    assert api.export_run(run.folder, run.folder.parent / "out")["difference"] < 1e-5
    assert hybridtune.load(run.folder.parent / "out").predict(rows) == run.predict(rows)


def test_a_second_text_has_to_be_everywhere_or_in_no_place(tune: Callable[..., hybridtune.Run]) -> None:
    with pytest.raises(DataError, match=r"\(test\): there is no column for text_pair, but train has one"):
        tune(train=pairs(24, 1), validation=pairs(8, 2), test=texts.labelled(8, 3))
    with pytest.raises(RecipeError, match="rows are no pairs"):
        tune(**texts.splits(24, 8, 8), template="{text} and {text_pair}")
    run = tune(train=texts.labelled(24, 1), validation=texts.labelled(8, 2), test=pairs(8, 3))
    assert run.predict([{"text": "good", "text_pair": "x y z"}]) == run.predict(["good"])


def test_own_column_names_hold_for_prediction_too(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    rows = {name: [{"text": row["label"], "body": row["text"], "kind": row["label"]} for row in split]
            for name, split in texts.splits(24, 8, 8).items()}  # fmt: skip
    run = tune(**rows, columns={"text": "body", "label": "kind"})
    again = hybridtune.load(run.folder)
    assert again.predict([{"text": "no matter", "body": "good a"}]) == again.predict(["good a"])
    assert api.evaluate_run(run.folder, rows["test"])["metrics"] == run.evaluation["metrics"]


@pytest.mark.parametrize(
    ("template", "text", "pair", "expected"),
    [
        ("Message: {text}", "hi", None, ("Message: hi", None)),
        ('{"text": "{text}", "n": {}}', "hi", None, ('{"text": "hi", "n": {}}', None)),
        ("{text} {text}", "{text_pair}", None, ("{text_pair} {text_pair}", None)),
        ("{text} -> {text_pair}", "a", "b", ("a -> b", None)),
        ("Q: {text}", "a", "b", ("Q: a", "b")),
        (None, "a", "b", ("a", "b")),
    ],
)
def test_template(template: str | None, text: str, pair: str | None, expected: tuple[str, str | None]) -> None:
    task = Task(["x", "y"], template=template, pairs=pair is not None)
    row = {"text": text} | ({"text_pair": pair} if pair is not None else {})
    found, others = task.texts(Dataset.from_list([row]))
    assert (found[0], others[0] if others else None) == expected


def test_a_template_without_the_text_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no place for the text\n.*Message: \{txt\}"):
        checked(texts.labelled(20), template="Message: {txt}")


def test_the_template_is_used_everywhere(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune(**texts.splits(24, 8, 8), template="old { {text} } new")
    with torch.no_grad():
        batch = run.tokenizer("old { good a } new", return_tensors="pt")
        scores = run.model(**batch).logits.softmax(-1)[0].tolist()
    assert list(hybridtune.load(run.folder).predict(["good a"])[0]["scores"].values()) == pytest.approx(
        scores, abs=1e-5
    )


def test_long_texts_and_unknown_words_are_counted_and_said(tune: Callable[..., hybridtune.Run]) -> None:
    rows = texts.splits(24, 8, 8)
    rows["train"] = [{**row, "text": row["text"] + " a" * 70} for row in rows["train"][:3]] + rows["train"][3:]
    rows["test"] = [{**row, "text": f"{row['text'].split()[0]} strange words here"} for row in rows["test"]]
    rows["test"] = [{**row, "text": f"{row['text']} {'q' * n}"} for n, row in enumerate(rows["test"], 1)]
    said = io.StringIO()
    run = tune(Console(stream=said), **rows)
    data = json.loads((run.folder / "data.json").read_text())
    assert {name: length["truncated"] for name, length in data["lengths"].items()} == {
        "train": 3,
        "validation": 0,
        "test": 0,
    }
    assert data["lengths"]["train"]["limit"] == 64
    assert data["lengths"]["train"]["max"] > 70
    assert "! train: 3 rows are longer than 64 tokens and are cut there" in said.getvalue()
    assert data["lengths"]["train"]["unknown_share"] == 0
    assert data["lengths"]["test"]["unknown_share"] > 0.6
    share = data["lengths"]["test"]["unknown_share"]
    assert f"! test: {share:.0%} of the tokens are unknown to this tokenizer" in said.getvalue()
    assert "train: 0%" not in said.getvalue()


def test_max_length_cuts(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune(**texts.splits(24, 8, 8), max_length=4)
    first, same, other = run.predict(["a b c d", "a b c d e f", "a b c e"])
    assert first == same != other


# Empty texts and decoders


def bare_tokenizer(padding_side: str, **tokens: str) -> hf.PreTrainedTokenizerBase:
    """The tiny tokenizer as decoders often come: without a pad token."""
    words = tiny.tokenizer()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, padding_side=padding_side, model_max_length=64, **tokens
    )


ROWS = ["a", "b c d e f g good", "bad", "x y z old new good bad a b c", "o o"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("tokens", [{"eos_token": "[SEP]", "unk_token": "[UNK]"}, {"unk_token": "[UNK]"}])
def test_decoders_without_a_pad_token_pool_the_last_real_token(
    name: str, padding_side: str, tokens: dict[str, str]
) -> None:
    model = tiny.classifier(name)
    model.config.pad_token_id = None
    tokenizer = bare_tokenizer(padding_side, **tokens)
    task = Task(["ham", "spam"])
    task.prepare(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    said = predict.Predictor(model, tokenizer, task, 64, batch_size=3).predict(ROWS)
    for text, one in zip(ROWS, said, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model.score(model.base_model(ids).last_hidden_state[:, -1])
        assert list(one["scores"].values()) == pytest.approx(last.softmax(-1)[0].tolist(), abs=1e-5)


def test_no_token_to_pad_with_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no pad, end or unknown token[\s\S]*add_special_tokens"):
        Task(["a", "b"]).prepare(tiny.classifier("gpt2"), bare_tokenizer("right"))


def test_a_whole_run_of_a_decoder(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    model = tiny.classifier("gpt2").base_model
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "gpt2")
    bare_tokenizer("left", eos_token="[SEP]", unk_token="[UNK]").save_pretrained(tmp_path / "gpt2")
    run = tune(model=str(tmp_path / "gpt2"), **texts.splits(24, 8, 8), baselines=True)
    assert (run.folder / "model" / "README.md").is_file()
    again = hybridtune.load(run.folder)
    assert again.tokenizer.padding_side == "right"
    for text, one in zip(ROWS, again.predict(ROWS), strict=True):
        assert one["label"] == run.predict([text])[0]["label"]
        assert one["scores"] == pytest.approx(run.predict([text])[0]["scores"], abs=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_empty_texts_do_no_harm(name: str) -> None:
    model, tokenizer, task = tiny.classifier(name), tiny.tokenizer(), Task(["ham", "spam"])
    task.prepare(model, tokenizer)
    encoded = task.encode(Dataset.from_list([{"text": ""}, {"text": None}, {"text": "a"}]), tokenizer, 64)
    assert [len(ids) for ids in encoded["input_ids"]] == [1, 1, 1]
    assert encoded["length"] == [0, 0, 1]
    found = np.stack(predict.Predictor(model, tokenizer, task, 64, batch_size=2).logits(encoded))
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(found[1])


# The loss


def test_cross_entropy_with_weights_by_hand() -> None:
    chance = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 3, generator=chance), torch.tensor([0, 1, 2, 2, 0, 1, 2])
    plain, weighted = Task("abc"), Task("abc", weights=[0.5, 2.0, 1.0])
    assert plain.loss({"logits": logits}, labels).item() == pytest.approx(cross_entropy(logits, labels).item())
    by_hand = 0.0
    for row, label in zip(logits, labels, strict=True):
        by_hand += [0.5, 2.0, 1.0][label] * -float(np.log(np.exp(row[label]) / np.exp(row).sum()))
    assert weighted.loss({"logits": logits}, labels).item() == pytest.approx(by_hand / 7, rel=1e-5)
    halves = [weighted.loss({"logits": logits[at]}, labels[at], 7).item() for at in (slice(0, 2), slice(2, 7))]
    assert sum(halves) == pytest.approx(by_hand / 7, rel=1e-5)


def test_binary_cross_entropy_by_hand() -> None:
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.eye(5, 3)
    task = Task("abc", multi_label=True, weights=[1.0, 2.0, 3.0])
    expected = binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor([1.0, 2.0, 3.0]))
    assert task.loss({"logits": logits}, labels).item() == pytest.approx(expected.item())
    assert task.loss({"logits": logits}, labels, 30).item() == pytest.approx(expected.item() / 2)


def test_class_weights() -> None:
    rows = [row for n, row in enumerate(texts.labelled(40)) if row["label"] == "ham" or n % 8 == 1]  # 20 ham, 5 spam
    task, _ = checked(rows, class_weight="balanced")
    assert task.weights == pytest.approx([25 / (2 * 20), 25 / (2 * 5)])
    task, _ = checked(rows, class_weight={"spam": 4})
    assert task.weights == [1.0, 4.0]
    again = Task.from_state(json.loads(json.dumps(task.state())))
    assert isinstance(again, Task)
    assert (again.weights, again.labels) == (task.weights, task.labels)
    numbers = [{**row, "label": int(row["label"] == "spam")} for row in rows]
    assert checked(numbers, class_weight={"1": 3})[0].weights == [1.0, 3.0]
    with pytest.raises(RecipeError, match=r'class_weight: unknown label "spamm", did you mean "spam"\?'):
        checked(rows, class_weight={"spamm": 3})
    with pytest.raises(RecipeError, match="spam has a weight below zero"):
        checked(rows, class_weight={"spam": -1})


def test_class_weights_reach_the_training(tune: Callable[..., hybridtune.Run]) -> None:
    rows = texts.splits(24, 8, 8)
    tilted = tune(**rows, class_weight={"ham": 50.0}, learning_rate=0.05, num_train_epochs=3)
    assert {line["label"] for line in lines(tilted)} == {"ham"}


# The state


def test_the_task_comes_back_from_its_state() -> None:
    named = [{"text": row["premise"], "text_pair": row["hypothesis"], "label": row["label"]} for row in pairs(20, 1)]
    task, rows = checked(named, template="T: {text}", columns={"text": "body"})
    again = Task.from_state(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()
    assert again.inputs == ("text", "text_pair")
    tokenizer = tiny.tokenizer()
    assert again.encode(rows, tokenizer, 64).to_dict() == task.encode(rows, tokenizer, 64).to_dict()


def test_class_weights_of_several_labels() -> None:
    """Balanced: with its weight, a label's rows count as much as all rows without it."""
    rows = [{"text": f"text {n}", "label": ["a", "b"] if n % 4 == 0 else ["a"] if n % 2 else []} for n in range(40)]
    task, _ = checked(rows, class_weight="balanced", multi_label=True)
    having = {"a": 30, "b": 10}
    assert task.weights == pytest.approx([(40 - having["a"]) / having["a"], (40 - having["b"]) / having["b"]])
