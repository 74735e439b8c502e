"""Summarization: scores against rouge-score, leads, and a whole run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer

from hybridtune import api, tasks
from hybridtune.console import Console
from hybridtune.tasks.summarization import Task

QUIET = Console(quiet=True)
WORDS = "The cats cat running runs, ran. A storm 3.5 closed-down bridges; it's of the and bridge"


def texts(count: int = 80) -> tuple[list[str], list[list[str]]]:
    chance = random.Random(0)

    def some() -> str:
        return " ".join(chance.choices(WORDS.split(), k=chance.randint(1, 15)))

    return ["", *(some() for _ in range(count - 1))], [
        [some() for _ in range(chance.randint(1, 3))] for _ in range(count)
    ]


def table(golds: list[list[str]], document: str = "x") -> Dataset:
    return Dataset.from_list(
        [{"document": document, "summary": gold[0], "references": gold[1:], "_row": n} for n, gold in enumerate(golds)]
    )


def test_scores_are_rouge_scores_with_the_best_reference() -> None:
    said, golds = texts()
    task = Task(script="latin")
    stats = task.stats(said, table(golds))
    reference = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in task.metrics:
        each = [
            max(reference.score(gold, text)[name].fmeasure for gold in of) for text, of in zip(said, golds, strict=True)
        ]
        assert stats[name].tolist() == each
        assert task.aggregate(stats)[name] == 100 * np.mean(each)
    assert task.metric == "rougeL"
    assert "Porter" in task.signatures["rouge"]


@pytest.mark.parametrize(
    ("text", "gold", "rouge1"),
    [("湖边小镇", "湖边的小镇", 8 / 9), ("みずうみ", "湖", 0.0), ("湖。", "湖", 1.0), ("GDP 增长", "GDP增长了", 6 / 7)],
)
def test_chinese_and_japanese_are_scored_by_character(text: str, gold: str, rouge1: float) -> None:
    task = Task()
    findings = task.learn_script(Dataset.from_list([{"summary": "大桥因风暴关闭", "document": "x"}] * 3))
    assert task.script == "zh"
    assert "characters" in findings[0].did
    assert task.stats([text], table([[gold]]))["rouge1"][0] == pytest.approx(rouge1)


@pytest.mark.parametrize(
    ("summary", "script"),
    [
        ("The bridge is closed", "latin"),
        ("Die Brücke ist für Fußgänger gesperrt", "other"),
        ("Мост закрыт после бури", "other"),
        ("橋は嵐のあと閉まっています", "ja"),
        ("大桥因风暴关闭", "zh"),
    ],
)
def test_words_of_all_scripts_are_counted(summary: str, script: str) -> None:
    task = Task()
    task.learn_script(Dataset.from_list([{"summary": summary}]))
    assert task.script == script
    perfect = task.aggregate(task.stats([summary], table([[summary]])))
    assert perfect == {"rougeL": 100.0, "rouge1": 100.0, "rouge2": 100.0}


def test_leads() -> None:
    document = "The bridge is closed. A storm was there! Is it open? No one knows. Perhaps in spring."
    test = table([["The bridge is closed."], ["A storm was there!"]], document)
    found = {name: stats for name, _, stats, _ in Task(script="latin").baselines(test, test, None)}
    assert found["lead-1"]["rouge1"].tolist() == [1.0, pytest.approx(0.0)]
    assert found["lead-1"]["exact"].tolist() == [True, False]
    assert found["lead-3"]["characters"].tolist() == [len("The bridge is closed. A storm was there! Is it open?")] * 2


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_whole_run(name: str, tmp_path: Path) -> None:
    """Of letters the first is the summary."""
    chance = random.Random(1)
    documents = [" ".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(220)]
    rows = [{"document": text, "summary": text[0], "references": [text[:3]]} for text in documents]
    tiny.save_writer(tmp_path / "model", name)
    run = api.tune(
        model=str(tmp_path / "model"), task="summarization", train=rows[:180], validation=rows[180:200],
        test=rows[200:], strategy="full", learning_rate=3e-3, num_train_epochs=3, per_device_train_batch_size=8,
        max_new_tokens=4, output=str(tmp_path / "run"), console=QUIET,
        template="{document} new " if name == "llama" else "good {document}",
    )  # fmt: skip
    told = run.evaluation
    assert [one["name"] for one in told["baselines"]] == ["lead-1", "lead-3"]
    assert told["goal"] == {"metric": "rougeL", "direction": "maximize"}
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    said = [one["text"] for one in run.predict(documents[200:])]
    assert said == [line["text"] for line in lines]
    assert told["metrics"]["rougeL"]["value"] == pytest.approx(
        100 * np.mean([line["stats"]["rougeL"] for line in lines])
    )
    manifest = json.loads((run.folder / "model" / "hybridtune.json").read_text())
    again = tasks.from_state(manifest["task"])
    assert again.state() == manifest["task"]
    assert manifest["base"]["auto_class"] == ("AutoModelForCausalLM" if name == "llama" else "AutoModelForSeq2SeqLM")
    assert "Texts, in characters" in (run.folder / "report.html").read_text()
