"""Builds and calls what is in `kernels/`.

Owns the library: built once with the machine's C compiler for the machine's own processor, and kept beside the
weights. Invariants: what is called has the types and the layout that the C code expects; where there is no
compiler, or it fails, there are no kernels, and torch computes everything.
"""

import ctypes
import enum
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import kernel_calls as calls
from .blocks import GROUP_SIZE, Blocks
from .cache_layout import CacheLayout
from .rowwise import Norm, Rowwise
from .window import Window

if TYPE_CHECKING:
    from .kv_cache import KvCache
    from .step_tensors import AttentionGroup, StepTensors

_SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
_BUILD_SECONDS = 120
_CACHE_LINE, _PAGE = 16, 1024  # in numbers of fp32
_UNIT_INPUTS = 32  # that the matrix unit multiplies at once
_PACKINGS = {torch.bfloat16: 16, torch.float16: 17}

_log = logging.getLogger("llm_engine.cpu_kernels")


class Narrowness(enum.IntEnum):
    """Which products may round rows, or do on this processor."""

    EXACT = 0
    """None: rows and sums are fp32."""
    FEW_ROWS = 1
    """As there is no matrix unit: those with weights in blocks, and with bf16 of a few rows."""
    ANY_ROWS = 2
    BYTES = 3
    """Without a matrix unit: rows for weights in blocks are bytes; without VNNI, for those of four bits."""


@dataclass(frozen=True)
class Packed:
    """A weight and its bias in the kernels' layout; `tensors` keeps what the header points to."""

    header: calls.Weight
    tensors: tuple[torch.Tensor | None, ...]
    output_size: int


@dataclass(frozen=True)
class LayerWeights:
    """A layer of a Llama-like model: the norms before attention and before the feed-forward part, those of heads where
    it has them, [query and KV heads, size], and its products."""

    attention_norm: Norm
    mlp_norm: Norm
    head_norms: torch.Tensor | None
    qkv: Packed
    output: Packed
    gate_up: Packed
    down: Packed


Layers = ctypes.Array[calls.Layer]
"""What `run_layers` takes; it points to the weights, which others keep."""


def layers_of(weights: Sequence[LayerWeights]) -> Layers:
    """A model's layers."""
    return (calls.Layer * len(weights))(
        *(
            calls.Layer(
                *(packed.header for packed in (each.qkv, each.output, each.gate_up, each.down)),
                each.attention_norm.weight.data_ptr(),
                each.mlp_norm.weight.data_ptr(),
                None if each.head_norms is None else each.head_norms.data_ptr(),
            )
            for each in weights
        )
    )


class CpuKernels:
    """The kernels, with so many threads. Rows are fp32, each row's numbers side by side."""

    def __init__(self, library: ctypes.CDLL, thread_count: int) -> None:
        self._library, self._threads = library, thread_count
        calls.declare(library)
        self._tile, self._lanes = library.tidegate_tile(), library.tidegate_lanes()
        self._memories: dict[str, torch.Tensor] = {}
        self._rooms: dict[str, torch.Tensor] = {}
        self.narrowness = Narrowness(library.tidegate_narrowness())
        """Which narrow products this processor has."""
        has_unit_elsewhere = self.narrowness == Narrowness.FEW_ROWS and torch.cpu._is_amx_tile_supported()
        self.are_quickest_in_bf16 = self.narrowness != Narrowness.EXACT and not has_unit_elsewhere
        """Whether torch's products of bf16 are slower for many rows, too. They are quicker where these kernels have
        none, or where a compiler that does not know the matrix unit leaves it to torch alone."""

    def room(self, name: str, *shape: int) -> torch.Tensor:
        """fp32 memory for a result that nobody needs any more when the next one of this name is asked for.

        Fresh memory for each result of a prompt costs as much as computing it: the system hands out pages of zeros.
        """
        kept = self._rooms.get(name)
        if kept is None or kept.shape != shape:
            size = math.prod(shape)
            memory = self._memories.get(name)
            if memory is None or memory.numel() < size:
                memory = self._memories[name] = torch.empty(size)
            kept = self._rooms[name] = memory[:size].view(shape)
        return kept

    def pack(self, weight: Blocks | torch.Tensor, bias: torch.Tensor | None = None) -> Packed | None:
        """A weight [output size, input size] for `linear`, with a bias [output size]; None: no kernel has its type."""
        scales = None
        if isinstance(weight, Blocks):
            (numbers, scales), packing = self._tiles(weight), weight.bits
        elif weight.dtype in _PACKINGS:
            numbers, packing = weight.contiguous(), _PACKINGS[weight.dtype]
        else:
            return None
        tensors = (numbers, scales, None if bias is None else bias.contiguous())
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return Packed(calls.Weight(*pointers, *weight.shape, packing), tensors, weight.shape[0])

    def linear(
        self,
        weight: Packed,
        rows: torch.Tensor,
        *,
        before: Rowwise | None = None,
        onto: torch.Tensor | None = None,
        room: str | None = None,
        narrowness: Narrowness = Narrowness.EXACT,
    ) -> torch.Tensor:
        """[row_count, input size], or twice that for SwiGLU, to [row_count, output size], fp32.

        Args:
            onto: the result is added to this, and comes back as this.
            room: else, in which memory it is; None is memory of its own.
            narrowness: which products may be narrow, of those that there are.
        """
        count = rows.shape[0]
        if onto is not None:
            out = onto
        elif room is not None:
            out = self._rows_room(room, count, weight.output_size)
        else:
            out = rows.new_empty(count, weight.output_size)
        given = calls.Rows(rows.data_ptr(), None, rows.stride(0), count, 0, 0.0)
        if isinstance(before, Norm):
            given.norm, given.epsilon, given.before = before.weight.data_ptr(), before.epsilon, 1
        elif before is not None:
            given.before = 2
        to = calls.Out(out.data_ptr(), out.stride(0), onto is not None)
        self._library.tidegate_linear(weight.header, given, to, narrowness, self._threads)
        return out

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        head_count: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        step: "StepTensors",
        norms: torch.Tensor | None,
        epsilon: float,
        cache: torch.Tensor,
        layout: CacheLayout,
    ) -> None:
        """Norm and turn the queries and keys of [row_count, width] in place, and keep keys and values in the cache.

        Args:
            head_count: of queries.
            tables: cosines and sines, [context, size / 2] each.
            step: whose positions and slots these are.
            norms: [query and KV heads, size], or none.
            cache: one layer's.
        """
        self._library.tidegate_rotate_and_write(
            calls.layout_of(layout), calls.places_of(tables, step), qkv.data_ptr(), qkv.stride(0), qkv.shape[0],
            head_count, None if norms is None else norms.data_ptr(), epsilon, cache.data_ptr(), self._threads,
        )  # fmt: skip

    def can_attend(self, layout: CacheLayout) -> bool:
        """Whether `attend` takes single rows of sequences, with a cache like that."""
        fits = layout.key_size % self._lanes == 0 and layout.value_size % self._lanes == 0
        return fits and layout.dtype in (torch.float32, torch.bfloat16)

    def can_attend_chunks(self, layout: CacheLayout) -> bool:
        """Whether it takes consecutive ones, and is quicker than torch."""
        if not self.can_attend(layout):
            return False
        if layout.dtype == torch.float32:
            return True
        # Torch has the matrix unit for any sizes, these kernels do not.
        fits_unit = layout.key_size % _UNIT_INPUTS == 0 and layout.value_size % _UNIT_INPUTS == 0
        return self.are_quickest_in_bf16 and (fits_unit or self.narrowness != Narrowness.ANY_ROWS)

    def attend(
        self,
        queries: torch.Tensor,
        cache: torch.Tensor,
        layout: CacheLayout,
        group: "AttentionGroup",
        window: Window,
        out: torch.Tensor,
    ) -> None:
        """Attend a group's rows of [row_count, heads, key size], which has no mask, to the value's size.

        Args:
            cache: one layer's blocks.
            window: what each row sees of the tokens up to its own. Blocks that it hides from all of a chunk may be any.
        """
        self._library.tidegate_attend(
            calls.layout_of(layout), calls.window_of(window), calls.group_of(group),
            queries.data_ptr(), queries.stride(0), queries.shape[1],
            cache.data_ptr(), out.data_ptr(), self.narrowness, self._threads,
        )  # fmt: skip

    def run_layers(
        self,
        layers: Layers,
        span: range,
        hidden: torch.Tensor,
        head_count: int,
        epsilon: float,
        tables: tuple[torch.Tensor, torch.Tensor],
        step: "StepTensors",
        kv_cache: "KvCache",
        narrowness: Narrowness,
    ) -> None:
        """Consecutive layers of a Llama-like model in one call: [row_count, hidden_size] in place.

        Args:
            epsilon: of all norms.
            step: whose groups have no masks.
            narrowness: of products.
        """
        for index in span:
            layers[index].cache = kv_cache.layer(index).data_ptr()
        first, count = layers[span.start], hidden.shape[0]
        qkv, gate_up = (self._rows_room(name, count, getattr(first, name).outputs) for name in ("qkv", "gate_up"))
        attended = self.room("attended", count, first.output.inputs)
        numbers = (each.data_ptr() for each in (hidden, qkv, attended, gate_up))
        groups = (calls.Group * len(step.groups))(*(calls.group_of(group) for group in step.groups))
        whole = calls.Step(
            *numbers, count, head_count, qkv.stride(0), gate_up.stride(0), len(groups), groups,
            calls.layout_of(kv_cache.layout), calls.places_of(tables, step), calls.window_of(kv_cache.window), epsilon,
        )  # fmt: skip
        self._library.tidegate_layers(ctypes.byref(first), len(span), whole, narrowness, self._threads)

    def _rows_room(self, name: str, count: int, width: int) -> torch.Tensor:
        """A room for rows; whole pages apart they would share a few places of a core's cache."""
        return self.room(name, count, width + (_CACHE_LINE if width % _PAGE == 0 else 0))[:, :width]

    def _tiles(self, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Words of the tile's outputs side by side, and scales of each group likewise; the last tile is filled up."""
        outputs = len(blocks.words)
        tiles = -(-outputs // self._tile)

        def tiled(values: torch.Tensor) -> torch.Tensor:
            """[outputs, columns] to [tiles, columns, tile]."""
            padded = torch.nn.functional.pad(values, (0, 0, 0, tiles * self._tile - outputs))
            return padded.view(tiles, self._tile, -1).transpose(1, 2).contiguous()

        scales = tiled(blocks.scales)
        if blocks.offsets is not None:
            scales = torch.stack((scales, tiled(blocks.offsets)), dim=2)
        return tiled(blocks.words), scales.contiguous()


def load_kernels(cache_dir: Path | None, thread_count: int) -> CpuKernels | None:
    """The kernels, built where they are not yet; None, and a warning that says why, where that cannot be."""
    try:
        folder = _private_folder() if cache_dir is None else cache_dir
        path = folder / f"cpu-kernels-{_identity()}.so"
        if not path.exists():
            _build(path)
        return CpuKernels(ctypes.CDLL(str(path)), thread_count)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or error
        _log.warning("torch computes everything, which is several times slower: no CPU kernels: %s", detail)
        return None


def _private_folder() -> Path:
    """A folder for this user's libraries, which nobody else can put one into."""
    folder = Path(tempfile.gettempdir()) / f"tidegate-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _identity() -> str:
    """Changes with the source, the compiler's flags and the processor."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        features = platform.processor()
    identity = ([path.read_text() for path in _SOURCES], _FLAGS, platform.machine(), features)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _build(path: Path) -> None:
    """Build the library beside its place, then move it there."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc, or what CC names)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:

        def run(*arguments: str) -> None:
            command = [*compiler.split(), *_FLAGS, *arguments]
            subprocess.run(command, check=True, timeout=_BUILD_SECONDS, capture_output=True, text=True)

        units = [source for source in _SOURCES if source.suffix == ".c"]
        objects = [f"{folder}/{unit.stem}.o" for unit in units]
        with ThreadPoolExecutor(len(units)) as pool:
            list(pool.map(lambda unit, result: run("-c", str(unit), "-o", result), units, objects))
        run("-shared", *objects, "-o", f"{folder}/finished", "-lm")
        os.replace(f"{folder}/finished", path)


assert GROUP_SIZE == 32, "kernels/products.c is written for groups of 32"
