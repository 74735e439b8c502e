"""Rows that lie on the disk, or were picked out of others: what comes back is the same, and texts are not copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hybridtune.data.checking.check import (
    check_classification,
    check_question_answering,
    check_regression,
    check_tagging,
)
from hybridtune.data.checking.twins import first_of

SOURCES = {"train": "train.csv", "validation": "dev.csv"}


def classes(n: int) -> dict[str, Any]:
    return {"text": f"text {n}", "label": ["ham", "Ham", "spam"][n % 3]}


def numbers(n: int) -> dict[str, Any]:
    return {"text": f"text {n}", "label": str(n % 7) if n % 9 else "n/a"}


def tags(n: int) -> dict[str, Any]:
    return {"tokens": ["word", str(n)], "tags": [["B-X", "I-X"], ["O", "I-Y"], ["B-Y", "O"]][n % 3]}


def answers(n: int) -> dict[str, Any]:
    found = {"text": [f"town {n}"], "answer_start": [n % 3]}
    return {"question": f"question {n}", "context": f"a town {n}, and {n % 3}", "answers": found}


def of_classes(splits: dict[str, Dataset]) -> tuple[dict[str, Dataset], list[Any]]:
    return check_classification(splits, sources=SOURCES, multi_label=False)


def of(check: Callable[..., Any]) -> Callable[..., Any]:
    return lambda splits: check(splits, sources=SOURCES)


CASES = [
    pytest.param(classes, of_classes, "text", id="classification"),
    pytest.param(numbers, of(check_regression), "text", id="regression"),
    pytest.param(tags, of(check_tagging), "tokens", id="tagging"),
    pytest.param(answers, of(check_question_answering), "context", id="question answering"),
]


@pytest.mark.parametrize(("row", "check", "column"), CASES)
def test_picked_rows_are_as_rows_of_their_own(row: Any, check: Any, column: str) -> None:
    every = Dataset.from_list([{**row(n % 40), "more": n, "_row": n + 2} for n in range(100)])
    picked = np.random.default_rng(0).permutation(100)[:80]
    rows = {"train": every.select(picked[:70]), "validation": every.select([n for n in picked[70:] if n % 40 % 9])}
    own = {name: Dataset.from_list(split.to_list()) for name, split in rows.items()}
    made, found = check(rows)
    expected, told = check(own)
    assert {"duplicate", "leak"} <= {item.kind for item in found}
    assert [item.as_dict() for item in found] == [item.as_dict() for item in told]
    assert {name: split.to_list() for name, split in made.items()} == {n: s.to_list() for n, s in expected.items()}


@pytest.mark.parametrize(("row", "check", "column"), CASES)
def test_texts_stay_where_they_are(row: Any, check: Any, column: str, tmp_path: Path) -> None:
    Dataset.from_list([{**row(n % 40), "_row": n + 2} for n in range(100)]).save_to_disk(tmp_path / "rows")
    before = {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    rows = Dataset.load_from_disk(tmp_path / "rows")
    made = check({"train": rows})[0]["train"]
    assert len(made) < len(rows)
    assert addresses(made, column) == addresses(rows, column)
    assert made.cache_files == []
    assert {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()} == before


def addresses(rows: Dataset, column: str) -> list[int]:
    return [buffer.address for chunk in rows.data.table[column].chunks for buffer in chunk.buffers() if buffer]


def test_first_of() -> None:
    values = np.random.default_rng(0).integers(0, 40, 300).astype(np.uint64)
    expected = [values.tolist().index(value) for value in values.tolist()]
    assert first_of(values).tolist() == expected
    assert first_of(values[:0]).tolist() == []
