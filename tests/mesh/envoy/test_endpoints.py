from __future__ import annotations

import os
from pathlib import Path

import pytest

from tidegate.cli.endpoints import endpoints_path, write_endpoints
from tidegate.common.endpoints import parse_endpoints


def test_what_is_written_is_read(tmp_path: Path):
    path = endpoints_path(tmp_path, "model")
    write_endpoints(path, "model", [("127.0.0.1", 50061), ("127.0.0.1", 50060)])
    assert parse_endpoints(path.read_text()) == ["127.0.0.1:50061", "127.0.0.1:50060"]
    write_endpoints(path, "model", [])
    assert parse_endpoints(path.read_text()) == []


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
