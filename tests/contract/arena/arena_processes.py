"""What the killed processes of the arena's tests do: `python arena_processes.py writer|reader REGION`."""

from __future__ import annotations

import itertools
import random
import sys
import time

from tidegate.common.arena import Arena
from tidegate.v1 import tensor_pb2

REGION_BYTES = 4 << 20
KEPT_COUNT = 20


def main() -> None:
    """Does one role until it is killed."""
    {"writer": write_for_ever, "reader": read_for_ever}[sys.argv[1]](sys.argv[2])


def write_for_ever(region: str) -> None:
    """Keeps the first pieces, whose handles it prints, and then writes and releases others without a pause."""
    arena = Arena.open(region, REGION_BYTES)
    rng = random.Random(0)
    for number in itertools.count():
        data = number.to_bytes(8, "little") * rng.randint(1, 4000)
        handle = arena.write(data, lease_seconds=600, now=time.monotonic())
        assert handle is not None
        if number < KEPT_COUNT:
            print(number, handle.SerializeToString().hex(), flush=True)
        else:
            arena.release(handle)


def read_for_ever(region: str) -> None:
    """Reads handles from stdin, and checks, renews and releases them as fast as it can."""
    arena = Arena.attach(region)
    for line in sys.stdin:
        number, encoded = line.split()
        handle = tensor_pb2.SharedMemoryHandle.FromString(bytes.fromhex(encoded))
        now = time.monotonic()
        assert arena.read(handle, now)[:8] == int(number).to_bytes(8, "little")
        assert arena.renew(handle, 120, now)
        print(number, arena.release(handle), flush=True)


if __name__ == "__main__":
    main()
