"""Every setting of every configuration, with values that have no meaning: refused at once, and by its name."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from peft_dynamic import ActivationDensityLoss
from peft_dynamic.trainers import PPOConfig
from peft_dynamic.tuners.lora_fields import RULES
from tests import methods
from tests.examples import at_most
from tests.tuners.common import tiny_llama

NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [
    *(None, "", "x", "16", "*[", "q_proj", b"x", True, False, object(), abs),
    *(-1, 0, 3, 1.5, 10**30, 10**400, NAN, INF, -INF, -0.0, np.int64(3), np.float32(2)),
    *([], [0], [1], [5], ["x"], [""], [None], [NAN], (1, 2), [[0, 1]]),
    *({}, {"a": 1}, {"q_proj": "x"}, {"q_proj": NAN}, {"q_proj": 0}, {"q_proj": 100}, {None: 1}),
]
MADE = methods.configs(["q_proj"], quantised=True, small=False, own={"loretta-adp": {"bottleneck": 8}})


def named(error: Exception, name: str) -> bool:
    """Whether the error is of a user's kind and says which setting it is about, in the code's words or in English."""
    return isinstance(error, TypeError | ValueError) and (
        name in str(error) or name.replace("_", " ") in str(error).lower()
    )


def refused(make: Callable[..., Any], name: str, value: Any) -> Exception | None:
    """The error of making it, or None; hosts' warnings of odd combinations are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make(**{name: value})
        except Exception as error:
            return error
    return None


def ppo(**setting: Any) -> Any:
    return PPOConfig(output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, bf16=False, **setting)


def soft(**setting: Any) -> Any:
    from peft_dynamic.trainers import SoFTConfig

    return SoFTConfig(output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, bf16=False, **setting)


@pytest.mark.parametrize("method", MADE)
def test_a_setting_without_a_meaning_is_refused_by_its_name(method: str) -> None:
    config = MADE[method]()
    found = [
        (field.name, value, error)
        for field in fields(config)
        for value in ODD
        if (error := refused(MADE[method], field.name, value)) is not None and not named(error, field.name)
    ]
    assert not found


OWN = {
    ppo: sorted({field.name for field in fields(PPOConfig)} - {field.name for field in fields(TrainingArguments)}),
    soft: ["exits", "exit_weights", "exits_per_step", "eval_exits"],
}


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in OWN.items() for name in names])
def test_a_trainers_setting_without_a_meaning_is_refused_by_its_name(make: Callable[..., Any], name: str) -> None:
    found = [
        (value, error) for value in ODD if (error := refused(make, name, value)) is not None and not named(error, name)
    ]
    assert not found
    assert refused(make, name, object()) is not None


@pytest.mark.parametrize("name", ["weight", "eps", "surrogate", "activation_modules", "layer_weights"])
def test_a_losss_setting_without_a_meaning_is_refused_by_its_name(name: str) -> None:
    def make(**setting: Any) -> Any:
        return ActivationDensityLoss(**setting).attach(tiny_llama())

    found = [
        (value, error) for value in ODD if (error := refused(make, name, value)) is not None and not named(error, name)
    ]
    assert not found


@pytest.mark.parametrize("method", methods.configs())
@at_most(60)
@given(data=st.data())
def test_what_is_accepted_trains_or_names_the_setting(method: str, data: st.DataObject) -> None:
    """And no other error than one that names it comes later: a model is made and run."""
    name = data.draw(st.sampled_from([field.name for field in fields(MADE[method]())]))
    value = data.draw(st.sampled_from(ODD))

    def run(**setting: Any) -> None:
        model = get_peft_model(tiny_llama(), MADE[method](**setting))
        model.train()(input_ids=torch.tensor([[1, 2, 3]]))

    error = refused(run, name, value)
    assert error is None or named(error, name), (name, value)


def test_each_field_of_peft_has_a_rule() -> None:
    """A field that PEFT adds is refused until it has one: see check_lora_fields."""
    assert RULES.keys() | {"r", "peft_type"} == {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize("method", methods.configs(lora=True, quantised=True))
@pytest.mark.parametrize("value", [{}, []])
def test_an_empty_setting_of_a_variant_is_refused_too(method: str, value: Any) -> None:
    """PEFT makes the variant's defaults of an empty dict."""
    names = ["arrow_config"] if method == "density-lora" else ["use_bdlora", "kasa_config", "arrow_config"]
    for name in names:
        with pytest.raises((TypeError, ValueError), match=name):
            MADE[method](**{name: value})


def test_numbers_of_numpy_are_taken() -> None:
    made = ppo(num_ppo_epochs=np.int64(3), kl_coef=np.float32(0.5), reward_weights=[np.float64(1)])
    assert [type(made.num_ppo_epochs), type(made.kl_coef), type(made.reward_weights[0])] == [int, float, float]
    assert soft(exits=[np.int64(2), 1]).exits == [1, 2]
