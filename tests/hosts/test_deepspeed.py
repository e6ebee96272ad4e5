"""What we rely on of DeepSpeed, and of the way in which torch's distributed checkpoints fill an optimizer."""

import inspect

import pytest
import torch

from peft_dynamic.hosts import deepspeed as ours
from tests.tuners.common import adapted, optimizer_of, rows, schedule_of

deepspeed = pytest.importorskip("deepspeed")
from deepspeed.runtime import engine as engines
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator


class Watcher:
    def before(self, engine: object) -> None:
        raise AssertionError("no engine here")

    def after(self, engine: object, noted: object) -> None:
        raise AssertionError("no engine here")


def test_an_engine_tells_of_its_steps() -> None:
    assert ours.is_imported()
    assert list(inspect.signature(engines.DeepSpeedEngine.was_step_applied).parameters) == ["self"]
    # accelerate calls these two, in this order, at each boundary
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    source = inspect.getsource(DeepSpeedEngineWrapper.backward)
    assert source.index("self.engine.backward(") < source.index("self.engine.step()")


def test_an_engine_that_does_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_watchers", [])
    monkeypatch.delattr(engines.DeepSpeedEngine, "was_step_applied")
    with pytest.raises(RuntimeError, match=r"its engine has no was_step_applied.*Use a version that has been tried"):
        ours.watch_steps(Watcher())
    assert not ours._watchers


def test_external_parameters_are_kept_by_identity() -> None:
    module, parameter = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(2))
    partition_parameters.register_external_parameter(module, parameter)
    assert module.__dict__["_external_params"] == {id(parameter): parameter}


def test_a_parameter_is_kept_while_a_module_is_active() -> None:
    """What a hook does for those that were registered, and `gather_with` for those of the pass that has begun."""
    source = inspect.getsource(partitioned_param_coordinator)
    assert "param.ds_active_sub_modules.add(current_submodule.ds_id)" in source
    assert "param.ds_active_sub_modules.discard(submodule.ds_id)" in source
    assert "not param.ds_active_sub_modules" in source


def test_torchs_step_to_make_an_optimizers_state_draws_no_rank() -> None:
    """FSDP2's resume calls it after the model, and with it the number of steps, has been loaded."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    model = adapted()
    optimizer = optimizer_of(model)
    _init_optim_state(optimizer)
    assert optimizer.state
    assert schedule_of(model).steps == 0
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    optimizer.step()
    assert schedule_of(model).steps == 1


def test_a_warm_up_that_begins_at_0_is_a_step() -> None:
    model = adapted()
    optimizer = optimizer_of(model, lr=0.0)
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    optimizer.step()
    assert schedule_of(model).steps == 1
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert schedule_of(model).steps == 2


def test_a_first_step_whose_loss_has_no_tokens_is_one() -> None:
    model = adapted()
    optimizer = optimizer_of(model, lr=0.0)
    (0 * model.train()(input_ids=rows(2), labels=rows(2)).loss).backward()
    optimizer.step()
    assert schedule_of(model).steps == 1
