"""What replicas count themselves, from their metrics pages."""

from __future__ import annotations

from typing import Final

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tidegate.bench.own_mesh import OwnMesh

GENERATED: Final = "vllm:generation_tokens_total"
FAIL_OPEN: Final = "tidegate_fail_open_requests_total"


async def families(mesh: OwnMesh) -> list[Metric]:
    """All that the replicas of a mesh publish now."""
    async with httpx.AsyncClient(trust_env=False) as http:
        names = [name for name in mesh.pids() if name.startswith("model-")]
        pages = [(await http.get(f"http://{mesh.address(f'{name}-metrics')}/metrics")).text for name in names]
    return [family for page in pages for family in text_string_to_metric_families(page)]


def total(found: list[Metric], name: str) -> int:
    """The sum of a metric's samples."""
    return round(sum(sample.value for sample in _samples(found, name)))


def engine_attempts(found: list[Metric]) -> int:
    """How often replicas began a request, or went on with one; what they refused they never began.

    An answer that went on at another replica counts there, and here once more.
    """
    ended = _samples(found, "tidegate_requests_total")
    began = sum(sample.value for sample in ended if sample.labels["outcome"] != "refused")
    return round(began) + total(found, "tidegate_resumes_total")


def _samples(found: list[Metric], name: str) -> list[Sample]:
    return [sample for family in found for sample in family.samples if sample.name == name]
