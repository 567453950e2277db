"""The benchmark of the engine on a GPU, run on a CPU with tiny shapes: it ends, and counts what it says it counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_engine.architecture import from_hugging_face

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "drivers")]

from engine_gpu import SHAPES  # noqa: E402
from inside_gpu import multiplied_weights  # noqa: E402


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-deepseek"])
def test_every_row_is_measured(tmp_path, shape):
    file = tmp_path / "rows.json"
    given = ["--device", "cpu", "--shape", shape, "--rounds", "1", "--json", str(file)]
    done = subprocess.run([sys.executable, str(BENCH / "engine_gpu.py"), *given], capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    found = json.loads(file.read_text())
    rows = {row["name"]: row["figure"] for row in found["rows"]}
    # transformers' own batching has no room for values of another size than keys.
    if shape == "tiny-llama":
        assert f"{shape}: 4 sequences x (16 in, 8 out), against transformers" in rows
        assert found["notes"] == []
    assert f"{shape}: decode of one sequence, share of the memory roofline" in rows
    assert f"{shape}: prefill of 2 x 32 tokens, share of the matrix rate" in rows
    assert len([name for name in rows if "its collectives stubbed" in name]) == 2
    assert all(figure > 0 for figure in rows.values())


def test_without_a_device_it_says_so(tmp_path):
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(BENCH / "engine_gpu.py"), "--shape", "tiny-llama", "--json", str(file)],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    found = json.loads(file.read_text())
    assert done.returncode == 0
    assert found["rows"] == []
    assert "finds no CUDA device" in found["notes"][0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # What Llama 3 8B has, less its embedding.
        (("llama-8b", {}), 8_030_261_248 - 128_256 * 4_096),
        # DeepSeek-V3 itself: of 671 billion 37 are active, its embedding among them.
        (
            (
                "deepseek-v3-scaled-down",
                {
                    "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "n_routed_experts": 256,
                    "num_attention_heads": 128, "num_key_value_heads": 128, "moe_intermediate_size": 2048,
                    "first_k_dense_replace": 3,
                },
            ),
            pytest.approx(37e9, rel=0.03),
        ),
    ],
    ids=["llama", "deepseek"],
)  # fmt: skip
def test_weights_that_a_token_is_multiplied_with(changes, expected):
    shape, fields = changes
    config = {**SHAPES[shape].config, **fields}
    # Norms are counted too: some hundred thousand.
    assert multiplied_weights(from_hugging_face(Path("config.json"), config, {})) == expected
