"""Builds and calls `cpu_kernels.c`.

Owns the library: built once with the machine's C compiler for the machine's own processor, and kept beside the
weights. Invariants: what is called has the types and the layout that the C code expects; where there is no
compiler, or it fails, there are no kernels, and torch computes everything.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .blocks import GROUP_SIZE, Blocks

_SOURCE = Path(__file__).with_name("cpu_kernels.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_BUILD_SECONDS = 120
_PLAIN_DTYPES = (torch.float16, torch.bfloat16)

_log = logging.getLogger("llm_engine.cpu_kernels")


@dataclass(frozen=True)
class Packed:
    """A weight in the kernels' layout; `scales` is None where it lies as it was read."""

    weights: torch.Tensor
    scales: torch.Tensor | None
    bits: int
    output_size: int
    input_size: int


class CpuKernels:
    """The kernels, with so many threads. Rows are fp32, each row's numbers side by side."""

    def __init__(self, library: ctypes.CDLL, thread_count: int) -> None:
        self._library, self._threads = library, thread_count
        for name, types in _SIGNATURES.items():
            function = getattr(library, f"tidegate_{name}")
            function.argtypes = [_C_TYPES[letter] for letter in types]
            function.restype = ctypes.c_int64 if not types else None
        self._tile, self._lanes, self._split = (getattr(library, f"tidegate_{n}")() for n in ("tile", "lanes", "split"))

    def pack(self, weight: Blocks | torch.Tensor) -> Packed | None:
        """A weight [output size, input size] for `linear`; None where there is no kernel for its type."""
        if isinstance(weight, Blocks):
            return self._pack_blocks(weight)
        if weight.dtype not in _PLAIN_DTYPES:
            return None
        return Packed(weight.contiguous(), None, 16, *weight.shape)

    def linear(self, weight: Packed, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[row_count, input size] to [row_count, output size], fp32; what lies in `bias` [output size] is added."""
        count = rows.shape[0]
        out = rows.new_empty(count, weight.output_size)
        added = None if bias is None else bias.data_ptr()
        sizes = (rows.stride(0), out.data_ptr(), count, weight.output_size, weight.input_size, self._threads)
        if weight.scales is None:
            is_bf16 = weight.weights.dtype == torch.bfloat16
            self._library.tidegate_plain_linear(is_bf16, weight.weights.data_ptr(), added, rows.data_ptr(), *sizes)
        else:
            packed = (weight.bits, weight.weights.data_ptr(), weight.scales.data_ptr(), added, rows.data_ptr())
            self._library.tidegate_packed_linear(*packed, *sizes)
        return out

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich, 2019) of [row_count, size]."""
        count, size = rows.shape
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        self._library.tidegate_rms_norm(
            rows.data_ptr(), rows.stride(0), weight.data_ptr(), epsilon, out.data_ptr(), count, size, self._threads
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU (Shazeer, 2020) of gate and up side by side: [row_count, 2 * size] to [row_count, size]."""
        count, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(count, size)
        self._library.tidegate_silu_mul(gate_up.data_ptr(), out.data_ptr(), count, size, self._threads)
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
    ) -> torch.Tensor:
        """Attend one row a sequence to the first tokens of each: [sequences, heads, key size] to the value's size.

        Args:
            cache: one layer's blocks; a token takes `token_size` numbers, keys first.
            blocks: [sequences, any] int64, each sequence's blocks in order.
            lengths: [sequences] int64, how many tokens each row sees; `longest` is the largest.
            values_at: where a token's values begin.
        """
        count, heads, key_size = queries.shape
        splits = -(-longest // self._split)
        out = queries.new_empty(count, heads, value_size)
        partials = queries.new_empty(count * splits * heads * (value_size + 2))
        self._library.tidegate_attention(
            cache.dtype == torch.bfloat16, queries.data_ptr(), queries.stride(0), cache.data_ptr(), block_token_count,
            token_size, blocks.data_ptr(), blocks.stride(0), lengths.data_ptr(), count, heads, kv_head_count, key_size,
            value_size, values_at, scale, out.data_ptr(), partials.data_ptr(), splits, self._threads,
        )  # fmt: skip
        return out

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
    ) -> torch.Tensor:
        """Attend consecutive rows of one sequence, [row_count, heads, key size], each to the tokens up to its own.

        Args:
            blocks: [any] int64, the sequence's blocks in order.
            start: which token of the sequence the first row is; the others are as in `attend`.
        """
        count, heads, key_size = queries.shape
        out = queries.new_empty(count, heads, value_size)
        self._library.tidegate_attend_chunk(
            cache.dtype == torch.bfloat16, queries.data_ptr(), queries.stride(0), cache.data_ptr(), block_token_count,
            token_size, blocks.data_ptr(), start, count, heads, kv_head_count, key_size, value_size, values_at, scale,
            out.data_ptr(), self._threads,
        )  # fmt: skip
        return out

    def _pack_blocks(self, blocks: Blocks) -> Packed:
        """Words of the tile's outputs side by side, and scales of each group likewise; the last tile is filled up."""
        outputs, inputs = blocks.shape
        tiles = -(-outputs // self._tile)

        def tiled(values: torch.Tensor) -> torch.Tensor:
            """[outputs, columns] to [tiles, columns, tile]."""
            padded = torch.nn.functional.pad(values, (0, 0, 0, tiles * self._tile - outputs))
            return padded.view(tiles, self._tile, -1).transpose(1, 2).contiguous()

        scales = tiled(blocks.scales)
        if blocks.offsets is not None:
            scales = torch.stack((scales, tiled(blocks.offsets)), dim=2)
        return Packed(tiled(blocks.words), scales.contiguous(), blocks.bits, outputs, inputs)


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
    identity = (_SOURCE.read_text(), _FLAGS, platform.machine(), features)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _build(path: Path) -> None:
    """Build the library beside its place, then move it there."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc, or what CC names)")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(unfinished), "-lm"]
    try:
        subprocess.run(command, check=True, timeout=_BUILD_SECONDS, capture_output=True, text=True)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


_C_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_SIGNATURES = {
    "packed_linear": "ipppp" + "npnnni",
    "plain_linear": "ippp" + "npnnni",
    "rms_norm": "pnpfpnni",
    "silu_mul": "ppnni",
    "rotate_and_write": "pnnnnppppfpipi",
    "attention": "ipnpnnpnpnnnnnnfppni",
    "attend_chunk": "ipnpnnpnnnnnnnfpi",
    "tile": "",
    "lanes": "",
    "split": "",
}

assert GROUP_SIZE == 32, "cpu_kernels.c is written for groups of 32"
