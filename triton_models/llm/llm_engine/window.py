"""What a row sees of the tokens before it.

Pure. Invariant: what is hidden from a row is one stretch of tokens, and stays hidden from every later row, so that
nobody needs the keys and values of blocks inside it any more. The newest tokens with a few first ones are
StreamingLLM's (Xiao et al., 2023); rows keep the positions that they have, as they lie within the model's context.
"""

from dataclasses import dataclass

from .config import EngineConfig

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Window:
    """Rows at `begins_at` and later see the `newest` tokens, their own included, and the first `sinks`."""

    newest: int
    begins_at: int
    sinks: int

    def hidden(self, position: int) -> range:
        """The tokens before a row that it does not see."""
        return range(self.sinks, max(self.sinks, self._first_seen(position)))

    def seen_count(self, position: int) -> int:
        """How many tokens a row sees, its own included."""
        return position + 1 - len(self.hidden(position))

    def hidden_blocks(self, position: int, block_token_count: int) -> range:
        """Which of a sequence's blocks no row sees from this one on."""
        kept = -(-self.sinks // block_token_count)
        return range(kept, max(kept, self._first_seen(position) // block_token_count))

    def most_blocks(self, step_token_budget: int, block_token_count: int) -> int:
        """More blocks than this no sequence needs at once, however long it is."""
        return -(-(self.begins_at + step_token_budget) // block_token_count) + 3

    def _first_seen(self, position: int) -> int:
        """The first of the newest tokens."""
        return 0 if position < self.begins_at else position - self.newest + 1


FULL = Window(newest=_NEVER, begins_at=_NEVER, sinks=0)
"""Every row sees everything before it."""


def window_of(config: EngineConfig) -> Window:
    """What the settings say."""
    if not config.attention_window:
        return FULL
    return Window(config.attention_window, config.attention_window_from, config.attention_sinks)
