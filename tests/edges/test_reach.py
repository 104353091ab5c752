"""What a function can reach: every value that decides what it computes, and nothing that does not."""

import functools

import numpy as np
import pytest

SCALE = 3
WEIGHTS = np.arange(4.0)
_reached_by_name = {"rate": 0.5}


class Settings:
    dt = 0.1
    unused = 7


class Model:
    def __init__(self):
        self.settings, self.gain, self.label = Settings(), 2.0, object()

    def advance(self, x):
        return x * self.gain * self.settings.dt + self._offset(x)

    def _offset(self, x, by=1.5):
        return by * helper(x)

    def never_called(self):
        return self.label


def helper(x, k=2):
    return x * k * SCALE * _reached_by_name["rate"]


def paths(*roots):
    from longtape.reach import places

    return {place.path for place in places(*roots) if place.kind in ("plain", "array")}


def changed(before, *roots):
    from longtape.reach import digests

    after = digests(roots, bytes)
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def test_a_function_reaches_closures_defaults_globals_and_helpers():
    factor, mask = 1.5, np.ones(3)

    def step(x, power=2):
        return helper(x) ** power * factor * mask

    assert {
        "closure variable 'factor'",
        "closure variable 'mask'",
        "defaults of step",
        "global 'SCALE'",
        "global '_reached_by_name'['rate']",
        "global 'helper' → defaults of helper",
    } == paths(step)


def test_a_method_reaches_attributes_that_code_names():
    found = paths(Model().advance)
    assert {"step.self.gain", "class Settings.dt", "global 'SCALE'"} <= found
    assert not {path for path in found if "label" in path or "unused" in path}


@pytest.mark.parametrize(
    ("name", "value"),
    [("gain", 2.5), ("_offset", lambda x: 0.0), ("settings", type("Other", (), {"dt": 0.2})())],
)
def test_a_changed_attribute_is_named(name, value):
    from longtape.reach import digests

    model = Model()
    before = digests([model.advance], bytes)
    assert not changed(before, model.advance)
    setattr(model, name, value)
    assert changed(before, model.advance)


def test_sets_have_one_digest_whatever_their_order():
    from longtape.reach import text_of

    assert text_of(frozenset("abc")) == text_of(frozenset("cba")) == "frozenset('a', 'b', 'c')"


def test_partials_and_cycles_and_arrays():
    from longtape.reach import digests

    model = Model()
    model.settings.gain = model  # a cycle
    bound = functools.partial(helper, k=5)
    weights = np.arange(3.0)

    def step(x):
        return bound(x) + weights.sum() + model.advance(x)

    before = digests([step], bytes)
    weights[1] = 7.0
    assert changed(before, step) == ["closure variable 'weights'"]


def test_a_place_can_be_bound_anew():
    from longtape.reach import places

    factor = 1.0

    def step(x):
        return x * factor * SCALE

    found = {place.path: place for place in places(step)}
    place = found["closure variable 'factor'"]
    place.write(4.0)
    assert step(1.0) == 4.0 * SCALE
    assert place.read() == 4.0


def test_a_logger_leads_nowhere():
    import logging

    logger = logging.getLogger("a step's")

    def step(x):
        logger.debug("here")
        return x

    from longtape.reach import places

    assert not [place.path for place in places(step) if place.path.startswith("closure variable 'logger'.")]
