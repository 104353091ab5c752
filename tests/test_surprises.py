"""Real runs that were told wrong costs: they stay close to the best plan for what happened, and never wait forward."""

import pytest

from benchmarks import noise


@pytest.mark.parametrize("name", noise.SURPRISES)
def test_within_a_quarter_of_the_best_plan_for_what_happened(scratch, name):
    """A tenth on a quiet machine; see ``python -m benchmarks.noise --only surprises``."""
    found = noise.surprised(name, 5, 8, str(scratch), steps=700, step=1e-3, stall=0.15)
    assert found["schedule"] == "asynchronous"
    assert found["forward_stall_seconds"] == 0.0
    assert found["over_best"] <= 1.25
    if name != "one write stalls":
        assert found["replans"] >= 1
