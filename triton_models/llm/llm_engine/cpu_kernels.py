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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .blocks import GROUP_SIZE, Blocks
from .rowwise import Norm, Rowwise
from .window import FULL, Window

_SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
_BUILD_SECONDS = 120
_CACHE_LINE, _PAGE = 16, 1024  # in numbers of fp32
_UNIT_INPUTS = 32  # that the matrix unit multiplies at once
_PACKINGS = {torch.bfloat16: 16, torch.float16: 17}

_log = logging.getLogger("llm_engine.cpu_kernels")


class Narrowness(enum.IntEnum):
    """Which products may round rows to bf16, or do on this processor."""

    EXACT = 0
    """None: rows and sums are fp32."""
    FEW_ROWS = 1
    """Those of a few rows, as there is no matrix unit."""
    ANY_ROWS = 2


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("numbers", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "packing")),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("numbers", "norm")),
        *((name, ctypes.c_int64) for name in ("stride", "count", "before")),
        ("epsilon", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Packed:
    """A weight and its bias in the kernels' layout; `tensors` keeps what the header points to."""

    header: _Weight
    tensors: tuple[torch.Tensor | None, ...]
    output_size: int


class CpuKernels:
    """The kernels, with so many threads. Rows are fp32, each row's numbers side by side."""

    def __init__(self, library: ctypes.CDLL, thread_count: int) -> None:
        self._library, self._threads = library, thread_count
        for name, types in _SIGNATURES.items():
            function = getattr(library, f"tidegate_{name}")
            function.argtypes = [_C_TYPES[letter] for letter in types]
            function.restype = ctypes.c_int64 if not types else None
        self._tile, self._lanes, self._split = (getattr(library, f"tidegate_{n}")() for n in ("tile", "lanes", "split"))
        self._memories: dict[str, torch.Tensor] = {}
        self._rooms: dict[str, torch.Tensor] = {}
        self.narrowness = Narrowness(library.tidegate_narrowness())
        """Which narrow products this processor has."""

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
        return Packed(_Weight(*pointers, *weight.shape, packing), tensors, weight.shape[0])

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
            # Rows whole pages apart share a few places of a core's cache.
            width = weight.output_size + (_CACHE_LINE if weight.output_size % _PAGE == 0 else 0)
            out = self.room(room, count, width)[:, : weight.output_size]
        else:
            out = rows.new_empty(count, weight.output_size)
        given = _Rows(rows.data_ptr(), None, rows.stride(0), count, 0, 0.0)
        if isinstance(before, Norm):
            given.norm, given.epsilon, given.before = before.weight.data_ptr(), before.epsilon, 1
        elif before is not None:
            given.before = 2
        self._library.tidegate_linear(
            weight.header, given, out.data_ptr(), out.stride(0), onto is not None, narrowness, self._threads
        )
        return out

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int, int],
        tables: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        norms: torch.Tensor | None,
        epsilon: float,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Norm and turn the queries and keys of [row_count, width] in place, and keep keys and values in the cache.

        Args:
            heads: query heads, KV heads, their size.
            tables: cosines and sines, [context, size / 2] each.
            norms: [query and KV heads, size], or none.
            cache: one layer's, a token's keys and values side by side.
            slots: [row_count] int64, places of tokens in the cache.
        """
        cosines, sines = tables
        self._library.tidegate_rotate_and_write(
            qkv.data_ptr(), qkv.shape[0], *heads, cosines.data_ptr(), sines.data_ptr(), positions.data_ptr(),
            None if norms is None else norms.data_ptr(), epsilon, cache.data_ptr(), cache.dtype == torch.bfloat16,
            slots.data_ptr(), self._threads,
        )  # fmt: skip

    def can_attend(self, key_size: int, value_size: int, dtype: torch.dtype) -> bool:
        """Whether `attend` takes heads of such sizes from a cache of such a type."""
        fits = key_size % self._lanes == 0 and value_size % self._lanes == 0
        return fits and dtype in (torch.float32, torch.bfloat16)

    def can_attend_chunks(self, key_size: int, value_size: int, dtype: torch.dtype) -> bool:
        """Whether `attend_chunk` takes them, and is quicker than torch."""
        if not self.can_attend(key_size, value_size, dtype):
            return False
        fits_unit = key_size % _UNIT_INPUTS == 0 and value_size % _UNIT_INPUTS == 0
        return dtype == torch.float32 or (fits_unit and self.narrowness == Narrowness.ANY_ROWS)

    def attend(
        self,
        queries: torch.Tensor,
        cache: torch.Tensor,
        token_size: int,
        block_token_count: int,
        blocks: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
        kv_head_count: int,
        value_size: int,
        values_at: int,
        scale: float,
        out: torch.Tensor,
        *,
        hidden: torch.Tensor | None = None,
        sinks: int = 0,
    ) -> None:
        """Attend one row a sequence to the first tokens of each: [sequences, heads, key size] to the value's size.

        Args:
            cache: one layer's blocks; a token takes `token_size` numbers, keys first.
            blocks: [sequences, any] int64, each sequence's blocks in order.
            lengths: [sequences] int64, how many tokens each row sees; `longest` is the largest.
            values_at: where a token's values begin.
            hidden: [sequences] int64, how many tokens behind the first `sinks` of its blocks each row does not see.
        """
        count, heads, key_size = queries.shape
        splits = -(-longest // self._split)
        partials = self.room("partials", count * splits * heads * (value_size + 2))
        self._library.tidegate_attention(
            cache.dtype == torch.bfloat16, queries.data_ptr(), queries.stride(0), cache.data_ptr(), block_token_count,
            token_size, blocks.data_ptr(), blocks.stride(0), lengths.data_ptr(),
            None if hidden is None else hidden.data_ptr(), sinks, count, heads, kv_head_count, key_size,
            value_size, values_at, scale, out.data_ptr(), partials.data_ptr(), splits, self._threads,
        )  # fmt: skip

    def attend_chunk(
        self,
        queries: torch.Tensor,
        cache: torch.Tensor,
        token_size: int,
        block_token_count: int,
        blocks: torch.Tensor,
        start: int,
        kv_head_count: int,
        value_size: int,
        values_at: int,
        scale: float,
        out: torch.Tensor,
        *,
        window: Window = FULL,
    ) -> None:
        """Attend consecutive rows of one sequence, [row_count, heads, key size], each to the tokens up to its own.

        Args:
            blocks: [any] int64, the sequence's blocks in order.
            start: which token of the sequence the first row is; the others are as in `attend`.
            window: what each row sees of the tokens up to its own. Blocks that it hides from all may be any.
        """
        count, heads, key_size = queries.shape
        self._library.tidegate_attend_chunk(
            cache.dtype == torch.bfloat16, self.narrowness,
            queries.data_ptr(), queries.stride(0), cache.data_ptr(), block_token_count,
            token_size, blocks.data_ptr(), start, window.newest, window.begins_at, window.sinks,
            count, heads, kv_head_count, key_size, value_size, values_at, scale, out.data_ptr(), self._threads,
        )  # fmt: skip

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


_C_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "w": ctypes.POINTER(_Weight),
    "r": ctypes.POINTER(_Rows),
}
_SIGNATURES = {
    "linear": "wrpniii",
    "rotate_and_write": "pnnnnppppfpipi",
    "attention": "ipnpnnpnppnnnnnnnfppni",
    "attend_chunk": "iipnpnnpnnnnnnnnnnfpi",
    "narrowness": "",
    "tile": "",
    "lanes": "",
    "split": "",
}

assert GROUP_SIZE == 32, "kernels/products.c is written for groups of 32"
