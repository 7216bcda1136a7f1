"""Schedules: where they start and end, what they do in between, and that they hold no state."""

import math
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from msf_core.schedules import constant, cosine, linear

VALUES = st.floats(-1e6, 1e6)
STEPS = st.integers(1, 10**9)
RAMPS = st.sampled_from([linear, cosine])


@given(VALUES, st.integers(0, 10**12))
def test_constant_is_its_value_at_every_step(value: float, step: int) -> None:
    assert constant(value)(step) == value


@given(RAMPS, VALUES, VALUES, STEPS)
@example(cosine, 0.996, 1.0, 7)
def test_ramps_start_and_end_exactly(ramp: Any, start: float, end: float, steps: int) -> None:
    schedule = ramp(start, end, steps=steps)
    assert schedule(0) == start
    assert schedule(steps) == end


@given(RAMPS, VALUES, VALUES, STEPS, st.integers(1, 10**9))
def test_ramps_hold_their_ends_beyond_them(ramp: Any, start: float, end: float, steps: int, beyond: int) -> None:
    schedule = ramp(start, end, steps=steps)
    assert schedule(steps + beyond) == end
    assert schedule(-beyond) == start


@given(RAMPS, VALUES, VALUES, STEPS, st.data())
def test_ramps_are_monotone_and_between_their_ends(
    ramp: Any, start: float, end: float, steps: int, data: st.DataObject
) -> None:
    schedule = ramp(start, end, steps=steps)
    step = data.draw(st.integers(0, steps - 1))
    later = data.draw(st.integers(step + 1, steps))
    rounding = 4 * math.ulp(max(abs(start), abs(end)))
    rise = math.copysign(1, end - start)
    assert rise * schedule(step) <= rise * schedule(later) + rounding
    for value in (schedule(step), schedule(later)):
        assert min(start, end) - rounding <= value <= max(start, end) + rounding


@given(RAMPS, st.floats(0, 1), STEPS, st.data())
def test_a_ramp_between_momenta_is_always_a_momentum(ramp: Any, start: float, steps: int, data: st.DataObject) -> None:
    assert 0 <= ramp(start, 1.0, steps=steps)(data.draw(st.integers(0, steps))) <= 1


@given(VALUES, VALUES, STEPS, st.data())
def test_linear_is_a_straight_line(start: float, end: float, steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps))
    expected = start + (end - start) * step / steps
    assert linear(start, end, steps=steps)(step) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(VALUES, VALUES, STEPS, st.data())
def test_cosine_is_half_a_cosine(start: float, end: float, steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps))
    expected = end - (end - start) * (math.cos(math.pi * step / steps) + 1) / 2
    assert cosine(start, end, steps=steps)(step) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_cosine_is_byols_momentum() -> None:
    # Grill et al. 2020, section 3.2: 1 − (1 − base)·(cos(πt/T) + 1)/2.
    schedule = cosine(0.996, 1.0, steps=1000)
    for t in range(0, 1001, 50):
        assert schedule(t) == pytest.approx(1 - (1 - 0.996) * (math.cos(math.pi * t / 1000) + 1) / 2, abs=1e-15)


def test_cosine_starts_slower_than_linear_and_meets_it_in_the_middle() -> None:
    straight, curved = linear(1.0, 3.0, steps=100), cosine(1.0, 3.0, steps=100)
    assert curved(10) < straight(10)
    assert curved(90) > straight(90)
    assert curved(50) == pytest.approx(straight(50))


def test_they_pickle_print_compare_and_hash_by_their_values() -> None:
    schedules = [constant(0.99), linear(0, 1, 5), linear(0, 1, 6), linear(0, 2, 5), cosine(0, 1, 5)]
    for index, schedule in enumerate(schedules):
        again = pickle.loads(pickle.dumps(schedule))
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert repr(again) == repr(schedule)
        assert again(3) == schedule(3)
        assert [other == schedule for other in schedules].index(True) == index
    assert len(set(schedules)) == 5
    assert repr(cosine(0.5, 1.0, steps=5)) == "cosine(start=0.5, end=1.0, steps=5)"


def test_they_hold_no_state_and_take_none() -> None:
    schedule = linear(0.0, 1.0, steps=4)
    assert [schedule(step) for step in (3, 0, 3)] == [0.75, 0.0, 0.75]
    with pytest.raises(AttributeError):
        schedule.steps = 8  # type: ignore[misc]


@pytest.mark.parametrize("ramp", [linear, cosine])
@pytest.mark.parametrize("steps", [0, -1])
def test_a_ramp_without_steps_is_refused(ramp: Any, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        ramp(0.0, 1.0, steps=steps)
