"""One budget of time: what is planned, how the training keeps to it, and what is measured when a machine slows down."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_dynamic.cli._budget import FEWEST_ROWS, FILL, Budget, Pace, Schedule, plan
from peft_dynamic.cli._measure import HeldOut, batches, choose, row_losses
from tests.stock_cases import build


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def budget(minutes: float | None, used: float = 0.0) -> Budget:
    clock = Clock()
    made = Budget(minutes, clock(), clock)
    clock.now += used
    return made


def test_a_budget_is_of_the_whole_command() -> None:
    ten = budget(10, used=60)
    assert (ten.limited, ten.used(), ten.left()) == (True, 60, 540)
    none = budget(None, used=60)
    assert (none.limited, none.left()) == (False, math.inf)
    assert not budget(math.inf).limited


def test_the_plan_fits_into_the_time() -> None:
    def made(minutes: float, rows: int = 100, done: int = 0) -> tuple[int, int]:
        """Of 50 steps of a second, and of rows of an eighth of one that are measured 8 times; 20 s are for the rest."""
        found = plan(budget(minutes), 1.0, 0.125, 8, 50, rows, 20.0, done)
        return found.steps, found.rows

    assert FILL == 0.85
    assert made(10) == (50, 100)
    # 120 s less 20 s: 85 s to use. All steps are 50 s; 35 s are left for rows of a second each.
    assert made(2) == (50, 35)
    # 60 s less 20 s: 34 s to use. 30 % of them are 10 rows; 16 are the least; the rest are 18 steps.
    assert made(1) == (18, FEWEST_ROWS) == (18, 16)
    # nothing to use: the least of both, and no more than there are
    assert made(0.3) == (1, 16)
    assert made(0.3, rows=4) == (1, 4)
    # a resumed run has 40 steps behind it: the 10 that are left fit in, or one of them does
    assert made(1, done=40) == (50, 24)
    assert made(0.3, done=40) == (41, 16)
    assert made(0.3, done=50) == (50, 16)  # nothing is left to train
    # what the margin leaves goes to training and measuring alike
    assert plan(budget(1), 1.0, 0.125, 8, 50, 100, 20.0).train_by == pytest.approx(100 + 60 - 20 - 16 / FILL)
    assert plan(budget(None), 1.0, 0.125, 8, 50, 100, 20.0).train_by == math.inf


def test_without_a_new_end_the_schedule_is_the_hosts_cosine() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 3, 60)
    ours = Schedule(60)
    for step in range(60):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert ours(60) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("at", "end"), [(20, 30), (20, 100), (2, 10), (59, 60), (20, 20)])
def test_the_rate_falls_to_nothing_where_the_training_ends(at: int, end: int) -> None:
    schedule = Schedule(60)
    before = schedule(at)
    schedule.move_end(at, end)
    assert schedule(at) == pytest.approx(before)
    rates = [schedule(step) for step in range(max(at, 3), end + 1)]
    assert rates == sorted(rates, reverse=True)
    if end > at:
        assert rates[-1] == pytest.approx(0, abs=1e-12)
        assert schedule(end + 5) == pytest.approx(0, abs=1e-12)
    # as LambdaLR keeps it in a checkpoint
    other = Schedule(7)
    other.__dict__.update(schedule.__dict__)
    assert [other(step) for step in range(end)] == [schedule(step) for step in range(end)]


def steps_of(
    seconds: list[float], by: float, wanted: int, stop_at: int | None = None
) -> tuple[Any, Schedule, list[int]]:
    """A training whose steps take so long each; the control's flags, the schedule, and the planned end at each step."""
    clock, schedule = Clock(), Schedule(wanted)
    state, control = (
        SimpleNamespace(global_step=0, max_steps=wanted),
        SimpleNamespace(should_training_stop=False, should_save=False),
    )
    pace = Pace(schedule, by, clock, lambda: state.global_step == stop_at, lambda text: None)
    pace.on_train_begin(None, state, control)
    ends = []
    for taken in seconds:
        clock.now += taken
        state.global_step += 1
        pace.on_step_end(None, state, control)
        ends.append(state.max_steps)
        if control.should_training_stop:
            break
    return control, schedule, ends


def test_a_training_that_keeps_its_pace_is_left_alone() -> None:
    control, schedule, ends = steps_of([1.0] * 50, by=100 + 51, wanted=50)
    assert ends == [50] * 50
    assert schedule.end == 50
    assert control.should_training_stop
    assert control.should_save  # what a later --resume goes on from


def test_a_training_that_slows_down_has_fewer_steps_and_ends_in_time() -> None:
    seconds = [1.0] * 10 + [4.0] * 40
    control, schedule, ends = steps_of(seconds, by=100 + 60, wanted=50)
    assert control.should_training_stop
    assert sum(seconds[: len(ends)]) <= 60
    assert len(ends) == ends[-1] == schedule.end == 22  # 10 s, and 12 steps of 4 s
    assert schedule(22) == pytest.approx(0, abs=1e-12)


def test_a_training_whose_time_is_over_ends_at_its_step() -> None:
    control, _, ends = steps_of([5.0] * 10, by=100 + 4, wanted=10)
    assert len(ends) == 1
    assert control.should_training_stop


def test_a_training_that_is_told_to_stop_saves_what_it_has() -> None:
    control, _, ends = steps_of([1.0] * 10, by=math.inf, wanted=10, stop_at=3)
    assert len(ends) == 3
    assert control.should_save


def test_a_resumed_training_moves_the_schedules_end() -> None:
    schedule = Schedule(60)
    schedule.move_end(30, 40)  # as its checkpoint has it
    state = SimpleNamespace(global_step=30, max_steps=60)
    Pace(schedule, math.inf, Clock(), lambda: False, print).on_train_begin(None, state, None)
    assert schedule.end == 60
    assert schedule(60) == pytest.approx(0, abs=1e-12)


ROWS = [{"input_ids": [i, 5, 7, 9], "attention_mask": [1] * 4, "labels": [-100, 5, 7, 9]} for i in range(1, 9)]


class Padding:
    """As much of a tokenizer as padding needs."""

    padding_side = "right"

    def pad(self, features: list[dict], **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in features]) for name in features[0]}


@pytest.fixture
def model() -> Any:
    return build("llama")[0].eval()


def test_losses_by_row_are_the_models_own(model: Any) -> None:
    (batch,) = batches(ROWS[:3], Padding(), 4, 0)
    rows = row_losses(model, batch, torch.float32)
    assert [count for _, count in rows] == [3, 3, 3]
    torch.testing.assert_close(sum(total for total, _ in rows) / 9, model(**batch).loss.item(), rtol=1e-5, atol=1e-5)
    for i, (total, _) in enumerate(rows):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        torch.testing.assert_close(total / 3, model(**one).loss.item(), rtol=1e-5, atol=1e-5)


def test_batches_in_a_random_order_are_a_fair_sample() -> None:
    sizes = [{"input_ids": [1] * n, "attention_mask": [1] * n, "labels": [1] * n} for n in range(1, 41)]

    class Ragged(Padding):
        def pad(self, features: list[dict], **kwargs: Any) -> dict[str, torch.Tensor]:
            longest = max(len(row["input_ids"]) for row in features)
            return {
                name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in features])
                for name in features[0]
            }

    made = [batch["input_ids"].shape[1] for batch in batches(sizes, Ragged(), 4, 0)]
    assert sorted(made) == list(range(4, 41, 4))
    assert made != sorted(made)
    assert made == [batch["input_ids"].shape[1] for batch in batches(sizes, Ragged(), 4, 0)]


def measured(monkeypatch: pytest.MonkeyPatch, seconds: list[float], minutes: float, batch_count: int = 4) -> HeldOut:
    """Ranks 1 and 2 and the base model, where each batch takes so long."""
    time = budget(minutes)
    steps = iter(seconds)

    def losses(model: Any, batch: Any, dtype: Any) -> list[tuple[float, int]]:
        time.clock.now += next(steps)  # type: ignore[attr-defined]  # our clock
        return [(float(batch["labels"].sum()), 2)]

    monkeypatch.setattr("peft_dynamic.cli._measure.row_losses", losses)
    made = [{"labels": torch.tensor([[i]])} for i in range(batch_count)]
    held_out = HeldOut(made, [1, 2], time, 0.0, torch.float32)
    for _ in range(3):
        held_out(None)
    return held_out


def test_all_ranks_are_compared_over_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = measured(monkeypatch, [1.0] * 12, 1.0)
    assert held_out.rows == 4
    # 30 s in all: 10 s for rank 1, which sees 2 batches of 6 s; the others see no more
    held_out = measured(monkeypatch, [6.0, 6.0, *[1.0] * 10], 0.5)
    assert held_out.rows == held_out.common == 2
    # a machine that slows down later: rank 1 has seen 4 batches, rank 2 only 3 of them, and 3 are compared
    held_out = measured(monkeypatch, [1.0] * 4 + [9.0] * 8, 1.2)
    assert held_out.rows == 4
    held_out = measured(monkeypatch, [1.0] * 4 + [9.0] * 8, 0.9)
    assert held_out.rows == 3
    assert [row.metrics["loss"] for row in held_out.curve().rows] == [(0 + 1 + 2) / 6] * 3
    # no time at all: one batch each, so that there always is a curve
    assert measured(monkeypatch, [50.0] * 12, 0.1).rows == 1


def held(base: list[float], **ranks: list[float]) -> HeldOut:
    made = HeldOut(
        [{"labels": torch.zeros(len(base), 2)}], [int(rank[1:]) for rank in ranks], budget(None), 0.0, torch.float32
    )
    made.seen = {int(rank[1:]): [[(loss, 1) for loss in losses]] for rank, losses in ranks.items()}
    made.seen[None] = [[(loss, 1) for loss in base]]
    return made


def test_the_standard_error_is_of_the_difference_over_the_rows() -> None:
    held_out = held([3.0, 4.0, 5.0], r1=[2.0, 2.0, 2.0])
    gain, error = held_out.gain(1)  # differences 1, 2, 3: mean 2, standard deviation 1
    assert gain == pytest.approx(2)
    assert error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(held([3.0], r1=[2.0]).gain(1)[1])


def test_the_choice_goes_by_the_share_of_the_gain() -> None:
    base = [3.0, 4.0, 5.0]
    better = {"r1": [2.6, 3.6, 4.6], "r2": [2.01, 3.0, 4.0], "r4": [2.0, 3.0, 4.0]}
    assert choose(held(base, **better), 0.01).rank == 2  # .9967 of the gain
    assert choose(held(base, **better), 0.001).rank == 4
    assert choose(held(base, **better), 0.7).rank == 1
    assert "rank 2, with 99.7 % of the gain of rank 4" in choose(held(base, **better), 0.01).sentence
    assert "rank 4, the best: its loss is 1.0000" in choose(held(base, **better), 0.001).sentence


@pytest.mark.parametrize(
    "losses",
    [
        {"r1": [3.0, 4.0, 5.0], "r2": [3.1, 4.1, 5.1]},  # no better
        {"r1": [2.0, 4.9, 5.0], "r2": [3.1, 4.1, 5.1]},  # better by .03, with a standard error of .56
        {"r1": [math.nan] * 3, "r2": [math.nan] * 3},
    ],
)
def test_where_nothing_was_learnt_no_rank_is_recommended(losses: dict) -> None:
    choice = choose(held([3.0, 4.0, 5.0], **losses), 0.01)
    assert choice.rank is None
    assert choice.sentence.startswith("Nothing was learnt: the best rank, 1, is ")
    assert choice.share(1) == ""
