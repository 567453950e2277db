"""Writes a GGUF file's weights as a Hugging Face folder, for those that read no GGUF: MODEL FOLDER DTYPE.

In fp8 matrices of layers are E4M3 with a scale for each block, as DeepSeek ships them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
BLOCK = 128
"""Rows and columns that share a scale."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def main() -> None:
    """The folder is there whole or not at all."""
    model, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    part = folder.with_name(f"{folder.name}.part")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent,
        gguf_file=model.name,
        dtype=DTYPES[dtype],
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    loaded.save_pretrained(part)
    # The file's own name for itself, which is no path, and no field that our engine knows.
    config = part / "config.json"
    fields = json.loads(config.read_text())
    fields.pop("_model_name_or_path", None)
    config.write_text(json.dumps(fields))
    if dtype == "fp8":
        _round(part)
    part.rename(folder)
    print(json.dumps({"folder": str(folder)}), flush=True)


def _round(folder: Path) -> None:
    """Rounds a folder's weights in place."""
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = _in_blocks(tensors[name].float())
    save_file(tensors, file, metadata={"format": "pt"})
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": said}))


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight-bit numbers [rows, columns], and what each block of them is multiplied with."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / LARGEST
    numbers = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scales


if __name__ == "__main__":
    main()
