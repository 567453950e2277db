"""The C side of a call to `kernels/`: its structures, which are those of `calls.h`, and its functions' types. Pure."""

import ctypes
from typing import TYPE_CHECKING

import torch

from .cache_layout import CacheLayout
from .window import Window

if TYPE_CHECKING:
    from .step_tensors import AttentionGroup, StepTensors


def _fields(pointers: str, integers: str, **others: type) -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int64) for name in integers.split()),
        *others.items(),
    ]


class Weight(ctypes.Structure):
    """A packed weight, and its bias."""

    _fields_ = _fields("numbers scales bias", "outputs inputs packing")


class Rows(ctypes.Structure):
    """What is multiplied, and what is done with it before."""

    _fields_ = _fields("numbers norm", "stride count before", epsilon=ctypes.c_float)


class Out(ctypes.Structure):
    """Where results go."""

    _fields_ = _fields("numbers", "stride adds")


class Layout(ctypes.Structure):
    """How a layer's cache lies."""

    _fields_ = _fields(
        "", "is_bf16 block_tokens token_size kv_heads key_size value_size values_at", scale=ctypes.c_float
    )


class WindowSizes(ctypes.Structure):
    """What rows see of the tokens before them."""

    _fields_ = _fields("", "newest begins_at sinks")


class Group(ctypes.Structure):
    """Rows that attend together."""

    _fields_ = _fields("blocks lengths hidden", "blocks_stride first_row count longest")


class Places(ctypes.Structure):
    """What turns queries and keys, and where tokens are kept."""

    _fields_ = _fields("cosines sines positions slots", "")


class Layer(ctypes.Structure):
    """A layer's weights, and its cache in a step."""

    _fields_ = [
        *((name, Weight) for name in ("qkv", "output", "gate_up", "down")),
        *_fields("attention_norm mlp_norm head_norms cache", ""),
    ]


class Step(ctypes.Structure):
    """A step's rows, and memory for what a layer makes of them."""

    _fields_ = _fields(
        "hidden qkv attended gate_up",
        "rows heads qkv_stride gate_up_stride group_count",
        groups=ctypes.POINTER(Group),
        layout=Layout,
        places=Places,
        window=WindowSizes,
        epsilon=ctypes.c_float,
    )


def layout_of(layout: CacheLayout) -> Layout:
    """As the kernels take it."""
    is_bf16, sizes = layout.dtype == torch.bfloat16, (layout.kv_head_count, layout.key_size, layout.value_size)
    return Layout(
        is_bf16, layout.block_token_count, layout.token_size, *sizes, layout.values_at, layout.scale
    )  # fmt: skip


def window_of(window: Window) -> WindowSizes:
    """As the kernels take it."""
    return WindowSizes(window.newest, window.begins_at, window.sinks)


def group_of(group: "AttentionGroup") -> Group:
    """A group without a mask; its tensors are to be kept."""
    lengths, hidden = (None if each is None else each.data_ptr() for each in (group.lengths, group.hidden))
    count = group.sequence_count * group.query_count
    return Group(
        group.blocks.data_ptr(), lengths, hidden, group.blocks.stride(0), group.first_row, count, group.longest
    )  # fmt: skip


def places_of(tables: tuple[torch.Tensor, torch.Tensor], step: "StepTensors") -> Places:
    """Cosines and sines, [context, size / 2] each, and a step's positions and slots; all are to be kept."""
    return Places(*(each.data_ptr() for each in (*tables, step.positions, step.slots)))


_C_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    **{
        letter: ctypes.POINTER(kind)
        for letter, kind in {
            "w": Weight, "r": Rows, "o": Out, "c": Layout, "W": WindowSizes, "g": Group, "P": Places,
            "L": Layer, "s": Step,
        }.items()
    },
}  # fmt: skip
_SIGNATURES = {
    "linear": "wroii",
    "rotate_and_write": "cPpnnnpfpi",
    "attend": "cWgpnnppii",
    "layers": "Lnsii",
    "narrowness": "",
    "tile": "",
    "lanes": "",
}


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the library's functions take and give."""
    for name, types in _SIGNATURES.items():
        function = getattr(library, f"tidegate_{name}")
        function.argtypes = [_C_TYPES[letter] for letter in types]
        function.restype = ctypes.c_int64 if not types else None
