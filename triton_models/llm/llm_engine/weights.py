"""A model's weights, from files to fused matrices in the wanted type.

Owns names and layouts: what a tensor is called in GGUF and in Hugging Face's files, how q, k and v
(and gate and up) are fused into one matrix, and the cache of the result. Invariants: every tensor that
the architecture needs is there with its exact shape, and there is no other; a cache file is either
complete or absent. What the matrices mean is left to `model.py`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import architecture as architectures
from .architecture import Architecture
from .errors import ModelLoadError
from .gguf_reader import GgufFile

# Counted up whenever the fused layout or the reading of a file changes.
CACHE_VERSION = 1
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_log = logging.getLogger("llm_engine.weights")


@dataclass(frozen=True)
class Checkpoint:
    """A model's architecture and its fused weights, each [output size, input size], on the CPU."""

    architecture: Architecture
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Source:
    """Tensors of a file or folder by the name they have there, with their shapes."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    names: dict[str, tuple[str, ...]]
    tied: bool
    """Whether the embedding is the output matrix too."""
    ignorable: frozenset[str] = frozenset()
    interleaved_rope: bool = False


def load_checkpoint(model_path: Path, *, dtype: str, cache_dir: Path | None) -> Checkpoint:
    """Load a GGUF file or a Hugging Face folder; ModelLoadError says what is wrong with it."""
    if model_path.is_dir():
        return _load_folder(model_path, dtype)
    if not model_path.exists():
        raise ModelLoadError(f"{model_path}: there is no such file or folder")
    file = GgufFile(model_path)
    architecture = architectures.from_gguf(model_path, file.metadata)
    source = _gguf_source(file, architecture)
    _check(source, architecture)
    cached = None if cache_dir is None else _cache_path(cache_dir, model_path, dtype)
    tensors = None if cached is None else _read_cache(cached, architecture)
    if tensors is None:
        tensors = _fuse(source, architecture, dtype)
        if cached is not None:
            _write_cache(cached, tensors)
    return Checkpoint(architecture, tensors)


def fused_shapes(architecture: Architecture, *, tied: bool) -> dict[str, tuple[int, int] | tuple[int]]:
    """The names and shapes of the fused weights."""
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {"embedding": (a.vocabulary_size, a.hidden_size)}
    for layer in range(a.layer_count):
        shapes[f"layers.{layer}.attention_norm"] = (a.hidden_size,)
        shapes[f"layers.{layer}.qkv"] = (a.query_size + 2 * a.kv_size, a.hidden_size)
        if a.has_qkv_bias:
            shapes[f"layers.{layer}.qkv_bias"] = (a.query_size + 2 * a.kv_size,)
        if a.has_head_norms:
            shapes[f"layers.{layer}.query_norm"] = (a.head_dim,)
            shapes[f"layers.{layer}.key_norm"] = (a.head_dim,)
        shapes[f"layers.{layer}.attention_output"] = (a.hidden_size, a.query_size)
        shapes[f"layers.{layer}.mlp_norm"] = (a.hidden_size,)
        shapes[f"layers.{layer}.gate_up"] = (2 * a.intermediate_size, a.hidden_size)
        shapes[f"layers.{layer}.down"] = (a.hidden_size, a.intermediate_size)
    shapes["final_norm"] = (a.hidden_size,)
    if not tied:
        shapes["output"] = (a.vocabulary_size, a.hidden_size)
    return shapes


def _part_rows(architecture: Architecture, fused_name: str, rows: int) -> tuple[int, ...]:
    """How the rows of a fused matrix divide between the tensors that it is made of."""
    if fused_name.endswith((".qkv", ".qkv_bias")):
        return (architecture.query_size, architecture.kv_size, architecture.kv_size)
    if fused_name.endswith(".gate_up"):
        return (rows // 2, rows // 2)
    return (rows,)


def _check(source: _Source, architecture: Architecture) -> None:
    """Refuse missing tensors, wrong shapes, and tensors that nothing would use."""
    used = set(source.ignorable)
    for fused_name, shape in fused_shapes(architecture, tied=source.tied).items():
        for name, rows in zip(source.names[fused_name], _part_rows(architecture, fused_name, shape[0]), strict=True):
            expected = (rows, *shape[1:])
            if name not in source.shapes:
                raise ModelLoadError(f"{source.path}: tensor {name} {list(expected)} is missing")
            if source.shapes[name] != expected:
                found = list(source.shapes[name])
                raise ModelLoadError(f"{source.path}: tensor {name} has shape {found}, expected {list(expected)}")
            used.add(name)
    unused = sorted(set(source.shapes) - used)
    if unused:
        raise ModelLoadError(f"{source.path}: tensor {unused[0]} is not supported ({len(unused)} such)")


def _fuse(source: _Source, architecture: Architecture, dtype: str) -> dict[str, torch.Tensor]:
    """Read, reorder, convert and join: fused name to [rows, columns] of the wanted type."""
    fused = {}
    for fused_name in fused_shapes(architecture, tied=source.tied):
        parts = [source.read(name) for name in source.names[fused_name]]
        if source.interleaved_rope and fused_name.endswith(".qkv"):
            parts[:2] = [_deinterleaved(part, architecture.head_dim) for part in parts[:2]]
        for name, part in zip(source.names[fused_name], parts, strict=True):
            if not torch.isfinite(part).all():
                raise ModelLoadError(f"{source.path}: tensor {name} holds values that are not finite")
        converted = [part.to(TORCH_DTYPES[dtype]) for part in parts]
        fused[fused_name] = converted[0] if len(converted) == 1 else torch.cat(converted)
    return fused


def _deinterleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from (pair, half) order, as GGUF has them, to (half, pair), as rotary here."""
    heads = weight.shape[0] // head_dim
    pairs = weight.view(heads, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _gguf_source(file: GgufFile, architecture: Architecture) -> _Source:
    names = {
        "embedding": ("token_embd.weight",),
        "final_norm": ("output_norm.weight",),
        "output": ("output.weight",),
    }
    for layer in range(architecture.layer_count):
        part = f"blk.{layer}.{{}}.weight".format
        names[f"layers.{layer}.attention_norm"] = (part("attn_norm"),)
        names[f"layers.{layer}.qkv"] = (part("attn_q"), part("attn_k"), part("attn_v"))
        names[f"layers.{layer}.attention_output"] = (part("attn_output"),)
        names[f"layers.{layer}.mlp_norm"] = (part("ffn_norm"),)
        names[f"layers.{layer}.gate_up"] = (part("ffn_gate"), part("ffn_up"))
        names[f"layers.{layer}.down"] = (part("ffn_down"),)
    shapes = {entry.name: entry.shape for entry in file.tensors.values()}
    return _Source(
        file.path,
        shapes,
        lambda name: torch.from_numpy(file.tensor(name)),
        names,
        tied="output.weight" not in shapes,
        interleaved_rope=True,
    )


def _load_folder(folder: Path, dtype: str) -> Checkpoint:
    config = _json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _json(generation_path) if generation_path.exists() else {}
    architecture = architectures.from_hugging_face(folder / "config.json", config, generation)
    source = _folder_source(folder, architecture, tied=bool(config.get("tie_word_embeddings", False)))
    _check(source, architecture)
    return Checkpoint(architecture, _fuse(source, architecture, dtype))


def _folder_source(folder: Path, architecture: Architecture, *, tied: bool) -> _Source:
    # A tied model may carry a copy of its embedding under the head's name; it is left unread.
    head = "lm_head.weight"
    names = {
        "embedding": ("model.embed_tokens.weight",),
        "final_norm": ("model.norm.weight",),
        "output": (head,),
    }
    for layer in range(architecture.layer_count):
        part = f"model.layers.{layer}.{{}}.weight".format
        attention = [part(f"self_attn.{letter}_proj") for letter in "qkv"]
        names[f"layers.{layer}.attention_norm"] = (part("input_layernorm"),)
        names[f"layers.{layer}.qkv"] = tuple(attention)
        names[f"layers.{layer}.qkv_bias"] = tuple(name.removesuffix("weight") + "bias" for name in attention)
        names[f"layers.{layer}.query_norm"] = (part("self_attn.q_norm"),)
        names[f"layers.{layer}.key_norm"] = (part("self_attn.k_norm"),)
        names[f"layers.{layer}.attention_output"] = (part("self_attn.o_proj"),)
        names[f"layers.{layer}.mlp_norm"] = (part("post_attention_layernorm"),)
        names[f"layers.{layer}.gate_up"] = (part("mlp.gate_proj"), part("mlp.up_proj"))
        names[f"layers.{layer}.down"] = (part("mlp.down_proj"),)
    files, shapes = {}, {}
    for path in _weight_files(folder):
        file = _open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            files[name], shapes[name] = file, tuple(file.get_slice(name).get_shape())
    if not tied and head not in shapes:
        raise ModelLoadError(f"{folder}: tensor {head} is missing, and tie_word_embeddings is not set")
    stale = {name for name in shapes if name.endswith(".rotary_emb.inv_freq")}
    return _Source(
        folder,
        shapes,
        lambda name: files[name].get_tensor(name).float(),
        names,
        tied=tied,
        ignorable=frozenset(stale | ({head} if tied else set())),
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = _json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ModelLoadError(f"{index}: field weight_map is missing or empty")
        return [folder / Path(name).name for name in sorted(set(places.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{folder}: there is no *.safetensors file")
    return files


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: expected a JSON object")
    return content


def _cache_path(cache_dir: Path, model_path: Path, dtype: str) -> Path:
    """The cache file's name changes with the model file, the type and the layout."""
    status = model_path.stat()
    identity = [str(model_path.resolve()), status.st_size, status.st_mtime_ns, dtype, CACHE_VERSION]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_dir / f"{model_path.stem}-{dtype}-{digest}.safetensors"


def _read_cache(path: Path, architecture: Architecture) -> dict[str, torch.Tensor] | None:
    """The cached weights, mapped and not copied; None where there is no sound file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        _log.warning("weight cache %s is damaged and will be rebuilt: %s", path, error)
        return None
    expected = fused_shapes(architecture, tied="output" not in tensors)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        _log.warning("weight cache %s does not fit the model and will be rebuilt", path)
        return None
    return tensors


def _write_cache(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the whole file beside its place, then move it there; a failure costs only the next start."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        _log.warning("weight cache %s cannot be written: %s", path, error)
        with suppress(OSError):
            unfinished.unlink()
