"""Looks at our engine on a GPU from inside its process: rates of the device, and what of them the engine reaches.

MODEL is a folder with a config.json alone: weights are random bf16, made on the device. Needs torch, numpy and
safetensors, and the engine's folder on the path; prints one line of JSON. With `--device cpu` the same runs on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch

if find_spec("gguf") is None:
    # No GGUF file is read here.
    sys.modules["gguf"] = sys.modules["gguf.quants"] = MagicMock()

from llm_engine import Engine, EngineConfig, SamplingParams, SequenceRequest
from llm_engine import engine as engine_module
from llm_engine import rank as rank_module
from llm_engine.architecture import Architecture, from_hugging_face
from llm_engine.cache_layout import cache_layout
from llm_engine.division import division
from llm_engine.layouts import fused_tensors
from llm_engine.matmul import compute_dtype
from llm_engine.weights import Checkpoint

DTYPE = "bf16"
REPEATED = 10
"""How many copies or products are timed at once, so that their launches do not count."""

GREEDY = SamplingParams(temperature=0.0)


def main() -> None:
    """Measures what the command line says, or says that there is no device."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--device", required=True, choices=("cuda", "cpu"))
    parser.add_argument("--prompts", type=Path, required=True, help="JSON file: token ids of those that are generated")
    parser.add_argument("--tokens", type=int, required=True, help="output tokens of each")
    parser.add_argument("--prefills", type=Path, required=True, help="JSON file: token ids of those that are only read")
    parser.add_argument("--matrix-size", type=int, required=True, help="rows and columns of the product")
    parser.add_argument("--copy-bytes", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"missing": f"torch {torch.__version__} finds no CUDA device"}))
        return
    rank_module.load_checkpoint = functools.partial(_random_checkpoint, device=options.device)
    print(json.dumps(Measures(options).all()), flush=True)


class Measures:
    """One shape's; the engine's figures and the device's are measured in turn."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._device = torch.device(options.device)
        self._options, self._tokens = options, options.tokens
        self._prompts: list[list[int]] = json.loads(options.prompts.read_text())
        self._prefills: list[list[int]] = json.loads(options.prefills.read_text())
        self._architecture = _architecture(options.model)
        dtype = compute_dtype(DTYPE, self._device)
        self._layout = cache_layout(self._architecture, EngineConfig.block_token_count, dtype)

    def all(self) -> dict[str, object]:
        """Of the whole model, and then of a rank's part of it."""
        size = self._options.matrix_size
        dtype, device = self._layout.dtype, self._device
        left, right, product = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
        source, target = (torch.zeros(self._options.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        engine = self._engine()
        many = [self._generated(engine) for _ in range(2)][-1]
        decodes, copies = self._in_turn(
            lambda: self._decode_seconds(engine), lambda: self._seconds(lambda: target.copy_(source))
        )
        prefills, products = self._in_turn(
            lambda: self._prefill_seconds(engine), lambda: self._seconds(lambda: torch.mm(left, right, out=product))
        )
        # A copy reads and writes.
        bandwidths = [2 * self._options.copy_bytes / seconds for seconds in copies]
        rates = [2 * size**3 / seconds for seconds in products]
        decode_bytes = multiplied_weights(self._architecture) * dtype.itemsize + self._kv_bytes()
        operations = self._prefill_operations()
        found = {
            "device": torch.cuda.get_device_name() if self._device.type == "cuda" else "the CPU",
            "torch": torch.__version__,
            "dtype": str(self._layout.dtype).removeprefix("torch."),
            "graphs": engine._rank._decodes is not None,
            "reads_blocks": engine._rank.kv_cache.reads_blocks,
            "copy_bytes_per_second": statistics.median(bandwidths),
            "matrix_operations_per_second": statistics.median(rates),
            "decode_bytes": decode_bytes,
            "decode_seconds": statistics.median(decodes),
            "roofline_share": _share((decode_bytes / each for each in decodes), bandwidths),
            "prefill_seconds": statistics.median(prefills),
            "prefill_operations_per_second": operations / statistics.median(prefills),
            "prefill_share": _share((operations / each for each in prefills), rates),
            "tokens_per_second": len(self._prompts) * self._tokens / many,
        }
        engine.close()
        engine = None
        gc.collect()
        torch.cuda.empty_cache()
        engine_module._ranks = _stubbed_ranks
        # As a node of two, so that one device is enough.
        shard = self._engine(tensor_parallel_size=2, node_count=2, master_port=1)
        of_shard = [
            self._in_turn(functools.partial(each, shard))[0] for each in (self._decode_seconds, self._prefill_seconds)
        ]
        found["shard_decode_seconds"], found["shard_prefill_seconds"] = map(statistics.median, of_shard)
        return found

    def _engine(self, **settings: int) -> Engine:
        """Blocks for all prompts at once, and a step's budget that takes all of the long ones."""
        longest = max(len(self._prompts[0]) + self._tokens, len(self._prefills[0]) + 1)
        block = EngineConfig.block_token_count
        blocks = max(len(self._prompts), len(self._prefills)) * (longest // block + 1) + 1
        return Engine(
            EngineConfig(
                model_path=str(self._options.model),
                device=self._device.type,
                dtype=DTYPE,
                kv_cache_bytes=blocks * self._layout.block_byte_count * self._architecture.layer_count,
                max_sequences=len(self._prompts),
                step_token_budget=max(sum(map(len, self._prefills)), len(self._prompts)),
                step_stretch=0,
                prefix_reuse=False,
                speculation_tokens=0,
                cpu_kernels=False,
                **settings,
            )
        )

    def _in_turn(self, *measured: Callable[[], float]) -> list[list[float]]:
        """What each gives, round by round; the first round only warms up."""
        rounds = [[each() for each in measured] for _ in range(1 + self._options.rounds)]
        return [list(figures) for figures in zip(*rounds[1:], strict=True)]

    def _seconds(self, launch: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(REPEATED):
            launch()
        self._wait()
        return (time.perf_counter() - started) / REPEATED

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _generated(self, engine: Engine) -> float:
        """The seconds that all prompts take to their last tokens."""
        return sum(_step_seconds(engine, self._prompts, self._tokens))

    def _decode_seconds(self, engine: Engine) -> float:
        """Of a token of one sequence."""
        return statistics.median(_step_seconds(engine, self._prompts[:1], self._tokens)[1:])

    def _prefill_seconds(self, engine: Engine) -> float:
        return sum(_step_seconds(engine, self._prefills, 1))

    def _kv_bytes(self) -> float:
        """What a token of one sequence reads of the cache, on average."""
        token_bytes = self._layout.block_byte_count / EngineConfig.block_token_count * self._architecture.layer_count
        return (len(self._prompts[0]) + self._tokens / 2) * token_bytes

    def _prefill_operations(self) -> float:
        """Two a weight and token, and attention's, causal; the output matrix multiplies one row of each prompt."""
        a, count, tokens = self._architecture, len(self._prefills), len(self._prefills[0])
        output = a.vocabulary_size * a.hidden_size
        sizes = 2 * a.head_dim if a.latent is None else a.latent.key_size + a.latent.value_size
        attention = a.layer_count * a.head_count * sizes * tokens**2
        return count * (2 * (multiplied_weights(a) - output) * tokens + 2 * output + attention)


def multiplied_weights(architecture: Architecture) -> float:
    """How many a token is multiplied with: all but the embedding, and of routed experts those that it takes."""
    experts = architecture.experts
    return sum(
        math.prod(part.shape) * (1 if part.expert is None or experts is None else experts.per_row / experts.count)
        for fused in fused_tensors(architecture, tied=False)
        if fused.name != "embedding"
        for part in fused.parts
    )


class _Stubbed:
    """The first of two ranks, whose collectives give it its own back; so the rank goes without graphs, step by step."""

    rank, size = 0, 2

    def add_up(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def joined(self, columns: torch.Tensor) -> torch.Tensor:
        return columns


def _stubbed_ranks(config: EngineConfig) -> tuple[rank_module.LoadedRank, rank_module.Rank]:
    loaded = rank_module.LoadedRank(config, 0)
    return loaded, loaded.ready(_Stubbed())


def _architecture(folder: Path) -> Architecture:
    path = folder / "config.json"
    return from_hugging_face(path, json.loads(path.read_text()), {})


def _random_checkpoint(model_path: Path, *, rank: int, size: int, device: str, **unused: object) -> Checkpoint:
    """`load_checkpoint` without files."""
    architecture = _architecture(model_path)
    here = division(model_path, architecture, rank, size)
    tensors = {}
    for fused in fused_tensors(architecture, tied=False):
        shapes = [here.shape(part) for part in filter(here.is_here, fused.parts)]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
        # What is no matrix is a norm, or says how experts are chosen.
        tensors[fused.name] = tensor if len(shape) == 1 else tensor.normal_(std=0.02)
    return Checkpoint(architecture, here, tensors, is_tied=False)


def _step_seconds(engine: Engine, prompts: list[list[int]], tokens: int) -> list[float]:
    """The seconds of each step, until all prompts have all their tokens."""
    given = {"max_tokens": tokens, "sampling": GREEDY, "ignore_eos": True}
    for index, prompt in enumerate(prompts):
        engine.add(SequenceRequest(request_id=str(index), token_ids=prompt, **given))
    seconds, reasons = [], []
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - started)
        reasons += [output.finish_reason for output in outputs if output.finish_reason]
    assert reasons == ["length"] * len(prompts), f"sequences ended with {sorted(set(reasons))}"
    return seconds


def _share(reached: Iterator[float], rates: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(reached, rates, strict=True))


if __name__ == "__main__":
    main()
