"""Writes a GGUF file's weights as a Hugging Face folder, for peers that read no GGUF: MODEL FOLDER DTYPE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    """The folder is there whole or not at all."""
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    part = folder.with_name(f"{folder.name}.part")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent,
        gguf_file=model.name,
        dtype=DTYPES[sys.argv[3]],
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    loaded.save_pretrained(part)
    part.rename(folder)
    print(json.dumps({"folder": str(folder)}), flush=True)


if __name__ == "__main__":
    main()
