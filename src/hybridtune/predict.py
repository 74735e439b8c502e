"""Runs a tuned model over rows: sorted by length, results back in the rows' order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import answer, checkpoint, tasks
from . import model as models
from .checkpoint import ABOUT, Base
from .data.checking.rows import place, row_numbers
from .data.reading import read as reading
from .engine import precision
from .errors import DataError, RunError
from .files import refuse_no_run
from .tasks import Task

SHOWN_ROWS = 10


@dataclass
class Predictor:
    """A tuned model with all that it needs to read rows and to say what they are.

    Attributes:
        model: on its device, in evaluation mode.
        tokenizer: its tokenizer.
        task: knows columns and labels.
        limit: rows are cut after that many tokens.
        batch_size: items at a time.
        watch: is told how many of them are done, of how many.
        bf16: whether it computes under autocast to bf16, as a training in bf16 does; else in the model's own type.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    limit: int
    batch_size: int = answer.BATCH
    watch: answer.Watch | None = None
    bf16: bool = False

    def predict(
        self,
        rows: Iterable[Any] | Dataset | pd.DataFrame,
        columns: dict[str, str] | None = None,
        warn: Callable[[str], Any] = warnings.warn,
        source: str = "the rows",
    ) -> list[dict[str, Any]]:
        """Predicts rows given as dicts of the task's columns, or as bare strings where one text is all.

        Args:
            rows: a list of them, a `datasets.Dataset` or a pandas frame.
            columns: what the columns are called, where they are not called as in training.
            warn: is told of rows without any text, for which a prediction means nothing.
            source: what the rows are called in messages; the file that they were read from.

        Raises:
            DataError: a row lacks a column.
        """
        if isinstance(rows, (str, dict)):
            raise DataError("predict: a single row was given", expected="a list of rows", mend="predict([row])")
        if not isinstance(rows, (Iterable, Dataset, pd.DataFrame)):
            raise DataError("predict: no rows were given", found=repr(rows), expected="a list of rows")
        table = rows if isinstance(rows, (Dataset, pd.DataFrame)) else self._rows_from(list(rows))
        if len(table) == 0:
            return []
        texts = self.texts(table, columns, source)
        inputs = texts.select_columns(list(self.task.inputs))
        numbers = row_numbers(texts).tolist()
        empty = [number for number, *row in zip(numbers, *inputs[:].values(), strict=True) if not any(map(_says, row))]
        if empty:
            listed = _listed(empty, source)
            warn(f"{len(empty)} of {len(texts)} rows are empty, their predictions mean nothing: {listed}")
        items = self.task.encode(texts, self.tokenizer, self.limit)
        lengths = [] if self.task.windowed else items["length"][:]
        cut = [number for number, length in zip(numbers, lengths, strict=False) if length > self.limit]
        if cut:
            of = f"{len(cut)} of {len(texts)} rows"
            warn(f"{of} are longer than {self.limit} tokens and are shortened to that: {_listed(cut, source)}")
        return self.task.decode(self.logits(items), items, texts)

    def _rows_from(self, given: list[Any]) -> list[dict[str, Any]]:
        needed, _ = self.task.asked(self.task.inputs[:1], labelled=False)
        bare = [one for one in given if not isinstance(one, dict)]
        if bare and len(needed) > 1:
            raise DataError(
                f"predict: one value, but a row has {' and '.join(needed)}",
                found=repr(bare[0])[:80],
                expected="rows such as {" + ", ".join(f'"{name}": ...' for name in needed) + "}",
                mend="give such rows; on the command line --input FILE, with these columns",
            )
        return self.task.rows_from(given)

    def logits(self, items: Dataset) -> list[np.ndarray]:
        """The model's answers, an array an item, in their order: logits, or the tokens that it writes."""
        return answer.answers(self.model, self.task, items, self.tokenizer, self.batch_size, self.watch, self.bf16)

    def encode(self, rows: reading.Source, columns: dict[str, str] | None = None) -> Dataset:
        """Token ids of rows that need no labels."""
        return self.task.encode(self.texts(rows, columns), self.tokenizer, self.limit)

    def texts(self, rows: reading.Source, columns: dict[str, str] | None = None, source: str = "the rows") -> Dataset:
        """What the model reads of rows, which need no labels; columns may have any name that training data may have.

        Returns:
            The task's input columns, and `_row`.
        """
        there = isinstance(rows, Dataset) and reading.ROW in rows.column_names
        table = self.task.unpack(rows if there else reading.read(rows, "input"))
        inputs = list(self.task.inputs)
        required, possible = self.task.asked([*table.column_names, *(columns or {})], labelled=False)
        wanted = {name: self.task.columns[name] for name in possible}
        own = {name: column for name, column in self.task.hints.items() if column in table.column_names}
        hints = {name: column for name, column in {**own, **(columns or {})}.items() if name in wanted}
        table = reading.map_columns(table, "input", source, wanted, hints, required, False, self.task.instead)
        table = self.task.gather(table).select_columns([*inputs, reading.ROW])
        for name in inputs:
            for number, value in zip(table[reading.ROW][:], table[name][:], strict=True):
                problem = self.task.problem(name, value)
                if problem:
                    mend = "take the row out, or give it a text" if value is None else None
                    raise DataError(f"{place(source, number)}: {name} {problem}", mend=mend)
        return table

    def to(self, device: torch.device | str) -> Predictor:
        """Moves the model."""
        self.model.to(device)  # type: ignore[arg-type]
        return self


def _listed(numbers: Sequence[int], source: str) -> str:
    """Rows by their numbers."""
    shown = ", ".join(map(str, numbers[1:SHOWN_ROWS])) + (", ..." if len(numbers) > SHOWN_ROWS else "")
    return place(source, numbers[0]).removeprefix("the rows, ") + (", " if len(numbers) > 1 else "") + shown


def _says(value: Any) -> bool:
    """Whether a text has a word, or a list of them, or of turns of a conversation."""
    if isinstance(value, dict):
        return _says(value.get("content"))
    return any(map(_says, value)) if isinstance(value, list) else bool(str(value).strip())


def features(model: PreTrainedModel, items: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> np.ndarray:
    """Mean of the last hidden states over a row's own tokens, float32 [rows, width]."""
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    def pooled(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden: torch.Tensor = body(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        hidden = hidden[:, -mask.shape[1] :]  # in front of it an encoder's output has the places of a soft prompt
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    asked = tasks.for_the_model(items, tokenizer)
    return np.stack(answer.run(model, asked, tokenizer, batch_size, pooled))


def load(folder: Path, device: str = "auto", bf16: bool = False) -> Predictor:
    """Loads what a tuning has made: a run, its `model/` folder, a delta folder, a PEFT folder or a plain checkpoint.

    Raises:
        RecipeError: bf16 is asked for, and the device has none.
        RunError: the folder is none of these, or is damaged.
    """
    refuse_no_run(folder)
    where = models.pick_device(device)
    if bf16:
        precision.refuse_bf16(where)
    home = folder / "model" if (folder / "model" / ABOUT).is_file() else folder
    if not (home / ABOUT).is_file():
        unfinished = (folder / "recipe.yaml").is_file()
        raise RunError(
            f"{folder}: "
            + ("the run is not finished, it has no model/ yet" if unfinished else "is not a run of hybridtune"),
            expected=f"a folder with model/{ABOUT} or {ABOUT} in it",
            mend="finish it with --resume" if unfinished else None,
        )
    task, base, limit = read_about(home, files=True)
    if (home / checkpoint.MANIFEST).is_file():
        model: PreTrainedModel = checkpoint.load(home)[0].model
    elif (home / "adapter_config.json").is_file():
        model = _with_peft(home, base)
    else:
        model = models.load(str(home), task.auto_class, **task.model_config()).model
    tokenizer = models.load_tokenizer(str(home))
    task.prepare(model, tokenizer)
    return Predictor(model, tokenizer, task, limit, bf16=bf16).to(where)


def read_about(home: Path, files: bool = False) -> tuple[Task, Base, int]:
    """What a model that was handed over says of itself: its task, its base, and after how many tokens rows are cut.

    Args:
        home: its folder.
        files: whether its files of tensors are looked at too.

    Raises:
        RunError: a file is missing or damaged.
    """
    told = checkpoint.read_about(home, files)
    try:
        return tasks.from_state(told["task"]), Base(**told["base"]), int(told["max_length"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{home / ABOUT}: is damaged, it does not say what hybridtune writes there",
            found=repr(error),
            mend="copy it again, or write it anew with `hybridtune export`",
        ) from None


def _with_peft(home: Path, base: Base) -> PreTrainedModel:
    """The base that an adapter of PEFT's was trained on, with the adapter on it."""
    from peft import PeftModel

    base = base.beside(home)
    loaded = checkpoint.load_base(base, tokenizer_from=str(home))
    checkpoint.check_fingerprint(loaded, base, home)
    with models.quiet():
        return PeftModel.from_pretrained(loaded.model, str(home))  # type: ignore[return-value]
