"""A request that its class's floor pays for is neither paced nor kept out, and is marked for the replica."""

from __future__ import annotations

import pytest

from tidegate.scheduler.fair_shares import FairShares
from tidegate.scheduler.placement import Weights
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable


@pytest.fixture
def placer() -> Placer:
    """One replica with a credit, whose engine computes as many prompts as pacing lets it."""
    table = ReplicaTable(margin_seconds=0.1, silence_seconds=10.0, now=0.0)
    table.set_addresses(["a:1"])
    replica = table.get("a:1")
    assert replica is not None
    table.connect(replica, 0.0)
    load = ReplicaLoad(
        is_ready=True, running_request_count=8, waiting_request_count=0, slot_count=32, seconds_per_output_token=0.02,
        time_to_first_token_seconds=0.1, starting_request_count=8,
    )  # fmt: skip
    table.hear(replica, load, 0.0)
    replica.book.grant(["one"], 5.0, 0.0)
    weights = Weights(latency=0.6, queue=0.4)
    return Placer(table, weights, alternative_count=0, start_share=0.1, batch_start_share=0.05)


def test_pacing_holds_back_what_no_floor_pays_for(placer: Placer) -> None:
    assert placer.place(10, 0.0, is_batch=True) is None
    assert placer.place(10, 0.0) is None


def test_a_floor_is_not_paced_and_says_so(placer: Placer) -> None:
    placement = placer.place(10, 0.0, is_batch=True, is_owed=True)
    assert placement is not None
    assert placement.is_owed


def test_a_tenant_is_owed_what_it_has_not_had() -> None:
    shares = FairShares(lambda name: 4.0 if name == "four" else 1.0)
    for step in range(100):
        now = step / 10
        for name in ("four", "one"):
            shares.ask(name, 100.0, now)
            if shares.is_within(name, 200.0, now) and name == "one":
                shares.admit(name, 100.0)
        shares.ask("small", 0.5, now)
    assert shares.owed_share("four") == 1.0
    assert shares.owed_share("one") < 0.5
    assert shares.owed_share("small") == 1.0
    assert shares.owed_share("nobody") == 0.0
