"""Thousands of interleavings and mishaps without a thread: the right states, within the budget, and an end."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtape.errors import StorageError
from longtape.plan.asynchronous import EXACT, Layout, Rules
from tests.faults.scripted import Case, Mishaps, run

pytestmark = pytest.mark.slow

LIKELY = st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0])
MISHAPS = st.builds(
    Mishaps,
    full=LIKELY,
    bad_write=LIKELY,
    bad_read=LIKELY,
    stuck=st.sampled_from([0.0, 0.0, 0.03, 0.3]),
    release=st.sampled_from([0.0, 0.2]),
    from_index=st.sampled_from([0, 0, 3, 8]),
    to_index=st.sampled_from([10**9, 10**9, 6, 20]),
)


@st.composite
def cases(draw):
    slots = draw(st.integers(1, 9))
    steps = draw(st.integers(1, 120 if slots > 1 else 40))
    blocks = draw(st.integers(0, 4))
    initial_is_free = draw(st.booleans())
    tail = draw(st.one_of(st.just(0), st.integers(0, steps)))
    known = draw(st.booleans()) or tail > 0
    final_state = draw(st.booleans()) or not known
    layout = Layout(
        window=draw(st.sampled_from([1, 1, 2, 3, 8])),
        tail=tail,
        fixed_spacing=draw(st.sampled_from([None, None, 3, 10])),
        records=blocks > 0,
        record_fraction=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])) if blocks > 1 else 0.0,
        safety=draw(st.sampled_from([1, 4, 32])),
        staging=draw(st.sampled_from([None, None, 2, 4])),
        held=draw(st.sampled_from([None, None, 1, 3, 6])),
        final_state=final_state,
        initial_is_free=initial_is_free,
        pin_initial=False,
    )
    layout = replace(layout, pin_initial=not initial_is_free and slots >= (1 if layout.record_fraction == 1 else 3))
    return Case(
        steps=steps,
        slots=slots,
        blocks=blocks,
        layout=layout,
        rules=draw(st.sampled_from([EXACT, Rules(), Rules(grain_seconds=3.0), Rules(margin=0.0, elastic=False)])),
        known=known,
        mishaps=draw(MISHAPS),
        pace=draw(st.sampled_from([0.01, 0.1, 0.5, 1.0])),
        write=draw(st.sampled_from([0.1, 1.0, 3.0, 30.0])),
        comes_back=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


def attempt(case):
    """Run it; only where the initial state relies on storage may it stop, and then it says so."""
    try:
        return run(case)
    except StorageError as error:
        assert not case.layout.pin_initial, error
        assert not case.layout.initial_is_free
        assert "state 0" in str(error)
        assert "memory" in str(error)
        return None


@settings(max_examples=1500, deadline=None)
@given(cases())
def test_right_states_whatever_storage_does(case):
    attempt(case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=20_000, deadline=None)
@given(cases())
def test_right_states_whatever_storage_does_at_length(case):
    attempt(case)
