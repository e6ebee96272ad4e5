"""Facts about PEFT that we rely on: a release that breaks one turns a test red by name."""

import inspect
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import peft.tuners.lora.variants as variants
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraVariant
from peft.utils.peft_types import PeftType

from peft_dynamic.methods import METHODS, REFUSED, VARIANTS


def test_the_variants_of_lora_are_those_that_we_know() -> None:
    classes = [
        cls for cls in vars(variants).values() if isinstance(cls, type) and issubclass(cls, LoraVariant)
        and cls is not LoraVariant
    ]  # fmt: skip
    known = tuple(start for starts in VARIANTS.values() for start in starts)
    assert [cls.__name__ for cls in classes if not cls.__name__.startswith(known)] == []
    assert {start for start in known if any(cls.__name__.startswith(start) for cls in classes)} == {*known}


def test_the_fields_that_ask_for_a_variant_are_marked() -> None:
    marked = {
        field.name
        for field in fields(LoraConfig)
        if field.metadata.get("is_lora_variant") or "lora_variants" in field.metadata
    }
    assert marked
    assert marked <= {*VARIANTS}


def test_the_fields_that_we_refuse_are_there() -> None:
    assert {*REFUSED} <= {field.name for field in fields(LoraConfig)}


def test_a_type_of_ours_is_a_member_like_peft_s_own() -> None:
    for name in METHODS:
        member = PeftType[name]
        assert PeftType(name) is member
        assert member in list(PeftType)
        assert isinstance(member, str)
        assert member.value == name


def test_arguments_of_peft_s_own_are_taken_out_where_the_hooks_are_enabled() -> None:
    """Where `ranks` comes in, for every kind of PeftModel."""
    kinds = [PeftModel, *PeftModel.__subclasses__()]
    assert len(kinds) >= 7
    for kind in kinds:
        assert ("_enable_peft_forward_hooks" in vars(kind)) == (kind is PeftModel)
        for name in {"forward", "generate"} & {*vars(kind)}:
            source = inspect.getsource(vars(kind)[name])
            enabled, filtered = "with self._enable_peft_forward_hooks(", "not in self.special_peft_forward_args}"
            assert source.count(enabled) == source.count(filtered) > 0
            assert source.index(enabled) < source.index(filtered)


def test_the_hooks_see_the_arguments_and_may_add_to_those_that_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tuners.common import rows, tiny_llama

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    seen: list[Any] = []
    monkeypatch.setattr(type(model.get_base_model()), "forward", lambda self, **kwargs: seen.append(sorted(kwargs)))

    @contextmanager
    def hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["novel"])
        self.special_peft_forward_args.add("novel")
        yield

    monkeypatch.setattr(PeftModel, "_enable_peft_forward_hooks", hooks)
    model(input_ids=rows(1), novel=3)
    assert seen[0] == 3
    assert "input_ids" in seen[1]
    assert "novel" not in seen[1]
