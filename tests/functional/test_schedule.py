"""Schedules: numbers, lines and stairs over the progress of a training, and their texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.functional.schedule import Schedule, stairs


@pytest.mark.parametrize(
    ("text", "at"),
    [
        (0.5, {0: 0.5, 0.3: 0.5, 1: 0.5}),
        ("0.5", {0: 0.5, 1: 0.5}),
        ("0:0.1 1:1", {0: 0.1, 0.5: 0.55, 1: 1}),
        ("0.2:1 0.6:3", {0: 1, 0.2: 1, 0.4: 2, 0.6: 3, 1: 3}),  # held before the first and after the last knot
        ("steps 0:0 0.78:1", {0: 0, 0.7799: 0, 0.78: 1, 1: 1}),
        ("steps 0.5:2", {0: 2, 1: 2}),
        ("0:-1.7e308 1:1.7e308", {0: -1.7e308, 0.5: 0, 1: 1.7e308}),  # whose difference is no float
    ],
)
def test_values(text: str | float, at: dict[float, float]) -> None:
    schedule = Schedule.parse(text)
    assert {progress: schedule(progress) for progress in at} == pytest.approx(at)


def test_a_stair_is_reached_at_the_step_that_is_meant() -> None:
    # 20 of 30 epochs and 200 of 300 steps are one number in binary, as both are one division
    schedule = Schedule.parse(stairs((0.0, 1.0), (20 / 30, 0.0)))
    assert [schedule(step / 300) for step in (199, 200)] == [1.0, 0.0]


@pytest.mark.parametrize(
    "value",
    [
        *("", "steps", "0:1 0:2", "0.5:1 0.2:2", "-0.1:1", "0:1 1.1:2", "0:nan", "0:inf", "a:b", "0:1:2", "1 2"),
        *(None, [0.5], "nan", float("nan")),
    ],
)
def test_what_is_none_is_refused_with_its_forms(value: object) -> None:
    with pytest.raises(ValueError, match=r"such as '0:0\.1 1:1'|must increase from 0 to 1"):
        Schedule.parse(value)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_out_of_range(progress: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Schedule.parse("0:0 1:1")(progress)


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.floats(0, 1), finite, min_size=1), st.booleans())
def test_the_text_reads_back_to_the_bit(knots: dict[float, float], steps: bool) -> None:
    schedule = Schedule(tuple(sorted(knots.items())), steps and len(knots) > 1)
    again = Schedule.parse(str(schedule))
    assert again.values == schedule.values
    assert [again(at) for at in knots] == [schedule(at) for at in knots]
