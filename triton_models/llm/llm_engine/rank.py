"""One rank: its part of the weights and of the KV cache, and the steps that it computes with them.

Owns what every rank of a group does alike. Invariants: memory is taken at start and does not grow; all ranks have
the same number of blocks. An engine alone is the only rank of its group.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cache_layout import cache_layout
from .config import EngineConfig
from .cpu_kernels import CpuKernels, load_kernels
from .cuda_graphs import Capture, GraphedDecodes
from .division import division
from .errors import ModelLoadError
from .kv_cache import KvCache
from .matmul import Compute, compute_dtype, narrowness
from .memory import enough_memory_for, free_bytes, machine_bytes
from .model import Model
from .ranks import Alone, Group
from .step_tensors import RowWork, StepLayout, StepTensors, step_tensors, step_tensors_after
from .weights import Checkpoint, load_checkpoint
from .window import window_of

if TYPE_CHECKING:
    from .gpu_attention import GpuAttention
    from .gpu_products import GpuExperts

_log = logging.getLogger("llm_engine.rank")

# Keys that one decode group gathers at most: on a CPU a few MB, which its cache holds.
_CPU_GROUP_TOKEN_BOUND = 2048
_CUDA_GROUP_TOKEN_BOUND = 1 << 20


class LoadedRank:
    """Weights that are read, before the ranks have found each other; loading raises ModelLoadError."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        torch.set_num_threads(config.thread_count)
        self.config, self.rank = config, rank
        self.device = _device(config, rank)
        if self.device.type == "cuda":
            # Triton's launcher, and whatever names no device, takes the current one.
            torch.cuda.set_device(self.device)
        cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
        is_cpu = self.device.type == "cpu"
        grouped_experts = None if is_cpu else _gpu_experts()
        with enough_memory_for(f"{config.model_path}: the weights"):
            self.checkpoint: Checkpoint = load_checkpoint(
                Path(config.model_path),
                dtype=config.dtype,
                cache_dir=cache_dir,
                rank=rank,
                size=config.tensor_parallel_size,
                keeps_fp8=grouped_experts is not None and _has_fp8(self.device),
                check_room=partial(_check_room, config, self.device),
            )
        self.dtype = compute_dtype(config.dtype, self.device)
        kernels = load_kernels(cache_dir, config.thread_count) if is_cpu and config.cpu_kernels else None
        narrow = narrowness(config.dtype, kernels)
        self.compute = Compute(
            device=self.device,
            dtype=self.dtype,
            activations=torch.float32 if is_cpu else self.dtype,
            cached=_cache_dtype(config, self.checkpoint, self.dtype, kernels if narrow else None),
            kernels=kernels,
            narrowness=narrow,
            attention=kernels if is_cpu else _gpu_attention(config),
            grouped_experts=grouped_experts,
        )
        self.block_count = _block_count(config, self.checkpoint, self.compute.cached)
        self.context_token_count = _context_token_count(config, self.checkpoint, self.block_count)

    def column_counts(self) -> list[int]:
        """How much of the vocabulary each rank has."""
        path, size = Path(self.config.model_path), self.config.tensor_parallel_size
        return [len(division(path, self.checkpoint.architecture, rank, size).vocabulary) for rank in range(size)]

    def ready(self, ranks: Alone | Group) -> "Rank":
        """The rank with its others, once; ModelLoadError where the device has not the memory."""
        with enough_memory_for(f"the weights, and kv_cache_bytes of {self.config.kv_cache_bytes},"):
            rank = Rank(self, ranks)
        # The rank has them in a form of its own, on its device.
        self.checkpoint.tensors.clear()
        return rank


class Rank:
    """Computes steps; every rank of a group must be given the same ones, in the same order."""

    def __init__(self, loaded: LoadedRank, ranks: Alone | Group) -> None:
        config, checkpoint, compute = loaded.config, loaded.checkpoint, loaded.compute
        local = checkpoint.division.local(checkpoint.architecture)
        self.kv_cache = KvCache(
            local,
            block_count=loaded.block_count,
            block_token_count=config.block_token_count,
            compute=compute,
            window=window_of(config),
        )
        self.model = Model(
            checkpoint.architecture,
            checkpoint.tensors,
            checkpoint.division,
            ranks,
            context_token_count=loaded.context_token_count,
            compute=compute,
        )
        self._layout = StepLayout(
            block_token_count=config.block_token_count,
            padding_block=self.kv_cache.padding_block,
            group_size=local.group_size,
            group_token_bound=_CPU_GROUP_TOKEN_BOUND if compute.device.type == "cpu" else _CUDA_GROUP_TOKEN_BOUND,
            reads_blocks=self.kv_cache.reads_blocks,
            reads_chunks=self.kv_cache.reads_chunks,
            window=window_of(config),
            dtype=compute.dtype,
            device=compute.device,
        )

        self._decodes = None
        # Expert by expert it is looked on the host how many rows each has, and ranks are told each step's tokens.
        waits = checkpoint.architecture.experts is not None and compute.grouped_experts is None
        self.runs_ahead = compute.device.type == "cuda" and isinstance(ranks, Alone) and not waits
        """Whether a step is only begun when `forward` returns, so that the next can be planned meanwhile."""
        if self.runs_ahead and self.kv_cache.reads_blocks:
            self._decodes = GraphedDecodes(
                lambda step: self.model.forward(step, self.kv_cache),  # type: ignore[arg-type, return-value]
                most_sequences=config.max_sequences,
                most_tokens=loaded.context_token_count,
                block_token_count=config.block_token_count,
                padding_block=self.kv_cache.padding_block,
                device=compute.device,
                capture=Capture(),
            )

    def lay_out(self, works: list[RowWork]) -> StepTensors:
        """A step's tensors on this rank."""
        return step_tensors(works, self._layout)

    def lay_out_after(self, works: list[RowWork], token_ids: torch.Tensor, rows: list[int]) -> StepTensors:
        """The tensors of a step whose tokens are on the device alone, as `step_tensors_after`'s."""
        return step_tensors_after(works, token_ids, rows, self._layout)

    def forward(self, step: StepTensors, *, give_up: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """A step's logits, [sampled_count, vocabulary] fp32; None for a step that was given up."""
        logits = None if self._decodes is None else self._decodes(step)
        return self.model.forward(step, self.kv_cache, give_up=give_up) if logits is None else logits

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that hold what is not finite."""
        self.kv_cache.clear(blocks)

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Nothing to watch: all is this process's."""

    def close(self) -> None:
        """Nothing to end either."""


def _device(config: EngineConfig, rank: int) -> torch.device:
    if config.device != "cuda":
        return torch.device(config.device)
    if not torch.cuda.is_available():
        raise ModelLoadError("device is 'cuda', but torch finds no CUDA device")
    ranks, found = config.own_ranks, torch.cuda.device_count()
    if len(ranks) > found:
        on_nodes = f" on {config.node_count} nodes" if config.node_count > 1 else ""
        raise ModelLoadError(
            f"tensor_parallel_size is {config.tensor_parallel_size}{on_nodes}, but torch finds {found} CUDA devices"
        )
    return torch.device("cuda", rank - ranks.start)


def _has_fp8(device: torch.device) -> bool:
    """Whether a GPU turns eight-bit floats into wider ones: those of Ada and Hopper, and since."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _gpu_experts() -> "type[GpuExperts] | None":
    """Nothing where Triton's compiler is not there."""
    try:
        from .gpu_products import GpuExperts
    except ImportError as error:
        _log.warning("experts multiply their rows one by one, which is slower: no compiler for their kernel: %s", error)
        return None
    return GpuExperts


def _gpu_attention(config: EngineConfig) -> "GpuAttention | None":
    """Nothing where Triton's compiler, which comes with torch's builds for CUDA, is not there, or with a window."""
    if config.attention_window:
        return None
    try:
        from .gpu_attention import GpuAttention
    except ImportError as error:
        _log.warning(
            "attention gathers all blocks at each step, which is slower: no compiler for its kernel: %s", error
        )
        return None
    return GpuAttention()


def _check_room(config: EngineConfig, device: torch.device, weight_bytes: int) -> None:
    """Refuse what the machine, or the rank's GPU, cannot hold: each rank's weights and its KV blocks."""
    here, needed = len(config.own_ranks), weight_bytes + config.kv_cache_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits, bound = needed <= free, f"{free} bytes of {device} are free"
    elif needed * here > (has := machine_bytes()):
        fits, bound = False, f"there are {has} bytes of memory"
    else:
        # The other ranks may have taken theirs by now, or not.
        free = free_bytes()
        fits, bound = needed <= free, f"{free} bytes of memory are free"
    if not fits:
        raise ModelLoadError(
            f"{config.model_path}: the weights take {weight_bytes} bytes and kv_cache_bytes is {config.kv_cache_bytes}"
            f" for each of {here} ranks, but {bound}"
        )


def _cache_dtype(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, narrow_kernels: CpuKernels | None
) -> torch.dtype:
    """bf16 also where torch computes in fp32, if the kernels' products are narrow and they read all of the cache.

    Hosts must count the same blocks, and each has a compiler of its own, or none: several keep the type they agreed on.
    """
    if narrow_kernels is None or config.node_count > 1:
        return dtype
    layout = cache_layout(checkpoint.architecture, config.block_token_count, torch.bfloat16)
    return torch.bfloat16 if narrow_kernels.can_attend_chunks(layout) else dtype


def _block_count(config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many KV blocks the bound holds on the rank that needs most for one, the padding block included."""
    architecture, size = checkpoint.architecture, config.tensor_parallel_size
    divisions = [division(Path(config.model_path), architecture, rank, size) for rank in range(size)]
    layouts = [cache_layout(part.local(architecture), config.block_token_count, dtype) for part in divisions]
    one = max(layout.block_byte_count for layout in layouts) * architecture.layer_count
    count = config.kv_cache_bytes // one - 1
    if count < 1:
        raise ModelLoadError(
            f"kv_cache_bytes is {config.kv_cache_bytes}, expected at least {2 * one}:"
            f" a block of {config.block_token_count} tokens takes {one}, and one is kept for padding"
        )
    return count


def _context_token_count(config: EngineConfig, checkpoint: Checkpoint, block_count: int) -> int:
    asked, most = config.max_context_tokens, checkpoint.architecture.context_token_count
    if asked is not None and asked > most:
        raise ModelLoadError(f"max_context_tokens is {asked}, the model's own bound is {most}")
    if block_count >= window_of(config).most_blocks(config.step_token_budget, config.block_token_count):
        return asked or most
    return min(asked or most, block_count * config.block_token_count)
