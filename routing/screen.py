"""What a person at a terminal sees. Results go to standard output, progress to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Screen:
    def __init__(self, results: Console | None = None, progress: Console | None = None) -> None:
        self._results = results or Console(highlight=False, soft_wrap=True)
        self._progress = progress or Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line of news."""
        self._progress.print(line, markup=False)

    def complain(self, text: str) -> None:
        """Why it cannot go on."""
        self._progress.print(text, markup=False, style="red")

    def result(self, text: str = "", *, end: str = "\n") -> None:
        """What was asked for, for a person or a pipe; out at once."""
        self._results.print(text, markup=False, end=end)
        self._results.file.flush()

    @contextmanager
    def starting(self, names: Sequence[str]) -> Iterator[Callable[[str], None]]:
        """A line with a clock for each name, until the given function is called with it."""
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<20}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._progress) as progress:
            rows = {name: progress.add_task(name, total=1) for name in names}
            yield lambda name: progress.advance(rows[name])
