"""The check of a classification: the names of the labels, and how many rows have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ...errors import DataError, nearest
from .findings import EXAMPLES, Finding, finding, some
from .labelled import Labelled, open_labelled, same_label_type
from .labels import DOUBT_SHARE, is_number, refuse_what_is_no_class, sort_labels, typos, variants, ways_of_writing
from .rows import as_text
from .steps import empty_texts, missing, train_of
from .twins import conflicts, duplicates, first_of, leaks, repeats

Splits = dict[str, Labelled]

SMALL_CLASS = 8
IMBALANCE = 10
MANY_NUMBERS = 10  # distinct labels; of fewer, a regression would say that classes may be meant


def check_classification(
    splits: dict[str, Dataset],
    *,
    sources: dict[str, str],
    multi_label: bool,
    separators: str | None = None,
    labels: Sequence[Any] = (),
    renamed: dict[str, str] | None = None,
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs labelled texts.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `text`, `label`, `_row` and
            perhaps `text_pair`. They are not changed.
        sources: for each split what `describe` returned, for messages.
        multi_label: whether a row may have several labels, or none.
        separators: what stands between labels in one text, in all splits; looked for in train where not given.
        labels: those that are known, where there is no train.
        renamed: label -> what it was called instead in train; is filled where train is there, and read elsewhere.

    Returns:
        The repaired splits (`label` is one value, or a list where `multi_label`), and what was found and done.

    Raises:
        DataError: the data cannot be what is wanted: one class only, no classes but numbers or free text, a label that
            train does not know, a row of validation or test without a label, nothing left.
    """
    if not labels:
        train_of(splits)
    found: list[Finding] = []
    renamed = {} if renamed is None else renamed
    rows, changed = same_label_type(open_labelled(splits, sources, multi_label, separators), labels)
    for name in sorted(changed):
        did = "taken for the model's own" if labels else "made text, as in other splits"
        found.append(finding("label_type", rows[name], range(len(rows[name])), did, "info"))
    rows = missing(rows, {name: split.where(lambda labels: labels is None) for name, split in rows.items()}, found)
    if "train" in rows:
        _refuse_swapped(rows["train"])
        refuse_what_is_no_class(rows["train"].counts, rows["train"].source)
    rows = empty_texts(rows, found)
    if "train" in rows:
        renamed |= variants(rows["train"].counts)
        rows = _rename(rows, rows["train"].counts, renamed, "label_variant", found)
        spelt = typos(rows["train"].counts)
        rows = _rename(rows, rows["train"].counts, spelt, "label_typo", found)
        renamed |= spelt
        rows = _compared(rows, found)
        labels = sort_labels(rows["train"].counts)
    else:
        known = Counter(labels)
        rows = _rename(rows, known, renamed, "label_variant", found)
        _refuse_unknown_labels(rows, labels)
    repeats(rows, found)
    label_type = pa.array(labels).type
    made = {
        name: split.to_dataset({**split.plain_texts(), **split.written(label_type)}) for name, split in rows.items()
    }
    return made, found


def _compared(rows: Splits, found: list[Finding]) -> Splits:
    """Looks at train as a whole, and at the other splits beside it."""
    _say_numbers(rows["train"], found)
    _doubtful_labels(rows["train"], found)
    rows = duplicates(rows, found)
    conflicts(rows["train"], found)
    known = set(rows["train"].counts)
    rows = leaks(rows, found)
    _refuse_one_class(rows["train"], known)
    _refuse_unknown_labels(rows, rows["train"].counts, known)
    _class_sizes(rows, found)
    return rows


def _rename(splits: Splits, train: Counter[Any], renames: dict[Any, Any], kind: str, found: list[Finding]) -> Splits:
    """Gives labels the name that they were meant to have; in validation and test only where train has none such."""
    made = {}
    for split, rows in splits.items():
        if kind == "label_variant":
            mine = ways_of_writing(rows.counts, train, renames)
        else:
            mine = {label: renames[label] for label in rows.counts if label in renames}
        made[split] = _renamed(rows, mine, kind, found) if mine else rows
    return made


def _renamed(rows: Labelled, renames: dict[Any, Any], kind: str, found: list[Finding]) -> Labelled:
    did = "renamed " + some(f"{old} -> {new} ({rows.counts[old]})" for old, new in renames.items())
    told = _first_label(renames, lambda label: {"label": label, "suggestion": renames[label]})
    level = "info" if kind == "label_variant" else "warning"
    found.append(finding(kind, rows, rows.having(renames), did, level, told))
    return rows.named(lambda label: renames.get(label, label))


def _first_label(
    among: dict[Any, Any], says: Callable[[Any], dict[str, Any]]
) -> Callable[[Labelled, int], dict[str, Any]]:
    """Returns what tells of a row's first label that is among these."""
    return lambda rows, at: says(next(label for label in rows.sets[rows.codes[at]] or () if label in among))


def _doubtful_labels(train: Labelled, found: list[Finding]) -> None:
    """Reports labels that may be misspelt, but are too frequent to be renamed unasked."""
    doubtful = typos(train.counts, DOUBT_SHARE)
    if not doubtful:
        return
    where = train.having(doubtful)
    pairs = (f"{old} ({train.counts[old]}) for {new} ({train.counts[new]})" for old, new in doubtful.items())
    told = _first_label(doubtful, lambda label: {"label": label, "suggestion": doubtful[label]})
    did = f"kept, but perhaps misspelt: {some(pairs)}"
    found.append(finding("doubtful_label", train, where, did, "warning", told))


def _refuse_swapped(train: Labelled) -> None:
    """Many labels, longer than the texts, of which there are few: the columns stand the wrong way round."""
    labels = [str(label) for label in train.counts]
    if len(train) < SMALL_CLASS or len(labels) <= len(train) / 2:
        return
    firsts = first_of(train.keys)
    distinct = train.keep(firsts == range(len(train)))
    if len(distinct) > len(labels) / 2:
        return
    columns = distinct.batches(*train.texts)
    texts = [as_text(list(row)) for batch in columns for row in zip(*batch, strict=True)]
    if sum(map(len, labels)) / len(labels) <= 2 * sum(map(len, texts)) / len(texts):
        return
    raise DataError(
        f"{train.source}: text and label look swapped",
        found=f"{len(labels)} labels such as {max(labels, key=len)[:60]!r}, "
        f"{len(texts)} texts such as {min(texts)[:60]!r}",
        expected="a few labels on many texts",
        mend="name the columns the other way round: --column text=... --column label=..., or data.columns",
    )


def _refuse_one_class(train: Labelled, before_leaks: set[Any]) -> None:
    counts = train.counts
    if not counts:
        raise DataError(f"{train.source}: no row of train has a label", expected="at least two classes")
    if len(counts) == 1 and all(train.sets[code] for code in set(train.codes.tolist())):
        raise DataError(
            f"{train.source}: train has one class only",
            found=f"{next(iter(counts))} on all {len(train)} rows",
            expected="at least two classes",
            mend="check that data.columns names the right column as label, and that the file is not cut off"
            if len(before_leaks) < 2
            else "all rows of the other classes also stand in validation or test: add others",
        )


def _say_numbers(train: Labelled, found: list[Finding]) -> None:
    """Many labels that are numbers are perhaps no classes: a model of classes does not know that 4 is nearer to 5."""
    if len(train.counts) > MANY_NUMBERS and all(is_number(label) for label in train.counts):
        did = "kept as classes: the labels are numbers; if they lie on a scale, task: regression is meant"
        found.append(finding("numeric_labels", train, [], did, "info", count=len(train.counts)))


def _refuse_unknown_labels(splits: Splits, labels: Iterable[Any], before_leaks: Collection[Any] = ()) -> None:
    known = set(labels)
    whose = "train" if "train" in splits else "the model"
    for split, rows in splits.items():
        unknown = rows.where(lambda labels: not known.issuperset(labels or ()))
        if not len(unknown):
            continue
        label = next(label for label in rows.sets[rows.codes[unknown[0]]] or () if label not in known)
        guess = nearest(str(label), [str(name) for name in known])
        if label in before_leaks:
            mend = f"all rows of this class in train also stand in {split} or test: add others"
        else:
            more = "add rows with it to train" if "train" in splits else "tune with rows of that label"
            mend = (f'did you mean "{guess}"? ' if guess else "") + f"correct the label, or {more}"
        raise DataError(
            f'{rows.place(unknown[0])}: {whose} has no label "{label}"',
            found=f"{len(unknown)} rows of {split} with labels that {whose} does not have",
            expected=", ".join(str(name) for name in sort_labels(known)[:20]) + (", ..." if len(known) > 20 else ""),
            mend=mend,
        )


def _class_sizes(splits: Splits, found: list[Finding]) -> None:
    train = splits["train"]
    counts = train.counts
    by_size = [label for label, _ in reversed(counts.most_common())]

    def report(kind: str, labels: list[Any], did: str) -> None:
        where = [int(train.having((label,))[0]) for label in labels[:EXAMPLES]]
        names = iter(labels)  # finding() asks in their order; two labels may have one row as their first

        def details(_: Labelled, at: int) -> dict[str, Any]:
            label = next(names)
            return {"label": label, "rows": counts[label]}

        found.append(finding(kind, train, where, did, "warning", details, len(labels)))

    small = [label for label in by_size if counts[label] < SMALL_CLASS]
    if small:
        report("small_class", small, f"kept: classes with fewer than {SMALL_CLASS} rows")
    least, most = by_size[0], by_size[-1]
    rare = [label for label in by_size if counts[most] > IMBALANCE * counts[label]]
    if rare:
        did = f"kept: {most} has {counts[most]} rows, {least} has {counts[least]}; class_weight: balanced may help"
        report("imbalance", rare, did)
    for rows in splits.values():
        absent = sort_labels(set(counts) - set(rows.counts))
        if absent:
            names = ", ".join(str(label) for label in absent[:EXAMPLES]) + (", ..." if len(absent) > EXAMPLES else "")
            found.append(finding("absent_class", rows, [], f"not measured there: {names}", "info", count=len(absent)))
