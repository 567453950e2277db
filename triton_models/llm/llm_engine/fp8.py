"""Weights of eight-bit floats, as DeepSeek ships them: E4M3, with a scale for each block of rows and columns.

Owns the reading of what config.json says of them, and their values. A weight is stored number times scale
(DeepSeek-V3, 2024, section 3.3); here products run in wider types, so activations are not rounded, whether weights are
kept as they are or expanded. Invariant: what config.json says beyond that is refused by its name.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .blocks import Floats8
from .errors import ModelLoadError
from .field_reader import Fields

SCALE_ENDING = "_scale_inv"
"""What the name of a weight's scales ends with, after the weight's own name."""
SHORTEST_GROUP = 16
"""Of inputs that share a scale: what a tensor core multiplies at once. Longer ones are multiples of it."""


@dataclass(frozen=True)
class Fp8:
    """How weights are stored."""

    block: tuple[int, int]
    """Rows and columns that share a scale."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of a weight [rows, columns]; the last blocks may be smaller."""
        return tuple(-(-size // each) for size, each in zip(shape, self.block, strict=True))

    def kept(
        self, stored: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...], slices: tuple[slice, ...]
    ) -> Floats8:
        """The part as it is; the arguments are those of `scaled`, and no group of columns is torn apart."""
        rows, columns = (range(size)[span] for size, span in zip(shape, self._spans(slices), strict=True))
        groups = slice(columns.start // self.block[1], -(-columns.stop // self.block[1]))
        of_rows = scales.float().index_select(0, torch.tensor(rows) // self.block[0])
        return Floats8(stored, of_rows[:, groups].contiguous(), self.block[1])

    def can_keep(self, slices: tuple[slice, ...]) -> bool:
        """Whether the part begins with a whole group of columns, and a device could multiply groups so long."""
        return (self._spans(slices)[1].start or 0) % self.block[1] == 0 and self.block[1] % SHORTEST_GROUP == 0

    def scaled(
        self, stored: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...], slices: tuple[slice, ...]
    ) -> torch.Tensor:
        """The values, fp32, of the part `slices` of a weight of a shape; `stored` is that part, `scales` are all."""
        for axis, (size, each, span) in enumerate(zip(shape, self.block, self._spans(slices), strict=True)):
            scales = scales.index_select(axis, torch.arange(size)[span] // each)
        return stored.float() * scales.float()

    @staticmethod
    def _spans(slices: tuple[slice, ...]) -> tuple[slice, slice]:
        """Of rows and of columns."""
        rows, columns, *_ = (*slices, slice(None), slice(None))
        return rows, columns


def read_fp8(path: Path, value: object) -> Fp8 | None:
    """What config.json's quantization_config says; None where there is none. ModelLoadError for any other kind."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: field quantization_config is {value!r}: not supported")
    # A path to the field, for messages.
    fields = Fields(path / "quantization_config", value)
    fields.expect("quant_method", ("fp8",))
    fields.expect("fmt", ("e4m3",), default="e4m3")
    fields.expect("activation_scheme", ("dynamic",), default="dynamic")
    block = fields.integers("weight_block_size")
    fields.refuse_others()
    if len(block) != 2 or min(block) < 1:
        raise fields.fault("weight_block_size", block)
    return Fp8((block[0], block[1]))
