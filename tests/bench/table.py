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

    @property
    def holds(self) -> bool:
        """Whether the figure keeps the bound."""
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound


@dataclass
class Table:
    """The rows of one benchmark, in the order in which they were measured."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def at_most(self, name: str, figure: float, bound: float, unit: str, detail: str = "") -> None:
        """Adds and prints a row whose figure must not exceed the bound."""
        self._add(Row(name, figure, bound, unit, True, detail))

    def at_least(self, name: str, figure: float, bound: float, unit: str, detail: str = "") -> None:
        """Adds and prints a row whose figure must reach the bound."""
        self._add(Row(name, figure, bound, unit, False, detail))

    def finish(self, json_path: Path | None = None) -> int:
        """Prints the table; returns the exit status: 1 if a row does not hold."""
        print(f"\n{self.title}\n{machine()}\n")
        print("| | measured | bound | holds | how |\n| --- | --- | --- | --- | --- |")
        for row in self.rows:
            sign = "≤" if row.at_most else "≥"
            print(
                f"| {row.name} | {row.figure:.4g} {row.unit} | {sign} {row.bound:.4g} {row.unit} "
                f"| {'yes' if row.holds else 'NO'} | {row.detail} |"
            )
        if json_path is not None:
            content = {"title": self.title, "machine": machine(), "rows": [asdict(row) for row in self.rows]}
            json_path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        held = sum(row.holds for row in self.rows)
        print(f"\n{held} of {len(self.rows)} rows hold")
        return 0 if held == len(self.rows) and self.rows else 1

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
