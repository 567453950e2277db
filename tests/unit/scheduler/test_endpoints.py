from __future__ import annotations

import json
import os

from tidegate.scheduler.endpoints import EndpointsFile


def document(host):
    entry = {"endpoint": {"address": {"socket_address": {"address": host, "port_value": 1}}}}
    return json.dumps({"resources": [{"endpoints": [{"lb_endpoints": [entry]}]}]})


def replace(path, text):
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def test_the_file_is_read_again_when_it_is_replaced(tmp_path):
    path, seen = tmp_path / "model.yaml", []
    file = EndpointsFile(str(path), 0.5, seen.append)
    replace(path, document("a"))
    file.poll()
    file.poll()
    assert seen == [["a:1"]]
    replace(path, document("b"))
    file.poll()
    assert seen == [["a:1"], ["b:1"]]


def test_a_broken_file_keeps_the_last_good_addresses_and_is_read_once_it_is_whole(tmp_path):
    path, seen = tmp_path / "model.yaml", []
    file = EndpointsFile(str(path), 0.5, seen.append)
    file.poll()
    replace(path, document("a"))
    file.poll()
    replace(path, "{")
    file.poll()
    path.unlink()
    file.poll()
    assert seen == [["a:1"]]
    replace(path, document("b"))
    file.poll()
    assert seen == [["a:1"], ["b:1"]]
