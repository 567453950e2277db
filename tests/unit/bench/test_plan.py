"""Plans: reproducible, sorted, and each flow as it was declared."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tidegate.bench.arrivals import Closed, PlanError, Poisson, Trace
from tidegate.bench.flows import Flow, Load, scaled
from tidegate.bench.lengths import UniformLength
from tidegate.bench.plan import NEVER, Plan, check
from tidegate.bench.prompts import Prompts

FLOWS = (
    Flow(name="chat", arrivals=Poisson(50), duration_seconds=20, tenants={"a": 1, "b": 3}, leave_share=0.25),
    Flow(name="nightly", arrivals=Poisson(20), begin_seconds=10, duration_seconds=10, service_class="batch",
         prompt_tokens=UniformLength(10, 90), tenants={"c": 1}),
)  # fmt: skip
LOAD = Load(name="two flows", flows=FLOWS)


def columns(requests):
    return {name: getattr(requests, name) for name in ("flow", "tenant", "planned_seconds", "prompt_tokens")}


def test_the_same_load_and_seed_give_the_same_plan():
    first, second = (columns(Plan(load=LOAD, seed=3).open_requests()) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_change_to_one_flow_leaves_the_other_as_it_was():
    changed = msgspec.structs.replace(FLOWS[1], arrivals=Poisson(99))
    before = Plan(load=LOAD, seed=3).open_requests()
    after = Plan(load=Load(name="", flows=(FLOWS[0], changed)), seed=3).open_requests()
    assert np.array_equal(before.planned_seconds[before.flow == 0], after.planned_seconds[after.flow == 0])
    assert np.array_equal(before.tenant[before.flow == 0], after.tenant[after.flow == 0])


def test_requests_are_in_order_of_time_and_flows_keep_their_hours():
    requests = Plan(load=LOAD, seed=3).open_requests()
    assert np.all(np.diff(requests.planned_seconds) >= 0)
    nightly = requests.planned_seconds[requests.flow == 1]
    assert nightly.min() >= 10
    assert nightly.max() < 20


def test_tenants_come_by_their_weights_and_clients_leave_by_their_share():
    requests = Plan(load=Load(name="", flows=(scaled(LOAD, time=50).flows[0],)), seed=3).open_requests()
    assert np.mean(requests.tenant == LOAD.tenants.index("b")) == pytest.approx(0.75, abs=0.02)
    leaves = requests.leave_seconds < NEVER
    assert np.mean(leaves) == pytest.approx(0.25, abs=0.02)
    assert requests.leave_seconds[leaves].max() <= FLOWS[0].deadline_seconds


def test_clients_may_be_told_to_leave_sooner_than_their_deadline():
    flow = Flow(name="x", arrivals=Poisson(50), leave_share=1, leave_within_seconds=0.5)
    leaves = Plan(load=Load(name="", flows=(flow,))).open_requests().leave_seconds
    assert 0.4 < leaves.max() <= 0.5


def test_a_load_is_scaled_in_rate_and_in_time():
    double = scaled(LOAD, rate=2, time=0.5)
    assert [flow.arrivals.rate for flow in double.flows] == [100, 40]
    assert [flow.begin_seconds for flow in double.flows] == [0, 5]
    assert double.duration_seconds == 10


def test_a_trace_gives_times_lengths_and_shared_blocks(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 2000, "input_length": 700, "output_length": 6, "hash_ids": [1, 3]}\n'
    )
    flow = Flow(name="t", arrivals=Trace(str(path)), duration_seconds=10)
    requests = Plan(load=Load(name="", flows=(flow,))).open_requests()
    assert requests.planned_seconds.tolist() == [0, 2]
    assert requests.prompt_tokens.tolist() == [600, 700]
    assert requests.answer_tokens.tolist() == [5, 6]
    assert requests.block_ids == ((1, 2), (1, 3))


@pytest.mark.parametrize("flow", [
    Flow(name="x", arrivals=Poisson(1), tenants={}),
    Flow(name="x", arrivals=Poisson(1), tenants={"a": 0}),
    Flow(name="x", arrivals=Closed(0)),
])  # fmt: skip
def test_a_load_that_cannot_be_run_is_refused(flow):
    with pytest.raises(PlanError):
        check(Load(name="x", flows=(flow,)))


def test_no_two_prompts_are_alike_and_each_can_be_made_again():
    prompts = Prompts(seed=1)
    made = [tuple(prompts.token_ids(number, 20).tolist()) for number in range(3000)]
    assert len(set(made)) == 3000
    assert tuple(Prompts(seed=1).token_ids(1234, 20).tolist()) == made[1234]
    assert all(len(each) == 20 for each in made)
    assert len({each[0] for each in made}) == 3000


def test_a_tenants_shared_prefix_and_a_traces_blocks_are_the_same_tokens():
    prompts = Prompts(seed=1)
    one, other = (prompts.token_ids(number, 100, prefix=(4, 64)).tolist() for number in (1, 2))
    assert one[:64] == other[:64]
    assert one[64:] != other[64:]
    blocks = [prompts.token_ids(number, 1024, block_ids=(8, number)).tolist() for number in (20, 21)]
    assert blocks[0][:512] == blocks[1][:512]
    assert blocks[0][512:] != blocks[1][512:]


def test_a_prompt_in_words_has_as_many_words():
    texts = {Prompts(seed=1).text(number, 30) for number in range(500)}
    assert {len(text.split()) for text in texts} == {30}
    assert len(texts) == 500
