"""The file in which the scheduler tells Envoy whom to limit: the configuration of a filter that Envoy watches.

Replaced by rename, as the endpoints are, and read anew by Envoy without touching its listeners. Each reading fills the
buckets, so it is written only when something has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

FILTER_NAME: Final = "tenant_limits"
NO_CLASS: Final = "none"
"""What Envoy calls the class of a request whose headers name none."""

_EXTENSION: Final = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
_FILTER: Final = "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
_CLASS: Final = "x-tidegate-class"
_TENANT: Final = {"request_headers": {"header_name": "x-tidegate-tenant", "descriptor_key": "tenant"}}
_ALWAYS: Final = {"default_value": {"numerator": 100}}
_UNBOUNDED: Final = {"max_tokens": 4_294_967_295, "tokens_per_fill": 4_294_967_295, "fill_interval": "1s"}


Limit = tuple[str, str, int]
"""A tenant, the name of a class (empty: the headers name none), and how many requests a second are let through."""


def write_limits(path: Path, limits: Iterable[Limit]) -> None:
    """Says who is limited to what; all others are not.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # JSON is YAML, too, and cheap to write.
    temporary.write_text(json.dumps({"resources": [_resource(limits)]}), encoding="utf-8")
    temporary.replace(path)


def _resource(limits: Iterable[Limit]) -> dict[str, Any]:
    no_class = {"name": _CLASS, "present_match": False}
    return {
        "@type": _EXTENSION,
        "name": FILTER_NAME,
        "typed_config": {
            "@type": _FILTER,
            "stat_prefix": FILTER_NAME,
            "filter_enabled": _ALWAYS,
            "filter_enforced": _ALWAYS,
            "status": {"code": "ServiceUnavailable"},
            "rate_limits": [
                {"actions": [_TENANT, {"request_headers": {"header_name": _CLASS, "descriptor_key": "class"}}]},
                {
                    "actions": [
                        _TENANT,
                        {
                            "header_value_match": {
                                "descriptor_key": "class",
                                "descriptor_value": NO_CLASS,
                                "headers": [no_class],
                            }
                        },
                    ]
                },
            ],
            "descriptors": [
                {
                    "entries": [{"key": "tenant", "value": tenant}, {"key": "class", "value": class_name or NO_CLASS}],
                    "token_bucket": {"max_tokens": rate, "tokens_per_fill": rate, "fill_interval": "1s"},
                }
                for tenant, class_name, rate in sorted(limits)
            ],
            # The filter asks for this one, too; it bounds nobody.
            "token_bucket": _UNBOUNDED,
            "always_consume_default_token_bucket": False,
        },
    }
