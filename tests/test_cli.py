"""The command line: help, exit codes, one clear message for each mistake, and calm output."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import texts
import tiny
import typer
from typer.testing import CliRunner

from hybridtune import api, cli, console
from hybridtune.errors import DataError, HybridtuneWarning, TrainingError
from hybridtune.recipe import built_in_strategies

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS"):
    ENVIRONMENT.pop(name, None)  # what conftest.py sets, a user has not


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model `m`, its rows as CSV files, and files that are wrong in some way."""
    folder = tmp_path_factory.mktemp("home")
    tiny.classifier("bert").base_model.save_pretrained(folder / "m")
    tiny.classifier("bert").base_model.save_pretrained(folder / "no-tokenizer")
    tiny.tokenizer().save_pretrained(folder / "m")
    for name, rows in texts.splits(24, 8, 8).items():
        texts.save_csv(folder / f"{name}.csv", rows)
    rows = texts.labelled(24, 1)
    texts.save_csv(folder / "one-class.csv", [{**row, "label": "ham"} for row in rows])
    texts.save_csv(folder / "eggs.csv", [*rows[:4], {"text": "a b", "label": "spamm"}])
    texts.save_csv(folder / "columns.csv", [{"body": row["text"], "kind": row["label"]} for row in rows])
    texts.save_csv(folder / "numbers.csv", [{"text": f"a {n} b", "label": f"{n}.5"} for n in range(200)])
    texts.save_csv(folder / "names.csv", [{"text": f"a {n} b", "label": f"row {n}"} for n in range(200)])
    texts.save_csv(folder / "unlabelled.csv", [*rows[:4], {"text": "a b", "label": ""}])
    texts.save_csv(folder / "no-texts.csv", [{"text": "", "label": row["label"]} for row in rows])
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("text,label\n")
    (folder / "ragged.csv").write_text("text,label\ngood a,ham\nbad,b,spam\n")
    (folder / "sheet.xlsx").write_bytes(b"PK")
    (folder / "bytes.csv").write_bytes("text,label\ngrün,ä\nblau,ö\n".encode() + b"\xff,x\n")
    (folder / "broken.yaml").write_text("model: m\ntask: [classification\n")
    (folder / "odd.yaml").write_text("model: m\ntask: classification\ndata: {train: train.csv}\nlerning_rate: 1e-4\n")
    (folder / "list.yaml").write_text("- model: m\n")
    (folder / "data.yaml").write_text("model: m\ntask: classification\ndata: train.csv\n")
    (folder / "strategy.yaml").write_text("stages: [{rules: [{part: head, methd: full}]}]\n")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("mine")
    return folder


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command in the home folder, in this process."""
    monkeypatch.chdir(home)

    def run(*words: Any) -> Any:
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return run


LEAST = {"--model": "m", "--task": "classification", "--train": "train.csv", "--validation": "validation.csv"}
LEAST |= {"--test": "test.csv", "--strategy": "head", "--num-train-epochs": "1", "--output": "runs/x"}


def tune_words(*more: str, **changes: str | None) -> list[str]:
    """`tune` with the least flags that train something; `model="x"` changes a flag, None leaves it out."""
    flags = LEAST | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return ["tune", *(word for key, value in flags.items() if value is not None for word in (key, value)), *more]


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A run that the command line has made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = tune_words("--set", "baselines=false", "--maximize", "accuracy", "--json", output="done/a")
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["run"] == "done/a"
        assert told["decision"] == json.loads(Path("done/a/decision.json").read_text())
        assert told["evaluation"] == json.loads(Path("done/a/evaluation.json").read_text())
        assert result.stderr == ""
    return home / "done" / "a"


def everything(folder: Path) -> dict[str, float]:
    """All files below a folder with their times."""
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call: Callable[..., Any], command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert re.search(rf"Examples?: hybridtune {command}\b", words)
    assert "--json" in words
    assert len(re.findall(r"--json", words)) == 1


@pytest.mark.parametrize("command", ["tune", "predict"])
def test_examples_stand_on_lines_of_their_own(call: Callable[..., Any], command: str) -> None:
    lines = call(command, "--help").output.splitlines()
    assert sum(line.strip().startswith(f"hybridtune {command} ") for line in lines) == 2


def test_examples_in_help_use_options_that_exist(call: Callable[..., Any]) -> None:
    for command in COMMANDS:
        words = " ".join(call(command, "--help").output.split())
        options, _, examples = words.partition("Example")
        for option in re.findall(r"--[a-z][a-z-]*", examples):
            assert option in options


@pytest.mark.parametrize("words", [["--help"], ["tune", "--help"], ["--version"]])
def test_help_comes_at_once_and_without_torch(words: list[str]) -> None:
    started = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "hybridtune.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert time.perf_counter() - started < 10
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hybridtune.errors" in loaded
    assert not {"torch", "transformers", "datasets", "numpy", "yaml"} & loaded
    assert "\x1b" not in done.stdout


def test_no_arguments_show_the_help(call: Callable[..., Any]) -> None:
    result = call()
    assert "Usage: hybridtune" in result.output
    assert "Exit codes: 0 done, 1 failure, 2 your mistake" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "words", [["tnue"], ["tune", "--modell", "m"], ["tune", "--seed", "one"], ["tune", "--device", "warp"], ["predict"]]
)
def test_wrong_usage_is_the_users_mistake(call: Callable[..., Any], words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# Every command, with --json


def test_predict(call: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    told = json.loads(call("predict", run, "good a", "bad", "--json").stdout)
    assert [set(one["scores"]) for one in told["predictions"]] == [{"ham", "spam"}] * 2
    lines = call("predict", run, "good a", "bad").stdout.splitlines()  # no terminal: a line a row
    assert [json.loads(line) for line in lines] == told["predictions"]
    result = call("predict", run, "--input", "test.csv", "--output", tmp_path / "out.jsonl")
    assert result.stdout == f"8 predictions in {tmp_path / 'out.jsonl'}\n"
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows = texts.splits(24, 8, 8)["test"]
    said = [{"row": at, "input": row} for at, row in enumerate(rows, 2)]  # line 1 of the file names the columns
    assert written == [a | b for a, b in zip(said, api.load(run).predict(rows), strict=True)]
    result = call("predict", run, "--input", "columns.csv", "--column", "text=body", "--json")
    assert len(json.loads(result.stdout)["predictions"]) == 24
    told = json.loads(call("predict", run, "--input", "test.csv", "--output", tmp_path / "o", "--json").stdout)
    assert told == {"rows": 8, "output": str(tmp_path / "o"), "warnings": []}


@pytest.mark.parametrize(
    ("words", "given", "numbers"),
    [
        (["-"], "good a\nbad\n", None),
        (["--input", "-"], "id,text\n7,good a\n8,bad\n", [2, 3]),
        (["--input", "-"], '{"text": "good a", "id": "7"}\n{"text": "bad", "id": "8"}\n', [1, 2]),
        (["--input", "-"], '\ufeff[{"text": "good a", "id": "7"},\n {"text": "bad", "id": "8"}]', [1, 2]),
    ],
)
def test_predict_reads_standard_input(run: Path, words: list[str], given: str, numbers: list[int] | None) -> None:
    result = CliRunner().invoke(cli.app, ["predict", str(run), *words], input=given)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["label"] for line in lines] == [one["label"] for one in api.load(run).predict(["good a", "bad"])]
    if numbers is None:
        assert [line["input"] for line in lines] == ["good a", "bad"]
    else:
        assert [(line["row"], str(line["input"]["id"])) for line in lines] == list(zip(numbers, "78", strict=True))


def test_a_line_of_standard_input_is_one_text(run: Path) -> None:
    result = CliRunner().invoke(cli.app, ["predict", str(run), "-"], input="\ufeffgood\u2028a\r\nbad\x0cb".encode())
    assert [json.loads(line)["input"] for line in result.stdout.split("\n")[:-1]] == ["good\u2028a", "bad\x0cb"]
    result = CliRunner().invoke(cli.app, ["predict", str(run), "-"], input=b"good\nb\xe4d\n")
    assert result.exit_code == 2
    assert "standard input, line 2: is not in UTF-8" in result.stderr
    result = CliRunner().invoke(cli.app, ["predict", str(run), "-"], input=b"")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "warning: standard input is empty: nothing is predicted\n"


def test_a_row_is_named_by_its_line(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["predict", str(run), "--input", "-"], input="id,text\n7,good\n8,\n")
    assert result.stderr == "warning: 1 of 2 rows are empty, their predictions mean nothing: stdin.csv:3\n"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": null}\n')
    result = CliRunner().invoke(cli.app, ["predict", str(run), "--input", str(tmp_path / "rows.jsonl")])
    assert result.stderr == (
        f"error: {tmp_path / 'rows.jsonl'}:3: text is missing\n  mend:     take the row out, or give it a text\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for words in (["predict", run, "--input"], ["evaluate", run, "--data"]):
        result = CliRunner().invoke(cli.app, [str(word) for word in (*words, tmp_path / "rows.jsonl")])
        assert "rows.jsonl:2:" in result.stderr and "on_bad_row" not in result.stderr  # which neither has


def test_predict_replaces_no_file_unasked(call: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    result = call("predict", run, "--input", "test.csv", "--output", output)
    assert result.exit_code == 2
    assert f"output: {output} exists" in result.stderr
    assert output.read_text() == "mine"
    assert call("predict", run, "--input", "test.csv", "--output", output, "--overwrite").exit_code == 0
    assert len(output.read_text().splitlines()) == 8


def test_predict_names_empty_rows(call: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    rows = texts.save_csv(tmp_path / "rows.csv", [{"text": text, "n": "1"} for text in ("good", " ", "bad", "")])
    result = call("predict", run, "--input", rows)
    assert result.stderr == f"warning: 2 of 4 rows are empty, their predictions mean nothing: {rows}:3, 5\n"
    assert [set(json.loads(line)) for line in result.stdout.splitlines()] == [{"row", "input", "label", "scores"}] * 4
    words = ["predict", str(run), "--input", "-"]
    result = CliRunner().invoke(cli.app, words, input='[{"text": "good"}, {"text": ""}]')
    assert result.stderr == "warning: 1 of 2 rows are empty, their predictions mean nothing: stdin.json, row 2\n"
    assert [json.loads(line)["row"] for line in result.stdout.splitlines()] == [1, 2]
    result = call("predict", run, "good", "", "--json")
    assert json.loads(result.stdout)["warnings"] == ["1 of 2 rows are empty, their predictions mean nothing: row 2"]
    with pytest.warns(UserWarning, match="1 of 2 rows are empty"):
        api.load(run).predict(["", "good"])


def test_predict_names_rows_that_it_cuts(call: Callable[..., Any], run: Path) -> None:
    limit = json.loads((run / "model" / "hybridtune.json").read_text())["max_length"]
    result = call("predict", run, "good", "bad " * (2 * limit), "--json")
    assert json.loads(result.stdout)["warnings"] == [
        f"1 of 2 rows are longer than {limit} tokens and are shortened to that: row 2"
    ]
    with pytest.raises(DataError, match="no rows were given"):
        api.load(run).predict(None)


def test_what_runs_otherwise_is_said(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of what libraries tell their developers."""

    def warn(*_: Any, **__: Any) -> None:
        warnings.warn("for developers", stacklevel=1)
        warnings.warn("rows with padding", HybridtuneWarning, stacklevel=1)
        raise TrainingError("the end")

    monkeypatch.setattr(api, "tune", warn)
    result = call(*tune_words())
    assert "  ! rows with padding\n" in result.stdout
    assert "for developers" not in result.output


def test_evaluate(call: Callable[..., Any], run: Path) -> None:
    own = json.loads(call("evaluate", run, "--json").stdout)
    assert own == json.loads((run / "evaluation.json").read_text())
    again = json.loads(call("evaluate", run, "--data", "test.csv", "--json").stdout)
    assert again["metrics"] == own["metrics"]
    named = call("evaluate", run, "--data", "columns.csv", "--column", "text=body", "--column", "label=kind", "--json")
    assert json.loads(named.stdout)["rows"] == 24
    named = call("evaluate", run, "--data", "columns.csv", "--column", "text=body", "--column", "label=kind")
    assert named.stdout.startswith("24 rows of columns.csv, columns: text = body, label = kind\n")
    assert re.search(r"^accuracy +0\.\d{4} \[0\.\d{4}, \d\.\d{4}\] *$", call("evaluate", run).stdout, re.MULTILINE)


def test_compare(call: Callable[..., Any], run: Path) -> None:
    told = json.loads(call("compare", run, run, "--json").stdout)
    assert told["rows"] == 8
    assert told["mcnemar_p"] == 1
    assert all(metric["difference"]["value"] == 0 for metric in told["metrics"].values())
    assert "no metric differs" in call("compare", run, run).stdout


def test_export(call: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    told = json.loads(call("export", run, "--output", tmp_path / "delta", "--kind", "delta", "--json").stdout)
    assert told["kind"] == "delta"
    assert told["difference"] < 1e-5
    again = json.loads(call("predict", tmp_path / "delta", "good a", "--json").stdout)
    assert again == json.loads(call("predict", run, "good a", "--json").stdout)


def test_report(call: Callable[..., Any], run: Path) -> None:
    told = json.loads(call("report", run, "--without-texts", "--json").stdout)
    assert Path(told["report"]).read_text("utf-8").startswith("<!")
    assert call("report", run).stdout.strip().endswith("report.html")


def test_check(call: Callable[..., Any], home: Path) -> None:
    before = everything(home)
    flags = ["--model", "m", "--train", "train.csv", "--test", "eggs.csv"]
    assert "spamm" in call("check", *flags).output
    told = json.loads(call("check", *flags[:4], "--json").stdout)
    assert {name: split["rows"] for name, split in told["splits"].items()} == {"train": 17, "validation": 2, "test": 5}
    (home / "check.yaml").write_text("model: nobody/nothing\ntask: classification\ndata: {train: train.csv}\n")
    assert call("check", "check.yaml").exit_code == 2
    assert call("check", "check.yaml", "--model", "m").exit_code == 0
    (home / "check.yaml").unlink()
    said = call("check", *flags[:2], "--train", "columns.csv", "--column", "text=body", "--column", "label=kind").output
    assert "  columns: text = body, label = kind\n" in said
    assert re.search(r"  2 labels in train: (h|sp)am \d+, (h|sp)am \d+\n", said)
    assert everything(home) == before


def test_a_guessed_encoding_is_said(call: Callable[..., Any], tmp_path: Path) -> None:
    rows = "".join(f"gr\u00fcn {letter},ham\nsch\u00f6n {letter},spam\n" for letter in "abcdefghijkl")
    (tmp_path / "old.csv").write_bytes(("message,label\n" + rows).encode("cp1252"))
    said = call("check", "--model", "m", "--train", tmp_path / "old.csv", "--test", "test.csv").output
    assert re.search(r"! .*old\.csv, read as cp125\d, which is a guess", said)
    assert "  columns of train: text = message, label = label\n  columns of test: text = text, label = label\n" in said
    assert "is a guess" not in call("check", "--model", "m", "--train", "train.csv").output


def test_methods_and_strategies(call: Callable[..., Any]) -> None:
    methods = json.loads(call("methods", "--json").stdout)
    assert {"full", "lora", "adapter", "freeze"} <= set(methods)
    for method in methods:
        told = json.loads(call("methods", method, "--json").stdout)
        assert {"name", "summary", "formula", "merges", "options", "source"} <= set(told)
        assert told["formula"] in call("methods", method).stdout
    assert list(json.loads(call("strategies", "--json").stdout)) == built_in_strategies()
    for strategy in built_in_strategies():
        assert json.loads(call("strategies", strategy, "--json").stdout)["name"] == strategy
    said = call("strategies", "lp-ft").stdout
    assert "Kumar" in said
    assert "num_train_epochs: 2" in said


def test_runs(call: Callable[..., Any], run: Path, home: Path) -> None:
    (home / "done" / "begun").mkdir()
    (home / "done" / "begun" / "recipe.yaml").write_text("a recipe that is nobody's run")
    (told,) = json.loads(call("runs", run.parent, "--json").stdout)
    assert (told["state"], told["strategy"], told["metric"]) == ("done", "head", "accuracy")
    assert "accuracy" in call("runs", run.parent).stdout
    assert json.loads(call("runs", home / "nowhere", "--json").stdout) == []


def test_one_damaged_run_does_not_hide_the_others(call: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    for name in ("a", "begun", "decided", "no-json", "no-recipe", "strange"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("model", "stages"))
    (tmp_path / "begun" / "decision.json").unlink()
    for name in ("begun", "decided"):
        (tmp_path / name / "evaluation.json").unlink()
    (tmp_path / "no-json" / "evaluation.json").write_text('{"goal"')
    (tmp_path / "no-recipe" / "recipe.yaml").write_text("a recipe")
    (tmp_path / "strange" / "evaluation.json").write_text("[1]")
    told = json.loads(call("runs", tmp_path, "--json").stdout)
    assert [Path(one["run"]).name for one in told] == ["a", "begun", "decided", "no-json", "no-recipe", "strange"]
    assert [one["state"] for one in told] == ["done", "unfinished", "unfinished", "damaged", "damaged", "damaged"]
    assert "evaluation.json: is not JSON" in told[3]["problem"]
    said = call("runs", tmp_path).stdout
    assert said.count("unfinished: continue with --resume") == 2
    assert re.search(r"! .*no-recipe: .*recipe\.yaml: holds no keys", said)


def test_doctor(call: Callable[..., Any]) -> None:
    told = json.loads(call("doctor", "--json").stdout)
    assert {"hybridtune", "torch", "device", "disk_free_bytes", "notes"} <= set(told)
    assert "transformers" in call("doctor").stdout


def test_demo(call: Callable[..., Any], home: Path) -> None:
    small = ["--set", "model=m", "--set", "strategy=head", "--set", "num_train_epochs=1", "--set", "baselines=false"]
    result = call("demo", "--output", "done/demo", *small, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["predictions"]) == 3
    assert call("demo", "--output", "done/demo", *small).exit_code == 2  # it is there already


def test_errors_as_json(call: Callable[..., Any]) -> None:
    result = call("predict", "nowhere", "a", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == {
        "kind": "RunError",
        "problem": "nowhere: there is no such folder",
        "found": None,
        "expected": None,
        "mend": "`hybridtune runs` lists the runs",
    }


# Mistakes: one clear message, exit code 2, nothing written


def rule(text: str) -> list[str]:
    return ["--set", f"strategy={{rules: [{text}]}}"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing file": (tune_words(train="trian.csv"), r"trian\.csv: there is no such file\n.*did you mean train\.csv\?"),
    "empty file": (tune_words(train="empty.csv"), r"empty\.csv: the file is empty"),
    "header only": (tune_words(train="header.csv"), r"header\.csv: there is a header but no rows"),
    "ragged row": (tune_words(train="ragged.csv"), r"ragged\.csv:3: the row has 3 cells, the header 2"),
    "spreadsheet": (tune_words(train="sheet.xlsx"), r"sheet\.xlsx: is not a readable xlsx file"),
    "bytes": (tune_words(train="bytes.csv"), r"bytes\.csv:4:1: a byte is not UTF-8"),
    "folder": (tune_words(train="foreign"), r"foreign: the folder holds no data set"),
    "one class": (tune_words(train="one-class.csv"), r"one-class\.csv: train has one class only\n.*ham on all"),
    "one class, held out": (
        tune_words(train="one-class.csv", test=None, validation=None),
        r"one-class\.csv: train has one class only",
    ),
    "swapped columns": (
        tune_words("--column", "text=label", "--column", "label=text"),
        r"train\.csv: text and label look swapped\n[\s\S]*the other way round: --column",
    ),
    "swapped columns, held out": (
        tune_words("--column", "text=label", "--column", "label=text", test=None, validation=None),
        r"train\.csv.*: text and label look swapped",
    ),
    "too few rows": (
        tune_words("--max-rows", "1"),
        r"train has one class only\n.*1 of the 2 labels.*\(max_rows: 1\)\n[\s\S]*more rows with --max-rows",
    ),
    "one file twice": (tune_words(test="./train.csv"), r"data\.test: is the same file as data\.train"),
    "label of test": (
        tune_words(test="eggs.csv"),
        r'eggs\.csv:6: train has no label "spamm"[\s\S]*did you mean "spam"\?',
    ),
    "no label in test": (tune_words(test="unlabelled.csv"), r"unlabelled\.csv:6: the row has no label"),
    "no texts": (tune_words(train="no-texts.csv"), r"no-texts\.csv: no rows of train are left after the check"),
    "missing column": (
        tune_words(train="columns.csv"),
        r"columns\.csv \(train\): there is no column for text\n.*body, kind",
    ),
    "wrong --column": (
        tune_words("--column", "text=txet", "--column", "label=label"),
        r'there is no column "txet", which data\.columns names for text\n.*text, label\n.*did you mean "text"\?',
    ),
    "--column of nothing": (tune_words("--column", "text"), r'--column "text": names no column'),
    "--column of a stranger": (tune_words("--column", "txt=text"), r'unknown column "txt", did you mean "text"\?'),
    "a regression": (tune_words(train="numbers.csv"), r"numbers\.csv: the label column does not look like classes"),
    "all distinct": (tune_words(train="names.csv"), r"names\.csv: the label column does not look like classes"),
    "all distinct, held out": (
        tune_words(train="names.csv", test=None, validation=None),
        r"names\.csv: the label column does not look like classes",
    ),
    "no tokenizer": (tune_words(model="no-tokenizer"), r"model no-tokenizer: its tokenizer cannot be loaded"),
    "no model": (
        tune_words(model="nobody/nothing"),
        r"model nobody/nothing: no such folder, and the hub did not give it",
    ),
    "no config": (tune_words(model="foreign"), r"model foreign: the folder has no config\.json"),
    "no task": (tune_words(task="clasification"), r'unknown task "clasification", did you mean "classification"\?'),
    "no task at all": (tune_words(task=None), r"task is missing\n.*--task classification"),
    "no train": (tune_words(train=None), r"train is missing\n.*--train FILE"),
    "strategy": (tune_words(strategy="loraa"), r'unknown strategy "loraa", did you mean "lora"\?'),
    "strategy twice": (tune_words("--strategy", "head"), r'"head" is listed more than once'),
    "strategy file": (tune_words(strategy="none.yaml"), r"none\.yaml: there is no such file"),
    "key of a strategy file": (
        tune_words(strategy="strategy.yaml"),
        r"strategy\.yaml:1: stages\.0\.rules\.0\.method is missing",
    ),
    "method": (tune_words(*rule("{part: layers, method: lorra}")), r'unknown method "lorra", did you mean "lora"\?'),
    "part": (tune_words(*rule("{part: laiers, method: full}")), r'unknown part "laiers", did you mean "layers"\?'),
    "layers outside": (
        tune_words(*rule('{part: "layers[0:9]", method: full}')),
        r"layers\[0:9\]: outside the model\n.*3 layers, numbered 0 to 2",
    ),
    "option": (tune_words(*rule("{part: layers, method: lora, rank: 4}")), r"method lora: unknown option rank"),
    "metric": (tune_words(maximize="acuracy"), r'unknown metric "acuracy", did you mean "accuracy"\?'),
    "part of a metric": (tune_words(maximize="f1"), r'unknown metric "f1", did you mean "macro_f1"\?'),
    "recipe that is a folder": (["tune", "m"], r"m: is a folder"),
    "wrong way": (tune_words(minimize="accuracy"), r"goal: minimize accuracy"),
    "device": (tune_words("--set", "device=tpu"), r"device is not 'auto', 'cpu', 'cuda' or 'mps'\n.*'tpu'"),
    "max length": (tune_words("--set", "max_length=100000"), r"max_length: 100000 is more than the model can take"),
    "recipe": (["tune", "missing.yaml"], r"missing\.yaml: there is no such file"),
    "broken recipe": (["tune", "broken.yaml"], r"broken\.yaml:3:1: is not readable YAML"),
    "list recipe": (["tune", "list.yaml"], r"list\.yaml: holds no keys\n.*list"),
    "key of the recipe": (["tune", "odd.yaml"], r"unknown key lerning_rate, did you mean learning_rate\?"),
    "data of the recipe": (["tune", "data.yaml"], r"data is not a mapping\n.*train\.csv"),
    "data of the recipe, with a flag": (["tune", "data.yaml", "--test", "test.csv"], r"data is not a mapping"),
    "--set": (tune_words("--set", "seed"), r'--set "seed" has no value'),
    "--set to nowhere": (tune_words("--set", "stages.3.learning_rate=1"), r'no entry "3"'),
    "output of others": (tune_words(output="foreign"), r"output: foreign holds other files"),
    "output is a file": (tune_words(output="train.csv"), r"output: train\.csv is a file"),
    "both ways": (tune_words("--resume", "--overwrite"), r"exclude each other"),
    "predict nowhere": (["predict", "nowhere", "a"], r"nowhere: there is no such folder"),
    "evaluate nowhere": (["evaluate", "nowhere"], r"nowhere: there is no such folder"),
    "compare nowhere": (["compare", "nowhere", "foreign"], r"nowhere: there is no such folder"),
    "export nowhere": (["export", "nowhere", "--output", "m2"], r"nowhere: there is no such folder"),
    "report nowhere": (["report", "foreig"], r"foreig: there is no such folder\n.*did you mean foreign\?"),
    "report of a file": (["report", "train.csv"], r"train\.csv: is a file\n +expected: the folder of a run"),
    "model is a file": (tune_words(model="./train.csv"), r"model \./train\.csv: is a file"),
    "no model, before the data": (
        tune_words(train="trian.csv", model="./nomodel"),
        r"model \./nomodel: there is no such folder\n +mend: +give a folder that save_pretrained wrote",
    ),
    "pattern of no folder": (
        tune_words(train="nosuch/*.csv"),
        r"nosuch/\*\.csv: no file matches .*\n.*no folder nosuch",
    ),
    "predict no run": (["predict", "foreign", "a"], r"foreign: is not a run of hybridtune"),
    "predict nothing": (["predict", "foreign"], r"give either texts or --input FILE"),
    "evaluate no run": (["evaluate", "foreign"], r"foreign: has no evaluation\.json"),
    "compare no run": (["compare", "foreign", "foreign"], r"foreign: has no predictions\.jsonl"),
    "export no run": (["export", "foreign", "--output", "out"], r"foreign: has no evaluation\.json"),
    "export kind": (
        ["export", "foreign", "--output", "out", "--kind", "zip"],
        r'unknown kind "zip"|kind: unknown "?zip',
    ),
    "report no run": (["report", "foreign"], r"foreign: is not a run folder"),
    "methods": (["methods", "lorra"], r'unknown method "lorra", did you mean "lora"\?'),
    "strategies": (["strategies", "fulll"], r'unknown strategy "fulll", did you mean "full"\?'),
    "check": (["check", "--model", "m", "--train", "empty.csv"], r"empty\.csv: the file is empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_clear_message(call: Callable[..., Any], home: Path, mistake: str) -> None:
    words, says = MISTAKES[mistake]
    before = everything(home)
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert re.match(f"error: .*{says}", result.stderr), result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    for line in result.stderr.splitlines()[1:]:
        assert re.match(r"  (found|expected|mend): ", line), result.stderr
    assert everything(home) == before


def test_a_mended_command_runs(call: Callable[..., Any], home: Path) -> None:
    assert call(*tune_words(train="trian.csv", output="done/mended")).exit_code == 2
    assert call(*tune_words("--set", "baselines=false", output="done/mended")).exit_code == 0


def test_output_that_holds_a_run(call: Callable[..., Any], run: Path) -> None:
    before = everything(run)
    result = call(*tune_words(output="done/a"))
    assert result.exit_code == 2
    assert "already holds a run" in result.stderr
    assert "--resume or --overwrite" in result.stderr
    result = call(*tune_words("--resume", "--set", "seed=5", output="done/a"))
    assert result.exit_code == 2
    assert "begun with another recipe" in result.stderr
    assert everything(run) == before


def test_mistakes_with_a_run(call: Callable[..., Any], run: Path, home: Path) -> None:
    before = everything(home)
    for words, says in (
        (["predict", run, "--input", "nothing.csv"], r"nothing\.csv: there is no such file"),
        (
            ["predict", run, "--input", "columns.csv"],
            r'there is no column for text\n.*body, kind\n.*\n.*columns=\{"text": "body"\} or --column text=body',
        ),
        (["predict", run, "a", "--input", "test.csv"], "either texts or --input"),
        (
            ["evaluate", run, "--data", "eggs.csv"],
            r'eggs\.csv:6: the model has no label "spamm"[\s\S]*did you mean "spam"\?',
        ),
        (["evaluate", run, "--data", "columns.csv", "--column", "text=body"], "there is no column for label"),
        (["export", run, "--output", "m"], "output: m exists"),
        (["export", run, "--output", "out", "--kind", "adapter"], "cannot be handed over"),
    ):
        result = call(*words)
        assert result.exit_code == 2, result.output
        assert re.match(f"error: .*{says}", result.stderr), result.stderr
    assert everything(home) == before


def test_compare_of_runs_with_different_tests(call: Callable[..., Any], run: Path, home: Path) -> None:
    quick = ["--set", "baselines=false"]
    other = [{**row, "text": f"{row['text']} z"} for row in texts.splits(24, 8, 8)["test"]]  # equal labels and numbers
    texts.save_csv(home / "other.csv", other)
    assert call(*tune_words(*quick, test="other.csv", output="done/b")).exit_code == 0
    result = call("compare", run, "done/b")
    assert result.exit_code == 2
    assert "were not tested on the same rows" in result.stderr
    assert "tune both with the same test file" in result.stderr


def test_a_full_disk(call: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = everything(home)
    monkeypatch.setattr("os.replace", full)
    result = call(*tune_words(output="full"))
    assert result.exit_code == 2
    assert re.match(r"error: full.*: no space left on the disk\n  found: .* MiB free\n  mend: ", result.stderr)
    assert everything(home) == before


def test_failures_that_are_nobodys_mistake(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(api, "tune", fail)
    assert call(*tune_words()).exit_code == 1

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "tune", stop)
    result = call(*tune_words())
    assert result.exit_code == 130
    assert result.stderr == "stopped; nothing was begun\n"
    monkeypatch.setattr(api, "check", stop)
    result = call("check", "--model", "m", "--train", "train.csv")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")  # there is nothing to go on with


# The real command


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hybridtune.cli", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=home,
        env=ENVIRONMENT,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells turn off in the background
    )


def test_the_real_command_is_calm_where_nobody_looks(home: Path) -> None:
    words = tune_words("--set", "class_weight=balanced", strategy="lora", output="done/real")
    done = start(home, *words)
    said, complained = done.communicate(timeout=120)
    assert done.returncode == 0, complained
    assert complained == ""
    assert not re.search(r"\x1b|\r|it/s|\d%\|| Warning|warn\(|\[transformers\]", said)
    steps = [line for line in said.splitlines() if re.match(r"\d/5 ", line)]
    assert [step[:3] for step in steps] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert "hybridtune predict done/real" in said
    assert ", 1 epoch, batch" in said


def test_ctrl_c_while_it_trains(home: Path) -> None:
    words = tune_words("--strategy", "lora", "--set", "strategy.1.stages.0.max_steps=1000000", output="stopped")
    log = home / "stopped" / "trials" / "lora" / "stages" / "1-lora" / "log.jsonl"
    running = start(home, *words, "--set", "logging_steps=1", "--set", "eval_strategy=no")
    until = time.monotonic() + 100
    try:
        while not (log.is_file() and log.stat().st_size) and running.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said, complained = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, complained
    assert complained == "stopped; what was finished is kept, --resume goes on from there\n"
    assert "Traceback" not in said + complained
    run = home / "stopped"
    assert not (run / "decision.json").exists()
    assert {path.name for path in run.iterdir()} == {
        *("asked.json", "recipe.yaml", "environment.json", "data.json", "trials"),
    }
    for path in run.rglob("*.json"):
        json.loads(path.read_text())
    for line in log.read_text().splitlines():
        json.loads(line)
    assert not list(run.rglob("*.tmp"))
    assert (run / "trials" / "head" / "trial.json").is_file()


def test_pipes_get_utf_8() -> None:
    code = "from hybridtune import cli; cli.app = lambda: print('中文 grün \\udc80'); cli.main()"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert done.stdout.decode("utf-8") == "中文 grün \\udc80\n"


# The console


def test_the_console_shows_texts_as_they_are() -> None:
    stream = io.StringIO()
    shown = console.Console(stream=stream)
    odd = "[bold]x[/bold] :smile: [0.1, 0.2] \\[y]"
    shown.line(odd, "dim")
    shown.warn(odd)
    shown.table((odd, "b"), [(odd, "[1]"), ("c", "d")], bold=0)
    shown.begin("bar", 10)
    shown.advance(5)
    shown.finish()
    assert stream.getvalue().count(odd) == 4
    assert "\x1b" not in stream.getvalue()
    console.Console(quiet=True, stream=stream).line("nothing")
    assert "nothing" not in stream.getvalue()


def test_long_lines_are_not_cut() -> None:
    stream = io.StringIO()
    shown = console.Console(stream=stream)
    shown.line("word " * 100)
    shown.table(("a", "b"), [("x" * 60, "y" * 60)])
    assert "word " * 100 in stream.getvalue()
    assert "x" * 60 in stream.getvalue()


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    shown = console.Console(stream=stream)
    assert shown.is_terminal
    shown.step(1, "goal: [x]")
    shown.table(("name", "score", "n"), [("a strategy with a long name", "0.912 [0.880, 0.938]", "1.2M")], bold=0)
    shown.begin("bar", 3)
    shown.advance(3)
    shown.finish()
    with shown.watch("texts") as watch:
        watch(1, 7)
        watch(7, 7)
    shown.begin("around", 5)
    shown.advance(2)
    with shown.watch("inside") as watch:
        watch(4, 9)
        time.sleep(0.3)  # bars are drawn ten times a second
    shown.advance(5)
    shown.finish()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "1/5 goal: [x]" in plain
    assert re.search(r"a strategy with a long name +0\.912 \[0\.880, 0\.938\] +1\.2M", plain)
    assert "3/3" in plain
    assert re.search(r"texts .*7/7", plain)
    assert re.search(r"around .*2/5.*\n.*inside .*4/9", plain)
    assert re.search(r"around .*5/5", plain)  # the outer one goes on


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (console.count(999), "999"),
        (console.count(1_234_567), "1.23M"),
        (console.count(7_000_000_000), "7B"),
        (console.memory(None), "-"),
        (console.memory(300 * 2**20), "300 MiB"),
        (console.memory(3 * 2**30), "3.00 GiB"),
        (console.seconds(9.94), "9.9 s"),
        (console.seconds(125), "2 min 05 s"),
        (console.number(-0.0001), "0.000"),
        (console.number(1234.5), "1,234"),
        (console.number(1_515_357_680_387.4), "1.515e+12"),
        (console.number(0.25, 4, "+"), "+0.2500"),
        (console.interval({"value": 0.9, "low": 0.8, "high": 1}), "0.900 [0.800, 1.000]"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_predict_never_writes_over_its_input(tmp_path: Path) -> None:
    rows = texts.save_csv(tmp_path / "rows.csv", [{"text": "good"}])
    before = rows.read_bytes()
    done = CliRunner().invoke(cli.app, ["predict", str(tmp_path), "--input", str(rows), "--output", str(rows)])
    assert (done.exit_code, rows.read_bytes()) == (2, before)
    done = CliRunner().invoke(cli.app, ["predict", str(tmp_path), "--input", str(rows), "--output", str(tmp_path)])
    assert (done.exit_code, rows.read_bytes()) == (2, before)


def test_bad_rows_are_left_in_the_run_and_said(call: Callable[..., Any], home: Path) -> None:
    broken = home / "broken.csv"
    broken.write_text(
        "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in texts.labelled(8, 9)) + "z\n"
    )
    words = tune_words("--train", "broken.csv", "--set", "baselines=false", output="bad/x")
    refused = call(*words)
    assert refused.exit_code == 2 and re.search(r"broken\.csv:10: the row has 1 cells[\s\S]*on_bad_row", refused.output)
    checked = call("check", "--model", "m", "--train", "broken.csv", "--on-bad-row", "skip").output
    assert "1 rows cannot be read and are left out, the first broken.csv:10" in checked
    assert "rejected.jsonl" not in checked  # a check writes nothing
    done = call(*words, "--on-bad-row", "skip")
    assert done.exit_code == 0, done.output
    assert "1 rows cannot be read and are left out, the first broken.csv:10" in done.output
    lines = (home / "bad/x/rejected.jsonl").read_text().splitlines()
    problem = "the row has 1 cells, the header 2"
    assert [json.loads(line) for line in lines] == [
        {"source": "broken.csv", "line": 10, "problem": problem, "text": "z"}
    ]
    assert json.loads((home / "bad/x/data.json").read_text())["rejected"] == 1
    again = call("tune", "bad/x/recipe.yaml", "--output", "bad/y", "--set", "baselines=false")
    assert again.exit_code == 0 and (home / "bad/y/rejected.jsonl").is_file(), again.output
