"""Costs that are not what they were believed to be: the run stays close to the best plan for what happened."""

import pytest

from longtape.plan.asynchronous import Layout, Rules
from longtape.plan.simulate import Speeds, simulate

STEPS = 4000
BEST_SPACINGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40)


def scenario(name, ratio, slots):
    """True durations, and what the plan believes at first."""
    believed = Speeds(1.0, 2.0, lambda key: ratio, lambda key: ratio)
    if name == "disk twice slower":
        return Speeds(1.0, 2.0, lambda key: 2 * ratio, lambda key: 2 * ratio), believed
    if name == "steps three times slower midway":
        return Speeds(lambda k: 1.0 if k < STEPS // 2 else 3.0, 4.0, believed.write, believed.read), believed
    stall = STEPS // 20

    def write(key):
        return stall if key.step <= STEPS // 2 < key.step + 2 * ratio + 1 else ratio

    return Speeds(1.0, 2.0, write, believed.read), believed


@pytest.mark.parametrize("name", ["disk twice slower", "a stall", "steps three times slower midway"])
@pytest.mark.parametrize(("ratio", "slots"), [(2.0, 8), (5.0, 8), (10.0, 24), (20.0, 8)])
def test_within_a_tenth_of_the_best_plan_for_what_happened(name, ratio, slots):
    true, believed = scenario(name, ratio, slots)
    ours = simulate(STEPS, slots, true, believed=believed)
    assert ours.forward_stall_seconds == 0.0
    others = [simulate(STEPS, slots, true)]
    others += [simulate(STEPS, slots, true, layout=Layout(fixed_spacing=spacing)) for spacing in BEST_SPACINGS]
    others += [simulate(STEPS, slots, true, rules=Rules(elastic=False, margin=0.0))]
    best = min(outcome.seconds for outcome in others)
    assert ours.seconds <= 1.1 * best
