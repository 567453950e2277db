"""The table that a benchmark prints: each row's figure beside its bound, and whether all of them hold."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured promise."""

    name: str
    figure: float
    bound: float
    unit: str
    at_most: bool
    detail: str = ""
    aim: float | None = None
    """What is wanted beyond the bound, where something is."""

    @property
    def holds(self) -> bool:
        """Whether the figure keeps the bound."""
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound


@dataclass
class Table:
    """The rows of one benchmark, in the order in which they were measured."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def at_most(
        self, name: str, figure: float, bound: float, unit: str, detail: str = "", *, aim: float | None = None
    ) -> None:
        """Adds and prints a row whose figure must not exceed the bound."""
        self._add(Row(name, figure, bound, unit, True, detail, aim))

    def at_least(
        self, name: str, figure: float, bound: float, unit: str, detail: str = "", *, aim: float | None = None
    ) -> None:
        """Adds and prints a row whose figure must reach the bound."""
        self._add(Row(name, figure, bound, unit, False, detail, aim))

    def note(self, text: str) -> None:
        """Adds a line below the table, for what was not measured; the same one only once."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"  note: {text}", flush=True)

    def finish(self, json_path: Path | None = None) -> int:
        """Prints the table; returns the exit status: 1 if a row does not hold, or nothing was measured or noted."""
        print(f"\n{self.title}\n{machine()}\n")
        print("| | measured | bound | holds | how |\n| --- | --- | --- | --- | --- |")
        for row in self.rows:
            sign = "≤" if row.at_most else "≥"
            aim = "" if row.aim is None else f", aim {row.aim:.4g}"
            print(
                f"| {row.name} | {row.figure:.4g} {row.unit} | {sign} {row.bound:.4g} {row.unit}{aim} "
                f"| {'yes' if row.holds else 'NO'} | {row.detail} |"
            )
        for text in self.notes:
            print(f"\n{text}")
        if json_path is not None:
            rows = [asdict(row) for row in self.rows]
            content = {"title": self.title, "machine": machine(), "rows": rows, "notes": self.notes}
            json_path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        held = sum(row.holds for row in self.rows)
        print(f"\n{held} of {len(self.rows)} rows hold")
        return 0 if held == len(self.rows) and (self.rows or self.notes) else 1

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"  {'ok  ' if row.holds else 'FAIL'} {row.name}: {row.figure:.4g} {row.unit}  {row.detail}", flush=True)


def machine() -> str:
    """The machine in words: cores, processor, memory, Python."""
    cores = text = memory = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            text = line.partition(":")[2].strip()
            cores += "."
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal"):
            memory = f"{int(line.split()[1]) / 1024**2:.0f} GiB"
    return f"{len(cores)} cores of {text}, {memory}, Python {platform.python_version()}, {platform.system()}"
