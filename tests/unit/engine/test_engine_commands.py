"""`python -m llm_engine`: what it prints, and how it ends where something is wrong."""

import io
import json

import pytest
import torch

from llm_engine.__main__ import main

KV = ("--kv-cache-bytes", "524288")


def test_generate_prints_one_object(make_folder, capsys):
    assert (
        main(["generate", "--model", str(make_folder()), *KV, "--token-ids", "1,5,9", "--tokens", "3", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert len(result["token_ids"]) <= 3 and result["finish_reason"] in ("stop", "length")


def test_generate_reads_a_long_prompt_from_standard_input(make_folder, capsys, monkeypatch):
    given = ["generate", "--model", str(make_folder()), *KV, "--tokens", "3", "--json", "--token-ids"]
    assert main([*given, "1,5,9"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("1,5,9\n"))
    assert main([*given, "-"]) == 0
    first, second = (json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines())
    assert first == second and first


def test_a_model_whose_logits_are_not_finite_is_an_error(make_folder, capsys):
    folder = make_folder(tensors={"model.norm.weight": torch.full((32,), 3e38)})
    assert main(["generate", "--model", str(folder), *KV, "--token-ids", "1", "--json"]) == 1
    printed = capsys.readouterr()
    assert not printed.out and "not finite" in printed.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["generate", "--token-ids", "1,x"], "--token-ids is '1,x'"),
        (["generate", "--token-ids", "1,96"], "token_ids[1] is 96"),
        (["bench", "--sequences", "0"], "--sequences is 0"),
        (["bench", "--kv-cache-bytes", str(1 << 44)], "kv_cache_bytes"),
    ],
)
def test_a_wrong_value_is_one_line(make_folder, capsys, given, words):
    assert main([given[0], "--model", str(make_folder()), *KV, *given[1:]]) == 1
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1
