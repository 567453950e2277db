"""How outputs become Triton's responses: one sequence a request, or many inside a subscription.

With `model.py` and `metrics.py` the only module that knows Triton. A response sender may be used by one thread at a
time; what is sent after the final flag is dropped here, because Triton raises for it.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tensors import bundle_arrays, output_arrays

from llm_engine import EngineLoad, SequenceOutput


class SequenceChannel:
    """Answers one request with its own sequence; the last output is the final response."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, outputs: list[SequenceOutput], load: EngineLoad) -> None:
        """Sends the sequence's output."""
        for output in outputs:
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if output.finish_reason else 0
            self._sender.send(_response(output_arrays(output, load)), flags=flags)

    def is_cancelled(self) -> bool:
        """Whether the request was cancelled, or its connection is gone."""
        return self._sender.is_cancelled()


class BundleChannel:
    """A subscription: each response carries outputs of all its sequences."""

    def __init__(self, sender: Any, name: str) -> None:
        self.name = name
        self._sender = sender
        self._lock = threading.Lock()
        self._ended = False

    def send(self, outputs: list[SequenceOutput], load: EngineLoad) -> None:
        """Sends the outputs as one response; one without outputs says that the subscription is open."""
        response = _response(bundle_arrays(outputs, load))
        with self._lock:
            if not self._ended:
                self._sender.send(response)

    def is_cancelled(self) -> bool:
        """Whether the subscription was cancelled, or its connection is gone."""
        return not self._ended and self._sender.is_cancelled()

    def end(self) -> None:
        """Ends the subscription with an empty final response."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _response(arrays: dict[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])
