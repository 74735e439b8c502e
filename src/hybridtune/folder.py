"""The run folder: who may have it, what is written before training starts, what is removed, what becomes its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from . import model as models
from . import yaml12
from .data.reading import read, sources
from .errors import RunError, UserError
from .files import new_folder, read_json, write_json, write_text
from .recipe import Recipe, Strategy
from .trial import RESULT, Setting, Trial

# All that a tuning writes into its folder, and all that it ever removes from there.
_ASKED, _RESOLVED = "asked.json", "recipe.yaml"
_OWN_FILES = (
    *(_RESOLVED, "environment.json", "data.json", "plan.json", "decision.json", "evaluation.json"),
    *("explanation.json", "predictions.jsonl", "report.html", "rejected.jsonl", _ASKED),
)
_TOKENIZER = "tokenizer"  # where the recipe changes the vocabulary
_OWN_FOLDERS = ("trials", "stages", "model", _TOKENIZER)
# Keys that a resumed run may have changed.
_FREE = {"output", "defaults", "data", "strategy", "push_to_hub", "hub_model_id", "hub_private_repo"}


def claim(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """The run folder. Nothing is written or removed yet.

    Raises:
        RunError: it cannot be written, or holds something that the user has not said what to do with.
    """
    folder = Path(recipe.output).expanduser()
    if resume and overwrite:
        raise RunError("output: --resume and --overwrite exclude each other", mend="give one of them")
    if overwrite and Path(recipe.model).exists() and Path(recipe.model).resolve().is_relative_to(folder.resolve()):
        raise RunError(f"output: {folder} holds the model to start from", mend="choose another output")
    there = _there(folder)
    begun = f".{_ASKED}.tmp"  # a process was killed while it wrote its first file
    if there is not folder or all(path.name == begun for path in folder.iterdir()):
        _try_out(there, folder)
        return folder
    if not (folder / _ASKED).is_file():
        raise RunError(f"output: {folder} holds other files", mend="choose another output, or empty it")
    if not (resume or overwrite):
        raise RunError(
            f"output: {folder} already holds a run", mend="choose another output, or give --resume or --overwrite"
        )
    if resume:
        before, asked = read_json(folder / _ASKED), _asked(recipe)
        changed = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
        if changed:
            raise RunError(
                f"output: the run in {folder} was begun with another recipe",
                found=f"different {', '.join(changed)}",
                mend="resume with the same recipe, or give --overwrite",
            )
    _try_out(folder, folder)
    return folder


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    with _writing(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"output: {there} is a file", mend="choose another output")
    return there


def _try_out(there: Path, folder: Path) -> None:
    """Makes a folder and takes it away again: rights alone do not tell, /proc refuses what they allow."""
    with _writing(folder):
        tempfile.TemporaryDirectory(prefix=".hybridtune-", dir=there).cleanup()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise RunError(f"output: {folder} cannot be written", found=found, mend="choose another output") from None


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same for a run to be resumed."""
    tree = recipe.model_dump(mode="json", exclude_defaults=True, exclude=_FREE)
    tree["strategy"] = [strategy.model_dump(mode="json", exclude_none=True) for strategy in recipe.strategies()]
    return tree | {"data": _data(recipe)}


def _data(recipe: Recipe) -> dict[str, Any]:
    """`data:` as plain values: rows that were given in Python are named by their kind."""
    given = {name: getattr(recipe.data, name) for name in ("train", "validation", "test")}
    told: dict[str, Any] = {
        name: sources.plain(value) if sources.are_places(value) else read.describe(value)
        for name, value in given.items()
        if value is not None
    }
    told |= {"columns": dict(recipe.data.columns)} if recipe.data.columns else {}
    return told | ({"on_bad_row": recipe.data.on_bad_row} if recipe.data.on_bad_row != "refuse" else {})


def begin(
    folder: Path,
    setting: Setting,
    files: dict[str, Any],
    plan: Sequence[Strategy],
    defaults: Sequence[str],
    resume: bool,
    rejected: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes what is known before anything is trained. What an earlier run has left makes way, unless it is resumed.

    Raises:
        RunError: the disk is full or read-only, or a resumed run was begun with other rows.
    """
    if resume and (folder / "data.json").is_file():
        before, now = read_json(folder / "data.json")["splits"], files["data.json"]["splits"]
        changed = [name for name in now if before.get(name, {}).get("fingerprint") != now[name]["fingerprint"]]
        if changed:
            raise RunError(
                f"output: the run in {folder} was begun with other rows",
                found=f"different {', '.join(changed)}",
                mend="resume with the same files, or give --overwrite",
            )
    if resume:
        _take_back_stages(folder)
    else:
        clear(folder)
    recipe = setting.recipe
    if setting.tokenizer is not None:
        with new_folder(folder / _TOKENIZER) as home:
            setting.tokenizer.save_pretrained(home)
    write_json(folder / _ASKED, _asked(recipe))
    for name, value in files.items():
        write_json(folder / name, value)
    if rejected:
        write_text(folder / "rejected.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
    tree = recipe.model_dump(mode="json", exclude={"data", "goal", "strategy", "defaults"}, exclude_none=True)
    own = {key: value for key, value in setting.task.chosen().items() if key not in tree and value is not None}
    tree |= {
        **own,
        "goal": {recipe.goal.direction: setting.metric},
        "bf16": setting.precision.bf16,
        "data": _data(recipe),
        "strategy": [strategy.model_dump(mode="json", exclude_none=True) for strategy in plan],
        "defaults": [*([] if recipe.goal.metric else [f"goal.{recipe.goal.direction}"]), *own, *defaults],
    }
    write_text(folder / _RESOLVED, yaml12.dump(tree))


def begun_in_bf16(folder: Path) -> bool | None:
    """Whether the run in a folder was begun in bf16; None where none was begun."""
    resolved = folder / _RESOLVED
    return yaml12.load(resolved.read_text("utf-8")).get("bf16") if resolved.is_file() else None


def begun_with(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the run in a folder has made; None where it has made none."""
    made = folder / _TOKENIZER
    return models.load_tokenizer(str(made)) if made.is_dir() else None


@contextmanager
def left_as_it_was(folder: Path) -> Iterator[None]:
    """Takes back what was written where a mistake shows before anything was trained: the mended call can be made."""
    try:
        yield
    except UserError:
        trained = [*folder.glob(f"trials/*/{RESULT}"), *folder.glob("trials/*/stages/*/checkpoint-*")]
        logs = folder.glob("trials/*/stages/*/log.jsonl")
        if not trained and not any(log.stat().st_size for log in logs):
            clear(folder)
            if folder.resolve() != Path.cwd():
                with suppress(OSError):  # other files are there
                    folder.rmdir()
        raise


def clear(folder: Path) -> None:
    """Removes what a tuning writes, and nothing else that may lie beside it."""
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def _take_back_stages(folder: Path) -> None:
    """Gives the stages of the trial that was chosen before back to it: another one may be chosen now."""
    stages, decision = folder / "stages", folder / "decision.json"
    if not (stages.is_dir() and decision.is_file()):
        return
    chosen = read_json(decision)
    for result in folder.glob(f"trials/*/{RESULT}"):
        trial = read_json(result)
        if (trial["strategy"], trial["seed"]) == (chosen["chosen"], chosen["seed"]):
            target = result.parent / "stages"
            if not target.is_dir():
                stages.rename(target)


def hand_over_stages(folder: Path, chosen: Trial) -> None:
    """The chosen trial's stages become the run's own."""
    source, target = Path(chosen.folder) / "stages", folder / "stages"
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
