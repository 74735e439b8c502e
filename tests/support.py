"""What works where: every method and every built-in strategy on tiny models of every architecture.

`python tests/support.py`, or `make support`, trains each pair for three steps a stage, checks what came of it and
writes docs/support.md. tests/test_support.py holds a part of the pairs to `REFUSED`, and the page to both.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft  # noqa: F401 - before the garbage collector is told to leave imported libraries alone
import tiny
import torch
import transformers as hf
from transformers import TrainerCallback

from hybridtune import checkpoint, methods
from hybridtune import model as models
from hybridtune.checkpoint import Base
from hybridtune.errors import MethodError, PartError
from hybridtune.recipe import Stage, Strategy, built_in_strategies, load_strategy
from hybridtune.train import HybridTrainer

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
STEPS = 3
# An optimizer need not move what has a smaller gradient than this.
SEEN = 1e-6

METHODS = methods.names()
STRATEGIES = [f"strategy {name}" for name in built_in_strategies()]
OPTIONS = {
    "lora": {"r": 2},
    "adapter": {"bottleneck": 4},
    "prompt": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
}
PLACES = {"prompt": "embeddings"}

NO_INTERFACE = "does not call transformers' AttentionInterface"
# What says no before anything is trained, and why; all else has to work.
REFUSED: dict[tuple[str, str], str] = {
    ("prefix", "deberta-v2"): NO_INTERFACE,
    ("strategy prefix", "deberta-v2"): NO_INTERFACE,
    ("strategy mam", "deberta-v2"): NO_INTERFACE,
}


# --- columns: models as they come from a hub, in folders


@dataclass(frozen=True)
class Kind:
    """One kind of model: the Auto class that loads it, and how it is written.

    Attributes:
        title: on the page.
        auto_class: name of the class in transformers.
        save: writes it into a folder.
        texts: whether its labels are tokens.
    """

    title: str
    auto_class: str
    save: Callable[[Path], object]
    texts: bool = False


def _save(model: hf.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def _encoder_decoder() -> hf.PreTrainedModel:
    model = tiny.encoder_decoder()
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    tiny.shake(model.parameters(), by=0.2)
    return model


def _masked(name: str, model_class: type[hf.PreTrainedModel]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(tiny.classifier(name).config)
    tiny.shake(model.parameters(), by=0.2)
    return model


TITLES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "deberta-v2": "DeBERTa-v2",
    "modernbert": "ModernBERT",
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gpt2": "GPT-2",
    "t5": "T5",
    "bart": "BART",
    "marian": "Marian",
}
_MASKED = {"bert": hf.BertForMaskedLM, "roberta": hf.RobertaForMaskedLM}
CLASSIFIERS = {
    **{name: Kind(TITLES[name], tiny.AUTO, functools.partial(tiny.save_body, name=name)) for name in tiny.CLASSIFIERS},
    "encoder-decoder": Kind(
        "EncoderDecoder", "EncoderDecoderModel", lambda folder: _save(_encoder_decoder(), folder), texts=True
    ),
}
LANGUAGE_MODELS = {
    **{
        f"{name} LM": Kind(
            TITLES[name],
            "AutoModelForMaskedLM",
            lambda folder, name=name, own=own: _save(_masked(name, own), folder),  # type: ignore[misc]
            texts=True,
        )
        for name, own in _MASKED.items()
    },
    **{
        f"{name} LM": Kind(
            TITLES[name],
            "AutoModelForCausalLM" if name in tiny.CAUSAL else "AutoModelForSeq2SeqLM",
            lambda folder, name=name: _save(tiny.language_model(name), folder),  # type: ignore[misc]
            texts=True,
        )
        for name in (*tiny.CAUSAL, *tiny.SEQ2SEQ)
    },
}
KINDS = CLASSIFIERS | LANGUAGE_MODELS
CELLS = [(row, column) for column in KINDS for row in (*METHODS, *STRATEGIES)]
# Every method everywhere, every strategy on each third kind and on each kind every third; and what says no.
SOME_CELLS = [
    cell
    for place, cell in enumerate(CELLS)
    if cell[0] in METHODS or cell in REFUSED or sum(divmod(place, len(METHODS) + len(STRATEGIES))) % 3 == 0
]


@functools.cache
def column(name: str, home: Path) -> tuple[hf.PreTrainedModel, Base]:
    """A model as loaded, for copies of it, and what manifests say of it."""
    kind, folder = KINDS[name], home / name.replace(" ", "-")
    if not folder.is_dir():
        kind.save(folder)
    loaded = models.load(str(folder), kind.auto_class)
    loaded.model._hybridtune_new = loaded.new
    tiny.shake((loaded.model.get_parameter(new) for new in loaded.new), by=0.5)  # logits large enough to differ
    fingerprint = models.fingerprint(loaded.model, loaded.new)
    return loaded.model, Base(str(folder), None, fingerprint, kind.auto_class, {})


# --- rows: what is put on them


def strategy(row: str) -> Strategy:
    """A built-in strategy with turns so short that they are taken; or a method where it fits, and the head."""
    if row in METHODS:
        rules = [
            {"part": PLACES.get(row, "layers"), "method": row, **OPTIONS.get(row, {})},
            {"part": "head", "method": "full"},
        ]
        return Strategy(name=row, stages=[Stage.model_validate({"rules": rules})])
    asked = load_strategy(row.removeprefix("strategy "))
    for stage in asked.stages:  # as long as any other
        stage.num_train_epochs = stage.max_steps = None
    for rule in (rule for stage in asked.stages for rule in stage.rules):
        if rule.active is not None and rule.active.every >= 1:
            rule.active.every = 1
    return asked


# --- one cell


@dataclass
class Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at every stage: what moved, what had a gradient, and what the loss was."""

    trainer: Any = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    def _values(self) -> dict[str, torch.Tensor]:
        parameters = {**dict(self.trainer.model.named_parameters()), **self.trainer.assembly._parameters}
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before, self.graded = self._values(), set[str]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for name in self.trainer.composition.names:
            gradient = self.trainer.assembly.parameter(name).grad
            if gradient is not None and gradient.abs().max() > SEEN:
                self.graded.add(name)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after, named = self._values(), self.trainer.composition.names
        assert after.keys() == self.before.keys()
        same = {id(self.trainer.assembly.parameter(name)) for name in named}
        aliases = {name for name, p in self.trainer.model.named_parameters() if id(p) in same}  # inside PEFT's layers
        self.stages.append(
            {
                "named": set(named),
                "known": set(named) | aliases,
                "groups": [set(group.names) for group in self.trainer.composition.groups],
                "graded": self.graded,
                "moved": {name for name, value in after.items() if not torch.equal(value, self.before[name])},
                "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
            }
        )


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads on the right; labels that are tokens too."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    tokens = isinstance(rows[0]["labels"], list)
    labels = padded("labels", -100) if tokens else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0), "labels": labels}


def rows(texts: bool) -> list[dict[str, Any]]:
    """Twelve rows; the labels of a language model are its own tokens."""
    made = tiny.rows(4 * STEPS)
    return [row | {"labels": row["input_ids"]} for row in made] if texts else made


def logits(model: torch.nn.Module, texts: bool) -> torch.Tensor:
    """For `tiny.batch()`; a decoder is given the text too."""
    batch = tiny.batch()
    more = {"decoder_input_ids": batch["input_ids"]} if texts and model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**batch, **more).logits
    return result


def attempt(row: str, name: str, home: Path, folder: Path) -> str:
    """Trains one pair and checks all that it promises.

    Args:
        row: a method or a strategy.
        name: of the column.
        home: where the columns' models are kept.
        folder: what the training writes.

    Returns:
        "yes", or "no: " and the reason that was given before anything was trained.

    Raises:
        AssertionError: a promise was not kept.
    """
    pretrained, base = column(name, home)
    texts = KINDS[name].texts
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    watch = Watch()
    try:
        watch.trainer = HybridTrainer(
            copy.deepcopy(pretrained),
            arguments,
            collate,
            rows(texts),
            strategy=strategy(row),
            base=base,
            callbacks=[watch],
        )
    except (MethodError, PartError) as error:
        return "no: " + re.sub(r"^strategy .+?, stage \d+ \(.+?\): ", "", error.problem)
    watch.trainer.remove_callback(hf.trainer_callback.PrinterCallback)
    watch.trainer.train()
    _check_training(watch)
    _check_checkpoint(watch.trainer, texts, {name for name, _ in pretrained.named_parameters()})
    return "yes"


def _check_training(watch: Watch) -> None:
    assert len(watch.stages) == len(watch.trainer.strategy.stages)
    for stage in watch.stages:
        assert len(stage["losses"]) == STEPS and all(map(math.isfinite, stage["losses"])), stage["losses"]
        assert stage["moved"] <= stage["known"], f"not named: {stage['moved'] - stage['known']}"
        assert stage["graded"] <= stage["moved"], f"did not move: {stage['graded'] - stage['moved']}"
        assert all(group & stage["moved"] for group in stage["groups"])


def _check_checkpoint(trainer: HybridTrainer, texts: bool, names: set[str]) -> None:
    """What was written gives the same logits to the last bit; merged, nearly the same, in the parameters of before."""
    trained = logits(trainer.model, texts)
    loaded, again, _ = checkpoint.load(trainer.stage_folders[-1])
    # A copy, as the trained model is one: the last bit of a product depends on where in memory its factors begin.
    difference = float((logits(copy.deepcopy(loaded.model), texts) - trained).abs().max())
    assert difference == 0.0, f"loaded again: logits differ by {difference}"
    if again.unmergeable():
        return
    again.merge()
    assert {name for name, _ in loaded.model.named_parameters()} == names
    difference = float((logits(loaded.model, texts) - trained).abs().max()) / max(1.0, float(trained.abs().max()))
    assert difference <= 1e-5, f"merged: logits differ by {difference}"


# --- the page


def expected(row: str, name: str, result: str) -> bool:
    """Whether a result is the one that `REFUSED` says."""
    reason = REFUSED.get((row, name))
    return result == "yes" if reason is None else bool(re.match(rf"no: .*{reason}", result))


PAGE_TEXT = """# What works where

This file is generated by `make support`, and the tests hold it to be true.

Every pair below was put on a tiny random model of that architecture and trained for three steps a stage. `yes`: the
loss is a number, exactly the tensors that the rules name have changed, a checkpoint gives the same logits to the last
bit, and what can be merged gives them merged too (within 1e-5 of the largest). `no`: it is refused before anything is
trained, for the reason of that number.

{works} of {pairs} pairs work; the other {refused} are refused.

## Methods on classifiers

Each on all layers (`prompt`: on the embeddings), with the head in full. EncoderDecoder is `EncoderDecoderModel` of two
BERTs, and no classifier.

{methods}

## Methods on language models

BERT and RoBERTa with masked tokens, T5, BART and Marian with encoder and decoder, the others causal.

{language}

## Strategies on classifiers

{strategies}

## Strategies on language models

Translation, summarization, written answers and instruction data are tuned on these, and on EncoderDecoder.

{texts}

## Reasons

{reasons}
"""


def page(results: Mapping[tuple[str, str], str]) -> str:
    """The whole of docs/support.md."""
    reasons = list(dict.fromkeys(result.removeprefix("no: ") for result in results.values() if result != "yes"))
    works = sum(result == "yes" for result in results.values())
    return PAGE_TEXT.format(
        works=works,
        pairs=len(results),
        refused=len(results) - works,
        methods=_table(METHODS, CLASSIFIERS, results, reasons),
        language=_table(METHODS, LANGUAGE_MODELS, results, reasons),
        strategies=_table(STRATEGIES, CLASSIFIERS, results, reasons),
        texts=_table(STRATEGIES, LANGUAGE_MODELS, results, reasons),
        reasons="\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
    )


def _table(
    names: Iterable[str], kinds: Mapping[str, Kind], results: Mapping[tuple[str, str], str], reasons: list[str]
) -> str:
    def cell(row: str, name: str) -> str:
        result = results[row, name]
        return "yes" if result == "yes" else f"no ({reasons.index(result.removeprefix('no: ')) + 1})"

    lines = [["", *(kind.title for kind in kinds.values())], ["---"] * (len(kinds) + 1)]
    lines += [[row.removeprefix("strategy "), *(cell(row, name) for name in kinds)] for row in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(text: str) -> dict[tuple[str, str], str]:
    """The results that a page tells."""
    reasons = re.findall(r"^\d+\. (.*)$", text, re.M)
    tables = itertools.product(("", "strategy "), (CLASSIFIERS, LANGUAGE_MODELS))
    found = {}
    for (prefix, kinds), lines in zip(tables, re.findall(r"(?:^\|.*\|\n)+", text, re.M), strict=True):
        for line in lines.splitlines()[2:]:
            row, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            for name, cell in zip(kinds, cells, strict=True):
                found[prefix + row, name] = cell if cell == "yes" else f"no: {reasons[int(cell[4:-1]) - 1]}"
    return found


def main() -> int:
    """Tries every pair and writes the page; gives 1 where something is not as expected."""
    parser = argparse.ArgumentParser(description="Trains every method and strategy everywhere, writes docs/support.md.")
    parser.add_argument("--output", type=Path, default=PAGE)
    output, results, wrong = parser.parse_args().output, {}, []
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.utils.logging.disable_progress_bar()
    gc.freeze()  # Accelerate collects garbage before every training
    with tempfile.TemporaryDirectory() as home:
        for number, (row, name) in enumerate(CELLS):
            try:
                results[row, name] = attempt(row, name, Path(home, "models"), Path(home, str(number)))
            except Exception as error:
                results[row, name] = f"no: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if not expected(row, name, results[row, name]):
                wrong.append(f"{row} on {name}: {results[row, name]}")
                print(wrong[-1], file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} pairs are not as expected; {output} stays as it is", file=sys.stderr)
        return 1
    output.write_text(page(results), encoding="utf-8")
    print(f"{output}: {sum(r == 'yes' for r in results.values())} of {len(results)} pairs work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
