"""Translation models that mark texts with their languages, and Marian, whose targets have words of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset

from hybridtune import answer, tasks
from hybridtune.engine import decoder, vocabulary
from hybridtune.errors import ModelError
from hybridtune.tasks import summarization
from hybridtune.tasks.translation import Task

LETTERS = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{one}", -1.0) for one in "abcdefghij")]
ROWS = Dataset.from_list([{"source": "a b c d e", "target": "f g"}, {"source": "c", "target": "h i j"}])


def pieces(folder: Path) -> Path:
    """A SentencePiece model of letters, and its words as a file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pairs = zip("abcdefghij" * 9, "jihgfedcba" * 9, strict=True)
    (folder / "text.txt").write_text("\n".join(" ".join(pair) for pair in pairs))
    made = {"model_prefix": str(folder / "spm"), "vocab_size": 16, "hard_vocab_limit": False, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), **made)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    found = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    words = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>", *found))
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    return folder / "spm.model"


def m2m100(folder: Path) -> Any:
    model = pieces(folder)
    return hf.M2M100Tokenizer(str(folder / "vocab.json"), str(model))


def marian(folder: Path) -> Any:
    model = pieces(folder)
    return hf.MarianTokenizer(str(model), str(model), str(folder / "vocab.json"))


TOKENIZERS = {
    "nllb": lambda folder: hf.NllbTokenizer(vocab={word: n for n, (word, _) in enumerate(LETTERS)}, merges=[]),
    "mbart": lambda folder: hf.MBartTokenizer(vocab=list(LETTERS)),
    "mbart50": lambda folder: hf.MBart50Tokenizer(vocab=list(LETTERS)),
    "m2m100": m2m100,
}
CODES = {
    "nllb": ("eng_Latn", "deu_Latn"),
    "mbart": ("en_XX", "de_DE"),
    "mbart50": ("en_XX", "de_DE"),
    "m2m100": ("en", "de"),
}
IN_FRONT = ("nllb", "mbart50", "m2m100")


def model_of(name: str, words: int) -> Any:
    size = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "vocab_size": words,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if name.startswith("mbart"):
        return hf.MBartForConditionalGeneration(hf.MBartConfig(**size, decoder_start_token_id=2)).eval()
    return hf.M2M100ForConditionalGeneration(hf.M2M100Config(**size, decoder_start_token_id=2)).eval()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_marked_and_the_model_begins_as_it_was_taught(name: str, tmp_path: Path) -> None:
    tokenizer, (source, target) = TOKENIZERS[name](tmp_path), CODES[name]
    model = model_of(name, len(tokenizer) + 200)
    task = Task(source_language=source, target_language=target, settings={"max_new_tokens": 6})
    task.prepare(model, tokenizer)
    items = task.encode(ROWS, tokenizer, 32)
    mark = {"m2m100": "__{}__"}.get(name, "{}")
    ids = {code: tokenizer.convert_tokens_to_ids(mark.format(code)) for code in (source, target)}
    assert all(ids[source] in given and ids[target] not in given for given in items["input_ids"][:])
    labels = items["labels"][0]
    assert 2 in labels
    assert (labels[0] if name in IN_FRONT else labels[-1]) == ids[target]
    taught = decoder.complete(model, {"labels": torch.tensor([labels])})["decoder_input_ids"][0].tolist()
    with torch.no_grad():
        written = model.generate(
            input_ids=torch.tensor([items["input_ids"][0]]), attention_mask=torch.tensor([items["attention_mask"][0]])
        )[0].tolist()
    if name in IN_FRONT:
        assert taught[:2] == written[:2] == [2, ids[target]]
    else:
        assert taught[0] == written[0] == ids[target]
    found = task.decode(answer.answers(model, task, items, tokenizer, 2), items, ROWS)
    assert not any(target in one["text"] for one in found)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_languages_that_are_missing_or_unknown_are_told(name: str, tmp_path: Path) -> None:
    tokenizer, (source, target) = TOKENIZERS[name](tmp_path), CODES[name]
    model = model_of(name, len(tokenizer) + 200)
    with pytest.raises(ModelError, match="source_language: the model marks texts with their language, and none"):
        Task(target_language=target).prepare(model, tokenizer)
    with pytest.raises(ModelError, match="target_language: the model marks texts with their language, unknown") as told:
        Task(source_language=source, target_language=f"{target}x").prepare(model, tokenizer)
    assert "," in told.value.expected


def test_a_cut_target_keeps_its_mark(tmp_path: Path) -> None:
    tokenizer, (source, target) = TOKENIZERS["mbart"](tmp_path), CODES["mbart"]
    task = Task(source_language=source, target_language=target, settings={"max_new_tokens": 4})
    task.prepare(model_of("mbart", len(tokenizer) + 200), tokenizer)
    items = task.encode(ROWS, tokenizer, 32)
    assert items["labels"][1][-1] == tokenizer.convert_tokens_to_ids(target)
    assert len(items["labels"][1]) == 4


def test_marian_has_words_of_its_own_for_targets(tmp_path: Path) -> None:
    tokenizer = marian(tmp_path)
    torch.manual_seed(0)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 40}
    model = hf.MarianMTModel(hf.MarianConfig(**size, **heads, **ids, max_position_embeddings=64)).eval()
    tiny.shake(model.parameters(), by=0.3)
    task = Task(settings={"max_new_tokens": 12})
    task.prepare(model, tokenizer)
    items = task.encode(ROWS, tokenizer, 32)
    assert [labels[-1] for labels in items["labels"][:]] == [2, 2]
    assert tokenizer.decode(items["labels"][0], skip_special_tokens=True) == "f g"
    together = answer.answers(model, task, items, tokenizer, 2)
    alone = [answer.answers(model, task, items.select([at]), tokenizer, 1)[0] for at in range(2)]
    assert [task._own(one) for one in together] == [task._own(one) for one in alone]


@pytest.mark.parametrize("name", ["nllb", "mbart"])
def test_the_loss_in_chunks_is_the_models_own(name: str, tmp_path: Path) -> None:
    tokenizer, (source, target) = TOKENIZERS[name](tmp_path), CODES[name]
    model = model_of(name, len(tokenizer) + 200)
    task = Task(source_language=source, target_language=target)
    task.prepare(model, tokenizer)
    items = task.encode(ROWS, tokenizer, 32)
    batch = dict(task.collator(tokenizer)(tasks.for_the_model(items, tokenizer, labels=True).to_list()))
    found = vocabulary.start(model, decoder.head_of(model), batch)
    assert found.on, found.reason
    with torch.no_grad():
        rest = decoder.complete(model, dict(batch))
        labels = rest.pop("labels")
        torch.testing.assert_close(task.loss(model(**rest), labels), model(**batch).loss)


def test_summaries_in_a_language_of_the_model(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["mbart50"](tmp_path)
    model = model_of("mbart50", len(tokenizer) + 200)
    with pytest.raises(ModelError, match="target_language: the model marks texts with their language, and none"):
        summarization.Task().prepare(model, tokenizer)
    task = summarization.Task(target_language="de_DE")
    task.prepare(model, tokenizer)
    items = task.encode(ROWS.rename_columns({"source": "document", "target": "summary"}), tokenizer, 32)
    code = tokenizer.convert_tokens_to_ids("de_DE")
    assert items["input_ids"][0][0] == items["labels"][0][0] == model.generation_config.forced_bos_token_id == code
