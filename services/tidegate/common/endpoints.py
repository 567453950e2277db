"""The addresses in a file of Envoy's endpoint discovery (EDS), in YAML or JSON: what all services read alike."""

from __future__ import annotations

from typing import Any, Final

import structlog
import yaml

log = structlog.get_logger()

AWAY: Final = frozenset({"UNHEALTHY", "DRAINING", "TIMEOUT"})
"""Envoy's health states of endpoints that get no new requests."""


class EndpointsError(Exception):
    """The file is not what it should be; the message says what and where."""


def parse_endpoints(text: str) -> list[str]:
    """The addresses in an EDS file, in order, each once.

    Raises:
        EndpointsError: it is not YAML, or not a DiscoveryResponse of cluster load assignments. Single endpoints that
            are not usable are left out; only where all of them are is the file refused.
    """
    try:
        document = yaml.load(text, Loader=_SafeLoader)
    except yaml.YAMLError as error:
        raise EndpointsError(f"not YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("resources"), list):
        raise EndpointsError("not a DiscoveryResponse: there is no list `resources`")
    entries = [
        entry
        for resource in document["resources"]
        for group in _list(resource, "endpoints")
        for entry in _list(group, "lb_endpoints")
    ]
    addresses = [address for address in map(_address, entries) if address is not None]
    unusable = sum(not _is_away(entry) for entry in entries) - len(addresses)
    if unusable and not addresses:
        raise EndpointsError(f"none of its {unusable} endpoints has a socket_address with address and port_value")
    if unusable:
        log.warning("endpoints_left_out", count=unusable)
    return list(dict.fromkeys(addresses))


_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _address(entry: Any) -> str | None:
    if _is_away(entry):
        return None
    try:
        socket_address = entry["endpoint"]["address"]["socket_address"]
        host, port = str(socket_address["address"]), int(socket_address["port_value"])
    except (KeyError, TypeError, ValueError):
        return None
    if not host or not 0 < port < 65536:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_away(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("health_status") in AWAY


def _list(parent: Any, name: str) -> list[Any]:
    value = parent.get(name) if isinstance(parent, dict) else None
    return value if isinstance(value, list) else []
