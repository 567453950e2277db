"""How much of prompts a step may compute beside running answers, so that they do not wait long for it.

Owns the estimate of what a step costs. Pure: times come in. A step's seconds are taken as those of its decodes alone
plus so much for each token of a prompt; both are followed as they change. What a step may take goes by the decodes of a
wide batch: a stream's pace in it is what everybody may get anyhow, and while few decode, prompts that came together
would wait for each other's small pieces. Invariants: a prompt always goes on, by LEAST_TOKENS a step; where nothing
decodes, or no wide batch was seen yet, a step has no bound of this kind.
"""

LEAST_TOKENS = 16
"""Fewer cost nearly as much, since the weights are read all the same."""
_WEIGHT_OF_NEW = 0.4


class StepPacer:
    """Bounds the tokens of prompts in a step by the time that they take."""

    def __init__(self, stretch: float, *, wide_count: int) -> None:
        """`stretch`: how many times as long as a wide batch's decodes alone a step may take; 0 is without bound.

        A batch is wide from `wide_count` decodes on.
        """
        self._stretch, self._wide_count = stretch, wide_count
        self._seconds_of_decodes: float | None = None
        self._seconds_of_wide: float | None = None
        self._seconds_of_prompt_token: float | None = None

    def prompt_token_bound(self, decode_count: int) -> int | None:
        """How many tokens of prompts a step may have beside so many decodes; None is any number."""
        if not self._stretch or not decode_count:
            return None
        if self._seconds_of_decodes is None or self._seconds_of_wide is None or not self._seconds_of_prompt_token:
            return None
        spare = self._stretch * self._seconds_of_wide - self._seconds_of_decodes
        return max(LEAST_TOKENS, round(spare / self._seconds_of_prompt_token))

    def observe(self, decode_count: int, prompt_token_count: int, seconds: float) -> None:
        """Learn from a step that was computed."""
        if not prompt_token_count:
            self._seconds_of_decodes = _moved(self._seconds_of_decodes, seconds)
            if decode_count >= self._wide_count:
                self._seconds_of_wide = _moved(self._seconds_of_wide, seconds)
            return
        if not decode_count:
            beside = 0.0
        elif self._seconds_of_decodes is not None:
            beside = min(self._seconds_of_decodes, seconds)
        else:
            return
        each = (seconds - beside) / prompt_token_count
        self._seconds_of_prompt_token = _moved(self._seconds_of_prompt_token, each)


def _moved(known: float | None, new: float) -> float:
    return new if known is None else known + _WEIGHT_OF_NEW * (new - known)
