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
from typing import Any, Final

import yaml

CLUSTERS: Final = ("model", "cache", "preprocess", "scheduler", "batch", "waiting")
"""The clusters of mesh/envoy.yaml; each has a file, which may be without endpoints."""

Endpoint = tuple[str, int]
"""A numeric address and a port."""

_ASSIGNMENT: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class EndpointsError(Exception):
    """A file that is not a list of endpoints."""


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


def read_endpoints(path: Path, cluster: str) -> list[Endpoint]:
    """The endpoints of a cluster, in the file's order.

    Raises:
        OSError: the file cannot be read.
        EndpointsError: it is not what `write_endpoints` writes.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        assignments = [item for item in document["resources"] if item["cluster_name"] == cluster]
        localities = [locality for item in assignments for locality in item.get("endpoints", [])]
        members = [member for locality in localities for member in locality.get("lb_endpoints", [])]
        return [_address(member) for member in members]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise EndpointsError(f"{path}: not a list of endpoints: {error!r}") from error


def _address(member: Any) -> Endpoint:
    address = member["endpoint"]["address"]["socket_address"]
    return str(address["address"]), int(address["port_value"])


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
