"""What PEFT adds tomorrow is refused by every method until a row of the table allows it."""

import dataclasses
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant

from peft_dynamic.methods import METHODS, REFUSED
from tests import methods, processes
from tests.tuners.common import tiny_llama

LORA = methods.configs(lora=True)


def test_a_field_of_tomorrow_is_refused_by_every_method() -> None:
    out = processes.python(
        "-c",
        f"""
LEAST = {methods.LEAST!r}"""
        """
from dataclasses import dataclass, field
import peft
def newer(base):
    @dataclass
    class Newer(base):
        tomorrow: bool = field(default=False, metadata={"is_lora_variant": True})
    Newer.__name__ = base.__name__
    return Newer
peft.LoraConfig, peft.PeftConfig = newer(peft.LoraConfig), newer(peft.PeftConfig)
from peft_dynamic.methods import METHODS
for name, method in METHODS.items():
    least = LEAST.get(name, {})
    method.config(**least)  # as long as nobody sets it, nothing is wrong
    try:
        method.config(tomorrow=True, **least)
    except ValueError as error:
        assert f"{method.config.__name__} does not support tomorrow=True" in str(error), error
        assert "Leave it at its default" in str(error), error
    else:
        raise SystemExit(f"{name} took it")
print(len(METHODS))
""",
    )
    assert int(out.split()[-1]) == len(METHODS)


class TomorrowVariant(LoraVariant):
    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("method", LORA)
def test_a_variant_of_tomorrow_is_refused_by_every_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {LoraLayer, *_below(LoraLayer)}
    for cls in classes:
        if "resolve_lora_variant" in vars(cls):
            monkeypatch.setattr(cls, "resolve_lora_variant", lambda self, **kwargs: TomorrowVariant())
    model = tiny_llama()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"does not support TomorrowVariant.*does not know it"):
        get_peft_model(model, LORA[method]())
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def _below(cls: type) -> set[type]:
    return {each for child in cls.__subclasses__() for each in (child, *_below(child))}


@pytest.mark.parametrize("field", REFUSED)
def test_each_refused_field_is_refused_with_its_reason(field: str) -> None:
    default = {item.name: item.default for item in dataclasses.fields(LoraConfig)}[field]
    value: Any = True if default is False else {"x": 1} if field != "target_parameters" else ["experts.gate"]
    for name, method in METHODS.items():
        if reason := method.refused.get(field):
            with pytest.raises(ValueError, match="does not support") as caught:
                method.config(**methods.SMALL[name], **{field: value})
            assert str(caught.value).endswith(f"{reason}.")
            assert f"{method.config.__name__} does not support {field}=" in str(caught.value)
