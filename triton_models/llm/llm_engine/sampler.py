"""From logits to the next token of each sequence.

Owns what is allowed, bias, penalties, temperature, truncation, the draw and the log-probabilities. Invariants: a row's
result depends on its own logits, parameters, tokens, seed and output position, never on the other
rows; a row whose logits are not finite is reported and harms no other. Order: what is allowed, logit_bias,
penalties, temperature, top_k, top_p over what top_k left, min_p, draw. Ties at a truncation's edge
are kept together. A greedy row sees no more than the first three. The log-probabilities are the
model's own, before all of these.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .random_stream import uniforms
from .request import SamplingParams
from .transfer import HostCopy, to_device

# Below this, dividing by the temperature says no more than greedy does, and overflows in the end.
GREEDY_TEMPERATURE = 1e-5
# The likeliest tokens that top_p looks at first; only a row that they do not satisfy is sorted whole.
_CANDIDATE_COUNT = 256


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What a row of logits is sampled with; `token_ids` is the prompt and then the output."""

    params: SamplingParams
    seed: int
    token_ids: list[int]
    prompt_token_count: int
    allowed: np.ndarray | None = None
    """[vocabulary_size] bool: what may come next, one token at least; None: all."""
    awaited_count: int = 0
    """Output tokens that come before the new one and are not among `token_ids` yet; not with a penalty."""

    @property
    def output_position(self) -> int:
        """The new token's place in the output, and in the seed's random stream."""
        return len(self.token_ids) + self.awaited_count - self.prompt_token_count

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.params.temperature < GREEDY_TEMPERATURE

    @property
    def biased(self) -> bool:
        """Whether the request moves some logits itself."""
        return bool(self.params.logit_bias)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A row's result; without `finite`, the rest means nothing."""

    token_id: int
    finite: bool
    logprob: float | None = None
    top_token_ids: list[int] | None = None
    top_logprobs: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Tokens that are chosen; a device may still be about it."""

    token_ids: torch.Tensor
    """[row_count] int64, where the logits were."""
    _results: HostCopy
    """[row_count, 2] int64: tokens, and whether their logits were finite."""
    _logprobs: "_Logprobs | None"

    def read(self) -> list[SampledToken]:
        """Wait for them."""
        logprobs = {} if self._logprobs is None else self._logprobs.read()
        return [
            SampledToken(token, bool(finite), *logprobs.get(index, ()))
            for index, (token, finite) in enumerate(self._results.read())
        ]


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Of the rows that ask, by their index: how many of the likeliest tokens each wants."""

    counts: dict[int, int]
    chosen: HostCopy
    values: HostCopy
    token_ids: HostCopy

    def read(self) -> dict[int, tuple[float, list[int], list[float]]]:
        """Of each row: the chosen token's log-probability, and the likeliest tokens with theirs."""
        found = zip(self.counts.items(), self.chosen.read(), self.token_ids.read(), self.values.read(), strict=True)
        return {row: (logprob, ids[:count], values[:count]) for (row, count), logprob, ids, values in found}


@torch.inference_mode()
def draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Draw:
    """Choose a token for each row of logits [row_count, vocabulary_size] fp32, which are left as they are.

    The host does not wait for a device.
    """
    finite = _finite(logits)
    if logits.is_cuda or not finite.all():
        logits = torch.where(finite[:, None], logits, 0.0)
    tokens = _chosen(_penalised(_biased(_allowed(logits, rows), rows), rows), rows)
    logprobs = _logprobs(logits, tokens, rows)
    return Draw(tokens, HostCopy(torch.stack((tokens, finite.long()), dim=1)), logprobs)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Whether all of each row is: [row_count] bool."""
    if logits.is_cuda:
        return torch.isfinite(logits).all(dim=-1)
    # A sum is finite only if all its terms are; one pass, and no mask of the vocabulary's size.
    finite = torch.isfinite(logits.sum(dim=-1))
    # That of finite terms may be too large for fp32.
    return finite if finite.all() else torch.isfinite(logits.sum(dim=-1, dtype=torch.float64))


def _chosen(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The next tokens, [row_count] int64."""
    # numpy's is six times as quick as torch's on a CPU.
    tokens = logits.argmax(dim=-1) if logits.is_cuda else torch.from_numpy(logits.numpy().argmax(axis=-1))
    drawn = _where(rows, lambda row: not row.greedy)
    if drawn:
        chosen = [rows[index] for index in drawn]
        tokens[_index(drawn, logits)] = _drawn(_rows_of(logits, drawn), chosen)
    return tokens


def _allowed(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """-inf for what may not come next; the memory is the input's if everything may."""
    bound = _where(rows, lambda row: row.allowed is not None)
    if not bound:
        return logits
    logits = logits.clone()
    for index in bound:
        forbidden = to_device(torch.from_numpy(~rows[index].allowed), logits.device)  # type: ignore[operator]
        logits[index].masked_fill_(forbidden, float("-inf"))
    return logits


def _biased(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Add what requests add themselves; the memory is the input's if none does."""
    biased = _where(rows, lambda row: row.biased)
    if not biased:
        return logits
    logits = logits.clone()
    for index in biased:
        bias = rows[index].params.logit_bias
        logits[index, _index([*bias], logits)] += _sent([*bias.values()], logits)
    return logits


def _penalised(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Apply the penalties; the memory is the input's if no row has one."""
    penalised = _where(rows, lambda row: row.params.has_penalty)
    if not penalised:
        return logits
    logits = logits.clone()
    for index in penalised:
        row = rows[index]
        everywhere = to_device(torch.from_numpy(np.unique(row.token_ids)), logits.device)
        found = logits[index, everywhere]
        penalty = row.params.repetition_penalty
        logits[index, everywhere] = torch.where(found > 0, found / penalty, found * penalty)
        output, counts = np.unique(
            np.asarray(row.token_ids[row.prompt_token_count :], dtype=np.int64), return_counts=True
        )
        taken = torch.from_numpy(row.params.frequency_penalty * counts + row.params.presence_penalty)
        taken = to_device(taken.to(logits.dtype), logits.device)
        logits[index, to_device(torch.from_numpy(output), logits.device)] -= taken
    return logits


def _drawn(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """Draw by inverting the distribution, in the vocabulary's order: [row_count] int64."""
    temperatures = _sent([row.params.temperature for row in rows], logits)
    # The largest logit at 0, so that a small temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    truncated = _where(rows, lambda row: row.params.is_truncated)
    if truncated:
        kept = _truncated(_rows_of(scaled, truncated), [rows[index] for index in truncated], sorts_all=scaled.is_cuda)
        scaled = scaled.index_copy(0, _index(truncated, logits), kept)
    floored = _where(rows, lambda row: row.params.min_p > 0.0)
    if floored:
        # The likeliest stands at 0, whatever was cut off.
        floors = _sent([math.log(rows[index].params.min_p) for index in floored], logits)[:, None]
        some = _rows_of(scaled, floored)
        scaled = scaled.index_copy(0, _index(floored, logits), some.masked_fill(some < floors, float("-inf")))
    sums = scaled.exp_().cumsum(dim=-1, dtype=torch.float64)
    numbers = uniforms([row.seed for row in rows], [row.output_position for row in rows])
    targets = to_device(torch.from_numpy(numbers), logits.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).squeeze(-1)


def _truncated(scaled: torch.Tensor, rows: list[SamplingRow], *, sorts_all: bool) -> torch.Tensor:
    """Scaled logits [row_count, vocabulary_size] fp32 with -inf where top_k or top_p cut.

    `sorts_all`: nobody is to know whether fewer than all tokens would do; the host would wait for a device to say so.
    """
    vocabulary_size = scaled.shape[-1]
    if sorts_all:
        return scaled.masked_fill(scaled < _floors(scaled, rows, vocabulary_size)[0], float("-inf"))
    width = min(vocabulary_size, max(_CANDIDATE_COUNT, *(row.params.top_k for row in rows)))
    floors, enough = _floors(scaled, rows, width)
    short = [index for index, is_enough in enumerate(enough.tolist()) if not is_enough]
    if short:
        again = [rows[index] for index in short]
        floors[_index(short, scaled)] = _floors(_rows_of(scaled, short), again, vocabulary_size)[0]
    return scaled.masked_fill(scaled < floors, float("-inf"))


def _floors(scaled: torch.Tensor, rows: list[SamplingRow], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least value that each row keeps [row_count, 1] fp32, and whether `width` candidates sufficed."""
    everything = scaled.shape[-1]
    values = scaled.topk(width, dim=-1).values
    top_k = _index([row.params.top_k or everything for row in rows], scaled)[:, None]
    top_p = _sent([row.params.top_p for row in rows], values.double())[:, None]
    ranks = torch.arange(width, device=scaled.device)
    weights = values.double().exp().masked_fill(ranks >= top_k, 0.0)
    whole = scaled.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    total = torch.where(top_k <= width, weights.sum(dim=-1, keepdim=True), whole)
    before = weights.cumsum(dim=-1) - weights
    # A token stays while those likelier than it do not yet reach top_p; the likeliest always stays.
    stays = ((before < top_p * total) | (top_p >= 1.0)) & (ranks < top_k)
    stays[:, 0] = True
    floors = values.gather(1, stays.sum(dim=-1, keepdim=True) - 1)
    enough = (top_k <= width) | (weights.sum(dim=-1, keepdim=True) >= top_p * total)
    return floors, enough.squeeze(-1) | (width == everything)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[SamplingRow]) -> _Logprobs | None:
    """For the rows that ask, if any does."""
    counts = {index: count for index, row in enumerate(rows) if (count := row.params.logprobs) is not None}
    if not counts:
        return None
    distribution = _rows_of(logits, [*counts]).log_softmax(dim=-1)
    chosen = distribution.gather(1, tokens[_index([*counts], logits)][:, None]).squeeze(-1)
    values, ids = distribution.topk(min(max(counts.values()), distribution.shape[-1]), dim=-1)
    return _Logprobs(counts, HostCopy(chosen), HostCopy(values), HostCopy(ids))


def _where(rows: Sequence[SamplingRow], holds: Callable[[SamplingRow], bool]) -> list[int]:
    return [index for index, row in enumerate(rows) if holds(row)]


def _rows_of(tensor: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Some rows of a tensor; the tensor itself where these are all."""
    return tensor if len(indices) == tensor.shape[0] else tensor[_index(indices, tensor)]


def _index(indices: list[int], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(indices, dtype=torch.int64), like.device)


def _sent(numbers: list[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(numbers, dtype=like.dtype), like.device)
