"""Where a benchmark's results stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


class Record:
    """A file of results, a line of JSON each; they are appended as they come, so that a stopped benchmark goes on.

    Args:
        file: the file, or the name of one among the committed results.
    """

    def __init__(self, file: Path | str) -> None:
        self.file = file if isinstance(file, Path) else FOLDER / f"{file}.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """The results so far."""
        return [json.loads(line) for line in self.file.read_text("utf-8").splitlines()] if self.file.exists() else []

    def has(self, key: Any) -> bool:
        """Whether the result of this key stands there; tuples are the lists that JSON makes of them."""
        return any(row["key"] == json.loads(json.dumps(key)) for row in self.rows())

    def add(self, row: dict[str, Any]) -> None:
        """Appends a result."""
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
