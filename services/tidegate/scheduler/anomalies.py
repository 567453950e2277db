"""Tenants whose requests are not like the others': found by an isolation forest, sent to the batch lane for a while.

Nothing is dropped for it, and a flag ends by itself. What the flag causes (a batch request is refused sooner) is not
held against the tenant, or it could never end. Off unless it is enabled; only then is scikit-learn imported, in a
thread.

A forest of random cuts isolates what is rare and different after few of them (Liu, Ting and Zhou, "Isolation Forest",
ICDM 2008); its score is below 0.5 for what is usual and goes towards 1. It works on how far tenants go beyond what is
common among them. A flag also needs a feature that hurts others and stands far above theirs, because to be unusual is
no fault by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from tidegate.scheduler.anomaly_features import COSTLY, History, Vector, baseline, excess, median_vector
from tidegate.scheduler.request import Request, ServiceClass

log = structlog.get_logger()

FLAGGED_TENANTS = Gauge("tidegate_flagged_tenants", "Tenants whose requests go to the batch lane, as abnormal.")
FLAGGED_REQUESTS = Counter(
    "tidegate_flagged_requests_total",
    "Requests that went to the batch lane for it, by the class that they had.",
    ["class"],
)

TREE_COUNT: Final = 100
SAMPLES_A_TREE: Final = 256
"""The paper's own."""

Scores = Callable[[Sequence[Vector], Sequence[Vector]], Sequence[float]]
"""Scores of the second, by a model of the first; towards 1 is abnormal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The detector's settings; see config.py."""

    enabled: bool
    window_seconds: float
    interval_seconds: float
    flag_seconds: float
    score_threshold: float
    deviation_threshold: float
    tenant_minimum: int
    sample_minimum: int
    tenant_limit: int
    window_limit: int = 30
    judged_window_count: int = 3
    """A tenant is judged by so many of its last windows, and must have them."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A tenant that is abnormal; times are monotonic seconds."""

    tenant: str
    score: float
    feature: str
    """What stands out most."""
    since: float
    until: float


class Anomalies:
    """The flags of one scheduler.

    Args:
        scores: the model; a test has its own.
    """

    def __init__(self, terms: Terms, clock: Callable[[], float], scores: Scores | None = None) -> None:
        self.enabled = terms.enabled
        self._terms = terms
        self._clock = clock
        self._scores = scores or isolation_scores
        self._flags: dict[str, Flag] = {}
        self._history = History(
            window_seconds=terms.window_seconds, window_limit=terms.window_limit, tenant_limit=terms.tenant_limit
        )

    def flags(self) -> list[Flag]:
        """Those that hold now."""
        now = self._clock()
        self._flags = {tenant: flag for tenant, flag in self._flags.items() if now < flag.until}
        FLAGGED_TENANTS.set(len(self._flags))
        return list(self._flags.values())

    def is_flagged(self, tenant: str) -> bool:
        """Whether the tenant's requests go to the batch lane."""
        flag = self._flags.get(tenant)
        return flag is not None and self._clock() < flag.until

    def class_of(self, request: Request) -> ServiceClass:
        """The class that the request is queued in."""
        if not self._flags or not self.is_flagged(request.tenant):
            return request.service_class
        if request.service_class is not ServiceClass.BATCH:
            FLAGGED_REQUESTS.labels(request.service_class.label).inc()
        return ServiceClass.BATCH

    def observe(self, request: Request, *, refused: bool, abandoned: bool) -> None:
        """A request has left the scheduler."""
        if not self.enabled:
            return
        flagged = self.is_flagged(request.tenant)
        self._history.add(
            request.tenant,
            self._clock(),
            arrived_at=request.arrived_at,
            prompt_token_count=request.prompt_token_count,
            answer_token_count=request.max_tokens or request.answer_token_count,
            refused=refused and not flagged,
            abandoned=abandoned and not flagged,
        )

    async def run(self) -> None:
        """Looks for abnormal tenants now and then, until it is cancelled; waits for ever when it is not enabled."""
        while self.enabled:
            await asyncio.sleep(self._terms.interval_seconds)
            try:
                await self.look()
            except Exception:
                # Without the detector the mesh serves as it did before there was one.
                log.exception("anomaly_detection_failed")
        await asyncio.Event().wait()

    async def look(self) -> None:
        """Judges every tenant that there is enough to know of."""
        self._history.roll(self._clock())
        vectors = dict(self._history.vectors())
        found = await asyncio.to_thread(judge, vectors, self._terms, self._scores)
        for tenant, (score, feature) in found.items():
            self.flag(tenant, score=score, feature=feature)
        self.flags()

    def flag(self, tenant: str, *, score: float, feature: str) -> None:
        """Sends the tenant's requests to the batch lane from now on, or for longer."""
        now = self._clock()
        known = self._flags.get(tenant)
        since = known.since if known is not None and now < known.until else now
        if since == now:
            log.warning("tenant_flagged", tenant=tenant, score=round(score, 3), feature=feature)
        self._flags[tenant] = Flag(tenant, score, feature, since, now + self._terms.flag_seconds)


def judge(vectors: dict[str, list[Vector]], terms: Terms, scores: Scores) -> dict[str, tuple[float, str]]:
    """The abnormal tenants, each with its score and the feature that stands out most. Pure, if `scores` is."""
    judged = {tenant: found for tenant, found in vectors.items() if len(found) >= terms.judged_window_count}
    samples = [vector for found in vectors.values() for vector in found]
    if len(judged) < terms.tenant_minimum or len(samples) < terms.sample_minimum:
        return {}
    usual = {tenant: median_vector(found[-terms.judged_window_count :]) for tenant, found in judged.items()}
    common = baseline(list(usual.values()))
    deviations = {tenant: common.deviations(vector) for tenant, vector in usual.items()}
    scored = scores(
        [excess(common.deviations(sample)) for sample in samples], [excess(each) for each in deviations.values()]
    )
    result = {}
    for (tenant, deviation), score in zip(deviations.items(), scored, strict=True):
        stands_out, feature = max(zip(deviation, COSTLY, strict=False))
        if score >= terms.score_threshold and stands_out >= terms.deviation_threshold:
            result[tenant] = (float(score), feature)
    return result


def isolation_scores(samples: Sequence[Vector], judged: Sequence[Vector]) -> Sequence[float]:
    """The scores of an isolation forest of the samples; the same for the same samples."""
    from sklearn.ensemble import IsolationForest  # Takes about a second; nobody waits for it who did not ask.

    forest = IsolationForest(
        n_estimators=TREE_COUNT, max_samples=min(SAMPLES_A_TREE, len(samples)), n_jobs=1, random_state=0
    )
    forest.fit(samples)
    return [-float(score) for score in forest.score_samples(judged)]
