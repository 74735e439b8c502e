"""Steps 2 and 3: from a recipe to rows that are checked and cut into tokens, and strategies with every value."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from . import console as consoles
from . import model as models
from . import own_file, survey, trial, vocabulary
from .console import Console
from .data import split
from .data.bars import no_bars
from .data.checking import check
from .data.checking.rows import as_text, batches
from .data.doubts.tokens import token_summary, unknown_characters
from .data.reading import read
from .data.reading.sources import same_files
from .engine import precision
from .errors import DataError, RecipeError, first_line
from .own_metrics import NO_METRICS, OwnMetrics
from .recipe import Recipe, Rule, Stage, Strategy, Training, without_heads
from .resolve import plan
from .stage import arguments_of
from .tasks import Task
from .trial import FEW_VALIDATION_ROWS, Setting

_KINDS_OF_ROWS = {"datasets.Dataset", "datasets.DatasetDict", "pandas.DataFrame", "list of dicts"}  # as describe says
_SPLITS = ("train", "validation", "test")
_SHOWN_LABELS = 8
_SHOWN_FILES = 3
_SOME_ROWS = 2000
MANY_UNKNOWN = 0.05


def rows_of(
    recipe: Recipe, task: Task, console: Console, notes: read.Notes | None = None
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Reads, maps, splits and checks the rows. Test rows are compared with train's here; no model sees them yet.

    Args:
        recipe, task: of the run.
        console: is told what was found and done.
        notes: get the rows that could not be read; the recipe's `on_bad_row` says whether they may be left out.

    Returns:
        The rows of every split, and what data.json says of them.

    Raises:
        DataError: a file, column, label or row is not what it has to be.
    """
    notes = notes or read.Notes()
    rows, sources, columns = _read(recipe, task, notes)
    _say_columns(columns, console)
    for text in notes.warnings:
        console.warn(text)
    seed = recipe.all_seeds()[0]
    folds = recipe.data.folds
    if folds and "validation" in rows:
        raise RecipeError(
            f"data.folds: {folds}, but validation rows are given",
            mend="leave one of them away: folds are made of train",
        )
    for name, fraction in (("test", 0.2), ("validation", 1 / folds if folds else 0.1)):
        if name not in rows:
            rows["train"], rows[name] = _hold_out(recipe, task, rows["train"], sources["train"], fraction)
            sources[name] = f"{fraction:.0%} of {sources['train']}, held out with seed {seed}"
            turns = f", the first of {folds} folds that take turns" if folds and name == "validation" else ""
            console.line(
                f"  no {name} rows given: {fraction:.0%} of train held out ({len(rows[name])} rows, seed {seed}){turns}"
            )
            if name == "validation" and len(rows[name]) < FEW_VALIDATION_ROWS and not folds:
                console.warn("so few validation rows choose by chance: data.folds: 5 has all rows of train take turns")
    read_counts = {name: len(table) for name, table in rows.items()}
    try:
        rows, findings = task.check(rows, sources)
    except DataError as error:
        raise _of_max_rows(recipe, task, sources["train"], rows["train"], error) from None
    checked = len(rows["train"])
    rows["train"] = read.weigh(rows["train"], recipe.data.train, seed)
    if len(rows["train"]) != checked:
        console.line(f"  train: {checked:,} rows are drawn as {len(rows['train']):,}, by the weights of their files")
    data = {
        "task": recipe.task,
        "rejected": len(notes.rejected),
        "splits": {
            name: {
                "source": sources[name],
                "columns": columns.get(name, columns["train"]),
                "rows_read": read_counts[name],
                "rows": len(table),
                "fingerprint": _fingerprint(table, [*task.inputs, task.target]),
            }
            for name, table in rows.items()
        },
        "windowed": task.windowed,
        **task.profile(rows),
    }
    if recipe.data.survey:
        near, more = survey.of_texts(task, rows, seed)
        findings, data = [*findings, *near], data | more
    data["findings"] = [finding.as_dict() for finding in findings]
    console.line("  " + ", ".join(f"{name} {len(rows[name]):,} rows" for name in _SPLITS))
    _say_labels(data.get("labels", []), console)
    if "languages" in data:
        survey.say_languages(data["languages"], console)
    _say_findings(findings, console)
    return rows, data


def _say_findings(findings: Sequence[check.Finding], console: Console) -> None:
    for finding in findings:
        console.finding(f"{finding.split}: {finding.count} x {finding.kind}: {finding.did}", finding.level)


def _read(
    recipe: Recipe, task: Task, notes: read.Notes
) -> tuple[dict[str, Dataset], dict[str, str], dict[str, dict[str, str]]]:
    """The rows of the splits that are given, with the task's columns; where each is from, what its columns were."""
    notes.on_bad_row = recipe.data.on_bad_row
    if recipe.data.train is None:
        raise RecipeError("data: train is missing", mend="add data: {train: ...} or --train FILE")
    sources, columns, rows = {}, {}, {}
    for name in _SPLITS:
        source = getattr(recipe.data, name)
        if source is None:
            continue
        if isinstance(source, str) and source in _KINDS_OF_ROWS:
            raise DataError(
                f"data.{name}: was a {source} in Python, of which the recipe does not hold the rows",
                mend=f"give them again: tune(recipe, {name}=rows)",
            )
        _refuse_same_file(recipe, name, source)
        sources[name] = read.describe(source)
        before = len(notes.rejected)
        table = task.unpack(read.read(source, name, max_rows=recipe.max_rows, notes=notes))
        if rejected := notes.rejected[before:]:
            first = f"{rejected[0]['source']}:{rejected[0]['line']}: {rejected[0]['problem']}"
            where = f"; all of them stand in {notes.kept_in}" if notes.kept_in else ""
            notes.warn(f"{name}: {len(rejected)} rows cannot be read and are left out, the first {first}{where}")
        hints = recipe.data.columns
        if name == "train":  # other splits have to be like it
            task.look_at([column for column in table.column_names if column != read.ROW])
        required, _ = task.asked([*table.column_names, *hints], labelled=True)
        columns[name] = read.find_columns(
            table, name, sources[name], task.columns, hints, required, instead=task.instead
        )
        rows[name] = task.gather(read.rename_columns(table, columns[name], task.columns))
        read.say_empty(rows[name], (*task.required, task.target), table, notes)
    return rows, sources, columns


def _refuse_same_file(recipe: Recipe, name: str, source: Any) -> None:
    """A file has one split; of a folder or a hub id, each split may be another."""
    for other in _SPLITS[: _SPLITS.index(name)]:
        both = same_files(getattr(recipe.data, other), source)
        if both:
            raise DataError(
                f"data.{name}: is the same file as data.{other}",
                found=", ".join(both[:_SHOWN_FILES]),
                expected="rows that no other split has",
                mend=f"name another file, or leave {name} away: a part of train is held out then",
            )


def _of_max_rows(recipe: Recipe, task: Task, source: str, train: Dataset, error: DataError) -> DataError:
    """The error, with another mend where it is `max_rows` that has left labels of train out."""
    if recipe.max_rows is None or task.target not in train.column_names:
        return error
    table = task.unpack(read.read(recipe.data.train, "train", notes=read.Notes(recipe.data.on_bad_row)))
    hints = recipe.data.columns
    required, _ = task.asked([*table.column_names, *hints], labelled=True)
    every = task.gather(read.map_columns(table, "train", source, task.columns, hints, required))
    have, there = (len(set(map(str, rows[task.target][:]))) for rows in (train, every))
    if have == there:
        return error
    return error.but(
        error.problem,
        found=f"{have} of the {there} labels of train among the first choice of rows (max_rows: {recipe.max_rows})",
        mend="take more rows with --max-rows, or all of them",
    )


def _say_columns(columns: dict[str, dict[str, str]], console: Console) -> None:
    """Which columns are taken for what, once where all files have the same."""
    told: dict[str, list[str]] = {}
    for name, found in columns.items():
        told.setdefault(consoles.pairs(found), []).append(name)
    for said, splits in told.items():
        console.line(f"  columns{'' if len(told) == 1 else ' of ' + ' and '.join(splits)}: {said}")


def _say_labels(labels: list[dict[str, Any]], console: Console) -> None:
    """The most frequent labels of train."""
    if labels:
        ranked = sorted(labels, key=lambda one: -one["train"])
        shown = ", ".join(f"{one['label']} {one['train']:,}" for one in ranked[:_SHOWN_LABELS])
        more = f" and {len(ranked) - _SHOWN_LABELS:,} more" if len(ranked) > _SHOWN_LABELS else ""
        console.line(f"  {len(ranked)} labels in train: {shown}{more}")


def _hold_out(recipe: Recipe, task: Task, train: Dataset, source: str, fraction: float) -> tuple[Dataset, Dataset]:
    try:
        lacking = task.lacking(train)
        others = train.select(np.flatnonzero(lacking))
        whole = train.select(np.flatnonzero(~lacking)) if len(others) else train  # a selection is slower to read
        kinds = task.strata(whole)
        kept, held = split.hold_out(whole, fraction, recipe.all_seeds()[0], **_alike(task, whole, kinds), keep=kinds)
        return (concatenate_datasets([kept, others]) if len(others) else kept), held
    except DataError as error:
        problem = error
    try:
        type(task).from_recipe(recipe).check({"train": train}, {"train": source})
    except DataError as known_better:
        problem = known_better
    raise _of_max_rows(recipe, task, source, train, problem)


def _alike(task: Task, rows: Dataset, kinds: Sequence[Sequence[Any]] | None) -> dict[str, Any]:
    """What parts that are held out have to know of the rows: which of them stay together, and what each is of."""
    texts = [name for name in task.apart if name in rows.column_names]
    return {"texts": texts, "strata": None if kinds is None else [next(iter(of_row), None) for of_row in kinds]}


def _fingerprint(rows: Dataset, columns: Sequence[str]) -> str:
    """BLAKE2b over what the task reads: equal only for equal rows in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches(rows, [name for name in columns if name in rows.column_names]):
        for values in zip(*batch, strict=True):
            digest.update(json.dumps(values, default=str).encode() + b"\n")
    return digest.hexdigest()


def setting_of(
    recipe: Recipe,
    task: Task,
    metric: str,
    rows: dict[str, Dataset],
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    begun: bool | None = None,
    own: OwnMetrics | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Setting, dict[str, Any]]:
    """Loads the model once, to plan every candidate on it and to cut the rows into what tokens they leave room for.

    Args:
        recipe, task, metric, rows: of the run.
        console: is told of the model and of rows that do not fit it.
        callbacks, compute_metrics: the user's own.
        begun: of a resumed run, whether it was begun in bf16.
        own: metrics of the user's own.
        tokenizer: of a resumed run, whose vocabulary the model had.

    Returns:
        What all trials share, and what data.json says of the rows' lengths.

    Raises:
        ModelError: the model cannot be loaded or cannot do the task.
        PartError, MethodError, RecipeError: a rule cannot be kept on this model, or the device has no bf16 and it is
            asked for.
    """
    chosen = precision.choose(recipe, models.pick_device(recipe.device), begun)
    tokenizer, before = _vocabulary(recipe, task, rows, tokenizer)
    start = trial.load(recipe, task, tokenizer)
    loaded = start.loaded
    training = Training(**{key: getattr(recipe, key) for key in Training.model_fields})
    width = models.width(loaded.model)
    candidates = [without_heads(one) if task.writes else one for one in recipe.strategies()]
    plans = [plan(strategy, training, start.assembly, width) for strategy in candidates]
    taken = max(one.positions for one in plans)
    limit = models.token_limit(loaded.model, loaded.tokenizer, recipe.max_length, taken)
    encoded = {name: task.encode(table, loaded.tokenizer, limit) for name, table in rows.items()}
    lengths = {name: _lengths(table, limit) for name, table in encoded.items()}
    sifted = {name: task.sifted(table, rows[name], name, limit) for name, table in encoded.items()}
    encoded = {name: table for name, (table, _) in sifted.items()}
    size = consoles.count(sum(parameter.numel() for parameter in loaded.model.parameters()))
    depth = ", ".join(f"{n} {role} layers".replace("  ", " ") for role, n in start.assembly.anatomy.depth.items())
    asked = recipe.vocabulary.train if recipe.vocabulary else None
    told = _say_vocabulary(before, loaded, asked, console) if before is not None else {}
    console.line(f"  model {recipe.model}: {type(loaded.model).__name__}, {size} parameters, {depth}")
    if start.assembly.attachments:
        there = "; ".join(map(str, start.assembly.attachments))
        console.line(f"  on {start.base.name} already: {there} (the first stage's previous: keep, merge or drop)")
    if loaded.new:
        console.line(f"  new weights, not in the checkpoint: {', '.join(loaded.new)}")
    for text, level in task.remarks(loaded.model, loaded.tokenizer):
        console.finding(text, level)
    for name, summary in lengths.items():
        if summary["truncated"]:
            said = f"{name}: {summary['truncated']} rows are longer than {limit} tokens"
            if task.windowed:
                console.line(f"  - {said}: read in several windows")
            else:
                console.warn(f"{said} and are cut there")
        if summary["unknown_share"] > MANY_UNKNOWN:
            console.warn(
                f"{name}: {summary['unknown_share']:.0%} of the tokens are unknown to this tokenizer, most often "
                f"{_strange(task, rows[name], loaded.tokenizer)}: choose a model for this language"
            )
    odd = [finding for _, findings in sifted.values() for finding in findings]
    _say_findings(odd, console)
    shared = Setting(
        recipe,
        task,
        metric,
        encoded["train"],
        encoded["validation"],
        rows["validation"],
        limit,
        plans,
        chosen,
        own or NO_METRICS,
        callbacks,
        compute_metrics,
        folds=_folds(recipe, task, rows, loaded, limit) if recipe.data.folds else (),
        tokenizer=tokenizer,
        console=console,
    )
    told |= {"lengths": lengths, **_target_lengths(task, limit, encoded, console)}
    if recipe.data.survey:
        told |= _doubts(recipe, task, loaded, rows, encoded, console)
    if odd:
        told["doubts"] = [*told.get("doubts", []), *(finding.as_dict() for finding in odd)]
    return shared, told


def _vocabulary(
    recipe: Recipe, task: Task, rows: dict[str, Dataset], begun: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase | None, tuple[dict[str, int], int] | None]:
    """The tokenizer whose vocabulary the model gets, where the recipe asks for another; the pieces that it had, and how
    many bytes of weights.

    Raises:
        ModelError: it cannot be done with this model or its tokenizer.
    """
    if recipe.vocabulary is None:
        return None, None
    of = trial.bare(recipe, task).loaded
    before = of.tokenizer.get_vocab(), _bytes(of)
    if begun is not None:
        return begun, before
    columns = [*task.inputs, *([task.target] if task.writes else [])]
    columns = [name for name in columns if name in rows["train"].column_names]

    def texts() -> Iterator[list[str]]:
        yield [re.sub(r"\{\w+\}", "", recipe.template or "")]
        for batch in batches(rows["train"], columns):
            for values in batch:
                yield list(map(_plain, values))

    def cut(tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
        task.prepare(of.model, tokenizer)
        limit = models.token_limit(of.model, tokenizer, recipe.max_length)
        for name in ("train", "validation"):
            items = task.encode(rows[name], tokenizer, limit)
            for column in ("input_ids", *(["labels"] if task.writes else [])):
                for ids in items[column][:]:
                    yield [one for one in ids if one >= 0]  # what is not learnt has no token

    return vocabulary.change(recipe.vocabulary, of, texts, cut), before


def _bytes(loaded: models.Loaded) -> int:
    return sum(parameter.nbytes for parameter in loaded.model.parameters())


def _plain(value: Any) -> str:
    """All that a value says: words of a row, turns of a conversation."""
    if isinstance(value, dict):
        value = list(value.values())
    return " ".join(map(_plain, value)) if isinstance(value, list) else as_text(value)


def _say_vocabulary(
    before: tuple[dict[str, int], int], after: models.Loaded, asked: int | None, console: Console
) -> dict[str, Any]:
    """How many pieces there were and are, and what became of the model's size, for data.json."""
    (known, size), found = before, after.tokenizer.get_vocab()
    new = [piece for piece in sorted(found, key=found.__getitem__) if piece not in known]
    sizes = [size, _bytes(after)]
    shown = f": {' '.join(new[:_SHOWN_LABELS])}" + (" ..." if len(new) > _SHOWN_LABELS else "") if new else ""
    console.line(
        f"  vocabulary: {len(found) - len(new):,} of {len(known):,} pieces kept, {len(new):,} new{shown}; "
        f"{' -> '.join(map(consoles.memory, sizes))} of weights"
    )
    if asked and len(found) < asked:
        console.warn(f"vocabulary: {asked:,} pieces were asked for; the texts give no more than {len(found):,}")
    return {
        "vocabulary": {
            "pieces_before": len(known),
            "pieces": len(found),
            "new": len(new),
            "bytes_before": sizes[0],
            "bytes": sizes[1],
        }
    }


def _folds(
    recipe: Recipe, task: Task, rows: dict[str, Dataset], loaded: models.Loaded, limit: int
) -> list[tuple[Dataset, Dataset, Dataset]]:
    """For each fold the items to train on, those to validate on, and the rows of the latter."""
    assert recipe.data.folds is not None
    with no_bars():
        every = concatenate_datasets([rows["train"], rows["validation"]])
    alike = _alike(task, every, task.strata(every))
    parts = split.k_folds(every, recipe.data.folds, recipe.all_seeds()[0], **alike)
    encode = partial(task.encode, tokenizer=loaded.tokenizer, limit=limit)
    return [(task.sifted(encode(kept), kept, "train", limit)[0], encode(out), out) for kept, out in parts]


def _lengths(items: Dataset, limit: int) -> dict[str, Any]:
    """Of rows in tokens; of a row's windows, the first carries what is known of it."""
    first = np.diff(items["row"][:], prepend=-1) > 0 if "row" in items.column_names else slice(None)
    return token_summary(np.asarray(items["length"][:])[first], np.asarray(items["unknown"][:])[first], limit)


def _strange(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The characters that are most often unknown."""
    some = rows.select(range(min(len(rows), _SOME_ROWS)))
    texts = (as_text(value) for name in task.inputs for value in some[name][:])
    ids = tokenizer.unk_token_id
    found = unknown_characters(texts, lambda character: ids in tokenizer(character)["input_ids"])
    return " ".join(character for character, _ in found.most_common(_SHOWN_LABELS)) or "whole words"


def _doubts(
    recipe: Recipe,
    task: Task,
    loaded: models.Loaded,
    rows: dict[str, Dataset],
    items: dict[str, Dataset],
    console: Console,
) -> dict[str, Any]:
    """What features of the frozen model say of the data, for data.json."""
    seed = recipe.all_seeds()[0]
    loaded.model.to(models.pick_device(recipe.device))  # type: ignore[arg-type]
    found = survey.features(task, loaded, rows, items, seed)
    if isinstance(found, str):
        if task.pooled:
            console.line(f"  labels and amount of data are not looked at: {found}")
        return {"curve": None, "not_looked_at": found}
    findings, curve = survey.of_features(task, found, seed)
    _say_findings(findings, console)
    console.line(f"  enough data? {curve.verdict} ({curve.metric}, linear model on frozen features)")
    return {"curve": curve.as_dict(), "doubts": [finding.as_dict() for finding in findings]}


def _target_lengths(task: Task, limit: int, encoded: dict[str, Dataset], console: Console) -> dict[str, Any]:
    """How long targets are that are texts, and how many are longer than what is learnt of them."""
    most = task.target_limit(limit)
    if most is None:
        return {}
    found = {
        name: token_summary(np.asarray(table["target_length"][:]), np.asarray(table["target_unknown"][:]), most)
        for name, table in encoded.items()
    }
    for name, summary in found.items():
        if summary["truncated"]:
            console.warn(
                f"{name}: {summary['truncated']} targets are longer than {most} tokens, the longest {summary['max']}: "
                f"the model learns no more of them, and writes no more; {task.target_mend(limit)}"
            )
        if summary["unknown_share"] > MANY_UNKNOWN:
            console.warn(
                f"{name}: {summary['unknown_share']:.0%} of the targets' tokens are unknown to this tokenizer, and can "
                "not be written: choose a model for this language"
            )
    return {"target_lengths": found}


def plan_of(setting: Setting, console: Console) -> tuple[list[Strategy], list[str]]:
    """Says what every candidate will do, and tries the training arguments of its stages.

    Returns:
        The strategies with every value, and the dotted paths of those values that are defaults.

    Raises:
        RecipeError: a value that TrainingArguments does not take.
    """
    arguments, defaults = _arguments(setting), ["bf16"] if setting.precision.default else []
    console.line(f"  bf16 {setting.precision}")
    for number, made in enumerate(setting.plans):
        full = made.strategy
        for stage in full.stages:
            arguments_of(arguments, stage, Path(setting.recipe.output), evaluates=True)
        defaults += [f"strategy.{number}.{path}" for path in made.defaults]
        console.line(f"  {full.name}" + (f": {full.title}" if full.title else ""))
        for at, stage in enumerate(full.stages):
            length = _length(stage)
            console.line(f"    {at + 1}. {stage.name}, {length}, batch {stage.per_device_train_batch_size}", "dim")
            for n, rule in enumerate(stage.rules):
                here = f"stages.{at}.rules.{n}."
                chosen = {path.removeprefix(here) for path in made.defaults if path.startswith(here)}
                console.line(f"       {_say_rule(rule, chosen)}", "dim")
        for name, reason in made.unmergeable.items():
            console.line(f"    cannot become a plain checkpoint: {name}: {reason}", "dim")
    return [made.strategy for made in setting.plans], defaults


def _arguments(setting: Setting) -> TrainingArguments:
    """The recipe's own training arguments, refused now and not after hours.

    Raises:
        RecipeError: a value that TrainingArguments does not take.
    """
    recipe = setting.recipe
    try:
        get_reporting_integration_callbacks(recipe.report_to)
        return trial.training_arguments(setting, recipe.all_seeds()[0], Path(recipe.output))
    except (ValueError, ImportError) as error:
        raise RecipeError(f"the recipe: {first_line(error)}") from None


def _say_rule(rule: Rule, defaults: set[str]) -> str:
    """`layers: lora(r=8), defaults: learning_rate 0.001, lora_alpha 16, ...`."""
    values: dict[str, Any] = {"learning_rate": rule.learning_rate, **rule.options}
    values |= {"layerwise_lr_decay": rule.layerwise_lr_decay}
    given = ", ".join(
        f"{key}={_short(value)}" for key, value in values.items() if key not in defaults and value is not None
    )
    filled = ", ".join(
        f"{key} {_short(value)}" for key, value in values.items() if key in defaults and value is not None
    )
    said = f"{rule.part}: {own_file.shown(rule.method)}" + (f"({given})" if given else "")
    if rule.active:
        said += f", active {', '.join(f'{key} {_short(value)}' for key, value in rule.active)}"
    return said + (f", defaults: {filled}" if filled else "")


def _length(stage: Stage) -> str:
    """How long a stage is: the first of its limits that is reached."""
    limits = [(stage.num_train_epochs, "epoch"), (stage.max_steps, "step")]
    said = [f"{number:g} {unit}" + ("" if number == 1 else "s") for number, unit in limits if number]
    return " or ".join([*said, *([consoles.seconds(stage.max_seconds)] if stage.max_seconds else [])])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
