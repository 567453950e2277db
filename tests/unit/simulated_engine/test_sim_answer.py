"""The answers of the simulated engine, as anybody can work them out."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from answer import answer_seed, answer_table, expected_token_ids, natural_token_count

ANSWER_FILE = Path(__file__).resolve().parents[3] / "triton_models" / "llm_sim" / "answer.py"


def test_the_table_holds_only_lower_case_words_after_a_space():
    assert answer_table(["Ġtide", "tide", "Ġ", "Ġx", "ĠTide", "▁gate", "Ġti de", "Ġté", "Ġa1", "", "Ġtides"]) == [
        0,
        5,
        10,
    ]


def test_a_vocabulary_without_words_is_refused():
    with pytest.raises(ValueError, match="no token that is a space"):
        answer_table(["a", "b"])


def test_the_answer_is_known_for_ever():
    table = list(range(100, 1100))
    assert expected_token_ids([1, 2, 3], 6, table) == [252, 481, 368, 812, 979, 315]


def test_a_longer_answer_begins_like_a_shorter_one():
    table = list(range(1000))
    assert expected_token_ids([9, 8], 50, table)[:20] == expected_token_ids([9, 8], 20, table)


def test_prompts_that_differ_in_one_token_or_in_order_have_other_answers():
    table = list(range(1000))
    answers = {tuple(expected_token_ids(prompt, 8, table)) for prompt in ([1, 2], [2, 1], [1, 2, 0], [1], [1, 3])}
    assert len(answers) == 5


def test_tokens_spread_over_the_whole_table():
    tokens = expected_token_ids([4, 5, 6], 20_000, list(range(16)))
    counts = [tokens.count(token) for token in range(16)]
    assert max(abs(count - 1250) for count in counts) < 150


def test_natural_lengths_have_the_median_and_the_spread_that_are_asked_for():
    lengths = [natural_token_count(answer_seed([n]), median=200, sigma=0.5) for n in range(4000)]
    assert statistics.median(lengths) == pytest.approx(200, rel=0.05)
    assert sorted(lengths)[int(0.841 * 4000)] == pytest.approx(200 * 2.718281828**0.5, rel=0.07)
    assert min(natural_token_count(seed, median=1, sigma=10) for seed in range(100)) == 1
    assert {natural_token_count(seed, median=30, sigma=0) for seed in range(10)} == {30}


def test_the_file_loads_by_itself_without_anything_installed():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('answer', {str(ANSWER_FILE)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.expected_token_ids([1, 2, 3], 2, [7]))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[7, 7]"
