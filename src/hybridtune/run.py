"""A finished tuning: its model, its predictions, its numbers, and what can be done with it afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from . import evaluate, export, predict
from .answer import Watch
from .data.reading import read
from .data.reading.sources import same_files
from .errors import HybridtuneError, RecipeError, RunError, first_line, unknown
from .files import read_json
from .own_metrics import OwnMetrics
from .recipe_file import read_recipe


@dataclass
class Run:
    """A finished tuning.

    Attributes:
        folder: where it is.
        device: where its model is put.
        bf16: whether it computes under autocast to bf16.
    """

    folder: Path
    device: str = "auto"
    bf16: bool = False

    def __post_init__(self) -> None:
        _ = self.predictor  # a folder that is no run is refused at once

    @cached_property
    def predictor(self) -> predict.Predictor:
        """The tuned model with its tokenizer and task."""
        return predict.load(self.folder, self.device, self.bf16)

    @property
    def model(self) -> torch.nn.Module:
        """The tuned model."""
        model: torch.nn.Module = self.predictor.model
        return model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.predictor.tokenizer

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json."""
        return evaluate.read_evaluation(self.folder)

    @property
    def decision(self) -> dict[str, Any]:
        """decision.json."""
        return dict(read_json(self.folder / "decision.json"))

    def predict(
        self,
        rows: Iterable[Any],
        columns: dict[str, str] | None = None,
        warn: Callable[[str], Any] = warnings.warn,
        source: str = "the rows",
    ) -> list[dict[str, Any]]:
        """Predicts rows: dicts of the task's columns, or bare strings where one text is all.

        Args:
            rows: a list of them, a `datasets.Dataset` or a pandas frame.
            columns: what the columns are called, where they are not called as in training: {"text": "message"}.
            warn: is told of rows without any text, for which a prediction means nothing.
            source: what the rows are called in messages.
        """
        return self.predictor.predict(rows, columns, warn, source)

    def evaluate(self, data: Any = None, columns: dict[str, str] | None = None) -> dict[str, Any]:
        """Scores the model on labelled rows, checked and repaired as test rows are when tuning.

        Args:
            data: anything that `data: {test: ...}` may be; without it, the run's own evaluation is given.
            columns: what the rows' columns are called, where they are not called as in training.

        Returns:
            The rows' number and columns, the metrics with their intervals (those of the user's own among them), where
            the model is wrong, what the check has found, and warnings; the keys that evaluation.json has too are the
            same.

        Raises:
            DataError: the rows cannot be read, or have a label that the model does not know.
            RecipeError: the file of the user's own metrics is not there any more, or bf16 is asked for without rows.
        """
        if data is None:
            return _own_scores(self.folder, self.bf16)
        task, source, notes = self.predictor.task, read.describe(data), read.Notes(may_skip=False)
        recipe = _recipe(self.folder)
        own = OwnMetrics.load(recipe.get("metrics"), task)
        table = task.unpack(read.read(data, "test", notes=notes))
        hints = {**{name: its for name, its in task.hints.items() if its in table.column_names}, **(columns or {})}
        required, _ = task.asked([*table.column_names, *hints], labelled=True)
        found = read.find_columns(table, "test", source, task.columns, hints, required, False, task.instead)
        rows = task.gather(read.rename_columns(table, found, task.columns))
        read.say_empty(rows, (*task.required, task.target), table, notes)
        if seen := same_files((recipe.get("data") or {}).get("train"), data):
            notes.warn(f"the model was tuned on rows of {', '.join(seen)}: these scores say nothing of new rows")
        rows, findings = task.recheck(rows, source)
        scores = evaluate.score(self.predictor, rows, own)
        kept, missed = evaluate.verdicts(task, scores.metrics)
        doubts = [*evaluate.doubts_of(scores.metrics), *task.looks(scores.stats)]
        return {
            "model": str(self.folder),
            "data": source,
            "columns": found,
            "rows": len(rows),
            "metrics": scores.metrics,
            **task.errors(scores.stats, rows, scores.predictions),
            "findings": [finding.as_dict() for finding in findings],
            "notes": kept,
            "warnings": [*notes.warnings, *missed, *doubts],
        }

    def export(self, output: str | Path, kind: str | None = None) -> dict[str, Any]:
        """Writes the model into a new folder, as `export_run` does."""
        return export_run(self.folder, Path(output), kind)

    def say(self, row: Any, prediction: dict[str, Any]) -> str:
        """A row and its prediction in one line for a person."""
        values = [row] if isinstance(row, str) else [value for key, value in row.items() if key != "_row"]
        words = (" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)
        shown = " ".join(" | ".join(words).split())
        return f"{self.predictor.task.say(prediction)}  {shown[:100]}"

    def push_to_hub(self, name: str | None = None, private: bool | None = None, token: str | None = None) -> None:
        """Uploads `model/` to the hub.

        Args:
            name: repository; the run folder's name where not given.
            private: whether a new repository is private.
            token: of the hub; the stored one where not given.

        Raises:
            HybridtuneError: the hub cannot be reached, or does not take it.
        """
        import huggingface_hub

        name = name or self.folder.resolve().name
        model = self.folder / "model" if (self.folder / "model").is_dir() else self.folder
        hub = huggingface_hub.HfApi(token=token)
        try:
            repository = hub.create_repo(name, private=private, exist_ok=True).repo_id
            hub.upload_folder(repo_id=repository, folder_path=str(model), commit_message="Tuned model")
        except Exception as error:  # whatever the hub, its client or the network may raise
            raise HybridtuneError(
                f"hub: {model} was not uploaded to {name}",
                found=first_line(error),
                mend=f'the run is finished; try again with hybridtune.load("{self.folder}").push_to_hub("{name}")',
            ) from error


def evaluate_run(
    folder: Path,
    data: Any,
    device: str = "auto",
    columns: dict[str, str] | None = None,
    watch: Watch | None = None,
    bf16: bool = False,
) -> dict[str, Any]:
    """As `Run.evaluate`; the model is loaded only where there are rows. `watch` is told how many are done.

    Raises:
        RunError: the run is not finished.
        RecipeError: bf16 is asked for, and there are no rows, or the device has none.
    """
    if data is None:
        return _own_scores(folder, bf16)
    run = Run(folder, device, bf16)
    run.predictor.watch = watch
    return run.evaluate(data, columns)


def _own_scores(folder: Path, bf16: bool) -> dict[str, Any]:
    if bf16:
        raise RecipeError(
            "evaluate: bf16 without rows",
            expected="rows to score",
            mend="leave bf16 away for the run's own scores, which are in fp32",
        )
    return evaluate.read_evaluation(folder)


def _recipe(folder: Path) -> dict[str, Any]:
    """What a run was asked for, of which its `model/` may be given too; nothing, of a model that was handed over."""
    homes = [folder, *([folder.parent] if folder.name == "model" else [])]
    recipe = next((home / "recipe.yaml" for home in homes if (home / "recipe.yaml").is_file()), None)
    return read_recipe(recipe) if recipe else {}


def export_run(folder: Path, output: Path, kind: str | None = None) -> dict[str, Any]:
    """Writes a run's model into a new folder.

    Returns:
        The kind, the snippet that loads it, and by how much its answers differ from the tuned model's.

    Raises:
        RunError: the run is not finished, the folder exists, or the model cannot be handed over so.
    """
    if kind not in (None, *export.KINDS):
        raise RunError(f"kind: {unknown('kind', str(kind), export.KINDS)}", expected=", ".join(export.KINDS))
    if output.exists():
        raise RunError(f"output: {output} exists", mend="choose another output")
    evaluate.read_evaluation(folder)
    stage, (task, _, _) = export.last_stage(folder), predict.read_about(folder / "model")
    written, snippet = export.write(output, stage, kind, task)  # type: ignore[arg-type]
    texts = [
        dict.fromkeys(task.inputs, text)
        for text in ("one short text", "and another one, which is a little longer than the first")
    ]
    return {
        "kind": written,
        "output": str(output),
        "load": snippet.replace("FOLDER", str(output)),
        "difference": export.difference(stage, output, texts),
    }


def with_inputs(rows: Dataset | list[Any], predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predictions, each with what its row came with under `input`; of rows of a file with `row` too, their place."""
    if not isinstance(rows, Dataset):
        return [{"input": row, **prediction} for row, prediction in zip(rows, predictions, strict=True)]
    made = []
    for row, prediction in zip(rows, predictions, strict=True):
        number = row.pop(read.ROW)
        made.append({"row": number, "input": row, **prediction})
    return made


def rows_for_prediction(path: Path, warn: Callable[[str], Any] = warnings.warn) -> Dataset:
    """Rows of a file, for `Run.predict`; `warn` is told what had to be guessed."""
    notes = read.Notes(may_skip=False)
    rows = read.read(path, "input", notes=notes)
    for text in notes.warnings:
        warn(text)
    return rows
