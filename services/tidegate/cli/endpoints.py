"""Which addresses a service has: the files that Envoy and the scheduler watch.

One file a cluster, `<directory>/<cluster>.yaml`, in the form of Envoy's endpoint discovery (a DiscoveryResponse
with one ClusterLoadAssignment). A file is replaced by rename, so that a reader sees the old one or the new one
and Envoy's watch notices it; it is never edited in place.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import yaml

CLUSTERS: Final = ("model", "lite", "cache", "preprocess", "scheduler", "batch", "waiting")
"""The clusters of mesh/envoy.yaml; each has a file, which may be without endpoints."""

Endpoint = tuple[str, int]
"""A numeric address and a port."""

_ASSIGNMENT: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


def endpoints_path(directory: Path, cluster: str) -> Path:
    """The file of a cluster."""
    assert cluster in CLUSTERS, cluster
    return directory / f"{cluster}.yaml"


def write_endpoints(path: Path, cluster: str, endpoints: Iterable[Endpoint]) -> None:
    """Replaces a cluster's endpoints, in order; none takes all traffic from it."""
    members = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in endpoints
    ]
    assignment = {"@type": _ASSIGNMENT, "cluster_name": cluster, "endpoints": [{"lb_endpoints": members}]}
    _replace(path, yaml.safe_dump({"resources": [assignment]}, sort_keys=False))


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and renames, with the mode that a fresh file would have."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
