"""What the console shows of a training and of its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import console as consoles
from .console import Console


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows a stage's steps as a bar, and its evaluations as lines."""

    def __init__(self, console: Console) -> None:
        self.console, self.training, self.stage = console, False, ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True
        self.stage = Path(args.output_dir).name.partition("-")[2]
        self.console.begin(self.stage, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.console.advance(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = metrics or {}
        if state.is_world_process_zero and self.training:
            shown = dict.fromkeys((str(args.metric_for_best_model), "loss"))
            values = "  ".join(f"{key} {consoles.number(metrics.get('eval_' + key, float('nan')), 4)}" for key in shown)
            self.console.line(f"    {self.stage}  epoch {state.epoch:g}  {values}", "dim")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        self.console.finish()


def say_scores(evaluation: dict[str, Any], metric: str, console: Console) -> None:
    """The table of test scores: every candidate, the chosen one stressed, then the baselines."""

    def scores(metrics: dict[str, Any]) -> tuple[str, str]:
        accuracy = f"{metrics['accuracy']['value']:.3f}" if "accuracy" in metrics else ""
        return consoles.interval(metrics[metric]) if metric in metrics else "-", accuracy

    candidates = evaluation["candidates"]
    rows = [
        (
            ("> " if candidate["chosen"] else "  ") + candidate["strategy"],
            *scores(candidate["metrics"]),
            consoles.count(candidate["trainable"]),
            f"{candidate['seconds']:.1f}",
            consoles.memory(candidate["peak_bytes"]),
        )
        for candidate in candidates
    ]
    rows += [
        ("  " + baseline["name"], *scores(baseline["metrics"]), "-", "-", "-") for baseline in evaluation["baselines"]
    ]
    accuracy = "accuracy" if "accuracy" in evaluation["metrics"] else ""
    chosen = next(number for number, candidate in enumerate(candidates) if candidate["chosen"])
    console.table(("", f"test {metric} (95%)", accuracy, "trained", "seconds", "memory"), rows, bold=chosen)
    say_numbers(evaluation, console)
    for note in evaluation["notes"]:
        console.line(f"  {note}")
    for warning in evaluation["warnings"]:
        console.warn(warning)


def say_numbers(evaluation: dict[str, Any], console: Console) -> None:
    """Where rows have several numbers, the scores of each."""
    if each := evaluation.get("per_number"):
        rows = [
            [str(one["number"]), *(f"{value:.4g}" for key, value in one.items() if key != "number")] for one in each
        ]
        console.table(list(each[0]), rows)


def say_result(run: Path, evaluation: dict[str, Any], inputs: Sequence[str], console: Console) -> None:
    """Where the model and the report are, and what to try."""
    console.line(f"\n  model   {run / 'model'} ({evaluation['model_kind']})")
    console.line(f"  report  {run / 'report.html'}")
    # A row of several columns is no text that could be typed.
    rows = '"..."' if len(inputs) == 1 else f"--input rows.jsonl   (with the columns {', '.join(inputs)})"
    console.line(f"  try     hybridtune predict {run} {rows}")
