"""The lite model: replicas of a smaller model, for standard requests that the others have no time for. Pure.

A standard request goes there

- by name, where it asks for that model;
- by its length, where its prompt is short enough to prefer it always (off by default);
- by load: in the brownout's step for it, while no other replica is ready, and whenever it would be refused otherwise.

Nothing waits for the lite model here. A request that is sent there by its length or by load takes a credit that is in
hand, or goes the usual way; one that asks for the model by name goes without a credit if need be, and its replica lets
it wait or refuses it. Seconds are monotonic.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from tidegate.common import headers
from tidegate.scheduler.placement import Placement
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import ReplicaTable
from tidegate.scheduler.request import Request, ServiceClass

TOKEN_RATIO: Final = 1.5
"""Another vocabulary may take so many times the tokens for the same text."""

TEMPLATE_TOKENS: Final = 64
"""And its chat template so many more."""


class Why(enum.Enum):
    """Why a request goes to the lite model, as headers and metrics say it."""

    NAME = headers.LITE_BY_NAME
    PROMPT = "prompt"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class Lite:
    """The lite model and its replicas.

    Args:
        model_name: by which clients ask for it; empty where there is none.
        prompt_token_limit: prompts of at most so many tokens prefer it; 0: none do.
    """

    model_name: str
    prompt_token_limit: int
    table: ReplicaTable
    placer: Placer

    @property
    def is_there(self) -> bool:
        """Whether one is configured."""
        return bool(self.model_name)

    def is_named(self, request: Request) -> bool:
        """Whether a prepared request asks for this model."""
        return self.is_there and request.model == self.model_name

    def is_preferred(self, request: Request) -> bool:
        """Whether a prepared request is to go there however little there is to do."""
        return request.prompt_token_count <= self.prompt_token_limit and self._can_read(
            request, request.answer_token_count
        )

    def may_help(self, request: Request, now: float) -> bool:
        """Whether a request of which only the headers are known could go there now."""
        return self.is_there and request.named_class in (None, ServiceClass.STANDARD) and self.placer.can_place(now)

    def place(self, request: Request, answer_token_count: int, now: float) -> Placement | None:
        """Spends a credit there on a prepared request; None where none can be spent, or where it cannot answer it.

        Args:
            answer_token_count: as expected of this model.
        """
        if not (self.is_named(request) or self._can_read(request, answer_token_count)):
            return None
        return self.placer.place(answer_token_count, now)

    def put_back(self, placement: Placement) -> None:
        """Takes back the credit of a request that was placed and not sent."""
        self.placer.put_back(placement)

    def _can_read(self, request: Request, answer_token_count: int) -> bool:
        """Whether a standard request that asks for another model can be answered there as it is."""
        if not self.is_there or not request.is_portable or request.service_class is not ServiceClass.STANDARD:
            return False
        limits = [replica.load.max_context_tokens for replica in self.table if replica.load is not None]
        need = TOKEN_RATIO * request.prompt_token_count + TEMPLATE_TOKENS + answer_token_count
        return need <= min(limits, default=0)
