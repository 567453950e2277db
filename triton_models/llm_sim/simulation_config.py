"""Every setting of the simulated engine, with its unit and bound.

Invariants: a config that exists is valid; it never changes. A preset gives values; what is given by itself wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from service_time import PRESETS, ServiceTime

DEFAULT_PRESET = "h200-70b"


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """The settings of one simulated engine; ValueError names everything that is wrong, at once."""

    model_path: str
    """A GGUF file or a Hugging Face folder, for the vocabulary and the context; its weights are not read."""
    sim_preset: str
    """Which engine is imitated: one of PRESETS."""
    base_step_seconds: float
    """What a step takes whatever it computes. 0.0001 to 60: an engine that costs nothing would spin."""
    seconds_per_sequence: float
    """What each decoded token adds to a step. 0 to 60."""
    seconds_per_prefill_token: float
    """What each prompt token adds to a step. 0 to 60."""
    max_sequences: int
    """Sequences that run at once."""
    kv_block_count: int
    """KV blocks of all sequences together."""
    step_token_budget: int
    """Tokens computed in one step; it bounds how long a prompt can stall the running decodes."""
    step_stretch: float = 0.0
    """As `llm`'s: a step with a prompt's piece takes at most so many times as long as a wide batch's decodes alone.
    More than 1, to 100; 0 is without bound, as the engines that presets imitate are."""
    max_waiting: int = 64
    """Sequences held beyond `max_sequences`; past this, `add` refuses."""
    max_context_tokens: int | None = None
    """Prompt and output together, in tokens; None takes the model file's own bound."""
    block_token_count: int = 16
    """Tokens in a KV block."""
    answer_tokens_median: float = 0.0
    """Where answers end by themselves, in tokens, drawn from the prompt; 0: never before max_tokens."""
    answer_tokens_sigma: float = 1.0
    """The spread of these lengths: the standard deviation of their logarithm. 0 to 10."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("simulated engine settings: " + "; ".join(problems))

    @property
    def service_time(self) -> ServiceTime:
        """What a step costs."""
        return ServiceTime(
            base_step_seconds=self.base_step_seconds,
            seconds_per_sequence=self.seconds_per_sequence,
            seconds_per_prefill_token=self.seconds_per_prefill_token,
        )

    def _problems(self) -> Iterator[str]:
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                yield f"{name} is {value!r}, expected {least:g} to {most:g}"
        if 0 < self.step_stretch <= 1:
            yield f"step_stretch is {self.step_stretch!r}, expected 0 (no bound), or more than 1"
        if self.step_token_budget < self.max_sequences:
            yield (
                f"step_token_budget is {self.step_token_budget}, expected at least max_sequences"
                f" ({self.max_sequences}), so that no running sequence misses a step"
            )


def with_preset(given: Mapping[str, object]) -> SimulationConfig:
    """The settings given, over those of the preset that they name.

    Raises:
        ValueError: no such preset, or values out of their bounds.
    """
    name = given.get("sim_preset", DEFAULT_PRESET)
    if name not in PRESETS:
        raise ValueError(f"sim_preset is {name!r}, expected one of {', '.join(PRESETS)}")
    values = {**PRESETS[str(name)], **given, "sim_preset": name}
    if "step_token_budget" not in given:
        # More sequences than the preset's need more tokens a step.
        values["step_token_budget"] = max(int(str(values["step_token_budget"])), int(str(values["max_sequences"])))
    return SimulationConfig(**values)  # type: ignore[arg-type]


_BOUNDS = (
    ("base_step_seconds", 1e-4, 60),
    ("seconds_per_sequence", 0, 60),
    ("seconds_per_prefill_token", 0, 60),
    ("max_sequences", 1, 65_536),
    ("kv_block_count", 1, 1 << 24),
    ("step_token_budget", 1, 1 << 20),
    ("step_stretch", 0, 100),
    ("max_waiting", 0, 1_000_000),
    ("max_context_tokens", 2, 1 << 24),
    ("block_token_count", 1, 1024),
    ("answer_tokens_median", 0, 1 << 20),
    ("answer_tokens_sigma", 0, 10),
)
