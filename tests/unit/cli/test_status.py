"""What `tidegate status` shows of a mesh to a person."""

import msgspec
import pytest

from tidegate.cli import status
from tidegate.cli.observe import MeshView

CALM = MeshView(
    running=True, phase="ready", model_name="m", ingress="127.0.0.1:1", processes=[], replicas=[], lanes=[],
    totals={"accepted": 2}, refused={}, brownout_step=0, errors=[],
)  # fmt: skip


@pytest.mark.parametrize(("step", "line"), [(0, None), (3, "brownout: step 3")])
def test_a_brownout_is_shown_while_there_is_one(capsys, step, line):
    status.show(msgspec.structs.replace(CALM, brownout_step=step))
    shown = [each for each in capsys.readouterr().out.splitlines() if "brownout" in each]
    assert shown == ([] if line is None else [line])
