from __future__ import annotations

import pytest
import yaml

from tidegate.common.endpoints import EndpointsError, parse_endpoints

KIND = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


def entry(host, port, **more):
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}, **more}


def document(*entries):
    resource = {"@type": KIND, "cluster_name": "model", "endpoints": [{"lb_endpoints": list(entries)}]}
    return yaml.safe_dump({"resources": [resource]})


def test_addresses_are_read_in_order_and_once():
    text = document(entry("127.0.0.1", 50061), entry("127.0.0.1", 50060), entry("127.0.0.1", 50061))
    assert parse_endpoints(text) == ["127.0.0.1:50061", "127.0.0.1:50060"]


def test_json_is_read_too():
    assert parse_endpoints('{"resources": [{"endpoints": []}]}') == []


def test_an_ipv6_address_is_bracketed():
    assert parse_endpoints(document(entry("::1", 1))) == ["[::1]:1"]


def test_endpoints_that_are_away_are_left_out():
    text = document(entry("a", 1, health_status="DRAINING"), entry("b", 1, health_status="HEALTHY"))
    assert parse_endpoints(text) == ["b:1"]
    assert parse_endpoints(document(entry("a", 1, health_status="UNHEALTHY"))) == []


@pytest.mark.parametrize(
    "bad", [{}, {"endpoint": None}, entry("", 1), entry("a", "x"), entry("a", 0), entry("a", 65536)]
)
def test_a_bad_endpoint_costs_the_others_nothing(bad):
    assert parse_endpoints(document(bad, entry("a", 1))) == ["a:1"]
    with pytest.raises(EndpointsError):
        parse_endpoints(document(bad))


@pytest.mark.parametrize("text", ["", "- a", "{", "resources: 1", "a: [b"])
def test_what_is_no_endpoints_file_is_an_error(text):
    with pytest.raises(EndpointsError):
        parse_endpoints(text)
