"""Ends this process when the Triton server that started it is gone, and its work when it is told to end.

Triton's Python stub outlives a server that was killed or could not bind its port, and holds the model's memory and
a shared-memory region then. A process descriptor of the parent becomes readable at its death, at no cost before.

Triton waits for streams that are under way when it is told to end, and tells its models only after that. A signal to
the process group reaches the stub too, so the model can end its streams itself and Triton need not wait.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path

SHARED_MEMORY_FOLDER = Path("/dev/shm")

# The stub's command line: its program, model.py, the region's name, two sizes, the server's process id, ...
_REGION_ARGUMENT = 2
_SERVER_ARGUMENT = 5


def end_with_server(command_line: list[str]) -> bool:
    """Starts watching the server that this stub's command line names; False where it names none."""
    if len(command_line) <= _SERVER_ARGUMENT or not command_line[_SERVER_ARGUMENT].isdecimal():
        return False
    server_process_id = int(command_line[_SERVER_ARGUMENT])
    try:
        server = os.pidfd_open(server_process_id)
    except OSError:
        return False
    region = SHARED_MEMORY_FOLDER / Path(command_line[_REGION_ARGUMENT]).name
    threading.Thread(target=_wait_and_end, args=(server, region), name="server-watch", daemon=True).start()
    return True


def call_on_terminate(end_work: Callable[[], None]) -> None:
    """Calls `end_work` on a thread of its own when this process gets SIGTERM. Called in the main thread.

    The main thread waits in Triton's code, where no Python handler runs, so a descriptor tells a thread.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(reader, True)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_signal, args=(reader, end_work), name="terminate-watch", daemon=True).start()


def _wait_for_signal(reader: int, end_work: Callable[[], None]) -> None:
    while os.read(reader, 1) != bytes([signal.SIGTERM]):
        pass
    end_work()


def _wait_and_end(server: int, region: Path) -> None:
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.poll()
    region.unlink(missing_ok=True)
    os._exit(1)
