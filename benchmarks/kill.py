"""Kills tunings with SIGKILL, resumes them, and compares what comes out with a tuning that was left alone.

    python benchmarks/kill.py                       # 30 moments; what stands in results/kill.jsonl is skipped
    python benchmarks/kill.py --only "before the rename of a checkpoint" --results /tmp/kill.jsonl

Three tunings of a tiny BERT, dropout on, `save_steps: 7`: three stages of which the last merges LoRA into the weights;
three stages of which the last drops an adapter; a race of two strategies. Each is killed at a random time or at an
event, some twice, and resumed. Then all weights and all logged losses have to be those of the undisturbed run to the
last bit, at most `save_steps` steps may have been made twice, files of finished stages must be untouched, and nothing
half written may be left.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Record

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from transformers import TrainerState

from hybridtune import api, checkpoint
from hybridtune.console import Console
from hybridtune.stage import LOG, StageLog

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

RECORD = Record("kill")
SAVE_STEPS = 7
HEAD = {"part": "head", "method": "full"}
TOP = {"part": "layers[-1:]", "method": "full", "learning_rate": 1e-4}
PROBE = {"name": "probe", "rules": [HEAD], "num_train_epochs": 2}
MERGE = [
    PROBE,
    {"name": "mix", "rules": [{"part": "layers.attention", "method": "lora", "r": 4}, TOP], "num_train_epochs": 3},
    {"name": "full", "previous": "merge", "rules": [TOP, HEAD], "num_train_epochs": 2},
]
ADAPTER = {"part": "layers", "method": "adapter", "bottleneck": 4}
DROP = [
    PROBE,
    {"name": "mix", "rules": [ADAPTER, {"part": "layers[0:2].attention", "method": "lora"}], "num_train_epochs": 3},
    {"name": "full", "previous": "drop", "rules": [TOP, HEAD], "num_train_epochs": 2},
]
TUNINGS: dict[str, Any] = {
    "merge": MERGE,
    "drop": DROP,
    "race": [{"name": "one", "stages": MERGE[:2]}, {"name": "two", "stages": DROP[:2]}],
}
CHECKPOINT = r"checkpoint-\d+"


@dataclass(frozen=True)
class Kill:
    """When a process dies: at a share of the undisturbed run's time, or at the nth time that something happens.

    Attributes:
        share: of the time that the stages took, counted from when the first log is there.
        what: "replace" (a rename to a name), "write" (half of a file is written), "remove" (a folder, one file of it
            gone) or the path of a function.
        name: pattern of the file's or folder's name.
        nth: which time.
        after: whether it has been done, or is about to be.
    """

    share: float = 0.0
    what: str = ""
    name: str = ""
    nth: int = 1
    after: bool = False


@dataclass(frozen=True)
class Moment:
    """A tuning and the kills that it has to survive."""

    name: str
    tuning: str
    kills: tuple[Kill, ...]


def moments() -> list[Moment]:
    """All 30."""
    chance = random.Random(7)
    tunings = ["merge", "drop", "merge", "drop", "race"] * 2 + ["merge", "race"]
    found = []
    for number, tuning in enumerate(tunings, 1):
        kills = [Kill(share=round(chance.uniform(0.05, 1.1), 3)) for _ in range(2 if number % 4 == 0 else 1)]
        found.append(Moment(f"random time {number}{', twice' if len(kills) > 1 else ''}", tuning, tuple(kills)))
    replace = "replace"
    events: list[tuple[str, str, *tuple[Kill, ...]]] = [
        ("before the rename of a checkpoint", "merge", Kill(what=replace, name=CHECKPOINT, nth=5)),
        ("after the rename of a checkpoint", "drop", Kill(what=replace, name=CHECKPOINT, nth=6, after=True)),
        ("an epoch's last checkpoint, twice", "merge", *[Kill(what=replace, name=CHECKPOINT, nth=2)] * 2),
        ("half of the optimizer's state", "drop", Kill(what="write", name=r"optimizer\.pt", nth=7)),
        ("half of a checkpoint's weights", "merge", Kill(what="write", name=r"\.delta\.safetensors\.tmp", nth=4)),
        ("half of the trainer's state", "merge", Kill(what="write", name=r"trainer_state\.json", nth=13)),
        ("while an old checkpoint is removed", "drop", Kill(what="remove", name=rf"\.{CHECKPOINT}\.tmp", nth=6)),
        ("half a line of the log", "race", Kill(what="write", name=r"log\.jsonl", nth=31)),
        ("between the first and the second stage", "merge", Kill(what="hybridtune.train.HybridTrainer._begin", nth=2)),
        ("between the second and the third stage", "drop", Kill(what="hybridtune.train.HybridTrainer._begin", nth=3)),
        ("after a stage's weights, before its metrics", "drop", Kill(what=replace, name=r"metrics\.json", nth=2)),
        ("after a stage's metrics", "merge", Kill(what=replace, name=r"metrics\.json", nth=2, after=True)),
        ("during an evaluation", "drop", Kill(what="hybridtune.train.HybridTrainer.prediction_step", nth=4)),
        ("the last stage's last evaluation", "merge", Kill(what="hybridtune.train.HybridTrainer.evaluate", nth=7)),
        ("between two strategies of a race", "race", Kill(what=replace, name=r"trial\.json", after=True)),
        ("the second strategy's second stage", "race", Kill(what="hybridtune.train.HybridTrainer.evaluate", nth=8)),
        ("before the model is handed over", "drop", Kill(what=replace, name="model")),
        (
            "around the stages' hand-over, twice",
            "race",
            Kill(what="hybridtune.folder.hand_over_stages", after=True),
            Kill(what="hybridtune.folder.hand_over_stages"),
        ),
    ]
    return found + [Moment(name, tuning, tuple(kills)) for name, tuning, *kills in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RECORD.file)
    parser.add_argument("--only", nargs="+", help="names of moments")
    asked = parser.parse_args()
    wanted = [moment for moment in moments() if not asked.only or moment.name in asked.only]
    record = Record(asked.results)
    there = {row["moment"]: row for row in record.rows()}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        for moment in wanted:
            if moment.name not in there:
                there[moment.name] = row = bench.survives(moment)
                record.add(row)
                print(json.dumps(row), flush=True)
    survived = sum(not there[moment.name]["wrong"] for moment in wanted)
    print(f"{survived} of {len(wanted)}")
    sys.exit(survived < len(wanted))


class Bench:
    """Runs tunings in forks of this process, which has everything imported and has computed nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.undisturbed: dict[str, tuple[Path, float]] = {}
        self._wait(self._fork(lambda: tiny.save_body(folder / "base")))

    def survives(self, moment: Moment) -> dict[str, Any]:
        """Kills and resumes one tuning; says what is wrong with the result."""
        whole, seconds = self._whole(moment.tuning)
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        wrong, repeated, died, before = [], [], [], dict[str, Any]()
        for kill in (*moment.kills, None):
            self._attempt(moment.tuning, run, kill, seconds)
            now = state_of(run)
            repeated.append(sum(len(set(old["log"]) - set(now[name]["log"])) for name, old in before.items()))
            wrong += [
                f"{name}: {file} of a finished stage was touched"
                for name, old in before.items()
                for file in old["files"]
                if old["finished"] and old["files"][file] != now[name]["files"].get(file)
            ]
            if kill is not None:
                wrong += [f"{c} is not whole" for c in run.rglob("checkpoint-*") if not is_whole(c)]
                going = [f"{name} step {len(s['log'])}" for name, s in now.items() if not s["finished"]]
                died.append(going[-1] if going else "between or after stages")
            before = now
        wrong += [f"{count} steps were made twice" for count in repeated if count > SAVE_STEPS]
        wrong += [f"{path.name} was left" for path in run.rglob("*") if path.name.startswith((".", "checkpoint-"))]
        wrong += [f"{name} differs" for name in differences(whole, run)]
        return {"moment": moment.name, "tuning": moment.tuning, "died": died, "repeated": repeated[1:], "wrong": wrong}

    def _whole(self, tuning: str) -> tuple[Path, float]:
        if tuning not in self.undisturbed:
            run = self.folder / f"undisturbed-{tuning}"
            self._attempt(tuning, run, None, 0.0)
            trained = [json.loads((stage / "metrics.json").read_text())["seconds"] for stage in stages_of(run).values()]
            self.undisturbed[tuning] = run, sum(trained)
        return self.undisturbed[tuning]

    def _attempt(self, tuning: str, run: Path, kill: Kill | None, seconds: float) -> None:
        """Begins or resumes a tuning; dies where it is told to."""

        def work() -> None:
            if kill is not None and kill.what:
                arm(kill)
            tune(self.folder / "base", tuning, run, resume=(run / "asked.json").is_file())

        share = kill.share if kill is not None else 0.0
        before = self.folder / "before"
        shutil.rmtree(before, ignore_errors=True)
        if run.exists():
            shutil.copytree(run, before)
        while True:
            process = self._fork(work)
            if share:
                while not any(run.glob("trials/*/stages/*/log.jsonl")) and not self._is_over(process):
                    time.sleep(0.01)
                time.sleep(share * seconds)
                os.kill(process, signal.SIGKILL)
            killed = self._wait(process)
            if killed == (kill is not None):
                return
            assert share, f"it was not killed: {kill}"
            share *= 0.7  # this time it was through before
            shutil.rmtree(run)
            if before.exists():
                shutil.copytree(before, run)

    def _fork(self, work: Callable[[], Any]) -> int:
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    @staticmethod
    def _is_over(process: int) -> bool:
        """Whether a process has ended and waits to be asked how."""
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _wait(self, process: int) -> bool:
        """Whether it was killed."""
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a tuning failed"
        return os.WIFSIGNALED(status)


def tune(base: Path, tuning: str, run: Path, resume: bool) -> None:
    """One tuning of the tiny model."""
    api.tune(
        model=str(base),
        task="classification",
        **{
            name: rows(count, seed)
            for seed, (name, count) in enumerate({"train": 150, "validation": 30, "test": 24}.items())
        },
        strategy=TUNINGS[tuning],
        save_steps=SAVE_STEPS,
        logging_steps=1,
        seed=3,
        device="cpu",
        baselines=False,
        output=str(run),
        resume=resume,
        console=Console(quiet=True),
    )


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Texts of single letters of different lengths, each with the word that gives its label away."""
    chance, found = random.Random(seed), []
    for number in range(count):
        words = chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(4, 20))
        words.insert(chance.randint(0, len(words)), ("good", "bad", "new")[number % 3])
        found.append({"text": " ".join(words), "label": ("praise", "blame", "news")[number % 3]})
    return found


def die() -> None:
    """At once, without a chance to tidy up."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill) -> None:
    """Has this process die at an event."""
    times = iter(range(1, 1_000_000))

    def due(path: Any) -> bool:
        return bool(re.fullmatch(kill.name, Path(path).name)) and next(times) == kill.nth

    if kill.what == "replace":
        replace = os.replace

        def replaced(source: Any, target: Any) -> None:
            now = due(target)
            if now and not kill.after:
                die()
            replace(source, target)
            if now:
                die()

        os.replace = replaced
    elif kill.what == "write":
        arm_writes(due)
    elif kill.what == "remove":
        rmtree = shutil.rmtree

        def removed(path: Any, *args: Any, **keys: Any) -> None:
            if Path(path).is_dir() and due(path):
                next(file for file in Path(path).rglob("*.safetensors")).unlink()
                die()
            rmtree(path, *args, **keys)

        shutil.rmtree = removed
    else:
        module, _, name = kill.what.rpartition(".")
        try:
            holder: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            parent, _, klass = module.rpartition(".")
            holder = getattr(importlib.import_module(parent), klass)
        function = getattr(holder, name)

        def called(*args: Any, **keys: Any) -> Any:
            now = next(times) == kill.nth
            if now and not kill.after:
                die()
            result = function(*args, **keys)
            if now:
                die()
            return result

        setattr(holder, name, called)


def arm_writes(due: Callable[[Any], bool]) -> None:
    """Has this process die when half of a file is written, whatever writes it."""

    def cut(path: Any) -> None:
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    write_weights, write_state = checkpoint.save_file, torch.save

    def save_file(tensors: Any, path: str, **keys: Any) -> None:
        write_weights(tensors, path, **keys)
        if due(path):
            cut(path)

    def save(value: Any, path: Any, *args: Any, **keys: Any) -> None:
        write_state(value, path, *args, **keys)
        if due(path):
            cut(path)

    to_json, on_log = TrainerState.save_to_json, StageLog.on_log

    def save_to_json(self: Any, path: str) -> None:
        to_json(self, path)
        if due(path):
            cut(path)

    def log(self: Any, *args: Any, logs: Any = None, **keys: Any) -> None:
        on_log(self, *args, logs=logs, **keys)
        if "loss" in (logs or {}) and due(LOG):
            os.truncate(self.folder / LOG, os.path.getsize(self.folder / LOG) - 20)
            die()

    checkpoint.save_file, torch.save = save_file, save
    TrainerState.save_to_json, StageLog.on_log = save_to_json, log


def stages_of(run: Path) -> dict[str, Path]:
    """The stages' folders by trial and stage, wherever they are."""
    found = {f"{path.parts[-3]}/{path.name}": path for path in run.glob("trials/*/stages/*")}
    handed_over = list(run.glob("stages/*"))
    if handed_over:
        chosen = json.loads((run / "decision.json").read_text())["chosen"]
        found |= {f"{chosen}/{path.name}": path for path in handed_over}
    return found


def state_of(run: Path) -> dict[str, Any]:
    """Log lines, and bytes and times of the files, of every stage."""
    state = {}
    for name, folder in sorted(stages_of(run).items()):
        files = {
            path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.iterdir()
            if path.is_file()
        }
        log = folder / "log.jsonl"
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []
        state[name] = {"log": lines, "files": files, "finished": "metrics.json" in files}
    return state


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files; what lies in a folder with a dot need not."""
    return folder.parent.name.startswith(".") or {path.name for path in folder.iterdir()} == tiny.CHECKPOINT_FILES


def differences(whole: Path, run: Path) -> list[str]:
    """Which weights, losses or scores are not those of the undisturbed run to the last bit."""
    wrong, ours, theirs = [], stages_of(run), stages_of(whole)
    if set(ours) != set(theirs):
        return ["list of stages"]
    for name, folder in theirs.items():
        if (folder / "delta.safetensors").read_bytes() != (ours[name] / "delta.safetensors").read_bytes():
            wrong.append(f"{name}: delta.safetensors")
        if losses(folder) != losses(ours[name]):
            wrong.append(f"{name}: log.jsonl")
        if told(folder / "metrics.json") != told(ours[name] / "metrics.json"):
            wrong.append(f"{name}: metrics.json")
    weights = {path.name for path in (whole / "model").glob("*.safetensors")}
    for name in weights | {path.name for path in (run / "model").glob("*.safetensors")}:
        if (whole / "model" / name).read_bytes() != (run / "model" / name).read_bytes():
            wrong.append(f"model/{name}")
    if (whole / "predictions.jsonl").read_bytes() != (run / "predictions.jsonl").read_bytes():
        wrong.append("predictions.jsonl")
    return wrong


def losses(stage: Path) -> list[dict[str, Any]]:
    """A stage's log without times."""
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def told(metrics: Path) -> dict[str, Any]:
    """A stage's metrics without times."""
    return {key: value for key, value in json.loads(metrics.read_text()).items() if key != "seconds"}


if __name__ == "__main__":
    main()
