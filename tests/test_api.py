"""Whole runs of tiny models: what they leave behind, in which order, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import texts
import tiny
import torch
import yaml
from datasets import Dataset
from sklearn import metrics as sklearn_metrics
from transformers import TrainerCallback

import hybridtune
from hybridtune import api, checkpoint, evaluate, predict
from hybridtune.comparison import compare
from hybridtune.console import Console
from hybridtune.errors import DataError, HybridtuneError, RecipeError, RunError, UserError
from hybridtune.files import write_text

HEAD = {"part": "head", "method": "full"}
MIX = {
    "name": "mix",
    "stages": [
        {"name": "probe", "rules": [HEAD]},
        {
            "name": "both",
            "rules": [{"part": "layers[-1:]", "method": "full"}, {"part": "layers[0:2]", "method": "lora"}],
        },
    ],
}
BEFORE_TRAINING = {"asked.json", "recipe.yaml", "environment.json", "data.json"}
RUN = BEFORE_TRAINING | {"decision.json", "evaluation.json", "predictions.jsonl", "report.html"}
STAGE = {"delta.safetensors", "manifest.json", "metrics.json", "log.jsonl"}


@pytest.fixture
def tune(base: Path, tmp_path: Path) -> Callable[..., hybridtune.Run]:
    """Tunes the tiny model quickly, into `tmp_path / "run"`."""

    def run(*source: Any, **keys: Any) -> hybridtune.Run:
        least = {"model": str(base), "task": "classification", **texts.splits(24, 8, 8), "strategy": "head"}
        least |= {"num_train_epochs": 1, "baselines": False, "output": str(tmp_path / "run")}
        quiet = {"console": Console(quiet=True)}
        return api.tune(*source, **quiet | (keys if source else least | keys))

    return run


@pytest.fixture(scope="module")
def race(base: Path, tmp_path_factory: pytest.TempPathFactory) -> hybridtune.Run:
    """A race of three strategies on files, one of them with two stages."""
    folder = tmp_path_factory.mktemp("race")
    splits = {name: str(texts.save_csv(folder / f"{name}.csv", rows)) for name, rows in texts.splits().items()}
    said = io.StringIO()
    run = hybridtune.tune(
        model=str(base),
        task="classification",
        data=splits,
        strategy=["head", "lora", MIX],
        num_train_epochs=2,
        logging_steps=1,
        per_device_train_batch_size=16,
        output=str(folder / "run"),
        console=Console(stream=said),
    )
    (folder / "said.txt").write_text(said.getvalue())
    return run


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read(run: hybridtune.Run, name: str) -> Any:
    text = (run.folder / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def test_how_rows_are_run_is_said_of_every_stage(race: hybridtune.Run) -> None:
    said = (race.folder.parent / "said.txt").read_text().split("4/5")[1].split("5/5")[0].splitlines()
    ways = [line.strip() for line in said if "padding" in line]
    probe = "rows without padding; 3 frozen layers computed once a row, without dropout"
    assert ways == [probe, "rows without padding", probe, "rows without padding"]


def test_what_is_there_already_is_said(base: Path, tmp_path: Path) -> None:
    """A stage that was finished, the step that the next goes on after, and that test rows may have been read."""

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "2-both" in args.output_dir and state.global_step == 3:
                raise KeyboardInterrupt

    keys = {
        "model": str(base),
        "task": "classification",
        "data": texts.splits(),
        "strategy": MIX,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 16,
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(KeyboardInterrupt):
        hybridtune.tune(keys, callbacks=[Stop()], console=Console(quiet=True))
    resumed, finished = io.StringIO(), io.StringIO()
    for said in (resumed, finished):
        hybridtune.tune(keys, resume=True, console=Console(stream=said))
    lines = [line.strip() for line in resumed.getvalue().splitlines()]
    at = lines.index("probe  finished before")
    assert re.match(r"goes on after step 2 of \d+$", lines[at + 1])
    assert "test rows, read by a model for the first time" in resumed.getvalue()
    assert re.search(r"5/5 evaluate: \d+ test rows\n", finished.getvalue())


# What a run leaves behind


def test_the_run_folder_is_that_of_the_design(race: hybridtune.Run) -> None:
    chosen = race.decision["chosen"]
    stages = {"head": ["1-head"], "lora": ["1-lora"], "mix": ["1-probe", "2-both"]}
    expected = RUN | {f"stages/{stage}/{file}" for stage in stages[chosen] for file in STAGE}
    for name in stages:
        expected.add(f"trials/{name}/trial.json")
        if name != chosen:
            expected |= {f"trials/{name}/stages/{stage}/{file}" for stage in stages[name] for file in STAGE}
    own = {file for file in files(race.folder) if not file.startswith("model/")}
    assert own == expected
    assert {"README.md", "hybridtune.json"} < {path.name for path in (race.folder / "model").iterdir()}
    for file in own:
        if file.endswith(".json"):
            json.loads((race.folder / file).read_text("utf-8"), parse_constant=pytest.fail)  # no NaN, no Infinity
    yaml.safe_load((race.folder / "recipe.yaml").read_text("utf-8"))


def test_decision(race: hybridtune.Run) -> None:
    decision = race.decision
    assert decision["goal"] == {"metric": "macro_f1", "direction": "maximize"}
    assert [candidate["strategy"] for candidate in decision["candidates"]] == ["head", "lora", "mix"]
    scores = {candidate["strategy"]: candidate["validation"]["macro_f1"] for candidate in decision["candidates"]}
    assert scores[decision["chosen"]] == max(scores.values())
    assert decision["reasons"]
    for candidate in decision["candidates"]:
        assert {"loss", "accuracy", "macro_f1", "weighted_f1", "mcc"} == set(candidate["validation"])
        assert candidate["seconds"] > 0
        assert 0 < candidate["trainable"] <= candidate["total"]
        assert candidate["peak_bytes"] is None or candidate["peak_bytes"] >= 0


def test_validation_scores_are_those_of_the_deltas(race: hybridtune.Run) -> None:
    rows = texts.splits()["validation"]
    gold = [row["label"] for row in rows]
    for candidate in race.decision["candidates"]:
        name = candidate["strategy"]
        own = race.folder / "trials" / name / "stages"
        last = sorted((own if own.is_dir() else race.folder / "stages").iterdir())[-1]
        loaded, _, manifest = checkpoint.load(last)
        task = race.predictor.task
        said = predict.Predictor(loaded.model, loaded.tokenizer, task, manifest["max_length"]).predict(rows)
        expected = sklearn_metrics.f1_score(gold, [one["label"] for one in said], average="macro")
        assert candidate["validation"]["macro_f1"] == pytest.approx(expected, abs=1e-12)


def test_evaluation_is_what_scikit_learn_finds_in_the_predictions(race: hybridtune.Run) -> None:
    evaluation, lines = race.evaluation, read(race, "predictions.jsonl")
    gold, said = [line["gold"] for line in lines], [line["label"] for line in lines]
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(gold, said),
        "macro_f1": sklearn_metrics.f1_score(gold, said, average="macro"),
        "weighted_f1": sklearn_metrics.f1_score(gold, said, average="weighted"),
        "mcc": sklearn_metrics.matthews_corrcoef(gold, said),
    }
    assert {name: metric["value"] for name, metric in evaluation["metrics"].items()} == pytest.approx(
        expected, abs=1e-12
    )
    assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in evaluation["metrics"].values())
    labels = evaluation["confusion"]["labels"]
    assert evaluation["confusion"]["matrix"] == sklearn_metrics.confusion_matrix(gold, said, labels=labels).tolist()
    table = sklearn_metrics.classification_report(gold, said, output_dict=True, zero_division=0)
    for row in evaluation["per_class"]:
        assert row["f1"] == pytest.approx(table[row["label"]]["f1-score"])
        assert row["support"] == table[row["label"]]["support"]
    assert evaluation["rows"] == len(lines) == 20
    assert evaluation["model_difference"] < 1e-5
    assert {baseline["name"] for baseline in evaluation["baselines"]} == {
        "majority class",
        "bag of words",
        "frozen features",
    }
    chosen = [candidate for candidate in evaluation["candidates"] if candidate["chosen"]]
    assert [candidate["strategy"] for candidate in chosen] == [race.decision["chosen"]]
    assert chosen[0]["metrics"] == evaluation["metrics"]
    assert [candidate["strategy"] for candidate in evaluation["candidates"]] == ["head", "lora", "mix"]


def test_predictions_are_those_of_the_model_in_the_rows_order(race: hybridtune.Run) -> None:
    rows, lines = texts.splits()["test"], read(race, "predictions.jsonl")
    assert [line["row"] for line in lines] == list(range(2, 22))  # lines of test.csv
    assert [line["gold"] for line in lines] == [row["label"] for row in rows]
    for line, said in zip(lines, race.predict(rows), strict=True):
        assert line["label"] == said["label"]
        assert line["scores"] == pytest.approx(said["scores"], abs=1e-5)
        assert line["stats"]["gold"] == ["ham", "spam"].index(line["gold"])


def test_logs_and_metrics_of_the_stages(race: hybridtune.Run) -> None:
    for folder in [*race.folder.glob("stages/*"), *race.folder.glob("trials/*/stages/*")]:
        name = folder.name.partition("-")[2]
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        for line in lines:
            assert set(line) == {"stage", "step", "loss", "learning_rate", "grad_norm", "seconds"}
            assert line["stage"] == name
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["steps"] == 6
        assert [evaluation["step"] for evaluation in metrics["evaluations"]] == [3, 6]


def test_data_and_environment(race: hybridtune.Run) -> None:
    data = read(race, "data.json")
    assert {name: split["rows"] for name, split in data["splits"].items()} == {
        "train": 48,
        "validation": 16,
        "test": 20,
    }
    assert data["labels"][0] == {"label": "ham", "train": 24, "validation": 8, "test": 10}
    assert data["lengths"]["train"]["truncated"] == 0
    assert set(read(race, "environment.json")) >= {"hybridtune", "python", "torch", "transformers", "device", "date"}


def test_what_was_said(race: hybridtune.Run) -> None:
    said = (race.folder.parent / "said.txt").read_text()
    for number, step in enumerate(("goal", "data", "strategy", "tune", "evaluate"), 1):
        assert f"\n{number}/5 {step}" in said
    assert f"chosen: {race.decision['chosen']}" in said
    assert f"> {race.decision['chosen']}" in said
    assert "\x1b" not in said


def test_the_report_is_there(race: hybridtune.Run) -> None:
    page = (race.folder / "report.html").read_text("utf-8")
    assert all(name in page for name in ("head", "lora", "mix", "bag of words"))


# Loading and predicting


MIXED = ["a", "b c d e f g h i j k l m n o p q good", "bad", "x y z old new good bad a b", "unknowable words here"]


def test_loaded_predictions_keep_the_order_and_equal_one_row_at_a_time(race: hybridtune.Run) -> None:
    run = hybridtune.load(race.folder)
    run.predictor.batch_size = 4
    said = run.predict(MIXED)
    assert said == run.predict([{"text": text} for text in MIXED])
    for text, one in zip(MIXED, said, strict=True):
        with torch.no_grad():
            scores = run.model(**run.tokenizer([text], return_tensors="pt")).logits.softmax(-1)[0].tolist()
        assert list(one["scores"].values()) == pytest.approx(scores, abs=1e-5)
        assert one["label"] == ["ham", "spam"][int(np.argmax(scores))]
    backwards = run.predict(MIXED[::-1])[::-1]
    assert [one["label"] for one in backwards] == [one["label"] for one in said]


def test_what_predict_takes(race: hybridtune.Run) -> None:
    rows = [{"text": "good a", "id": 1}, {"text": "bad b", "id": "two", "label": "no label"}]
    said = race.predict(rows)
    assert said == race.predict(Dataset.from_list([{"text": "good a"}, {"text": "bad b"}]))
    assert said == race.predict(pd.DataFrame({"message": ["good a", "bad b"]}))
    assert said == race.predict([{"body": "good a"}, {"body": "bad b"}], columns={"text": "body"})
    assert race.predict([]) == race.predict(pd.DataFrame({"text": []})) == []
    assert race.predict(text for text in ("good a", "bad b")) == said
    for mistake, says in (
        ("good a", "a single row"),
        ({"text": "good a"}, "a single row"),
        ([{"body": "good a"}], "no column for text"),
        ([{"text": "good"}, {"text": None}], "row 2: text is missing"),
        ([{"text": ["good", "a"]}], "row 1: text is not a text"),
        ([None], "row 1: text is missing"),
    ):
        with pytest.raises(DataError, match=says):
            race.predict(mistake)


def test_the_model_folder_alone_is_enough(race: hybridtune.Run, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    os.rename(race.folder / "model", moved)
    try:
        assert hybridtune.load(moved).predict(MIXED[:2]) == race.predict(MIXED[:2])
    finally:
        os.rename(moved, race.folder / "model")


def test_load_of_what_is_no_run(tmp_path: Path, race: hybridtune.Run) -> None:
    with pytest.raises(RunError, match="no such folder"):
        hybridtune.load(tmp_path / "nothing")
    with pytest.raises(RunError, match="is not a run of hybridtune"):
        hybridtune.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m")
    with pytest.raises(RunError, match=r"not finished[\s\S]*--resume"):
        hybridtune.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: {key: value for key, value in about.items() if key != "task"},
        lambda about: about | {"base": {}},
        lambda about: about | {"task": {"name": "classification", "lables": []}},
        lambda about: about | {"max_length": None},
        lambda about: [about],
    ],
    ids=["no task", "no base", "another key", "no length", "a list"],
)
def test_a_damaged_description_is_named(race: hybridtune.Run, tmp_path: Path, damage: Callable[..., Any]) -> None:
    shutil.copytree(race.folder / "model", tmp_path / "model")
    shutil.copy(race.folder / "predictions.jsonl", tmp_path)
    about = tmp_path / "model" / "hybridtune.json"
    about.write_text(json.dumps(damage(json.loads(about.read_text()))))
    for use in (lambda: hybridtune.load(tmp_path), lambda: compare(tmp_path, race.folder)):
        with pytest.raises(RunError, match=re.escape(f"{about}: is damaged")):
            use()


def test_evaluate_run(race: hybridtune.Run, tmp_path: Path) -> None:
    again = api.evaluate_run(race.folder, str(race.folder.parent / "test.csv"))
    assert again["metrics"] == race.evaluation["metrics"]
    assert api.evaluate_run(race.folder, None) == race.evaluation
    rows = [{"body": "good a", "kind": "ham"}, {"body": "bad b", "kind": "spam"}]
    scored = api.evaluate_run(race.folder, rows, columns={"text": "body", "label": "kind"})
    assert scored["rows"] == 2
    file = texts.save_csv(tmp_path / "new.csv", [{"text": "good", "label": "ham"}, {"text": "bad", "label": "spamm"}])
    with pytest.raises(DataError, match=r'new\.csv:3: the model has no label "spamm"[\s\S]*did you mean "spam"\?'):
        api.evaluate_run(race.folder, str(file))
    with pytest.raises(DataError, match="row 2: the row has no label"):
        api.evaluate_run(race.folder, [{"text": "good", "label": "ham"}, {"text": "bad", "label": None}])


# Going on from a run


def test_a_prompt_that_is_kept_leaves_less_room_for_the_text(
    tune: Callable[..., hybridtune.Run], tmp_path: Path
) -> None:
    tiny.classifier("bert", max_position_embeddings=40).base_model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    prompt = [{"rules": [{"part": "embeddings", "method": "prompt", "num_virtual_tokens": 12}]}]
    first = tune(model=str(tmp_path / "base"), strategy=prompt)
    for previous, room in (("keep", 28), ("drop", 40)):
        stages = [{"rules": [HEAD], "previous": previous}]
        then = tune(model=str(first.folder), strategy=stages, output=str(tmp_path / previous))
        assert json.loads((then.folder / "model" / "hybridtune.json").read_text())["max_length"] == room


# The order of things


def test_no_model_sees_a_test_row_before_the_decision(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = tiny.WORDS.index("z")  # a token that only test rows have
    rows = texts.splits(24, 8, 8)
    rows["test"] = [{**row, "text": "z " + row["text"]} for row in rows["test"]]
    forward, seen = torch.nn.Module.__call__, []

    def call(self: torch.nn.Module, *given: Any, **keys: Any) -> Any:
        for value in [*given, *keys.values()]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and (value == sign).any():
                seen.append((tmp_path / "run" / "decision.json").is_file())
        return forward(self, *given, **keys)

    monkeypatch.setattr(torch.nn.Module, "__call__", call)
    tune(**rows, strategy=["head", "lora"], baselines=True)
    assert seen
    assert all(seen)


def test_the_recipe_of_a_run_gives_the_same_run(race: hybridtune.Run, tmp_path: Path) -> None:
    again = hybridtune.tune(race.folder / "recipe.yaml", output=str(tmp_path / "again"), console=Console(quiet=True))
    first, second = (yaml.safe_load((run.folder / "recipe.yaml").read_text()) for run in (race, again))
    assert first.pop("output") != second.pop("output")
    assert first.pop("defaults")
    assert second.pop("defaults") == []
    assert first == second
    assert first["goal"] == {"maximize": "macro_f1"}
    assert read(again, "predictions.jsonl") == read(race, "predictions.jsonl")
    told = ("strategy", "validation")
    assert [{k: c[k] for k in told} for c in again.decision["candidates"]] == [
        {k: c[k] for k in told} for c in race.decision["candidates"]
    ]


def test_the_doors_give_the_same_run(tune: Callable[..., hybridtune.Run], base: Path, tmp_path: Path) -> None:
    rows = texts.splits(24, 8, 8)
    paths = {name: str(texts.save_csv(tmp_path / f"{name}.csv", rows[name])) for name in rows}
    kinds: dict[str, dict[str, Any]] = {
        "paths": paths,
        "dicts": rows,
        "frames": {name: pd.DataFrame(rows[name]) for name in rows},
        "sets": {name: Dataset.from_list(rows[name]) for name in rows},
    }
    found = []
    for name, data in kinds.items():
        run = tune(**data, output=str(tmp_path / name))
        lines = [{k: v for k, v in line.items() if k != "row"} for line in read(run, "predictions.jsonl")]
        recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
        assert recipe.pop("output") == str(tmp_path / name)
        assert recipe.pop("data")["train"] in (paths["train"], "list of dicts", "pandas.DataFrame", "datasets.Dataset")
        fingerprints = {split: about["fingerprint"] for split, about in read(run, "data.json")["splits"].items()}
        found.append((lines, recipe, fingerprints))
    assert found[0] == found[1] == found[2] == found[3]
    with pytest.raises(DataError, match=r"data\.train: was a list of dicts in Python[\s\S]*tune\(recipe, train=rows\)"):
        api.tune(tmp_path / "dicts" / "recipe.yaml", output=str(tmp_path / "x"), console=Console(quiet=True))


# Seeds, rows, goals


def test_several_seeds(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune(seeds=[1, 2, 3], strategy=["head", "lora"], goal={"maximize": "accuracy"})
    for candidate in run.decision["candidates"]:
        values = [seed["validation"]["accuracy"] for seed in candidate["seeds"]]
        assert [seed["seed"] for seed in candidate["seeds"]] == [1, 2, 3]
        assert len({seed["validation"]["loss"] for seed in candidate["seeds"]}) == 3
        assert candidate["validation"]["accuracy"] == pytest.approx(statistics.mean(values))
        assert candidate["spread"]["accuracy"] == pytest.approx(statistics.stdev(values))
    candidates = {candidate["strategy"]: candidate for candidate in run.decision["candidates"]}
    chosen = candidates.pop(run.decision["chosen"])
    best = chosen["validation"]["accuracy"]
    assert all(other["validation"]["accuracy"] <= best for other in candidates.values())
    of_seed = {seed["seed"]: seed["validation"]["accuracy"] for seed in chosen["seeds"]}
    assert of_seed[run.decision["seed"]] == max(of_seed.values())
    assert {folder.name for folder in (run.folder / "trials").iterdir()} == {
        f"{name}-seed-{seed}" for name in ("head", "lora") for seed in (1, 2, 3)
    }
    for candidate in run.evaluation["candidates"]:
        values = [seed["metrics"]["accuracy"]["value"] for seed in candidate["seeds"]]
        assert candidate["mean"]["accuracy"] == pytest.approx(statistics.mean(values))
        assert candidate["spread"]["accuracy"] == pytest.approx(statistics.stdev(values))
        shown = [s["metrics"] for s in candidate["seeds"] if candidate["chosen"] and s["seed"] == run.decision["seed"]]
        assert shown in ([], [candidate["metrics"]])


def test_the_goal_may_be_the_loss(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune(strategy=["head", "lora"], goal={"minimize": "loss"})
    losses = {candidate["strategy"]: candidate["validation"]["loss"] for candidate in run.decision["candidates"]}
    assert losses[run.decision["chosen"]] == min(losses.values())
    assert run.evaluation["goal"] == {"metric": "loss", "direction": "minimize"}
    assert [candidate["mean"] for candidate in run.evaluation["candidates"]] == [{}, {}]


def test_max_rows_and_held_out_rows(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune(train=texts.labelled(60, 5), validation=None, test=None, max_rows=40)
    splits = read(run, "data.json")["splits"]
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 29, "validation": 3, "test": 8}
    assert splits["test"]["source"] == "20% of list of dicts, held out with seed 0"


def test_a_metric_and_a_callback_of_the_users_own(tune: Callable[..., hybridtune.Run]) -> None:
    began = []

    class Mine(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            began.append(True)

    run = tune(
        compute_metrics=lambda prediction: {"rows_seen": float(len(prediction.label_ids))},
        goal={"maximize": "rows_seen"},
        callbacks=[Mine()],
    )
    assert began == [True]
    assert run.decision["candidates"][0]["validation"]["rows_seen"] == 8
    assert run.evaluation["candidates"][0]["mean"] == {}


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ({"maximize": "acuracy"}, r'unknown metric "acuracy", did you mean "accuracy"\?'),
        ({"minimize": "accuracy"}, r"minimize accuracy\n.*maximize: accuracy"),
        ({"maximize": "loss"}, r"maximize loss\n.*minimize: loss"),
        ({"maximize": "micro_f1"}, "unknown metric"),
    ],
)
def test_goals_that_make_no_sense(tune: Callable[..., hybridtune.Run], goal: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        tune(goal=goal)


# Going on, beginning again, and what is never removed


class StopsAt(TrainerCallback):
    """Interrupts, as Ctrl-C does, when the named stage has made a step; counts the stages that began."""

    def __init__(self, stage: str = "") -> None:
        self.stage, self.began = stage, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(Path(args.output_dir).name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage and args.output_dir.endswith(self.stage):
            raise KeyboardInterrupt


def test_resume_skips_what_is_finished(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(strategy=["head", "lora"], callbacks=[StopsAt("1-lora")])
    run = tmp_path / "run"
    assert files(run) >= BEFORE_TRAINING | {"trials/head/trial.json"}
    assert not (run / "decision.json").exists()
    before = (run / "trials" / "head" / "trial.json").read_bytes()
    with pytest.raises(RunError, match="already holds a run"):
        tune(strategy=["head", "lora"])
    counted = StopsAt()
    resumed = tune(strategy=["head", "lora"], resume=True, callbacks=[counted])
    assert counted.began == ["1-lora"]
    assert (run / "trials" / "head" / "trial.json").read_bytes() == before
    assert files(run) >= RUN
    whole = tune(strategy=["head", "lora"], output=str(tmp_path / "whole"))
    assert read(resumed, "predictions.jsonl") == read(whole, "predictions.jsonl")
    again = tune(strategy=["head", "lora"], resume=True, callbacks=[counted])  # of a finished run: nothing is trained
    assert counted.began == ["1-lora"]
    assert again.evaluation["metrics"] == whole.evaluation["metrics"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 0.1}, "another recipe\n.*different learning_rate"),
        ({"strategy": "lora"}, "another recipe\n.*different strategy"),
        ({"seed": 1}, "another recipe\n.*different seed"),
        ({"train": texts.labelled(24, 9)}, "other rows\n.*different train"),
        ({"test": texts.labelled(8, 9)}, "other rows\n.*different test"),
        ({"columns": {"label": "label"}}, "another recipe\n.*different data"),
        ({"overwrite": True}, "exclude each other"),
    ],
)
def test_resume_refuses_what_has_changed(
    begun: Callable[..., hybridtune.Run], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(RunError, match=says):
        begun(resume=True, **change)


@pytest.fixture
def begun(tune: Callable[..., hybridtune.Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., hybridtune.Run]:
    """`tune` after a run that was stopped just before its first step; it never trains."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridtune.select.race", stop)
    with pytest.raises(KeyboardInterrupt):
        tune()
    return tune


def test_what_a_resumed_run_may_change(begun: Callable[..., hybridtune.Run]) -> None:
    for change in ({}, {"seed": 0}, {"hub_model_id": "me/x"}, {"strategy": ["head"]}):
        with pytest.raises(KeyboardInterrupt):
            begun(resume=True, **change)


def test_overwrite_replaces_the_run_and_leaves_other_files(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    run = tune()
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / "plots").mkdir()
    first = read(run, "environment.json")
    again = tune(strategy="lora", overwrite=True)
    assert again.decision["chosen"] == "lora"
    assert (run.folder / "notes.txt").read_text() == "mine"
    assert (run.folder / "plots").is_dir()
    assert not (run.folder / "trials" / "head").exists()
    assert read(again, "environment.json")["date"] >= first["date"]


@pytest.mark.parametrize("inside", [".", "model", "stages/1-head", "trials/../model"])
def test_overwrite_never_removes_the_model_to_start_from(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    run = tune()
    before = files(run.folder)
    monkeypatch.chdir(tmp_path)
    for output, model in ((str(run.folder), f"run/{inside}"), ("run", str(run.folder / inside))):
        with pytest.raises(RunError, match=r"run holds the model to start from\n.*another output"):
            tune(model=model, output=output, overwrite=True)
    assert files(run.folder) == before


@pytest.mark.parametrize("keys", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_with_other_files_is_never_touched(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, keys: dict[str, bool]
) -> None:
    mine = tmp_path / "run" / "recipe.yaml"
    mine.parent.mkdir()
    mine.write_text("model: my own recipe, which lies here by chance")
    (mine.parent / "model").mkdir()
    (mine.parent / "model" / "weights").write_text("mine too")
    with pytest.raises(RunError, match="holds other files"):
        tune(**keys)
    assert files(mine.parent) == {"recipe.yaml", "model/weights"}


def test_output_that_is_or_stands_below_a_file(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for output in ("run", "run/x"):
        with pytest.raises(RunError, match="run is a file"):
            tune(output=str(tmp_path / output))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no folders: /proc")
def test_output_that_cannot_be_made(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^output: /proc/x/y cannot be written\n  found: "):
        tune(output="/proc/x/y")
    with pytest.raises(RunError, match="/proc/x/out.jsonl: cannot be written"):
        write_text(Path("/proc/x/out.jsonl"), "")
    with pytest.raises(RunError, match="cannot be written"):
        tune(output=str(tmp_path / ("x" * 300)))
    assert list(tmp_path.iterdir()) == []


MISTAKES: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "file": ({"train": "nothing.csv"}, DataError, "there is no such file"),
    "one class": ({"train": texts.labelled(9, labels=["ham"])}, DataError, "one class only"),
    "label": ({"test": texts.labelled(9, 4, labels=["ham", "eggs"])}, DataError, 'no label "eggs"'),
    "model": ({"model": "nobody/nothing"}, UserError, "no such folder, and the hub did not give it"),
    "method": ({"strategy": [{"rules": [{"part": "head", "method": "fulll"}]}]}, UserError, 'did you mean "full"'),
    "part": ({"strategy": [{"rules": [{"part": "layers[0:9]", "method": "full"}]}]}, UserError, "outside the model"),
    "option": ({"strategy": [{"rules": [{"part": "layers", "method": "lora", "rr": 1}]}]}, RecipeError, "option rr"),
    "schedule": ({"lr_scheduler_type": "steep"}, RecipeError, "steep"),
    "optimizer": ({"optim": "adamm"}, RecipeError, "adamm"),
    "precision": ({"bf16": True, "fp16": True}, RecipeError, "both"),
    "tracker": ({"report_to": "nothing"}, RecipeError, "nothing"),
    "length": ({"max_length": 100_000}, UserError, "max_length"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_nothing_behind(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, kind, says = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=says):
        tune(**keys)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_does_not_cost_the_run_that_was_there(tune: Callable[..., hybridtune.Run]) -> None:
    run = tune()
    before = files(run.folder)
    with pytest.raises(DataError):
        tune(train="nothing.csv", overwrite=True)
    assert files(run.folder) == before
    with pytest.raises(UserError):
        tune(strategy=[{"rules": [{"part": "layers[0:9]", "method": "full"}]}], overwrite=True)
    assert files(run.folder) == before
    assert run.predict(["good"]) == hybridtune.load(run.folder).predict(["good"])


def test_a_mistake_that_shows_at_the_first_step_leaves_nothing_behind(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        (tmp_path / "run" / "trials" / "head" / "stages" / "1-head").mkdir(parents=True)
        raise RecipeError("optim: does not do")

    monkeypatch.setattr("hybridtune.trial.run", refuse)
    with pytest.raises(RecipeError):
        tune()
    assert list(tmp_path.iterdir()) == []


# The disk


def test_full_disk_before_training(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", full)
        with pytest.raises(RunError, match=r"no space left on the disk\n.*MiB free[\s\S]*choose another output"):
            tune()
    assert list(tmp_path.iterdir()) == []
    assert tune().decision["chosen"] == "head"


@pytest.mark.parametrize("call", [3, 9, 14, 19, 25])
def test_full_disk_at_any_time(
    tune: Callable[..., hybridtune.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"no space left|cannot be written"):
            tune()
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    for name in files(tmp_path):
        if name.endswith(".json"):
            json.loads((tmp_path / name).read_text())
    trained = (tmp_path / "run" / "trials").is_dir()
    assert trained is (call > 14), "before its first checkpoint is whole, a run has nothing to go on with"
    assert tune(resume=trained).decision["chosen"] == "head"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 184704 vs 184592"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_as_libraries_say_it(
    tune: Callable[..., hybridtune.Run], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("hybridtune.trial.run", fail)
    with pytest.raises(RunError, match="no space left on the disk"):
        tune()


# The hub, and what must not leak


def test_push_to_hub(tune: Callable[..., hybridtune.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            calls.append(token)

        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
            calls.append((name, private, exist_ok))
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = tune(push_to_hub=True, hub_model_id="intents", hub_private_repo=True, hub_token="hf_secret")
    model = sorted(path.name for path in (run.folder / "model").iterdir())
    assert calls == ["hf_secret", ("intents", True, True), ("me/intents", model)]
    assert "README.md" in model
    for path in run.folder.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes()
    calls.clear()
    hybridtune.load(run.folder / "model").push_to_hub("again")
    assert calls[1:] == [("again", None, True), ("me/again", model)]


def test_a_hub_that_refuses_costs_nothing(tune: Callable[..., hybridtune.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, name: str, **_: Any) -> None:
            raise ConnectionError("401 Unauthorized\nlong story")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(HybridtuneError, match=r"was not uploaded to run\n.*401 Unauthorized\n.*push_to_hub") as caught:
        tune(push_to_hub=True)
    assert caught.value.exit_code == 1
    folder = str(caught.value.mend).partition('load("')[2].partition('"')[0]
    assert hybridtune.load(folder).evaluation["rows"] == 8


@pytest.mark.parametrize("include", [True, False])
def test_texts_in_the_report_only_where_they_are_wanted(tune: Callable[..., hybridtune.Run], include: bool) -> None:
    rows = texts.splits(24, 8, 8)
    rows["train"].append({**rows["train"][0]})  # a duplicate: the finding shows its text
    run = tune(**rows, include_texts=include)
    page = (run.folder / "report.html").read_text("utf-8")
    shown = [row["text"] for split in rows.values() for row in split if row["text"] in page]
    assert bool(shown) is include


def test_evaluate_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no evaluation\.json"):
        evaluate.read_evaluation(tmp_path)


@pytest.mark.parametrize("best", [True, False])
def test_the_score_is_that_of_the_weights_that_are_kept(tune: Callable[..., hybridtune.Run], best: bool) -> None:
    """Without the best checkpoint restored, the last weights are kept, and so it is their score that counts."""
    run = tune(num_train_epochs=4, learning_rate=0.05, load_best_model_at_end=best, goal={"minimize": "loss"})
    evaluations = read(run, "stages/1-head/metrics.json")["evaluations"]
    losses = [one["loss"] for one in evaluations]
    kept = run.decision["candidates"][0]["validation"]["loss"]
    assert kept == pytest.approx(min(losses) if best else losses[-1], abs=1e-6)
    assert losses[-1] != min(losses)  # else this says nothing


def test_doubts_are_said_on_the_console_and_in_the_report(tune: Callable[..., hybridtune.Run], tmp_path: Path) -> None:
    said = io.StringIO()
    rows = texts.splits(60, 49, 20)
    run = tune(**rows, baselines=True, learning_rate=1e-12, console=Console(stream=said))  # learns nothing
    best = max(run.evaluation["baselines"], key=lambda one: one["metrics"]["macro_f1"]["value"])
    own, other = (metrics["macro_f1"]["value"] for metrics in (run.evaluation["metrics"], best["metrics"]))
    assert own < other
    few = "only 49 validation rows"
    beaten = f"head does not beat the best baseline on the test rows: macro_f1 {own:.3f}"
    page = (run.folder / "report.html").read_text("utf-8")
    for doubt in (few, beaten):
        assert any(warning.startswith(doubt) for warning in run.evaluation["warnings"])
        assert doubt in said.getvalue()
        assert doubt in page
    again = tune(**{**rows, "validation": texts.labelled(50, 9)}, output=str(tmp_path / "more"))
    assert not any("validation rows" in warning for warning in again.evaluation["warnings"])
