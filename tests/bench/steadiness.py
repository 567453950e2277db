"""How steady the machine is by itself: what each core computes in 10 ms while nothing else runs.

A virtual machine may be given less than its cores, for tens of milliseconds at a time, and shows it nowhere: programs
just take longer. What is measured in milliseconds is to be read beside that.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

WINDOW_SECONDS: Final = 0.01
SECONDS: Final = 6.0
SLOW_SHARE: Final = 0.5
"""A window is slow in which a core does less than this share of its median."""


def steadiness(seconds: float = SECONDS) -> str:
    """Keeps every core busy for so long, and says how steadily it computed."""
    argv = [sys.executable, __file__, str(seconds)]
    cores = sorted(os.sched_getaffinity(0))
    running = [subprocess.Popen([*argv, str(core)], stdout=subprocess.PIPE) for core in cores]
    counts = [json.loads(each.communicate()[0]) for each in running]
    slow = [slow_windows(each) for each in counts]
    share = sum(map(sum, slow)) / sum(map(len, slow))
    longest = max(map(longest_run, slow))
    return (
        f"the cores alone: {share:.1%} of the time below half of their usual speed, "
        f"at most {1000 * WINDOW_SECONDS * longest:.0f} ms in a row"
    )


def slow_windows(counts: Sequence[int]) -> list[bool]:
    """For each window of one core, whether little was done in it."""
    usual = statistics.median(counts)
    return [count < SLOW_SHARE * usual for count in counts]


def longest_run(slow: Sequence[bool]) -> int:
    """The most slow windows one after the other."""
    return max((len(list(run)) for is_slow, run in itertools.groupby(slow) if is_slow), default=0)


def _work(seconds: float, core: int) -> list[int]:
    """What was done in each window, in units of their own."""
    os.sched_setaffinity(0, [core])
    counts = [0] * (int(seconds / WINDOW_SECONDS) + 1)
    began_at = time.perf_counter()
    while (elapsed := time.perf_counter() - began_at) < seconds:
        counts[int(elapsed / WINDOW_SECONDS)] += 1
    return counts[1:-1]


if __name__ == "__main__":
    print(json.dumps(_work(float(sys.argv[1]), int(sys.argv[2]))))
