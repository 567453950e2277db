"""A model for Triton's Python backend: requests to the engine's thread, outputs to Triton's responses.

The models `llm` and `llm_sim` differ only in the engine that they construct. The one door to Triton on this side.
Invariants: `execute` never waits for the engine; every request gets a final response; a refusal is a response with
finish reason `error` and `REASON: message` in the output `error`.
config.pbtxt names the tensors. Commands (the input `command`):

- `generate`, the default: the outputs come as responses of this request, the last one with a finish reason; or, with
  `subscription`, inside the responses of that subscription, and this request ends without any.
- `subscribe`: this request stays open, and each of its responses carries what one step or some gave all of its
  sequences. That is one message a step at most, not one a token. Closing it, or its connection, cancels its sequences.
- `cancel`: ends the sequence named by `target_request_id`; it ends with finish reason `cancelled`.
- `load`: answers with `engine_load` at once; an engine that is broken answers with an error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from channels import BundleChannel, SequenceChannel
from client_watch import ClientWatch
from engine_settings import stream_interval
from engine_thread import ENGINE_UNAVAILABLE, SHUTTING_DOWN, Engine, EngineThread, Unavailable
from metrics import LoadMetrics
from outbox import Channel
from server_watch import call_on_terminate, end_with_server
from tensors import error_arrays, load_array, sequence_request, text

from llm_engine import RequestRefused

CLOSE_SECONDS = 2.0

MAX_SUBSCRIPTION_COUNT = 64
"""Clients that keep a subscription open; a mesh has one a model service."""

SWITCH_SECONDS = 1e-4
"""How long a thread keeps Python to itself when another one wants it.

Python's own 5 ms are much of a step: what the step before gave would leave when all cores compute again.
"""

UNLOAD_SECONDS = 0.25
"""Time for Triton to take note that a broken model asks to be unloaded."""

END_SECONDS = 10.0
"""After which a broken model ends however far it came: more than it takes when the server answers."""

BROKEN_EXIT_STATUS = 70


class TritonModel(ABC):
    """Triton's interface: initialize, execute, finalize."""

    @abstractmethod
    def load_engine(self, parameters: Mapping[str, str], environment: Mapping[str, str]) -> Engine:
        """The engine to serve, by config.pbtxt's parameters and TIDEGATE_ENGINE_* of the environment."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model; an exception here is Triton's reason not to be ready."""
        end_with_server(Path("/proc/self/cmdline").read_bytes().decode().split("\0"))
        sys.setswitchinterval(SWITCH_SECONDS)
        started = time.monotonic()
        self._name = args["model_name"]
        self._ending = threading.Lock()
        parameters = json.loads(args["model_config"]).get("parameters", {})
        texts = {name: value["string_value"] for name, value in parameters.items()}
        interval_seconds = stream_interval(texts, os.environ)
        engine = self.load_engine(texts, os.environ)
        self._log(f"loaded {engine.model_info} in {time.monotonic() - started:.1f} s")
        self._subscriptions: dict[str, BundleChannel] = {}
        self._thread = EngineThread(
            engine, on_broken=self._end_broken, log=self._log_error, stream_interval_seconds=interval_seconds
        )
        self._watch = ClientWatch(
            self._thread,
            channels=self._open_channels,
            on_gone=self._drop,
            on_load=LoadMetrics(self._name).show,
            on_hung=self._end_broken,
            log=self._log_error,
        )
        engine.watch(self._end_broken)
        call_on_terminate(self._end_work)

    def execute(self, requests: list[Any]) -> None:
        """Takes requests; their responses come later, from other threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except RequestRefused as refused:
                self._refuse(sender, refused.reason, refused.message)
            except Unavailable as unavailable:
                self._refuse(sender, ENGINE_UNAVAILABLE, str(unavailable))
            except Exception as error:  # One bad request must not end the model.
                self._log_error(f"request {request.request_id()!r}: {error!r}")
                self._refuse(sender, "INTERNAL_ERROR", repr(error))

    def finalize(self) -> None:
        """Ends the threads."""
        self._end_work()
        self._watch.close(CLOSE_SECONDS)

    def _take(self, request: Any, sender: Any) -> None:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        command = text(arrays, "command", "generate")
        if command == "generate":
            self._generate(request.request_id(), arrays, sender)
        elif command == "subscribe":
            self._subscribe(request.request_id(), sender)
        elif command == "cancel":
            self._cancel(text(arrays, "target_request_id"), sender)
        elif command == "load":
            self._answer_load(sender)
        else:
            raise RequestRefused(
                "INVALID_VALUE", f"command is {command!r}, expected generate, subscribe, cancel or load"
            )

    def _generate(self, request_id: str, arrays: dict[str, np.ndarray], sender: Any) -> None:
        name = text(arrays, "subscription")
        if not name:
            self._thread.submit(sequence_request(request_id, arrays), SequenceChannel(sender))
            return
        channel = self._subscriptions.get(name)
        if channel is None:
            raise RequestRefused("INVALID_VALUE", f"subscription {name!r} is not open")
        sequence = sequence_request(request_id, arrays)
        if sequence.sampling.logprobs is not None:
            raise RequestRefused("INVALID_VALUE", "logprobs do not travel in a subscription; leave out one of the two")
        self._thread.submit(sequence, channel)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _subscribe(self, request_id: str, sender: Any) -> None:
        self._thread.require_available()
        if not request_id or request_id in self._subscriptions:
            raise RequestRefused("INVALID_VALUE", f"subscription {request_id!r} needs a request id of its own")
        if len(self._subscriptions) >= MAX_SUBSCRIPTION_COUNT:
            raise RequestRefused("QUEUE_FULL", f"{MAX_SUBSCRIPTION_COUNT} subscriptions are open")
        channel = BundleChannel(sender, request_id)
        channel.send([], self._thread.load)
        self._subscriptions[request_id] = channel

    def _cancel(self, request_id: str, sender: Any) -> None:
        self._thread.cancel(request_id)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer_load(self, sender: Any) -> None:
        self._thread.require_available()
        tensor = pb_utils.Tensor("engine_load", load_array(self._thread.load))
        sender.send(pb_utils.InferenceResponse([tensor]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _open_channels(self) -> set[Channel]:
        return self._thread.channels() | set(self._subscriptions.values())

    def _drop(self, channel: Channel) -> None:
        """Ends the sequences of a client that is gone, and its subscription."""
        self._thread.cancel_channel(channel)
        if isinstance(channel, BundleChannel):
            self._subscriptions.pop(channel.name, None)
            channel.end()

    def _end_work(self, reason: str = SHUTTING_DOWN) -> None:
        """Ends the sequences and the subscriptions; what comes now is refused."""
        self._thread.close(CLOSE_SECONDS, reason)
        for channel in list(self._subscriptions.values()):
            channel.end()

    def _refuse(self, sender: Any, reason: str, message: str) -> None:
        load = self._thread.load
        tensors = [pb_utils.Tensor(name, array) for name, array in error_arrays(reason, message, load).items()]
        sender.send(pb_utils.InferenceResponse(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _end_broken(self, message: str) -> None:
        """Has Triton call this model not ready, and ends this process; the first caller does, others return.

        Triton goes on calling a model ready whose process has ended, unless it was asked to unload it before.
        """
        if not self._ending.acquire(blocking=False):
            return
        # Triton's Python backend waits for the server's answers without giving Python away: this needs no Python.
        faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=2)
        self._log_error(f"the engine is broken, ending the model: {message}")
        self._end_work(message)
        try:
            pb_utils.unload_model(self._name)
        except pb_utils.TritonModelException as error:
            self._log_error(f"cannot unload the model: {error}")
        time.sleep(UNLOAD_SECONDS)
        os._exit(BROKEN_EXIT_STATUS)

    def _log(self, message: str) -> None:
        pb_utils.Logger.log_info(message)

    def _log_error(self, message: str) -> None:
        pb_utils.Logger.log_error(message)
