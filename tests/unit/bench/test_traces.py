"""Traces in their public forms."""

from __future__ import annotations

import pytest

from tidegate.bench.arrivals import PlanError
from tidegate.bench.traces import read_trace


def test_azures_form_with_seven_digits_of_a_second(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.2300000,3180,8\n"
    )
    trace = read_trace(path)
    assert trace.seconds.tolist() == pytest.approx([0, 0.25004])
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert trace.answer_tokens.tolist() == [10, 8]


def test_azures_form_with_a_time_zone_and_out_of_order(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:01.500000+00:00,20,2\n"
        "2024-05-10 00:00:00.500000+00:00,10,1\n"
    )
    trace = read_trace(path)
    assert trace.seconds.tolist() == [0, 1]
    assert trace.prompt_tokens.tolist() == [10, 20]


def test_mooncakes_form_as_json_lines_and_as_csv(tmp_path):
    lines, table = tmp_path / "trace.jsonl", tmp_path / "trace.csv"
    lines.write_text('{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n')
    table.write_text('timestamp,input_length,output_length,hash_ids\n27482,6955,52,"[46, 47]"\n')
    for path in (lines, table):
        trace = read_trace(path)
        assert (trace.prompt_tokens.tolist(), trace.answer_tokens.tolist()) == ([6955], [52])
        assert trace.block_ids == ((46, 47),)


def test_a_trace_is_stretched_to_a_rate(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [f'{{"timestamp": {1000 * each}, "input_length": 1, "output_length": 1}}' for each in range(11)]
    path.write_text("\n".join(rows))
    assert read_trace(path).at_rate(5).seconds.tolist() == pytest.approx([each / 5 for each in range(11)])


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", '{"timestamp": "x"}', "TIMESTAMP,ContextTokens\n2023,1\n"])
def test_a_file_that_is_no_trace_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "nothing.csv"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"nothing\.csv"):
        read_trace(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PlanError, match="cannot read"):
        read_trace(tmp_path / "gone.csv")
