"""The exceptions that the engine raises, and the reasons that they carry.

Invariants: a message is one line and says what was found, where, and what was expected. A reason is
one upper-case word of a closed set, so that an edge can map it to a status without reading text.
"""

QUEUE_FULL = "QUEUE_FULL"
CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
INVALID_VALUE = "INVALID_VALUE"
DUPLICATE_ID = "DUPLICATE_ID"
REFUSAL_REASONS = (QUEUE_FULL, CONTEXT_LENGTH_EXCEEDED, INVALID_VALUE, DUPLICATE_ID)

NON_FINITE_LOGITS = "NON_FINITE_LOGITS"
SCHEMA_TOO_COMPLEX = "SCHEMA_TOO_COMPLEX"
SEQUENCE_ERROR_REASONS = (NON_FINITE_LOGITS, SCHEMA_TOO_COMPLEX)


class EngineError(Exception):
    """The base of every exception that the engine raises on purpose."""


class ModelLoadError(EngineError):
    """The model cannot be served as it lies on disk, or not within the settings."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class EngineBroken(EngineError):
    """The engine cannot compute any more, for good: a rank of it has died, or does not answer."""


class RequestRefused(EngineError):
    """A request was not taken; the engine's state is as it was before."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REFUSAL_REASONS, reason
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
