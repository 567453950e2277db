"""Guesses at what a sequence says next, taken from its own text: prompt lookup (Saxena, 2023).

Owns when to guess, and what. Where the newest tokens stood before, what followed them there is drafted; the step
computes it beside the newest token, and every draft that is sampled as well is a token without a step of its own
(Leviathan et al., ICML 2023). Since a draw belongs to a place in the output (`random_stream.py`), tokens are kept by
equality alone, at any temperature, and are those that single steps give. Pure. Invariants: nobody drafts beyond
`max_tokens` or the context; a sequence whose drafts are seldom right drafts once in REST_TOKENS.
"""

from .sequence import Sequence

WINDOW_TOKENS = 8192
"""How far back a text is looked through: that takes 0.1 to 0.25 ms, a step with such a context many times as long."""
REST_TOKENS = 32
_LEAST_MATCH = 2
_ENOUGH_MATCH = 4
_LEAST_GAIN = 0.5
"""Tokens that a step's drafts must bring of late to be worth their rows: on a CPU four cost 0.1 to 0.7 of a step."""
_WEIGHT_OF_NEW = 0.3


class Drafter:
    """Drafts `most_tokens` a step and sequence at most; 0 drafts nothing."""

    def __init__(self, most_tokens: int, *, context_token_count: int) -> None:
        self._most_tokens, self._context_token_count = most_tokens, context_token_count
        self.drafted_token_total = 0
        self.accepted_token_total = 0

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """What may follow a sequence's tokens, `most` tokens at most; empty where that is not worth a try."""
        sampling = sequence.request.sampling
        if (
            sampling.json_schema
            or sampling.grammar
            or sampling.logprobs is not None
            or sequence.token_count < sequence.drafts_from
        ):
            return []
        # A token follows the last draft.
        answer_left = sequence.request.max_tokens - sequence.output_token_count - 1
        context_left = self._context_token_count - sequence.token_count - 1
        most = min(most, self._most_tokens, answer_left, context_left)
        return continued(sequence.token_ids, most) if most > 0 else []

    def rests(self, sequence: Sequence) -> bool:
        """Whether nothing would be drafted once it has one more token, whichever that is."""
        return sequence.token_count + 1 < sequence.drafts_from or not self._most_tokens

    def give_up(self, sequence: Sequence) -> None:
        """Draft nothing for a sequence any more."""
        sequence.drafts_from = self._context_token_count

    def learn(self, sequence: Sequence, drafted_count: int, accepted_count: int) -> None:
        """Take note of how many drafts of a step were right."""
        self.drafted_token_total += drafted_count
        self.accepted_token_total += accepted_count
        sequence.draft_gain += _WEIGHT_OF_NEW * (accepted_count - sequence.draft_gain)
        if sequence.draft_gain < _LEAST_GAIN:
            # After the rest one try decides again.
            sequence.draft_gain = _LEAST_GAIN
            sequence.drafts_from = sequence.token_count + REST_TOKENS


def continued(token_ids: list[int], count: int) -> list[int]:
    """What followed where the newest tokens stood before, `count` tokens; empty where they did not.

    The longest match counts, and of equally long ones the latest. What is nearer than `count` is taken to repeat.
    """
    backwards = token_ids[: -WINDOW_TOKENS - 1 : -1]
    place = longest = best = 0
    while longest < _ENOUGH_MATCH:
        try:
            place = backwards.index(backwards[0], place + 1)
        except ValueError:
            break
        length = _match_length(backwards, place)
        if length > longest:
            longest, best = length, place
    if longest < _LEAST_MATCH:
        return []
    return [backwards[best - 1 - step % best] for step in range(count)]


def _match_length(backwards: list[int], place: int) -> int:
    """How many tokens from `place` on are the newest ones, as far as it matters."""
    length = 1
    while length < min(_ENOUGH_MATCH, len(backwards) - place) and backwards[place + length] == backwards[length]:
        length += 1
    return length
