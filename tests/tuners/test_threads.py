"""Several threads or tasks on one model: each forward pass is at the rank that its caller asked for, or an error."""

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.tuners.common import adapted, optimizer_of, rows, schedule_of, train

RANKS = (1, 2, 4, 8)


def perturbed(**settings: Any) -> Any:
    model = adapted(**settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows(2)).logits


def at_each_rank(model: Any) -> dict[int, torch.Tensor]:
    found = {}
    for rank in RANKS:
        with model.at_rank(rank):
            found[rank] = logits(model)
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"truncation": "prefix", "scaling": "alpha/b"}, {"use_mixer": True}],
    ids=["svd", "prefix", "mixer"],
)
def test_a_server_serves_several_ranks(settings: dict[str, Any]) -> None:
    model = perturbed(**settings)
    expected = at_each_rank(model)
    start = threading.Barrier(4)

    def serve(rank: int) -> None:
        start.wait(timeout=60)
        for _ in range(10):
            with model.at_rank(rank):
                assert model.get_rank() == rank
                torch.testing.assert_close(logits(model), expected[rank])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(serve, rank) for rank in RANKS]:
            done.result(timeout=120)
    assert model.get_rank() == 8
    torch.testing.assert_close(logits(model), expected[8])


def in_a_thread(call: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


def test_a_forward_pass_outside_of_a_turn_is_refused_while_another_has_it() -> None:
    model = perturbed()
    with model.at_rank(2):
        with pytest.raises(RuntimeError, match="another thread or task is inside `at_rank`"):
            in_a_thread(lambda: logits(model))
        assert logits(model).isfinite().all()  # the one who has it goes on
    assert torch.equal(in_a_thread(lambda: logits(model)), logits(model))


def test_a_turn_is_refused_while_another_thread_computes_outside_of_one() -> None:
    model = perturbed()
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        inside.set()
        assert go_on.wait(timeout=60)

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model)
        assert inside.wait(timeout=60)
        handle.remove()
        for change in (lambda: model.set_rank(2), lambda: model.at_rank(2).__enter__()):
            with pytest.raises(RuntimeError, match="another thread runs a forward pass of this model outside"):
                change()
        assert model.get_rank() == 8
        go_on.set()
        torch.testing.assert_close(running.result(timeout=60), at_each_rank(model)[8])


def test_another_thread_that_was_interrupted_does_not_block_for_ever() -> None:
    model = perturbed()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        with pytest.raises(KeyboardInterrupt), model.at_rank(2):
            logits(model)

    in_a_thread(interrupted)
    handle.remove()
    with model.at_rank(2):
        assert logits(model).isfinite().all()
    assert model.get_rank() == 8


def test_tasks_of_one_thread_are_refused_rather_than_mixed() -> None:
    model = perturbed()
    expected = at_each_rank(model)

    async def serve(rank: int, lock: Any = None) -> None:
        if lock is not None:
            async with lock:
                return await serve(rank)
        with model.at_rank(rank):
            await asyncio.sleep(0)
            torch.testing.assert_close(logits(model), expected[rank])

    async def both(lock: Any) -> list[Any]:
        return await asyncio.gather(serve(2, lock), serve(4, lock), return_exceptions=True)

    first, second = asyncio.run(both(None))
    assert first is None
    assert isinstance(second, RuntimeError)
    assert "another task of this thread is inside `at_rank`" in str(second)

    async def with_a_lock() -> list[Any]:
        return await both(asyncio.Lock())

    assert asyncio.run(with_a_lock()) == [None, None]
    assert model.get_rank() == 8


def test_an_evaluation_beside_a_training_step_is_refused() -> None:
    model = perturbed().train()

    def evaluate(*args: Any) -> None:
        with pytest.raises(RuntimeError, match="a training step and another forward pass run on this DyLoRA model"):
            in_a_thread(lambda: logits(model))

    handle = model.base_model.model.model.layers[0].register_forward_pre_hook(evaluate)
    model(input_ids=rows(2), labels=rows(2)).loss.backward()
    handle.remove()
    optimizer_of(model).step()
    assert model.get_rank() == 8


def test_a_set_rank_of_another_thread_waits_for_the_end_of_a_turn() -> None:
    model = perturbed()
    with ThreadPoolExecutor(1) as pool:
        with model.at_rank(2):
            waiting = pool.submit(model.set_rank, 4)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            assert model.get_rank() == 2
        waiting.result(timeout=60)
    assert model.get_rank() == 4


def test_nested_turns_of_one_thread_and_of_two_adapters() -> None:
    model = perturbed()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    with model.at_rank(4), model.at_rank(2, "other"), model.at_rank(1, "default"):
        assert (model.get_rank("default"), model.get_rank("other")) == (1, 2)
        assert logits(model).isfinite().all()
    assert (model.get_rank("default"), model.get_rank("other")) == (8, 8)


def test_copies_and_pickles_have_turns_of_their_own() -> None:
    model = perturbed()
    with model.at_rank(2):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert in_a_thread(lambda twin=twin: logits(twin)).isfinite().all()
            twin.set_rank(4)
        assert model.get_rank() == 2


def test_optimizers_step_while_another_thread_makes_models() -> None:
    """The set of all adapters that the step looks through grows meanwhile."""
    model = adapted()
    stop, made = threading.Event(), []

    def make() -> None:
        while not stop.is_set():
            made.append(adapted(target_modules=["q_proj"]))

    thread = threading.Thread(target=make)
    thread.start()
    try:
        train(model, 40)
    finally:
        stop.set()
        thread.join(timeout=60)
    assert made
    assert schedule_of(model).updates == 40
