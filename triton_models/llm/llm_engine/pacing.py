"""How much of prompts a step may compute beside running answers, so that they do not wait long for it.

Owns the estimate of what a step costs. Pure: times come in. A step with prompts is taken to cost as much for each of
its rows as the last ones did, whichever rows are decodes: how many there are changes little from step to step, and what
is wrong with the estimate is corrected by the next. What a step may take goes by the decodes of a wide batch: a
stream's pace in it is what everybody may get anyhow, and while few decode, prompts that came together would wait for
each other's small pieces. Invariants: a prompt always goes on, by LEAST_TOKENS a step; where nothing decodes, or no
wide batch was seen yet, a step has no bound of this kind.
"""

LEAST_TOKENS = 16
"""Fewer cost nearly as much, since the weights are read all the same."""
_WEIGHT_OF_NEW = 0.2


class StepPacer:
    """Bounds the tokens of prompts in a step by the time that they take."""

    def __init__(self, stretch: float, *, wide_count: int) -> None:
        """`stretch`: how many times as long as a wide batch's decodes alone a step may take; 0 is without bound.

        A batch is wide from `wide_count` decodes on.
        """
        self._stretch, self._wide_count = stretch, wide_count
        self._seconds_of_wide: float | None = None
        self._seconds_of_row: float | None = None

    def prompt_token_bound(self, decode_count: int) -> int | None:
        """How many tokens of prompts a step may have beside so many decodes; None is any number."""
        if not self._stretch or not decode_count or self._seconds_of_wide is None or not self._seconds_of_row:
            return None
        row_count = round(self._stretch * self._seconds_of_wide / self._seconds_of_row)
        return max(LEAST_TOKENS, row_count - decode_count)

    def observe(self, decode_count: int, prompt_token_count: int, seconds: float) -> None:
        """Learn from a step that was computed."""
        if prompt_token_count:
            self._seconds_of_row = _moved(self._seconds_of_row, seconds / (decode_count + prompt_token_count))
        elif decode_count >= self._wide_count:
            self._seconds_of_wide = _moved(self._seconds_of_wide, seconds)


def _moved(known: float | None, new: float) -> float:
    return new if known is None else known + _WEIGHT_OF_NEW * (new - known)
