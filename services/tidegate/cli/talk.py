"""How the command line speaks: talk and progress to stderr, data to stdout, colours only on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Final

from rich.console import Console
from rich.text import Text

MARKS: Final = {"ok": ("√", "green"), "warning": ("‼", "yellow"), "failed": ("×", "red")}
"""As linkerd's check has them."""

WIDTH_OF_FILES: Final = 240
"""Columns of tables that go to a file or a pipe, so that nothing in them is cut."""

LONGEST_PROMPT_BYTES: Final = 16 * 1024 * 1024

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_STATUS_BASE: Final = 64
"""Plus the gRPC code, when the server answered with a status."""
EXIT_INTERRUPTED: Final = 130


def err() -> Console:
    """Where talk goes. Lines are not folded, so that what is not a terminal gets them whole."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False)


def out() -> Console:
    """Where data goes. What is not a terminal is as wide as the data."""
    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    return Console(highlight=False, soft_wrap=True, emoji=False, markup=False, width=width)


def fail(message: str) -> None:
    """Says what went wrong; a line each where there are several."""
    console = err()
    for line in message.splitlines():
        console.print(Text("error: ", style="bold red") + Text(line))


class Steps:
    """Tells the steps of a start, each with its time, and on a terminal what is being waited for."""

    def __init__(self) -> None:
        self._console = err()
        self._started_at = time.monotonic()
        self._said_at = self._started_at
        self._status = self._console.status("") if self._console.is_terminal else None

    @property
    def elapsed_seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started_at

    def done(self, what: str, seconds: float | None = None) -> None:
        """A step that is complete."""
        self._line("ok", what, f"{seconds:.1f} s" if seconds is not None else "")

    def warn(self, what: str) -> None:
        """Something that a person should know."""
        self._line("warning", what)

    def failed(self, what: str) -> None:
        """Something that went wrong."""
        self._line("failed", what)

    def detail(self, lines: list[str]) -> None:
        """Lines that belong to the step before."""
        for line in lines:
            self._console.print(Text(f"      {line}", style="dim"))

    def waiting(self, what: str, *, every_seconds: float) -> None:
        """Says what is being waited for: in place on a terminal, else a line when nothing was said for a while."""
        if self._status is not None:
            self._status.update(f"{what} ({self.elapsed_seconds:.0f} s)")
            self._status.start()
        elif time.monotonic() - self._said_at >= every_seconds:
            self._say(Text(f"[{self.elapsed_seconds:5.1f} s]   … {what}"))

    def pause(self) -> None:
        """Takes the moving line away."""
        if self._status is not None:
            self._status.stop()

    def _line(self, outcome: str, what: str, time_text: str = "") -> None:
        mark, colour = MARKS[outcome]
        line = Text()
        line.append(f"[{self.elapsed_seconds:5.1f} s] ", style="dim")
        line.append(f"{mark} ", style=colour)
        line.append(what)
        if time_text:
            line.append(f"  {time_text}", style="dim")
        self._say(line)

    def _say(self, line: Text) -> None:
        self._said_at = time.monotonic()
        self._console.print(line)


def is_interactive() -> bool:
    """Whether a person types and reads here."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def standard_input() -> str:
    """The text that comes in there, cut at LONGEST_PROMPT_BYTES; empty where there is none."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    return sys.stdin.buffer.read(LONGEST_PROMPT_BYTES).decode("utf-8", errors="replace")
