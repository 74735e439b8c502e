"""The check of a tagging: a tag for every word, and what the tags mark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from datasets import Dataset

from ...errors import DataError
from .findings import Finding, finding, some
from .labels import TYPO_SHARE, variants, ways_of_writing
from .rows import column_type, is_list, is_string
from .schemes import IOB2, OUTSIDE, is_chunked, parse, scheme_of
from .steps import empty_texts, missing, train_of, unfit
from .tagged import BROKEN, MISMATCH, MISSING, RENAMED, Rule, Tagged, Tally, open_tagged
from .twins import conflicts, duplicates, leaks, repeats

RARE = 8

Splits = dict[str, Tagged]


def check_tagging(
    splits: dict[str, Dataset], *, sources: dict[str, str], tags: Sequence[str] = ()
) -> tuple[dict[str, Dataset], list[Finding]]:
    """Checks and repairs words with tags.

    Args:
        splits: "train", and "validation" and "test" where they are there, with the columns `tokens`, `tags` and `_row`.
            They are not changed.
        sources: for each split what `describe` returned, for messages.
        tags: those that are known, where there is no train.

    Returns:
        The repaired splits, and what was found and done. `tokens` and `tags` are lists of texts. Validation and test
        may have tags that train does not know.

    Raises:
        DataError: the data cannot be what is wanted: as many tags as words neither in validation and test nor in most
            of train, nothing marked, no type that train and another split share, nothing left.
    """
    if not tags:
        train_of(splits)
    found: list[Finding] = []
    rows = {name: open_tagged(name, data, sources.get(name, name)) for name, data in splits.items()}
    _say_types(rows, found)
    rows = missing(rows, {name: split.having(MISSING) for name, split in rows.items()}, found, "tags")
    rows = unfit(
        rows,
        {name: split.having(MISMATCH) for name, split in rows.items()},
        found,
        "length_mismatch",
        Tagged.lengths,
        problem="the row has not one tag for every token",
        expected="lists of the same length",
        mend="correct these rows; a token that holds white space or a line break may have been cut",
    )
    rows = empty_texts(rows, found)
    rows = _settle(rows, tags, found)
    if "train" in rows:
        rows = duplicates(rows, found)
        conflicts(rows["train"], found)
        before = rows["train"].counts()
        rows = leaks(rows, found)
    repeats(rows, found)
    tallies = {name: split.tally() for name, split in rows.items()}
    if "train" in rows:
        _refuse_nothing_marked(rows["train"], tallies["train"], before)
    _types(rows, tallies, tags, found)
    return {name: split.to_dataset(split.written()) for name, split in rows.items()}, found


def _say_types(splits: Splits, found: list[Finding]) -> None:
    for rows in splits.values():
        kinds = {name: column_type(rows.data, name) for name in ("tokens", "tags")}
        odd = [name for name, kind in kinds.items() if not is_string(kind.value_type if is_list(kind) else kind)]
        if odd:
            did = " and ".join(f"{name} made lists of texts, out of {kinds[name]}" for name in odd)
            found.append(finding("label_type", rows, range(len(rows)), did, "info"))


def _settle(splits: Splits, tags: Sequence[str], found: list[Finding]) -> Splits:
    """Gives tags one way of writing, and those of train what their scheme has for the pieces that they mark."""
    train = splits["train"].counts() if "train" in splits else Counter(tags)
    chunked = is_chunked(train)
    made = {}
    renames = _renames(train, train, chunked)
    named = Counter[tuple[str, str]]()
    for (before, tag), count in splits["train"].pairs.items() if "train" in splits else ():
        named[renames.get(before, before), renames.get(tag, tag)] += count
    scheme = scheme_of(named) if chunked and named else None
    for split, rows in splits.items():
        renames = _renames(rows.counts(), train, chunked)
        made[split], broken = rows.settled(Rule(renames, chunked, scheme, repairs=split == "train"))
        _say_tags(made[split], broken, found)
    return made


def _renames(counts: Counter[str], train: Counter[str], chunked: bool) -> dict[str, str]:
    """Returns tag -> what it is called in train.

    Where tags mark pieces, the types are compared, and letters are capitals. Others may well differ by case alone, as
    many parts of speech do; there a tag has to be rare to be another way of writing one.
    """
    if not chunked:
        rare = {old: new for old, new in variants(train).items() if train[old] <= TYPO_SHARE * train[new]}
        return ways_of_writing(counts, train, rare)
    mine, known = _of_types(counts), _of_types(train)
    types = ways_of_writing(mine, known, variants(known))
    names = {tag: part for tag in counts if (part := parse(tag))}
    whole = {tag: f"{letter}-{types.get(kind, kind)}" if kind else OUTSIDE for tag, (letter, kind) in names.items()}
    return {tag: name for tag, name in whole.items() if tag != name}


def _of_types(counts: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for tag, count in counts.items():
        part = parse(tag)
        if part and part[1]:
            found[part[1]] += count
    return found


def _say_tags(rows: Tagged, broken: Counter[tuple[str, str]], found: list[Finding]) -> None:
    scheme = rows.rule.scheme
    if rows.split == "train" and rows.rule.chunked and scheme is not IOB2:  # what everybody takes for granted
        name = scheme.name if scheme else "pieces in no known scheme"
        found.append(finding("scheme", rows, [], f"tags read as {name}", "info", count=len(rows)))
    renamed = rows.marked(RENAMED)
    if len(renamed):
        did = "renamed " + some(f"{old} -> {new}" for old, new in rows.rule.renames.items())
        found.append(finding("tag_variant", rows, renamed, did, "info", Tagged.change))
    wrong = rows.marked(BROKEN)
    if len(wrong):
        pairs = some(f"{old} -> {new} ({count})" for (old, new), count in broken.most_common())
        did = "made what conlleval reads" if rows.rule.repairs else "kept, but read as conlleval does"
        found.append(finding("broken_tags", rows, wrong, f"{did}: {pairs}", "warning", Tagged.change))


def _refuse_nothing_marked(train: Tagged, tally: Tally, before_leaks: Counter[str]) -> None:
    """One tag on all words teaches nothing."""
    if tally.types and (train.rule.chunked or len(tally.types) > 1):
        return
    raise DataError(
        f"{train.source}: train has one tag only",
        found=f"{next(iter(tally.types), OUTSIDE)} on all tokens of {len(train)} rows",
        expected="tags such as B-PER, I-PER and O, or one of several for each token",
        mend="check that data.columns names the right column as tags, and that the file is not cut off"
        if len(before_leaks) < 2
        else "all rows with other tags also stand in validation or test: add others",
    )


def _types(splits: Splits, tallies: dict[str, Tally], tags: Sequence[str], found: list[Finding]) -> None:
    """Reports types that are rare, that train lacks and that others lack; refuses a split that shares none."""
    chunked = next(iter(splits.values())).rule.chunked
    if "train" in tallies:
        train, whose = tallies["train"].types, "train"
    else:
        train, whose = _of_types(Counter(tags)) if chunked else Counter(tags), "the model"
    word = "types" if chunked else "tags"

    def report(kind: str, names: list[str], did: str, level: str = "warning") -> None:
        first, sizes = tallies[split].first, tallies[split].types
        where = [first[name] for name in names if name in first]
        told = some(f"{name} ({sizes[name]})" if name in first else name for name in names)
        found.append(finding(kind, rows, where, f"kept: {word} that {did}: {told}", level, count=len(names)))

    for split, rows in splits.items():
        unknown = sorted(tallies[split].types.keys() - train.keys())
        if unknown and len(unknown) == len(tallies[split].types):
            raise DataError(
                f"{rows.place(min(tallies[split].first.values()))}: {whose} has none of the {word} of {split}",
                found=", ".join(unknown[:20]),
                expected=", ".join(sorted(train)[:20]),
                mend="check that all splits are tagged alike",
            )
        if unknown:
            report("unknown_type", unknown, f"{whose} does not have, so that they cannot be found")
        absent = sorted(train.keys() - tallies[split].types.keys())
        if absent:
            report("absent_type", absent, "are not measured there", "info")
        rare = sorted((name for name in train if train[name] < RARE), key=lambda name: train[name])
        if rare and split == "train":
            report("rare_type", rare, f"stand there fewer than {RARE} times")
