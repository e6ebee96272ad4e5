"""Registration with PEFT: once, whenever it happens, and never over a name that PEFT has."""

from pathlib import Path

import pytest

from tests.processes import python


def test_the_members_are_real_and_registering_again_changes_nothing() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import PeftType

    from peft_dynamic import DyLoRAConfig, DyLoRAModel
    from peft_dynamic.hosts.registry import register

    before = list(PeftType)
    register("dylora", DyLoRAConfig, DyLoRAModel)
    assert list(PeftType) == before
    member = PeftType("DYLORA")
    assert member is PeftType.DYLORA is PeftType["DYLORA"]
    assert (member.value, member.name, str(member), member == "DYLORA") == ("DYLORA", "DYLORA", str(member), True)
    assert str(member) == str(PeftType.LORA).replace("LORA", "DYLORA")
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DYLORA"] is DyLoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is DyLoRAModel


def test_importing_after_peft_objects_exist_and_twice() -> None:
    python(
        "-c",
        """
import importlib, pickle, sys
from peft import LoraConfig, get_peft_model, PeftType
from torch import nn
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
import peft_dynamic
importlib.reload(peft_dynamic)
from peft_dynamic import DyLoRAConfig
again = get_peft_model(nn.Sequential(nn.Linear(4, 4)), DyLoRAConfig(r=2, target_modules=["0"]))
assert again.peft_config["default"].peft_type is PeftType.DYLORA
assert pickle.loads(pickle.dumps(PeftType.DYLORA)) is PeftType.DYLORA
model.merge_and_unload()
""",
    )


@pytest.mark.parametrize("name", ["DYLORA", "QDYLORA"])
def test_a_peft_that_has_the_name_is_a_clear_error(name: str) -> None:
    out = python(
        "-c",
        f"""
import enum
import peft.utils.peft_types as types
class PeftType(str, enum.Enum):
    LORA = "LORA"
    {name} = "{name}"
types.PeftType = PeftType
try:
    import peft_dynamic
except ImportError as error:
    print(error)
""",
    )
    assert f"PEFT already has a method named {name}" in out
    assert "Use PEFT's" in out


def test_another_plugin_with_the_name_is_a_clear_error() -> None:
    from peft_dynamic.hosts.registry import register

    with pytest.raises(ImportError, match="DYLORA is already registered with PEFT by"):
        register("dylora", object, object)


def test_an_adapter_without_our_import_names_the_type(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "DYLORA", "r": 2}')
    out = python(
        "-c",
        f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    print("KeyError", error)
import peft_dynamic
print(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)
""",
    )
    assert out.split() == ["KeyError", "'DYLORA'", "DyLoRAConfig"]
