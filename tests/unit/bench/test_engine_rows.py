"""How `make bench SCENARIO=engine` counts, and what it says of a peer that is not there."""

from __future__ import annotations

import json

import pytest
from bench_modules import module


def test_only_the_time_in_which_all_sequences_run_counts():
    measure = module("drivers/measure.py")
    early = [1.0, 2.0, 3.0, 4.0, 5.0]
    late = [3.0, 4.0, 5.0, 6.0, 7.0]
    # From 3 to 5: two tokens of each.
    assert measure.decode_tokens_per_second([early, late]) == pytest.approx(2.0)


def test_sequences_that_never_run_together_have_no_rate():
    measure = module("drivers/measure.py")
    assert measure.decode_tokens_per_second([[1.0, 2.0], [3.0, 4.0]]) is None


def test_a_run_with_missing_tokens_is_no_result():
    measure = module("drivers/measure.py")
    job = measure.Job("model", [[1], [2]], 3, 2, "fp32", 64, "cpu")
    with pytest.raises(SystemExit, match="1 of 2 sequences have not 3 tokens"):
        measure.report(job, 0.0, [[1.0, 2.0, 3.0], [1.0, 2.0]])


def test_a_peer_that_is_not_installed_is_told_with_the_command(tmp_path):
    peers = module("engine_peers.py")
    assert peers.LLAMA_CPP.python(tmp_path) is None
    folder = f"{tmp_path}/llama.cpp"
    command = f"python3 -m venv {folder} && {folder}/bin/pip install xllamacpp"
    assert peers.LLAMA_CPP.not_installed(tmp_path) == f"llama.cpp: not installed; `{command}`"
    assert peers.LLAMA_CPP.not_installed(None).endswith("then --peers DIR")


def test_a_peers_environment_is_found_by_its_name(tmp_path):
    peers = module("engine_peers.py")
    python = tmp_path / "llama.cpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert peers.LLAMA_CPP.python(tmp_path) == python


def test_notes_stand_below_the_table_and_fail_nothing(tmp_path, capsys):
    table = module("table.py").Table("A title")
    table.note("llama.cpp: not installed")
    table.note("llama.cpp: not installed")
    table.at_least("rate", 1.2, 1.0, "x", aim=1.3)
    file = tmp_path / "rows.json"
    assert table.finish(file) == 0
    written = json.loads(file.read_text())
    assert written["notes"] == ["llama.cpp: not installed"]
    assert written["rows"][0]["aim"] == 1.3
    assert "≥ 1 x, aim 1.3" in capsys.readouterr().out
