"""Vocabularies that are trimmed, trained or grown: the tokenizer, the model that follows it, and whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
import vocabularies
from safetensors import safe_open
from test_multilingual import m2m100
from transformers import AutoTokenizer, TrainerCallback
from vocabularies import sentences

import hybridtune
from hybridtune import checkpoint, vocabulary
from hybridtune import model as models
from hybridtune.console import Console
from hybridtune.errors import MethodError, ModelError, RecipeError, RunError
from hybridtune.recipe import Recipe, Vocabulary

QUIET = Console(quiet=True)
HEADS = {
    "bert": "ForSequenceClassification",
    "roberta": "ForMaskedLM",
    "gpt2": "ForCausalLM",
    "llama": "ForCausalLM",
    "t5": "ForSeq2SeqLM",
    "bart": "ForSeq2SeqLM",
}
FEW = sentences(30, 5, syllables=4)


def load(folder: Path, kind: str) -> models.Loaded:
    return models.load(str(folder), f"AutoModel{HEADS[kind]}")


def changed(loaded: models.Loaded, asked: Vocabulary, texts: list[str] = FEW) -> Any:
    """The tokenizer that a recipe asks for where rows are these texts."""
    return vocabulary.change(
        asked, loaded, lambda: iter([texts]), lambda tokenizer: iter(tokenizer(texts)["input_ids"])
    )


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    given = {"input_ids": torch.tensor([ids])}
    more = {"decoder_input_ids": given["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**given, **more).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model and its tokenizer of each kind."""
    root = tmp_path_factory.mktemp("vocabularies")
    return {kind: vocabularies.save(root / kind, kind, head) for kind, head in HEADS.items()}


@pytest.mark.parametrize("kind", HEADS)
def test_trimmed(folders: dict[str, Path], kind: str) -> None:
    before, after = load(folders[kind], kind), load(folders[kind], kind)
    old, new = before.tokenizer, changed(before, Vocabulary(trim=True))
    after = vocabulary.follow(after, new)
    known, found = old.get_vocab(), new.get_vocab()
    assert sorted(found.values()) == list(range(len(found)))
    assert len(found) < len(known) - 20
    assert set(old.all_special_tokens) | set(old.added_tokens_encoder) <= set(found)
    assert {piece for piece in known if len(piece) == 1} <= set(found)
    number = {at: known[piece] for piece, at in found.items()}
    for text in FEW:
        ids = new(text)["input_ids"]
        assert [number[one] for one in ids] == old(text)["input_ids"]
        assert new.decode(ids) == old.decode(old(text)["input_ids"])
        expected, got = logits(before.model, old(text)["input_ids"]), logits(after.model, ids)
        if HEADS[kind] != "ForSequenceClassification":
            expected = expected[..., [number[at] for at in range(len(number))]]
        assert torch.equal(got, expected)
    for key, at in before.model.config.to_dict().items():
        if key.endswith("_token_id") and at is not None and at in known.values():
            assert number[getattr(after.model.config, key)] == at, key
    assert {after.model.config.vocab_size, after.model.get_input_embeddings().num_embeddings} == {len(found)}
    assert after.new == before.new
    assert new("ka \u00e9 7").input_ids  # what no row had can be written as far as it could before


def test_all_that_follows_the_vocabulary(folders: dict[str, Path]) -> None:
    """BART's bias of final logits is a buffer, and its tables are tied."""
    loaded = load(folders["bart"], "bart")
    with torch.no_grad():
        loaded.model.final_logits_bias.normal_()
    bias = loaded.model.final_logits_bias.clone()
    old, new = loaded.tokenizer, changed(loaded, Vocabulary(trim=True))
    model = vocabulary.follow(loaded, new).model
    number = {at: old.get_vocab()[piece] for piece, at in new.get_vocab().items()}
    assert torch.equal(model.final_logits_bias, bias[:, [number[at] for at in range(len(number))]])
    tables = {id(module.weight) for module in (model.lm_head, model.model.shared, model.model.encoder.embed_tokens)}
    assert len(tables) == 1


def test_trimmed_encoder_decoder(tmp_path: Path) -> None:
    """Two tables of one vocabulary, in configurations inside the configuration."""
    words = tiny.encoder_decoder()
    words.config.decoder_start_token_id, words.config.pad_token_id = 2, 0
    words.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    before, after = (models.load(str(tmp_path), "AutoModelForSeq2SeqLM") for _ in range(2))
    texts = ["a b good", "c new"]
    new = changed(before, Vocabulary(trim=True), texts)
    assert "bad" not in new.get_vocab() and "z" in new.get_vocab()
    after = vocabulary.follow(after, new)
    ids = before.tokenizer(texts[0])["input_ids"]
    of = before.tokenizer.get_vocab()
    order = [of[piece] for piece in sorted(new.get_vocab(), key=new.get_vocab().__getitem__)]
    assert torch.equal(logits(after.model, new(texts[0])["input_ids"]), logits(before.model, ids)[..., order])
    assert after.model.config.encoder.vocab_size == after.model.config.decoder.vocab_size == len(new)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "bart"])
def test_new_tokens(folders: dict[str, Path], kind: str) -> None:
    """A new row starts as the mean of what the text was before; nothing else moves, and folded in it is the same."""
    before, after = load(folders[kind], kind), load(folders[kind], kind)
    old, new = before.tokenizer, changed(before, Vocabulary(add_tokens=["kalomi", "tenzz"]))
    after = vocabulary.follow(after, new)
    table = before.model.get_input_embeddings().weight
    at = new.convert_tokens_to_ids("kalomi")
    assert old.convert_tokens_to_ids("kalomi") in (None, old.unk_token_id)
    ids = [one for one in old("kalomi", add_special_tokens=False)["input_ids"] if one != old.unk_token_id]
    scale = getattr(after.model.get_input_embeddings(), "embed_scale", 1.0)
    with torch.no_grad():
        assert torch.allclose(after.model.get_input_embeddings()(torch.tensor([at]))[0], table[ids].mean(0) * scale)
    text = old("lo mi")["input_ids"]
    size = len(table)
    expected, got = logits(before.model, text), logits(after.model, text)
    same = [n for n in range(min(size, got.shape[-1])) if n not in (at, new.convert_tokens_to_ids("tenzz"))]
    assert torch.equal(got[..., same], expected[..., same]) or (kind == "bert" and torch.equal(got, expected))
    (first, *_) = after.new if kind != "bert" else [name for name in after.new if "new_rows" in name]
    rows = after.model.get_parameter(first)
    with torch.no_grad():
        rows.add_(1.0)
    moved = logits(after.model, [*text, at])
    assert not torch.equal(moved, logits(before.model, [*text, 5]))
    vocabulary.fold(after.model)
    assert torch.allclose(logits(after.model, [*text, at]), moved, atol=1e-6)
    assert not any("new_rows" in name for name, _ in after.model.named_parameters())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_trained(folders: dict[str, Path], kind: str) -> None:
    before, after = load(folders[kind], kind), load(folders[kind], kind)
    old, new = before.tokenizer, changed(before, Vocabulary(train=60 + 256 * (kind == "gpt2")), sentences(200, 9))
    after = vocabulary.follow(after, new)
    assert type(new) is type(old) and set(old.all_special_tokens) <= set(new.get_vocab())
    shared = set(old.get_vocab()) & set(new.get_vocab())
    assert len(shared) > 10 and len(shared) < len(new)
    tables = [loaded.model.get_input_embeddings().weight for loaded in (before, after)]
    for piece in shared:
        rows = (table[of.get_vocab()[piece]] for table, of in zip(tables, (old, new), strict=True))
        assert torch.equal(*rows), piece
    (rows, *_) = [after.model.get_parameter(name) for name in after.new if "new_rows" in name]
    assert len(rows) == len(new) - len(shared)
    assert after.model.config.vocab_size == len(new)
    again = changed(load(folders[kind], kind), Vocabulary(train=60 + 256 * (kind == "gpt2")), sentences(200, 9))
    # the scores of a Unigram differ in their last digits, and what is equal but for these stands in another order
    assert again.backend_tokenizer.to_str() == new.backend_tokenizer.to_str() or kind == "t5"


def test_new_languages(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A new code marks texts, starts as the mean of all codes, and tells the model how to begin."""
    tokenizer = hf.MBartTokenizer(vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)])
    config = tiny.classifier("bart").config
    for key, value in {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    hf.MBartForConditionalGeneration(
        hf.MBartConfig(**{key: value for key, value in config.to_dict().items() if key not in ("model_type", "dtype")})
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path), "AutoModelForSeq2SeqLM")
    codes = [loaded.tokenizer.convert_tokens_to_ids(code) for code in loaded.tokenizer.lang_code_to_id]
    expected = loaded.model.get_input_embeddings().weight[codes].mean(0)
    new = changed(loaded, Vocabulary(add_languages=["gsw_CH"]))
    loaded = vocabulary.follow(loaded, new)
    at = new.convert_tokens_to_ids("gsw_CH")
    (name,) = loaded.new
    assert torch.allclose(loaded.model.get_parameter(name)[0], expected)
    task = hybridtune.tasks.translation.Task(source_language="en_XX", target_language="gsw_CH")
    task.prepare(loaded.model, new)
    assert loaded.model.generation_config.decoder_start_token_id == at
    assert new(text_target="a")["input_ids"][-1] == at
    with pytest.raises(ModelError, match="does not mark texts"):
        changed(load(folders["t5"], "t5"), Vocabulary(add_languages=["gsw_CH"]))
    (tmp_path / "slow").mkdir()
    slow = m2m100(tmp_path / "slow")
    with pytest.raises(ModelError, match="cannot mark texts with gsw"):
        vocabulary.change(Vocabulary(add_languages=["gsw"]), models.Loaded(None, slow, "", ()), None, None)
    with pytest.raises(ModelError, match="trim: cannot be done"):
        vocabulary.change(Vocabulary(trim=True), models.Loaded(None, slow, "", ()), None, lambda of: iter([[0]]))


def test_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="has ka already"):
        changed(load(folders["bert"], "bert"), Vocabulary(add_tokens=["ka"]))
    given = {"model": "m", "task": "translation", "train": "t"}
    for asked, problem in (
        ({"trim": True, "train": 9}, "one of trim and train"),
        ({"trim": False}, "says nothing"),
        ({"add_tokens": ["a", "a"]}, "listed twice"),
        ({"trimm": True}, "did you mean trim"),
        ({"train": 1}, "vocabulary.train"),
    ):
        with pytest.raises(RecipeError, match=problem):
            Recipe.make(**given, vocabulary=asked)


def test_positions_counted_from_the_padding_token(tmp_path: Path) -> None:
    """RoBERTa's positions begin behind the padding token's number, so that it must stay what it is."""
    tokens = vocabularies.tokenizer("roberta")
    pieces = sorted(tokens.get_vocab(), key=tokens.get_vocab().__getitem__)
    tree = json.loads(tokens.backend_tokenizer.to_str())
    order = [*pieces[5:], *pieces[:5]]
    tree["model"]["vocab"] = {piece: at for at, piece in enumerate(order)}
    for token in tree["added_tokens"]:
        token["id"] = order.index(token["content"])
    pad = order.index("<pad>")
    config = tiny.classifier("roberta").config
    config.vocab_size, config.pad_token_id, config.max_position_embeddings = len(order), pad, pad + 80
    hf.RobertaModel(config).save_pretrained(tmp_path)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=hf.tokenization_utils_tokenizers.TokenizerFast.from_str(
            json.dumps({**tree, "post_processor": None})
        ),
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path), "AutoModel")
    with pytest.raises(ModelError, match="padding token would get another number"):
        vocabulary.follow(loaded, changed(loaded, Vocabulary(trim=True)))


# whole runs


def labelled(count: int, seed: int) -> list[dict[str, str]]:
    """Texts whose label is a word that the tokenizer has no piece for."""
    texts = sentences(count, seed, syllables=6)
    return [
        {"text": f"{text} {('zzyes', 'zzno')[at % 2]}", "label": ("yes", "no")[at % 2]} for at, text in enumerate(texts)
    ]


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    return [{"source": text, "target": " ".join(text.split()[::-1])} for text in sentences(count, seed, syllables=6)]


CLASSES = {"train": labelled(80, 1), "validation": labelled(20, 2), "test": labelled(20, 3)}
PAIRS = {"train": pairs(60, 1), "validation": pairs(20, 2), "test": pairs(20, 3)}
QUICK: dict[str, Any] = {"num_train_epochs": 2, "console": QUIET, "baselines": False, "bf16": False}


def tune(model: Path, output: Path, data: dict[str, Any] = CLASSES, **keys: Any) -> hybridtune.Run:
    task = "classification" if data is CLASSES else "translation"
    more = {} if data is CLASSES else {"max_new_tokens": 12, "generate_on": 8}
    given = {"data": {**data, "survey": False}, "output": str(output), **QUICK, **more, **keys}
    return hybridtune.tune(model=str(model), task=task, **given)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body without a head."""
    return vocabularies.save(tmp_path_factory.mktemp("bert"), "bert")


ADD = {"add_tokens": ["zzyes", "zzno"]}


def delta(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / "delta.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("strategy", ["head", "lora"])
def test_only_new_rows_move(bert: Path, tmp_path: Path, strategy: str) -> None:
    """The rest of the table stays, to the last bit, under AdamW with weight decay; a delta has the new rows alone."""
    run = tune(bert, tmp_path / "run", vocabulary=ADD, strategy=strategy, weight_decay=0.5, learning_rate=0.01)
    (stage,) = (run.folder / "stages").iterdir()
    name = "bert.embeddings.word_embeddings.new_rows.rows"
    tensors = delta(stage)
    assert tensors[name].shape == (2, 32)
    assert not any("word_embeddings.weight" in other for other in tensors)
    base = models.load(str(bert), "AutoModelForSequenceClassification")
    old, table = base.tokenizer, base.model.get_input_embeddings().weight
    plain = hf.AutoModelForSequenceClassification.from_pretrained(run.folder / "model")
    found, tokens = plain.get_input_embeddings().weight, AutoTokenizer.from_pretrained(run.folder / "model")
    assert torch.equal(found[: len(old)], table[: len(old)])
    ids = [tokens.convert_tokens_to_ids(token) for token in ADD["add_tokens"]]
    assert torch.equal(found[ids], tensors[name])
    start = table[old("zzyes", add_special_tokens=False)["input_ids"]].mean(0)
    assert not torch.allclose(found[ids[0]], start, atol=1e-3)
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["base"]["name"] == str(bert)
    assert manifest["base"]["fingerprint"] == models.fingerprint(base.model, base.new)


NEW_PROCESS = """
import json, sys
import hybridtune
folder, rows, out = json.loads(sys.stdin.read())
json.dump(hybridtune.load(folder).predict(rows), open(out, "w"))
"""


def in_a_new_process(folder: Path, rows: list[dict[str, str]], out: Path) -> Any:
    sent = json.dumps([str(folder), rows, str(out)])
    done = subprocess.run([sys.executable, "-c", NEW_PROCESS], input=sent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["delta", "checkpoint", "adapter"])
def test_handed_over(bert: Path, tmp_path: Path, kind: str) -> None:
    """Each kind answers in a new process as the tuned model does, and plain libraries load what is theirs."""
    asked = {**ADD, "trim": True}
    run = tune(bert, tmp_path / "run", vocabulary=asked, strategy="lora", learning_rate=0.01)
    said = hybridtune.api.export_run(run.folder, tmp_path / kind, kind)
    assert said["difference"] < 1e-5
    rows = [{"text": row["text"]} for row in CLASSES["test"]]
    expected, found = run.predict(rows), in_a_new_process(tmp_path / kind, rows, tmp_path / "out.json")
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    if kind == "checkpoint":
        model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / kind)
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / kind)) < 112
    if kind == "adapter":
        assert (tmp_path / kind / "base" / "model.safetensors").is_file()
        names: dict[str, Any] = {}
        exec(said["load"], names)
        batch = names["tokenizer"]([rows[0]["text"]], return_tensors="pt")
        with torch.no_grad():
            theirs = names["model"](**batch).logits.softmax(-1)[0].tolist()
        assert theirs == pytest.approx(list(expected[0]["scores"].values()), abs=1e-5)
    if kind == "delta":
        (tmp_path / kind / "tokenizer.json").write_text((bert / "tokenizer.json").read_text())
        with pytest.raises(RunError, match="not the one that the model was trained with"):
            hybridtune.load(tmp_path / kind)


def test_nothing_wraps_a_table_with_new_rows(bert: Path, tmp_path: Path) -> None:
    """An update of the table, folded in, would miss the new rows: LoRA on all leaves it out, on it alone is refused."""
    rules = [{"part": "re:.*word_embeddings", "method": "lora"}]
    with pytest.raises(MethodError, match="no matrix is left there"):
        tune(bert, tmp_path / "no", vocabulary=ADD, strategy=[{"rules": rules}])
    run = tune(bert, tmp_path / "run", vocabulary=ADD, strategy=[{"rules": [{"part": "all", "method": "lora"}]}])
    (stage,) = (run.folder / "stages").iterdir()
    assert not any("word_embeddings.lora" in name for name in delta(stage))
    assert run.evaluation["model_difference"] < 1e-5


class Stop(TrainerCallback):
    """Interrupts a training after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("bart", {"train": 330}), ("t5", {"trim": True, "add_tokens": ["<x>"]})],
    ids=["train", "trim"],
)
def test_resumed(folders: dict[str, Path], tmp_path: Path, kind: str, asked: dict[str, Any]) -> None:
    """An interrupted run goes on with the tokenizer that it had, and ends as an undisturbed one, to the last bit."""
    keys = {"vocabulary": asked, "strategy": "full", "save_steps": 2}
    whole = tune(folders[kind], tmp_path / "whole", PAIRS, **keys)
    with pytest.raises(KeyboardInterrupt):
        tune(folders[kind], tmp_path / "run", PAIRS, callbacks=[Stop(5)], **keys)
    kept = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    run = tune(folders[kind], tmp_path / "run", PAIRS, resume=True, **keys)
    assert (run.folder / "tokenizer" / "tokenizer.json").read_bytes() == kept
    (one,), (other,) = ((of.folder / "stages").iterdir() for of in (whole, run))
    tensors = delta(one)
    assert any("new_rows" in name for name in tensors)
    for name, tensor in delta(other).items():
        assert torch.equal(tensor, tensors[name]), name
    assert run.predict(PAIRS["test"][:3]) == whole.predict(PAIRS["test"][:3])


def test_stages_prompts_and_a_start_from_a_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """Soft prompts sit on the changed embeddings; another tuning goes on from the delta, but not with another one."""
    stages = [
        {"name": "soft", "rules": [{"part": "embeddings", "method": "prompt", "num_virtual_tokens": 3}]},
        {"name": "layers", "rules": [{"part": "decoder.layers", "method": "lora"}, {"part": "new", "method": "full"}]},
    ]
    asked = {"add_tokens": ["kalomi"]}
    run = tune(folders["bart"], tmp_path / "run", PAIRS, vocabulary=asked, strategy=stages)
    assert json.loads((run.folder / "model" / "hybridtune.json").read_text())["kind"] == "delta"
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    assert "kalomi" in tokenizer.get_vocab()
    second = tune(run.folder, tmp_path / "second", PAIRS, strategy="full")
    assert second.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert "kalomi" in second.tokenizer.get_vocab()
    rows = PAIRS["test"][:4]
    assert in_a_new_process(second.folder, rows, tmp_path / "out.json") == second.predict(rows)
    with pytest.raises(ModelError, match="belongs to a vocabulary"):
        tune(run.folder, tmp_path / "third", PAIRS, vocabulary={"trim": True})


def test_trimmed_runs_are_those_of_the_whole_vocabulary(bert: Path, tmp_path: Path) -> None:
    """With the table frozen, what is trained of a trimmed model is what would be of the whole one, to the last bit."""
    keys = {"strategy": "lora", "learning_rate": 0.01}
    whole, less = (
        tune(bert, tmp_path / name, vocabulary=asked, **keys)
        for name, asked in (("whole", None), ("less", {"trim": True}))
    )
    assert json.loads((less.folder / "data.json").read_text())["vocabulary"]["pieces"] < 90
    (one,), (other,) = ((of.folder / "stages").iterdir() for of in (whole, less))
    found, expected = delta(other), delta(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_windows_and_tags(bert: Path, tmp_path: Path) -> None:
    """Tokens of rows that come as words, and of questions with their contexts, are counted as they are cut."""
    words = [text.split() for text in sentences(40, 4, syllables=5)]
    rows = [{"tokens": row, "tags": ["B-X" if word[0] == "k" else "O" for word in row]} for row in words]
    splits = {"train": rows[:24], "validation": rows[24:32], "test": rows[32:], "survey": False}
    out = str(tmp_path / "tags")
    run = hybridtune.tune(
        model=str(bert), task="tagging", data=splits, vocabulary={"trim": True}, strategy="head", output=out, **QUICK
    )
    assert len(run.tokenizer) < 90
    assert checkpoint.read_manifest(next((run.folder / "stages").iterdir()))["base"]["vocabulary"]


def never(*_: Any) -> Iterator[Any]:
    raise AssertionError("not to be called")


def test_growing_reads_no_rows(folders: dict[str, Path]) -> None:
    assert (
        "<x>"
        in vocabulary.change(Vocabulary(add_tokens=["<x>"]), load(folders["bert"], "bert"), never, never).get_vocab()
    )
