"""Facts about PEFT that we rely on: a release that breaks one turns a test red by name."""

from dataclasses import fields

import peft.tuners.lora.variants as variants
from peft import LoraConfig
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
