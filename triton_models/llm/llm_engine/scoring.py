"""How likely a model holds a text: each token's log-probability after those before it.

Drives an engine that has nothing else to do, step by step, as a prompt; the numbers are those of the very code that
generates.
"""

import dataclasses

import torch

from .engine import Engine
from .request import SequenceRequest
from .step_tensors import row_works

_NAME = "scored"


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """What the model holds of one token of a text."""

    log_probability: float
    """Natural logarithm."""
    likeliest_token_id: int
    """What it would have said in its place."""


def log_probabilities(engine: Engine, token_ids: list[int]) -> list[float]:
    """Of each token but the first, natural logarithms; RequestRefused where the text does not fit the context."""
    return [score.log_probability for score in scores(engine, token_ids)]


def scores(engine: Engine, token_ids: list[int]) -> list[Score]:
    """Of each token but the first; RequestRefused where the text does not fit the context."""
    assert not engine.has_work
    engine.add(SequenceRequest(request_id=_NAME, token_ids=token_ids, max_tokens=1))
    found: list[Score] = []
    try:
        while len(found) < len(token_ids) - 1:
            found += _next_step(engine, token_ids, len(found))
    finally:
        engine.cancel(_NAME)
    return found[: len(token_ids) - 1]


def _next_step(engine: Engine, token_ids: list[int], first: int) -> list[Score]:
    """Those of the tokens that follow the step's rows."""
    plan = engine._batcher.plan()
    step = engine._rank.lay_out(row_works(plan))
    rows = torch.arange(step.token_ids.shape[0], device=step.token_ids.device)
    logits = engine._rank.forward(dataclasses.replace(step, sample_rows=rows))
    engine._batcher.commit(plan)
    assert logits is not None
    following = torch.tensor(token_ids[first + 1 : first + 1 + len(rows)], device=logits.device)
    known = logits[: len(following)].log_softmax(dim=-1)
    found = known.gather(1, following.unsqueeze(1)).squeeze(1)
    return list(map(Score, found.tolist(), known.argmax(dim=-1).tolist()))
