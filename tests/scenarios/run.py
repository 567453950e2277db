"""Runs scenarios of the simulator and prints their figures: `python tests/scenarios/run.py [NAME...] [--length N]`."""

from __future__ import annotations

import argparse
import logging
import sys
import time

import structlog
from simulation.scenarios import SCENARIOS


def main() -> int:
    """Prints a line a figure; 99 where one misses its bound."""
    parser = argparse.ArgumentParser(description="Scenarios of overload, in simulated time.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}; all where none is given")
    parser.add_argument("--length", type=float, default=1.0, help="times the length that the tests use")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in SCENARIOS]
    if unknown:
        parser.error(f"there is no scenario {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    missed = 0
    for name in arguments.names or SCENARIOS:
        begun_at = time.perf_counter()
        figures = SCENARIOS[name](arguments.length, arguments.seed)
        print(f"{name}  ({time.perf_counter() - begun_at:.1f} s)", flush=True)
        for figure in figures:
            missed += not figure.holds
            mark = "" if figure.holds else "  missed"
            print(f"  {figure.name:<36}{figure.value:>12.4g}  {figure.bound:<9}{mark}", flush=True)
    return 99 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
