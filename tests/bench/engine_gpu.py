"""Measures the engine on a GPU, each figure beside its bound: `make bench SCENARIO=engine ARGS="--only gpu"`.

Runs by itself too, with any Python that has torch for CUDA and transformers, from the repository alone:
`python3 tests/bench/engine_gpu.py`. Weights are random, of an 8B Llama's shape and of a DeepSeek-V3's that is scaled
down, bf16. `--device cpu --shape tiny-llama` runs the same on a CPU, where its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine_runs import DRIVERS, RunFailed, flags, prompt, run
from table import Table

RUN_SECONDS: Final = 200.0
"""The bound on one run; there are two of each shape."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    sequences: int
    prompt_tokens: int
    tokens: int
    prefills: int
    prefill_tokens: int
    matrix_size: int
    copy_bytes: int


@dataclass(frozen=True)
class Shape:
    """A model that is only a config.json."""

    sizes: Sizes
    config: dict[str, Any]


FULL: Final = Sizes(256, 512, 128, 8, 2048, 8192, 1 << 32)
TINY: Final = Sizes(4, 16, 8, 2, 32, 128, 1 << 20)
LLAMA: Final = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK: Final = {
    **LLAMA, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "rope_theta": 10000.0,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
SHAPES: Final = {
    "llama-8b": Shape(
        FULL,
        {
            **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    # Latents and the choice of experts are V3's own; widths are those of DeepSeek-V2-Lite.
    "deepseek-v3-scaled-down": Shape(
        FULL,
        {
            **DEEPSEEK, "vocab_size": 129280, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 8,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        },
    ),
    "tiny-llama": Shape(
        TINY,
        {
            **LLAMA, "vocab_size": 41000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
    ),
    "tiny-deepseek": Shape(
        TINY,
        {
            **DEEPSEEK, "vocab_size": 41000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        },
    ),
}  # fmt: skip
FULL_SHAPES: Final = ("llama-8b", "deepseek-v3-scaled-down")


def measure(table: Table, own: Path, peer: Path | None, *, device: str, shapes: Sequence[str], rounds: int) -> None:
    """Adds the rows of the shapes, or a note where there is no device; RunFailed where ours does not run.

    Args:
        own: the interpreter of our engine.
        peer: that of transformers; None where it is not installed.
    """
    for name in shapes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory(prefix="tidegate-gpu-") as folder:
            given = _written(shape, Path(folder)) | {"device": device, "tokens": shape.sizes.tokens}
            found = _own(own, name, shape.sizes, given, rounds)
            if "missing" in found:
                table.note(f"GPU: nothing measured: {found['missing']} (asked of {own})")
                return
            _add_rows(table, name, shape.sizes, found)
            _add_comparison(table, name, shape.sizes, found, peer, given)


def _written(shape: Shape, folder: Path) -> dict[str, object]:
    """The model and the prompts of all engines, as files."""
    (folder / "config.json").write_text(json.dumps(shape.config))
    file = folder / "prompts.json"
    file.write_text(json.dumps([prompt(seed, shape.sizes.prompt_tokens) for seed in range(shape.sizes.sequences)]))
    return {"model": folder, "prompts": file}


def _own(python: Path, name: str, sizes: Sizes, given: dict[str, object], rounds: int) -> dict[str, Any]:
    file = Path(str(given["model"])) / "prefills.json"
    file.write_text(json.dumps([prompt(seed, sizes.prefill_tokens) for seed in range(sizes.prefills)]))
    more = {"prefills": file, "matrix-size": sizes.matrix_size, "copy-bytes": sizes.copy_bytes, "rounds": rounds}
    return run([str(python), str(DRIVERS / "inside_gpu.py"), *flags(given | more)], f"{name}, ours", RUN_SECONDS)


def _add_rows(table: Table, name: str, sizes: Sizes, found: dict[str, Any]) -> None:
    where = f"{found['dtype']}, {found['device']}, torch {found['torch']}"
    how = "CUDA graphs" if found["graphs"] else "no graphs"
    table.at_least(
        f"{name}: decode of one sequence, share of the memory roofline",
        100 * found["roofline_share"],
        70,
        "%",
        f"{1 / found['decode_seconds']:.0f} tokens/s; {found['decode_bytes'] / 1e9:.2f} GB of weights and KV a token,"
        f" copies at {found['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written; {how};"
        f" {'blocks read in place' if found['reads_blocks'] else 'blocks gathered'}; {where}",
        aim=80,
    )
    table.at_least(
        f"{name}: prefill of {sizes.prefills} x {sizes.prefill_tokens:,} tokens, share of the matrix rate",
        100 * found["prefill_share"],
        50,
        "%",
        f"{found['prefill_operations_per_second'] / 1e12:.4g} of {found['matrix_operations_per_second'] / 1e12:.4g}"
        f" TFLOP/s, products of {sizes.matrix_size:,}³; {where}",
        aim=65,
    )
    for what in ("decode", "prefill"):
        whole, shard = (1000 * found[f"{part}{what}_seconds"] for part in ("", "shard_"))
        table.at_least(
            f"{name}: half of the whole against a rank of two, its collectives stubbed, {what} (no bound)",
            100 * whole / 2 / shard,
            0,
            "%",
            f"{shard:.4g} ms against {whole:.4g} ms; {where}",
        )


def _add_comparison(
    table: Table, name: str, sizes: Sizes, found: dict[str, Any], peer: Path | None, given: dict[str, object]
) -> None:
    row = f"{name}: {sizes.sequences} sequences x ({sizes.prompt_tokens} in, {sizes.tokens} out), against transformers"
    own = f"{found['tokens_per_second']:.0f} tokens/s"
    if peer is None:
        table.note(f"{row}: it is not installed; ours {own}")
        return
    command = [str(peer), str(DRIVERS / "transformers_batching.py"), *flags(given | {"threads": 2, "dtype": "bf16"})]
    try:
        other = run(command, f"{name}, transformers", RUN_SECONDS)
    except RunFailed as failure:
        table.note(f"{row}: it does not run: {failure}; ours {own}")
        return
    table.at_least(
        row,
        found["tokens_per_second"] / other["tokens_per_second"],
        4,
        "x",
        f"{own}; transformers {other['version']} {other['tokens_per_second']:.0f} ({other['detail']}); prefill"
        f" included; {found['device']}, torch {found['torch']}",
        aim=8,
    )


def main() -> None:
    """Parses the command line and measures with this Python."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--shape", action="append", choices=list(SHAPES), help="may be repeated; default: the two large"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    given = parser.parse_args()
    table, python = Table("The engine on a GPU"), Path(sys.executable)
    failed = False
    try:
        shapes = given.shape or FULL_SHAPES
        measure(table, python, python, device=given.device, shapes=shapes, rounds=given.rounds)
    except RunFailed as failure:
        failed = True
        table.note(f"FAILED: {failure}")
    sys.exit(table.finish(given.json) or int(failed))


if __name__ == "__main__":
    main()
