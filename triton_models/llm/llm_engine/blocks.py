"""Weights of four and eight bits in groups that share a scale: integers, as GGUF's Q4_0, Q4_1 and Q8_0 hold them, and
floats, as DeepSeek's files do.

Owns the engine's own form of them, which loses nothing of a file's, and the rounding of other weights to eight
bits. Pure, beside torch. Invariant: a weight's value is digit * scale + offset, digits of four bits from 0 to 15
and of eight from -128 to 127; only the former have offsets. A float's is number * scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

GROUP_SIZE = 32
"""Inputs that share a scale."""


@dataclass(frozen=True)
class Blocks:
    """A matrix [output size, input size]."""

    words: torch.Tensor
    """[output size, input size * bits / 32] int32: consecutive inputs of an output, the first in the lowest bits."""
    scales: torch.Tensor
    """[output size, input size / 32] fp16"""
    offsets: torch.Tensor | None
    """Likewise; None with eight bits."""

    @property
    def bits(self) -> int:
        """Of one weight."""
        return 8 if self.offsets is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        """Output size, input size."""
        return len(self.words), self.words.shape[1] * 32 // self.bits

    @property
    def is_finite(self) -> bool:
        """Whether every value is."""
        return bool(self.scales.isfinite().all() and (self.offsets is None or self.offsets.isfinite().all()))

    def dense(self) -> torch.Tensor:
        """The values, [output size, input size] fp32."""
        if self.offsets is None:
            digits = self.words.view(torch.int8).float()
        else:
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            digits = (self.words.unsqueeze(2) >> shifts & 15).flatten(1).float()
        groups = digits.view(len(digits), -1, GROUP_SIZE).mul_(self.scales.float().unsqueeze(2))
        if self.offsets is not None:
            groups += self.offsets.float().unsqueeze(2)
        return groups.flatten(1)

    def rows(self, chosen: torch.Tensor | slice) -> "Blocks":
        """Some outputs."""
        return Blocks(*(None if part is None else part[chosen] for part in self._parts()))

    def joined(self, others: "Sequence[Blocks]") -> "Blocks":
        """Its outputs and then those of others of the same bits."""
        parts = zip(*(part._parts() for part in (self, *others)), strict=True)
        return Blocks(*(None if kind[0] is None else torch.cat(kind) for kind in parts))  # type: ignore[arg-type]

    def named(self, name: str) -> dict[str, torch.Tensor]:
        """The parts, by the names under which a file keeps them."""
        return {f"{name}.{kind}": part for kind, part in zip(_KINDS, self._parts(), strict=True) if part is not None}

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.words, self.scales, self.offsets


@dataclass(frozen=True)
class Floats8:
    """A matrix [output size, input size] of eight-bit floats (E4M3), for devices that multiply them."""

    numbers: torch.Tensor
    """[output size, input size] float8_e4m3fn"""
    scales: torch.Tensor
    """[output size, groups] fp32: each output has its own, so that outputs can change places."""
    group_size: int
    """Inputs that share a scale; the last group may be shorter."""

    bits = 8

    @property
    def shape(self) -> tuple[int, int]:
        """Output size, input size."""
        return self.numbers.shape[0], self.numbers.shape[1]

    @property
    def is_finite(self) -> bool:
        """Whether every value is; E4M3 has no infinity."""
        is_nan = self.numbers.view(torch.uint8) & 0x7F == 0x7F
        return bool(self.scales.isfinite().all()) and not is_nan.any()

    def dense(self) -> torch.Tensor:
        """The values, [output size, input size] fp32."""
        scales = self.scales.repeat_interleave(self.group_size, dim=1)
        return self.numbers.float() * scales[:, : self.shape[1]]

    def rows(self, chosen: torch.Tensor | slice) -> "Floats8":
        """Some outputs."""
        numbers = self.numbers.view(torch.uint8)[chosen].view(self.numbers.dtype)
        return Floats8(numbers, self.scales[chosen], self.group_size)

    def joined(self, others: "Sequence[Floats8]") -> "Floats8":
        """Its outputs and then those of others with the same groups."""
        parts = (self, *others)
        numbers = torch.cat([part.numbers.view(torch.uint8) for part in parts]).view(self.numbers.dtype)
        return Floats8(numbers, torch.cat([part.scales for part in parts]), self.group_size)

    def to(self, device: torch.device) -> "Floats8":
        """The same on a device."""
        return Floats8(self.numbers.to(device), self.scales.to(device), self.group_size)


Narrow = Blocks | Floats8
Weight = torch.Tensor | Blocks | Floats8

_KINDS = ("words", "scales", "offsets")


def unnamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Blocks]:
    """A file's tensors, with those together that `Blocks.named` took apart."""
    found: dict[str, torch.Tensor | Blocks] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind not in _KINDS:
            found[name] = tensor
        elif kind == "words":
            found[stem] = Blocks(tensor, tensors[f"{stem}.scales"], tensors.get(f"{stem}.offsets"))
    return found


def rounded(weight: torch.Tensor) -> Blocks | None:
    """A weight [output size, input size] rounded to eight bits; None where its rows are not whole groups."""
    if weight.ndim != 2 or weight.shape[1] % GROUP_SIZE:
        return None
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    scales = (groups.abs().amax(dim=2) / 127).half()
    # A group so small that its scale vanishes in fp16 is nothing but zeros.
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    digits = (groups * inverse.unsqueeze(2)).round_().clamp_(-127, 127).to(torch.int8)
    return Blocks(digits.flatten(1).view(torch.int32), scales, None)


def from_q4_0(raw: np.ndarray) -> Blocks:
    """GGUF's Q4_0, [output size, bytes] uint8: a scale and 16 bytes of digits, less 8, a group."""
    blocks = _grouped(raw, 18)
    scales = _halves(blocks, 0)
    # Eight times a number of fp16 is one, as long as it does not overflow.
    return Blocks(_words(blocks[:, :, 2:]), scales, scales * -8)


def from_q4_1(raw: np.ndarray) -> Blocks:
    """GGUF's Q4_1: a scale, an offset and 16 bytes of digits a group."""
    blocks = _grouped(raw, 20)
    return Blocks(_words(blocks[:, :, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def from_q8_0(raw: np.ndarray) -> Blocks:
    """GGUF's Q8_0: a scale and 32 digits a group."""
    blocks = _grouped(raw, 34)
    digits = np.ascontiguousarray(blocks[:, :, 2:]).reshape(len(blocks), -1).view(np.int32)
    return Blocks(torch.from_numpy(digits), _halves(blocks, 0), None)


GGUF_BLOCKS = {"Q4_0": from_q4_0, "Q4_1": from_q4_1, "Q8_0": from_q8_0}
"""What reads which of GGUF's kinds, by its name there."""


def _grouped(raw: np.ndarray, byte_count: int) -> np.ndarray:
    return raw.reshape(len(raw), -1, byte_count)


def _halves(blocks: np.ndarray, at: int) -> torch.Tensor:
    values = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)
    return torch.from_numpy(values.reshape(len(blocks), -1))


def _words(digits: np.ndarray) -> torch.Tensor:
    """From bytes that hold inputs i and i + 16 of a group to words of eight inputs in order."""
    in_order = np.concatenate((digits & 15, digits >> 4), axis=2)
    pairs = in_order[:, :, 0::2] | in_order[:, :, 1::2] << 4
    return torch.from_numpy(np.ascontiguousarray(pairs).reshape(len(digits), -1).view(np.int32))
