"""The support matrix: cells are what `support.REFUSED` says, and so is the committed page. `make support` tries all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models are kept, each written once."""
    return tmp_path_factory.mktemp("columns")


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
@pytest.mark.parametrize(("row", "column"), support.SOME_CELLS)
def test_a_cell_is_as_expected(row: str, column: str, home: Path, tmp_path: Path) -> None:
    result = support.attempt(row, column, home, tmp_path)
    assert support.expected(row, column, result), result


def test_the_page_tells_what_is_expected() -> None:
    found = support.read(support.PAGE.read_text("utf-8"))
    assert list(map(set, (found, support.REFUSED))) == [set(support.CELLS), set(support.CELLS) & set(support.REFUSED)]
    assert [cell for cell, result in found.items() if not support.expected(*cell, result)] == []
    assert support.page({cell: found[cell] for cell in support.CELLS}) == support.PAGE.read_text("utf-8")


def test_each_strategy_and_each_kind_is_tried() -> None:
    tried = [cell for cell in support.SOME_CELLS if cell[0] in support.STRATEGIES]
    assert {row for row, _ in tried} == set(support.STRATEGIES)
    assert {column for _, column in tried} == set(support.KINDS)
    assert len(tried) > len(support.STRATEGIES) * len(support.KINDS) / 4


def test_what_has_to_work_is_not_refused() -> None:
    """Every method's own architectures, whatever else is refused."""
    everywhere = ("full", "lora", "adapter", "bias", "norm", "freeze")
    usual = ("bert", "roberta", "llama", "qwen3", "gemma", "gpt2", "t5", "bart")
    wanted = {(row, column) for row in everywhere for column in support.CLASSIFIERS}
    wanted |= {(row, f"{column}{kind}") for row in ("ia3", "prompt") for column in usual for kind in ("", " LM")}
    wanted |= {("prefix", column) for column in ("bert", "roberta", "llama", "qwen3", "gpt2")}
    assert wanted <= set(support.CELLS)
    assert not wanted & set(support.REFUSED)
    for reason in support.REFUSED.values():
        re.compile(reason)
