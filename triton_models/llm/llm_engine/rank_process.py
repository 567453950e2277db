"""`python -m llm_engine.rank_process`: a rank beside the first, which starts it and gives it steps.

It answers when it has loaded, and when it is ready: with an empty text, or with what is wrong. It ends when its
connection does.
"""

import dataclasses
import json
import signal
import sys
from multiprocessing.connection import Connection

import torch
import torch.distributed as distributed

from .config import EngineConfig
from .errors import EngineBroken, ModelLoadError
from .rank import LoadedRank, Rank
from .rank_group import COLLECTIVE_TIMEOUT
from .ranks import Group


def main() -> int:
    """Serve until the first rank is gone; 1 where it is lost in the middle of a step."""
    connection = Connection(int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    config, rank = EngineConfig(**settings["config"]), settings["rank"]
    # An interrupt from the keyboard reaches all ranks; the others leave when the first has left.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loaded = LoadedRank(config, rank)
    except (ModelLoadError, OSError) as error:
        connection.send(str(error))
        return 1
    try:
        connection.send("")
        group = Group(
            distributed.FileStore(settings["meeting"], config.tensor_parallel_size),
            rank,
            column_counts=loaded.column_counts(),
            device=loaded.device,
            timeout=COLLECTIVE_TIMEOUT,
        )
        ready = loaded.ready(group)
        connection.send("")
        _serve(connection, ready)
    except ModelLoadError as error:
        connection.send(str(error))
        return 1
    except EngineBroken as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (EOFError, OSError):
        return 0
    return 0


def _serve(connection: Connection, rank: Rank) -> None:
    while True:
        order, *arguments = connection.recv()
        if order == "clear":
            rank.clear(*arguments)
            continue
        works, sample_rows = arguments
        rows = torch.tensor(sample_rows, dtype=torch.int64)
        step = rank.lay_out(works)
        rank.forward(dataclasses.replace(step, sample_rows=rows.to(step.positions.device)))


if __name__ == "__main__":
    sys.exit(main())
