"""How every service's process begins and ends: settings, logs, event loop, and one clear line when it cannot start."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import msgspec
import uvloop

from tidegate.common import logs
from tidegate.common.settings import SettingsError, load

FAILED: Final = 1
BAD_SETTINGS: Final = 2
"""Exit statuses; a supervisor need not try again after the second."""

GC_THRESHOLDS: Final = (10_000, 10, 10)
"""New objects that make the collector look at the young ones, and how often that makes it look at older ones. All
waits while it looks at everything; what a request makes is freed by reference counts, so it may look seldom."""

_Settings = TypeVar("_Settings", bound=msgspec.Struct)


def run(
    section: str,
    settings_type: type[_Settings],
    serve: Callable[[_Settings], Coroutine[Any, Any, int]],
    *,
    start_errors: tuple[type[Exception], ...] = (),
) -> int:
    """Runs a service until it ends by itself; answers the process's exit status.

    Args:
        section: of the settings; also the service's name in its log lines. The settings have a `log_level`.
        serve: builds the service and serves; answers the exit status.
        start_errors: what it raises, beside OSError, when it cannot start; their messages are told as they are.
    """
    try:
        settings = load(settings_type, section)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS
    _quieten_collector()
    logs.configure(section, level=getattr(settings, "log_level"))  # noqa: B009 - a struct's type does not say it.
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(settings))
    except (OSError, *start_errors) as error:
        print(f"tidegate.{section}: {error}", file=sys.stderr)
        return FAILED


def _quieten_collector() -> None:
    """What the modules made stays for ever, and need not be looked at."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
