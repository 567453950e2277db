from __future__ import annotations

import os
from pathlib import Path

import pytest

from tidegate.cli.endpoints import EndpointsError, endpoints_path, read_endpoints, write_endpoints


def test_what_is_written_is_read(tmp_path: Path):
    path = endpoints_path(tmp_path, "model")
    write_endpoints(path, "model", [("127.0.0.1", 50061), ("127.0.0.1", 50060)])
    assert read_endpoints(path, "model") == [("127.0.0.1", 50061), ("127.0.0.1", 50060)]
    assert read_endpoints(path, "cache") == []
    write_endpoints(path, "model", [])
    assert read_endpoints(path, "model") == []


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "model.yaml"
    write_endpoints(path, "model", [("127.0.0.1", 1)])
    with path.open() as old:
        write_endpoints(path, "model", [("127.0.0.1", 2)])
        assert "port_value: 1" in old.read()
    assert os.listdir(tmp_path) == ["model.yaml"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "model.yaml"
    write_endpoints(path, "model", [("127.0.0.1", 1)])
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        write_endpoints(path, "model", [("127.0.0.1", 2)])
    assert os.listdir(tmp_path) == ["model.yaml"]


@pytest.mark.parametrize(
    "text", ["", "[]", "resources: 1", "resources: [{}]", "a: [", "resources: [{cluster_name: model, endpoints: 3}]"]
)
def test_what_is_no_list_of_endpoints_is_said_to_be_none(tmp_path: Path, text: str):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(EndpointsError, match=r"model\.yaml"):
        read_endpoints(path, "model")
