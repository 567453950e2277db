from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.text.blocks import answer_key, block_hashes
from tidegate.v1 import inference_pb2

IDS = list(range(40))


def hashes(token_ids: list[int], model: str = "m", tenant: str = "t", size: int = 16) -> list[int]:
    return block_hashes(token_ids, model=model, tenant=tenant, block_token_count=size)


@pytest.mark.parametrize(("token_count", "expected"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (40, 2)])
def test_only_whole_blocks_have_a_hash(token_count: int, expected: int) -> None:
    assert len(hashes(IDS[:token_count])) == expected


@given(st.lists(st.integers(0, 49151), max_size=80), st.integers(0, 79), st.integers(0, 49151))
def test_prompts_share_hashes_as_far_as_they_share_tokens(token_ids: list[int], place: int, other: int) -> None:
    changed = list(token_ids)
    if place < len(changed):
        changed[place] = other
    same = [a == b for a, b in zip(hashes(token_ids), hashes(changed), strict=True)]
    differs = next((i for i, (a, b) in enumerate(zip(token_ids, changed, strict=True)) if a != b), len(token_ids))
    assert same == [block < differs // 16 for block in range(len(same))]


def test_salted_with_model_and_tenant_apart() -> None:
    assert (
        len({tuple(hashes(IDS, model, tenant)) for model, tenant in [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c")]})
        == 4
    )


def test_arrays_and_lists_have_the_same_hashes_in_every_process() -> None:
    assert hashes(IDS) == block_hashes(np.array(IDS, dtype=np.int32), model="m", tenant="t")
    assert hashes(IDS)[0] == HASH_OF_THE_FIRST_BLOCK
    assert all(0 <= one < 2**64 for one in hashes(IDS))


HASH_OF_THE_FIRST_BLOCK = 17562522799178207700


def key(token_ids: list[int] = IDS, **changes: object) -> bytes:
    sampling = inference_pb2.SamplingParameters(**{"temperature": 0.0, **changes.pop("sampling", {})})  # type: ignore[dict-item]
    arguments = {"model": "m", "tenant": "t", "max_tokens": 8, "sampling": sampling, **changes}
    return answer_key(token_ids, **arguments)  # type: ignore[arg-type]


def test_a_key_has_32_bytes_and_is_the_same_for_the_same_request() -> None:
    assert len(key()) == 32
    assert key() == key()


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"temperature": 1e-6}])
def test_no_key_where_the_answer_may_differ(sampling: dict[str, float]) -> None:
    assert key(sampling=sampling) == b""
    assert key(sampling={**sampling, "seed": 0}) != b""


def test_no_key_by_default() -> None:
    assert answer_key(IDS, model="m", tenant="t", max_tokens=1, sampling=inference_pb2.SamplingParameters()) == b""


def test_everything_that_changes_the_answer_changes_the_key() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"token_ids": IDS[:-1]},
        {"model": "n"},
        {"tenant": "u"},
        {"max_tokens": 9},
        {"stop": ["a", "b"]},
        {"stop": ["ab"]},
        {"stop": ["b", "a"]},
        {"logprobs": 0},
        {"logprobs": 1},
        {"ignore_eos": True},
        {"sampling": {"repetition_penalty": 1.1}},
        {"sampling": {"frequency_penalty": 1.0}},
        {"sampling": {"presence_penalty": 1.0}},
        {"sampling": {"temperature": 0.5, "seed": 1}},
        {"sampling": {"temperature": 0.5, "seed": 2}},
        {"sampling": {"temperature": 0.5, "seed": 1, "top_k": 2}},
        {"sampling": {"temperature": 0.5, "seed": 1, "top_p": 0.5}},
        {"sampling": {"temperature": 0.5, "seed": 1, "min_p": 0.5}},
        {"sampling": {"temperature": 0.5, "seed": 1, "logit_bias": {3: 1.0}}},
        {"sampling": {"json_schema": "{}"}},
        {"sampling": {"temperature": 0.5, "seed": 1, "json_schema": "{}"}},
        {"sampling": {"grammar": "a", "grammar_kind": inference_pb2.GRAMMAR_KIND_REGEX}},
        {"sampling": {"grammar": "a", "grammar_kind": inference_pb2.GRAMMAR_KIND_LARK}},
        {"sampling": {"grammar": "b", "grammar_kind": inference_pb2.GRAMMAR_KIND_LARK}},
        {"sampling": {"logit_bias": {3: 1.0}}},
        {"sampling": {"logit_bias": {3: 2.0}}},
        {"sampling": {"logit_bias": {4: 1.0}}},
        {"sampling": {"logit_bias": {3: 1.0, 4: 1.0}}},
    ]
    assert len({key(**change) for change in changes}) == len(changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 7},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.5},
        {"repetition_penalty": 1.0},
        {"frequency_penalty": 0.0},
    ],
)
def test_what_a_greedy_answer_does_not_depend_on_is_not_in_its_key(sampling: dict[str, float]) -> None:
    assert key(sampling=sampling) == key()
