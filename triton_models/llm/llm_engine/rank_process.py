"""`python -m llm_engine.rank_process`: a rank beside the first, started by the first or by its node.

It answers when it has loaded, is told then where ranks meet, and answers again when it is ready: with an empty text, or
with what is wrong. Steps follow. It ends when its connection does.
"""

import dataclasses
import json
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection

import torch

from .config import EngineConfig
from .errors import EngineBroken, ModelLoadError
from .orders import row_works, unpacked
from .rank import LoadedRank, Rank
from .ranks import Group, store_at


def main() -> int:
    """Serve until the first rank is gone; 1 where it is lost in the middle of a step."""
    connection = Connection(int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    config, rank = EngineConfig(**settings["config"]), settings["rank"]
    # What a keyboard or a supervisor sends reaches all ranks; the others leave when the first has left.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        loaded = LoadedRank(config, rank)
    except (ModelLoadError, OSError) as error:
        _answer(connection, str(error))
        return 1
    try:
        _answer(connection, "")
        ready = loaded.ready(_group(connection, loaded, settings["address"]))
        _answer(connection, "")
        _serve(connection, ready)
    except ModelLoadError as error:
        _answer(connection, str(error))
        return 1
    except EngineBroken as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (EOFError, OSError):
        return 0
    return 0


def _answer(connection: Connection, fault: str) -> None:
    connection.send_bytes(fault.encode())


def _group(connection: Connection, loaded: LoadedRank, address: str) -> Group:
    """The rank among the others, once it is told where they meet."""
    order, meeting = unpacked(connection.recv_bytes())
    assert order == "meet", order
    timeout = timedelta(seconds=loaded.config.collective_timeout_seconds)
    return Group(
        store_at(meeting, loaded.config.tensor_parallel_size, timeout),
        loaded.rank,
        column_counts=loaded.column_counts(),
        device=loaded.device,
        timeout=timeout,
        address=address,
    )


def _serve(connection: Connection, rank: Rank) -> None:
    while True:
        order, *arguments = unpacked(connection.recv_bytes())
        if order == "clear":
            rank.clear(*arguments)
            continue
        works, sample_rows = arguments
        rows = torch.tensor(sample_rows, dtype=torch.int64)
        step = rank.lay_out(row_works(works))
        rank.forward(dataclasses.replace(step, sample_rows=rows.to(step.positions.device)))


if __name__ == "__main__":
    sys.exit(main())
