"""Rotary positions (Su et al., 2021) in the half-split order, and the ways in which a context is stretched."""

import math

import torch

from .architecture import Architecture, RopeScaling


def rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn [row_count, head_count, rope_size] by its positions; cosines and sines [row_count, 1, rope_size / 2]."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def rotary_tables(
    architecture: Architecture, context_token_count: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [context_token_count, head_dim / 2] each, computed in fp32."""
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
    frequencies = 1.0 / architecture.rope_base**exponents
    magnitude = 1.0
    if architecture.rope_scaling is not None:
        frequencies = _scaled(frequencies, architecture.rope_scaling, architecture.rope_base)
        magnitude = architecture.rope_scaling.attention_factor
    angles = torch.outer(torch.arange(context_token_count).float(), frequencies)
    return (angles.cos() * magnitude).to(device, dtype), (angles.sin() * magnitude).to(device, dtype)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Stretch rotary frequencies: all alike, or as Llama 3.1 and YaRN do, the slow ones only."""
    if scaling.kind == "linear":
        return frequencies / (scaling.factor * torch.tensor(scaling.factors or 1.0))
    if scaling.kind == "yarn":
        kept = _yarn_kept(len(frequencies), scaling, base)
    else:
        assert scaling.kind == "llama3"
        turns = scaling.original_context_token_count * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn_kept(count: int, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Which share of each of `count` frequencies stays: all of those that turn often within the original context."""

    def dimension(turns: float) -> float:
        """The pair that turns so often within the original context."""
        wavelength = scaling.original_context_token_count / (turns * 2 * math.pi)
        return count * math.log(wavelength) / math.log(base)

    first, last = dimension(scaling.fast_turns), dimension(scaling.slow_turns)
    if scaling.rounds_dimensions:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = (torch.arange(count).float() - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)
