"""A model's weights, from files to fused matrices in the wanted type.

Owns the reading: what a tensor is called in GGUF, the order of its rows, and the cache of the result.
Invariants: every tensor that the architecture needs is there with its exact shape, and there is no other;
a cache file is either complete or absent. What is fused is `layouts.py`'s, what it means `model.py`'s.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import architecture as architectures
from .architecture import Architecture, RopeScaling
from .blocks import GGUF_BLOCKS, Blocks, Floats8, Narrow, Weight, rounded, unnamed
from .config import ROUNDED_DTYPES
from .division import Division, division
from .errors import ModelLoadError
from .fp8 import SCALE_ENDING, Fp8, read_fp8
from .gguf_reader import GgufFile
from .layouts import Fused, Part, RopeRows, fused_tensors

# Counted up whenever the fused layout or the reading of a file changes.
CACHE_VERSION = 2
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16} | dict.fromkeys(("fp32", *ROUNDED_DTYPES), torch.float32)
"""In which tensors are held, where they are not rounded."""
# What a safetensors file's numbers may be; those of other types would be quantised, with scales beside them.
_FLOATS = ("F64", "F32", "F16", "BF16")

_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
"""How a file is called that is one of several."""

_MOST_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by its own library's bound."""

_log = logging.getLogger("llm_engine.weights")


@dataclass(frozen=True)
class Checkpoint:
    """A model's architecture and its fused weights, each [output size, input size], on the CPU."""

    architecture: Architecture
    """The whole model's, also where the tensors are one rank's."""
    division: Division
    tensors: dict[str, Weight]
    """In blocks is what a file has in blocks, whatever type is wanted."""
    is_tied: bool
    """Whether the embedding is the output matrix too."""


@dataclass(frozen=True)
class _Source:
    """Tensors of a file or folder by the name they have there, with their shapes."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, tuple[slice, ...]], torch.Tensor]
    """A tensor by its name, of which only what the slices say is read."""
    tied: bool
    """Whether the embedding is the output matrix too."""
    name_of: Callable[[str], str] = str
    """From Hugging Face's name of a tensor to the one that it has here."""
    ignorable: frozenset[str] = frozenset()
    blocks: Callable[[str, tuple[slice, ...]], Narrow | None] = lambda name, slices: None
    """A tensor's own blocks of what the slices say, where it has some and none is torn apart."""
    block_bytes: Mapping[str, float] = field(default_factory=dict)
    """What a number of a tensor takes that has some, by name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Of a folder: in which of its files a tensor lies."""

    def file_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self.files.get(name, self.path)


def load_checkpoint(
    model_path: Path,
    *,
    dtype: str,
    cache_dir: Path | None,
    rank: int = 0,
    size: int = 1,
    keeps_fp8: bool = False,
    check_room: Callable[[int], None] = lambda byte_count: None,
) -> Checkpoint:
    """Load a GGUF file or a Hugging Face folder; ModelLoadError says what is wrong with it.

    Of `size` ranks each loads its own part, and reads no other (but for whole blocks at its edges).

    Args:
        keeps_fp8: whether eight-bit floats stay what they are, for a device that multiplies them.
        check_room: is told what the weights will take, in bytes, before they are read, and may refuse it.
    """
    source, architecture = _opened(model_path, keeps_fp8=keeps_fp8)
    here = division(model_path, architecture, rank, size)
    check_room(_byte_count(source, architecture, here, dtype))
    # A folder's tensors are mapped as they are; those of a GGUF file cost seconds to dequantise.
    is_cached = cache_dir is not None and not model_path.is_dir()
    cached = _cache_path(cache_dir, model_path, dtype, rank, size) if is_cached else None
    tensors = None if cached is None else _read_cache(cached, architecture, here)
    if tensors is None:
        tensors = _fuse(source, architecture, here, dtype)
        if cached is not None:
            _write_cache(cached, tensors)
    return Checkpoint(architecture, here, tensors, source.tied)


def check_model(model_path: Path, size: int) -> None:
    """Raise ModelLoadError for what can be told without reading weights: fields, names, shapes, and the ranks."""
    _, architecture = _opened(model_path)
    for rank in range(size):
        division(model_path, architecture, rank, size)


def model_files(model_path: Path) -> list[Path]:
    """The files that say what a model computes."""
    if not model_path.is_dir():
        return [model_path]
    return [model_path / "config.json", *_weight_files(model_path)]


def _opened(model_path: Path, *, keeps_fp8: bool = False) -> tuple[_Source, Architecture]:
    """A model's files, read as far as their headers, and checked."""
    if model_path.is_dir():
        source, architecture = _opened_folder(model_path, keeps_fp8=keeps_fp8)
    elif not model_path.exists():
        raise ModelLoadError(f"{model_path}: there is no such file or folder")
    else:
        file = GgufFile(model_path)
        source, architecture = _gguf_source(file), _gguf_architecture(file)
    _check(source, architecture)
    return source, architecture


def _check(source: _Source, architecture: Architecture) -> None:
    """Refuse missing tensors, wrong shapes, and tensors that nothing would use."""
    used = set(source.ignorable)
    for fused in fused_tensors(architecture, tied=source.tied):
        for part in fused.parts:
            name, expected = source.name_of(part.name), part.shape
            if name not in source.shapes:
                raise ModelLoadError(f"{source.path}: tensor {name} {list(expected)} is missing")
            if source.shapes[name] != expected:
                found = list(source.shapes[name])
                path = source.file_of(name)
                raise ModelLoadError(f"{path}: tensor {name} has shape {found}, expected {list(expected)}")
            used.add(name)
    unused = sorted(set(source.shapes) - used)
    if unused:
        path = source.file_of(unused[0])
        raise ModelLoadError(f"{path}: tensor {unused[0]} is not supported ({len(unused)} such)")


def _byte_count(source: _Source, architecture: Architecture, here: Division, dtype: str) -> int:
    """What a rank's weights take at least, in the types that they are held in."""
    total = 0.0
    for fused in fused_tensors(architecture, tied=source.tied):
        for part in filter(here.is_here, fused.parts):
            each: float = 4 if fused.is_exact else TORCH_DTYPES[dtype].itemsize
            if len(part.shape) == 2 and not fused.is_exact:
                is_rounded = dtype in ROUNDED_DTYPES and fused.can_be_rounded
                each = source.block_bytes.get(source.name_of(part.name), 1 if is_rounded else each)
            total += each * math.prod(here.shape(part))
    return int(total)


def _fuse(source: _Source, architecture: Architecture, here: Division, dtype: str) -> dict[str, Weight]:
    """Read, reorder, convert and join: fused name to its blocks, or its tensor of the wanted type."""
    tensors: dict[str, Weight] = {}
    for fused in fused_tensors(architecture, tied=source.tied):
        blocks = _fused_blocks(source, architecture, here, fused)
        if blocks is not None:
            tensors[fused.name] = blocks
            continue
        parts = []
        for part in filter(here.is_here, fused.parts):
            name = source.name_of(part.name)
            slices = _slices(here, part)
            stored = source.read(name, slices)
            tensor = stored if fused.is_exact else stored.to(TORCH_DTYPES[dtype])
            if not torch.isfinite(tensor).all():
                raise _not_finite(source, name, slices, stored, dtype)
            if architecture.has_interleaved_rope and part.rope is not None:
                tensor = _deinterleaved(tensor, part.rope)
            parts.append(tensor)
        # A rank's part may be a view of the whole tensor, which joining copies.
        tensor = parts[0] if len(parts) == 1 and here.size == 1 else torch.cat(parts)
        tensors[fused.name] = (rounded(tensor) if dtype in ROUNDED_DTYPES and fused.can_be_rounded else None) or tensor
    return tensors


def _fused_blocks(source: _Source, architecture: Architecture, here: Division, fused: Fused) -> Narrow | None:
    """The blocks of all parts of a tensor; None where not all have some, and of the same kind."""
    found: list[Any] = []
    for part in filter(here.is_here, fused.parts):
        blocks = None if fused.is_exact else _block_part(source, architecture, here, part)
        if blocks is None or (found and blocks.bits != found[0].bits):
            return None
        found.append(blocks)
    joined: Narrow = found[0].joined(found[1:])
    return joined


def _block_part(source: _Source, architecture: Architecture, here: Division, part: Part) -> Narrow | None:
    """The rank's blocks of a tensor, in the order that is wanted here; None where it has none."""
    name = source.name_of(part.name)
    blocks = source.blocks(name, _slices(here, part))
    if blocks is None:
        return None
    if not blocks.is_finite:
        raise ModelLoadError(f"{source.file_of(name)}: tensor {name} holds blocks that are not finite")
    if architecture.has_interleaved_rope and part.rope is not None:
        blocks = blocks.rows(_deinterleaved(torch.arange(blocks.shape[0]), part.rope))
    return blocks


def _not_finite(
    source: _Source, name: str, slices: tuple[slice, ...], stored: torch.Tensor, dtype: str
) -> ModelLoadError:
    where = f"{source.file_of(name)}: tensor {name}"
    wrong = (~torch.isfinite(stored)).nonzero()
    if not len(wrong):
        most = stored.abs().max().item()
        return ModelLoadError(f"{where} holds {most:g}, which is beyond what {dtype} can hold; another dtype can")
    for axis, span in enumerate(slices):
        wrong[:, axis] += span.start or 0
    return ModelLoadError(f"{where} holds {len(wrong)} values that are not finite, the first at {wrong[0].tolist()}")


def _slices(here: Division, part: Part) -> tuple[slice, ...]:
    """What the rank holds of a tensor, as an index."""
    span = here.span(part)
    if span is None or part.cut is None:
        return (slice(None),)
    return (*[slice(None)] * part.cut.axis, slice(span.start, span.stop))


def _fused_shapes(architecture: Architecture, here: Division, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The rank's fused tensors: all parts' rows, and the columns of one."""
    shapes = {}
    for fused in fused_tensors(architecture, tied=tied):
        parts = [here.shape(part) for part in filter(here.is_here, fused.parts)]
        shapes[fused.name] = (sum(shape[0] for shape in parts), *parts[0][1:])
    return shapes


def _deinterleaved(weight: torch.Tensor, rope: RopeRows) -> torch.Tensor:
    """The turned rows of each head from (pair, half) order to (half, pair), as rotary here."""
    heads = weight.view(-1, rope.head_size, *weight.shape[1:])
    plain, turned = heads.split((rope.head_size - rope.rope_size, rope.rope_size), dim=1)
    halves = (turned[:, 0::2], turned[:, 1::2])
    return torch.cat((plain, *halves), dim=1).reshape(weight.shape)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_ROPE_FACTORS = "rope_freqs.weight"
"""By what each rotary frequency is divided."""


def _gguf_name(name: str) -> str:
    """From model.layers.3.mlp.up_proj.weight to blk.3.ffn_up.weight."""
    stem, ending = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{ending}"
    return f"{_GGUF_NAMES[stem]}.{ending}"


def _gguf_architecture(file: GgufFile) -> Architecture:
    """What the fields say, and the tensor in which llama.cpp's converter keeps Llama 3.1's way to stretch a context."""
    architecture = architectures.from_gguf(file.path, file.metadata)
    entry, expected = file.tensors.get(_ROPE_FACTORS), (architecture.head_dim // 2,)
    if entry is None:
        return architecture
    if entry.shape != expected:
        found = list(entry.shape)
        raise ModelLoadError(f"{file.path}: tensor {_ROPE_FACTORS} has shape {found}, expected {list(expected)}")
    factors = tuple(file.tensor(_ROPE_FACTORS).tolist())
    if not all(0 < factor < math.inf for factor in factors):
        raise ModelLoadError(f"{file.path}: tensor {_ROPE_FACTORS} holds {factors}, expected finite ones above 0")
    scaling = architecture.rope_scaling or RopeScaling(kind="linear", factor=1.0)
    return dataclasses.replace(architecture, rope_scaling=dataclasses.replace(scaling, factors=factors))


def _gguf_source(file: GgufFile) -> _Source:
    shapes = {entry.name: entry.shape for entry in file.tensors.values()}
    return _Source(
        file.path,
        shapes,
        lambda name, slices: torch.from_numpy(file.tensor(name, slices)),
        tied="output.weight" not in shapes,
        name_of=_gguf_name,
        ignorable=frozenset([_ROPE_FACTORS]),
        blocks=lambda name, slices: _gguf_blocks(file, name, slices),
        block_bytes={
            entry.name: entry.byte_count / math.prod(entry.shape)
            for entry in file.tensors.values()
            if entry.quantization.name in GGUF_BLOCKS and entry.byte_count
        },
    )


def _gguf_blocks(file: GgufFile, name: str, slices: tuple[slice, ...]) -> Blocks | None:
    """A tensor's own blocks; None where it is no matrix of a kind that is read in blocks, or they would be torn."""
    entry = file.tensors[name]
    read = GGUF_BLOCKS.get(entry.quantization.name)
    raw = file.raw_rows(name, slices) if read is not None and len(entry.shape) == 2 else None
    return None if read is None or raw is None else read(raw)


def _opened_folder(folder: Path, *, keeps_fp8: bool) -> tuple[_Source, Architecture]:
    config = _json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _json(generation_path) if generation_path.exists() else {}
    architecture = architectures.from_hugging_face(folder / "config.json", config, generation)
    # DeepSeek-V3's files hold layers after the last one, which guess more than one token ahead.
    layers, guessing = architecture.layer_count, config.get("num_nextn_predict_layers") or 0
    source = _folder_source(
        folder,
        tied=bool(config.get("tie_word_embeddings", False)),
        unused_layers=range(layers, layers + guessing),
        fp8=read_fp8(folder / "config.json", config.get("quantization_config")),
        keeps_fp8=keeps_fp8,
    )
    return source, architecture


def _folder_source(folder: Path, *, tied: bool, unused_layers: range, fp8: Fp8 | None, keeps_fp8: bool) -> _Source:
    # A tied model may carry a copy of its embedding under the head's name; it is left unread.
    head = "lm_head.weight"
    files, paths, shapes, types = {}, {}, {}, {}
    for path in _weight_files(folder):
        file = _open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            entry = file.get_slice(name)
            if name in files:
                raise ModelLoadError(f"{path}: tensor {name} is in {paths[name].name} too")
            paths[name] = path
            files[name], shapes[name], types[name] = file, tuple(entry.get_shape()), entry.get_dtype()
    if not tied and head not in shapes:
        raise ModelLoadError(f"{folder}: tensor {head} is missing, and tie_word_embeddings is not set")
    beyond = tuple(f"model.layers.{layer}." for layer in unused_layers)
    stale = {name for name in shapes if name.endswith(".rotary_emb.inv_freq") or name.startswith(beyond)}
    scales = {} if fp8 is None else _scale_names(folder, shapes, fp8)
    for name in shapes.keys() - stale:
        expected = ("F8_E4M3",) if name in scales else _FLOATS
        if types[name] not in expected:
            found = f"tensor {name} has type {types[name]}, expected {' or '.join(expected)}"
            raise ModelLoadError(f"{paths[name]}: {found}")

    def read(name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        stored = files[name].get_slice(name)[slices]
        if fp8 is None or name not in scales:
            return stored.float()
        of_all = files[scales[name]].get_tensor(scales[name])
        return fp8.scaled(stored, of_all, shapes[name], slices)

    def kept(name: str, slices: tuple[slice, ...]) -> Narrow | None:
        if fp8 is None or name not in scales or not fp8.can_keep(slices):
            return None
        stored = files[name].get_slice(name)[slices]
        return fp8.kept(stored, files[scales[name]].get_tensor(scales[name]), shapes[name], slices)

    source = _Source(
        folder,
        shapes,
        read,
        tied=tied,
        ignorable=frozenset(stale | set(scales.values()) | ({head} if tied else set())),
        files=paths,
    )
    if fp8 is None or not keeps_fp8:
        return source
    # A byte, and its part of a scale.
    return dataclasses.replace(source, blocks=kept, block_bytes=dict.fromkeys(scales, 1 + 4 / fp8.block[1]))


def _scale_names(folder: Path, shapes: dict[str, tuple[int, ...]], fp8: Fp8) -> dict[str, str]:
    """The names of scales by those of the weights that they belong to, with their shapes checked."""
    found = {name.removesuffix(SCALE_ENDING): name for name in shapes if name.endswith(SCALE_ENDING)}
    for weight, name in found.items():
        shape = shapes.get(weight, ())
        if len(shape) != len(fp8.block):
            raise ModelLoadError(f"{folder}: tensor {name} has no matrix {weight} that it could belong to")
        expected = fp8.scale_shape(shape)
        if shapes[name] != expected:
            raise ModelLoadError(
                f"{folder}: tensor {name} has shape {list(shapes[name])}, expected {list(expected)}:"
                f" one for each {' x '.join(map(str, fp8.block))} of {weight}"
            )
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = _json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
            raise ModelLoadError(f"{index}: field weight_map is not a table of tensors and their files")
        tensors = {folder / Path(place).name: name for name, place in sorted(places.items(), reverse=True)}
        for path, name in tensors.items():
            if not path.exists():
                raise ModelLoadError(f"{path}: there is no such file, in which by {index.name} tensor {name} lies")
        return sorted(tensors)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{folder}: there is no *.safetensors file")
    names = {path.name for path in files}
    # By the first file of each, what of several there should be.
    several = {
        found.group("stem", "count"): found[0] for found in map(_NUMBERED.fullmatch, sorted(names)[::-1]) if found
    }
    for (stem, count), first in several.items():
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:05}-of-{count}.safetensors"
            if name not in names:
                raise ModelLoadError(f"{folder / name}: there is no such file, and {first} says that there should be")
    return files


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: {_truncation(path) or f'cannot be read: {error}'}") from error


def _truncation(path: Path) -> str:
    """Where a safetensors file should end, by its own header; empty where it does, or where that cannot be told."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            data_start = 8 + header_bytes
            if header_bytes > _MOST_HEADER_BYTES:
                return ""
            if data_start > size:
                return f"truncated: the header ends at byte {data_start}, the file has {size}"
            header = json.loads(file.read(header_bytes))
        ends = [
            (data_start + entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__"
        ]
        end, name = min(found for found in ends if found[0] > size)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return f"truncated: tensor {name} ends at byte {end}, the file has {size}"


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: expected a JSON object")
    return content


def _cache_path(cache_dir: Path, model_path: Path, dtype: str, rank: int, size: int) -> Path:
    """The cache file's name changes with the model file, the type, the rank and the layout."""
    status = model_path.stat()
    identity = [str(model_path.resolve()), status.st_size, status.st_mtime_ns, dtype, CACHE_VERSION]
    if size > 1:
        identity += [rank, size]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_dir / f"{model_path.stem}-{dtype}-{digest}.safetensors"


def _read_cache(path: Path, architecture: Architecture, here: Division) -> dict[str, Weight] | None:
    """The cached weights, mapped and not copied; None where there is no sound file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Weight] = unnamed({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        _log.warning("weight cache %s is damaged and will be rebuilt: %s", path, error)
        return None
    expected = _fused_shapes(architecture, here, tied="output" not in tensors)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        _log.warning("weight cache %s does not fit the model and will be rebuilt", path)
        return None
    return tensors


def _write_cache(path: Path, tensors: dict[str, Weight]) -> None:
    """Write the whole file beside its place, then move it there; a failure costs only the next start."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flat: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            assert not isinstance(tensor, Floats8)  # Those of a folder are not cached.
            flat |= tensor.named(name) if isinstance(tensor, Blocks) else {name: tensor}
        save_file(flat, unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        _log.warning("weight cache %s cannot be written: %s", path, error)
        with suppress(OSError):
            unfinished.unlink()
