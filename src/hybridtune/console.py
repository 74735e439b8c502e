"""What a person sees while a tuning runs: steps, notes, tables and progress. Calm where it is not a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_NUMBER = re.compile(r"([-+]?\d[^\[]*|-?)$")


class Console:
    """Prints to a stream; `quiet` prints nothing at all.

    Args:
        quiet: for `--json` and for use from programs.
        stream: standard output where not given.
    """

    def __init__(self, quiet: bool = False, stream: IO[str] | None = None) -> None:
        stream = stream or sys.stdout
        self._rich = RichConsole(file=stream, quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether a person is looking."""
        return self._rich.is_terminal

    def step(self, number: int, title: str) -> None:
        """Announces one of the five steps."""
        self.line(f"\n{number}/5 {title}", "bold")

    def line(self, text: str, style: str | None = None) -> None:
        """Prints one line; the text is shown as it is, never read as markup."""
        self._rich.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.line(f"  ! {text}", "yellow")

    def finding(self, text: str, level: str) -> None:
        """Prints what a check has found: a warning, or something to know."""
        if level == "warning":
            self.warn(text)
        else:
            self.line(f"  - {text}")

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]], bold: int | None = None) -> None:
        """Prints a table, no cell cut, columns of numbers to the right; `bold` is the number of a row to stress."""
        rows = list(rows)
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        for column, heading in enumerate(headings):
            numbers = all(_NUMBER.match(row[column]) for row in rows)
            table.add_column(Text(heading), justify="right" if numbers else "left", no_wrap=True)
        for number, row in enumerate(rows):
            table.add_row(*map(Text, row), style="bold" if number == bold else None)
        width = self._rich.width
        self._rich.width = 10_000  # a line that is too long wraps
        self._rich.print(table, soft_wrap=False)
        self._rich.width = width

    def begin(self, title: str, total: int) -> None:
        """Begins a progress bar."""
        self.finish()
        if not self.is_terminal:
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._rich, transient=True)
        self._progress.start()
        self._task = self._progress.add_task(title, total=total)

    def advance(self, done: int) -> None:
        """Moves the progress bar to `done`."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    @contextmanager
    def watch(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Shows a progress bar of work that tells how much is done, of how much; below one that is there already."""
        around, inside = self._progress, None

        def told(done: int, total: int) -> None:
            nonlocal inside
            if around is None:
                if self._progress is None:
                    self.begin(title, total)
                self.advance(done)
                return
            inside = around.add_task(title, total=total) if inside is None else inside
            around.update(inside, completed=done)

        try:
            yield told
        finally:
            if around is None:
                self.finish()
            elif inside is not None:
                around.remove_task(inside)

    def finish(self) -> None:
        """Takes the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def count(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def memory(number: int | None) -> str:
    """Bytes in MiB or GiB; a dash where they were not measured."""
    if number is None:
        return "-"
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def seconds(number: float) -> str:
    """Seconds, or minutes where they are many."""
    return f"{number:.1f} s" if number < 100 else f"{int(number // 60)} min {int(number % 60):02d} s"


def number(value: float, digits: int = 3, sign: str = "") -> str:
    """A score or an error: 0.912; 1,235; 1.515e+12. More digits of a large number say nothing, and fill the line.

    Args:
        value: the number.
        digits: behind the point, where it is not large.
        sign: "+" where positive ones are to have one too.
    """
    if abs(value) >= 1e7:
        return f"{value:{sign}.4g}"
    return (
        f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{round(value, digits) + 0.0:{sign}.{digits}f}"
    )  # no -0.000


def pairs(names: dict[str, str]) -> str:
    """text = message, label = intent."""
    return ", ".join(f"{name} = {other}" for name, other in names.items())


def interval(metric: dict[str, float], digits: int = 3, sign: str = "") -> str:
    """0.912 [0.880, 0.938]."""
    value, low, high = (number(metric[key], digits, sign) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
