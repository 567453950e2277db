"""Abnormal tenants: found among a normal mix, never in it, never too early, and let go again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tidegate.scheduler.anomalies import Anomalies, Terms
from tidegate.scheduler.anomaly_features import FEATURES, History, Window, baseline, excess
from tidegate.scheduler.request import Request, ServiceClass

TERMS = {
    "enabled": True,
    "window_seconds": 10.0,
    "interval_seconds": 30.0,
    "flag_seconds": 120.0,
    "score_threshold": 0.55,
    "deviation_threshold": 4.0,
    "tenant_minimum": 8,
    "sample_minimum": 64,
    "tenant_limit": 100,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(tenant: str, arrived_at: float, prompt: int = 200, answer: int = 150) -> Request:
    made = Request("r", "/v1/completions", "application/json", False, tenant, arrived_at, arrived_at)
    made.prompt_token_count, made.answer_token_count = prompt, answer
    return made


class Mix:
    """Tenants of different sizes that ask at random moments, and one that a test adds."""

    def __init__(self, seed: int, anomalies: Anomalies, clock: Clock, *, tenant_count: int = 20) -> None:
        self._random = random.Random(seed)
        self._anomalies = anomalies
        self._clock = clock
        self.tenants: dict[str, dict[str, float]] = {
            f"tenant-{index}": {
                "rate": self._random.uniform(0.6, 5),
                "prompt": self._random.lognormvariate(5.5, 0.8),
                "answer": self._random.lognormvariate(5, 0.6),
                "refused": self._random.uniform(0, 0.05),
            }
            for index in range(tenant_count)
        }

    async def run(self, seconds: float) -> None:
        """Lets time pass, and looks every 30 s."""
        end = self._clock.now + seconds
        while self._clock.now < end:
            began = self._clock.now
            for moment, tenant in sorted(self._arrivals(began, 10.0)):
                self._clock.now = moment
                self._ask(tenant, self.tenants[tenant])
            self._clock.now = began + 10.0
            if round(self._clock.now) % 30 == 0:
                await self._anomalies.look()

    def _arrivals(self, began: float, seconds: float):
        for tenant, traits in self.tenants.items():
            moment = began
            while True:
                gap = 1 / traits["rate"]
                moment += gap if traits.get("regular") else self._random.expovariate(1 / gap)
                if moment >= began + seconds:
                    break
                yield moment, tenant

    def _ask(self, tenant: str, traits: dict[str, float]) -> None:
        tokens = [round(traits[name] * self._random.uniform(0.5, 2)) for name in ("prompt", "answer")]
        self._anomalies.observe(
            request(tenant, self._clock.now, *tokens),
            refused=self._random.random() < traits["refused"],
            abandoned=self._random.random() < traits.get("abandoned", 0.02),
        )


ABNORMAL = {
    "a flood": ({"rate": 80, "prompt": 200, "answer": 200, "refused": 0, "regular": True}, "arrival_rate"),
    "endless texts": ({"rate": 3, "prompt": 12_000, "answer": 1_000, "refused": 0}, "prompt_tokens"),
    "one that leaves": ({"rate": 10, "prompt": 300, "answer": 200, "refused": 0, "abandoned": 0.9}, "abandoned_share"),
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("name", ABNORMAL)
async def test_a_tenant_unlike_the_others_is_flagged_and_let_go_when_it_behaves(clock, name):
    anomalies = Anomalies(Terms(**TERMS), clock)
    mix = Mix(1, anomalies, clock)
    traits, feature = ABNORMAL[name]
    mix.tenants["odd"] = traits
    await mix.run(120)
    (flag,) = anomalies.flags()
    assert (flag.tenant, flag.feature) == ("odd", feature)
    assert anomalies.class_of(request("odd", clock.now)) is ServiceClass.BATCH
    assert anomalies.class_of(request("tenant-1", clock.now)) is ServiceClass.STANDARD
    mix.tenants["odd"] = dict(mix.tenants["tenant-1"])
    await mix.run(180)
    assert anomalies.flags() == []
    assert anomalies.class_of(request("odd", clock.now)) is ServiceClass.STANDARD


@pytest.mark.parametrize("seed", range(6))
async def test_nobody_of_a_normal_mix_is_flagged(clock, seed):
    anomalies = Anomalies(Terms(**TERMS), clock)
    await Mix(seed, anomalies, clock).run(180)
    assert anomalies.flags() == []


async def test_too_few_tenants_or_samples_flag_nobody(clock):
    few = Anomalies(Terms(**TERMS), clock)
    mix = Mix(1, few, clock, tenant_count=6)
    mix.tenants["odd"] = ABNORMAL["a flood"][0]
    await mix.run(120)
    assert few.flags() == []
    unsure = Anomalies(Terms(**TERMS | {"sample_minimum": 10_000}), clock)
    mix = Mix(1, unsure, clock)
    mix.tenants["odd"] = ABNORMAL["a flood"][0]
    await mix.run(120)
    assert unsure.flags() == []


async def test_what_a_flag_causes_does_not_keep_it(clock):
    anomalies = Anomalies(Terms(**TERMS), clock)
    mix = Mix(1, anomalies, clock)
    mix.tenants["odd"] = ABNORMAL["a flood"][0]
    await mix.run(120)
    assert anomalies.is_flagged("odd")
    mix.tenants["odd"] = dict(mix.tenants["tenant-1"]) | {"refused": 1.0}
    await mix.run(130)
    assert not anomalies.is_flagged("odd")


async def test_unusual_is_not_enough_without_something_that_hurts(clock):
    def all_abnormal(samples: Sequence, judged: Sequence) -> list[float]:
        return [1.0] * len(judged)

    anomalies = Anomalies(Terms(**TERMS), clock, all_abnormal)
    mix = Mix(1, anomalies, clock)
    mix.tenants["tiny"] = {"rate": 0.7, "prompt": 3, "answer": 2, "refused": 0}
    mix.tenants["clock"] = {"rate": 1, "prompt": 200, "answer": 100, "refused": 0, "regular": True}
    await mix.run(120)
    assert anomalies.flags() == []


def test_without_being_enabled_nothing_is_kept(clock):
    anomalies = Anomalies(Terms(**TERMS | {"enabled": False}), clock)
    for _ in range(100):
        anomalies.observe(request("a", clock.now), refused=False, abandoned=False)
        clock.now += 1
    assert list(anomalies._history.vectors()) == []


def test_a_window_is_told_by_rate_lengths_shares_and_regularity():
    clockwork = Window([float(i) for i in range(10)], [99] * 10, [0] * 10, 10, 5, 2)
    vector = dict(zip(FEATURES, clockwork.vector(10.0), strict=True))
    assert vector["refused_share"] == 0.5
    assert vector["abandoned_share"] == 0.2
    assert vector["irregularity"] == 0.0
    assert vector["arrival_rate"] == pytest.approx(0.693, abs=0.001)
    assert vector["prompt_tokens"] == pytest.approx(4.605, abs=0.001)


def test_deviations_are_in_spreads_of_the_tenants_but_never_of_none():
    common = baseline([(float(i), 1.0, 0.0, 0.0, 0.0, 1.0) for i in range(11)])
    found = common.deviations((5 + 3 * 1.4826 * 2, 1.5, 0.0, 0.0, 0.0, 0.0))
    assert found == pytest.approx((2.0, 2.0, 0.0, 0.0, 0.0, -5.0))


def test_only_what_goes_beyond_the_common_in_a_direction_that_hurts_is_an_excess():
    found = excess((3.0, -9.0, 4.0, 0.0, 2.9, -4.0))
    assert found == pytest.approx((0, 0, 0.693, 0, 0, 0.693), abs=0.001)


def test_a_history_is_bounded_and_forgets_who_asked_longest_ago():
    history = History(window_seconds=1.0, window_limit=2, tenant_limit=3, request_minimum=1, request_limit=2)
    for second in range(10):
        tenant = f"t{second % 5}"
        for _ in range(4):
            history.add(
                tenant, second + 0.5, arrived_at=second, prompt_token_count=1, answer_token_count=1,
                refused=False, abandoned=False,
            )  # fmt: skip
    history.roll(20.0)
    kept = dict(history.vectors())
    assert list(kept) == ["t2", "t3", "t4"]
    assert all(len(vectors) <= 2 for vectors in kept.values())
