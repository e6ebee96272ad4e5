"""Schedules through the parser of transformers' and TRL's scripts."""

import pytest
from transformers import HfArgumentParser

from peft_dynamic.trainers import KDConfig, KDSFTConfig, SoFTConfig


@pytest.mark.parametrize(
    ("config", "field"),
    [
        *((kind, field) for kind in (KDConfig, KDSFTConfig) for field in ("kd_weight", "temperature", "teacher_scale")),
        (SoFTConfig, "exit_kd"),
        (SoFTConfig, "exit_kd_temperature"),
    ],
)
@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), ("0:0.5 1:1", "0.0:0.5 1.0:1.0"), ("steps 0:0.5 0.5:1", "steps 0.0:0.5 0.5:1.0")],
)
def test_a_schedule_may_be_given_on_a_command_line(config: type, field: str, text: str, value: object) -> None:
    parser = HfArgumentParser(config)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", f"--{field}", text])
    assert getattr(parsed, field) == value


@pytest.mark.parametrize("field", ["kd_weight", "temperature", "teacher_scale"])
def test_none_is_no_schedule(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=None: schedule None: must be a number"):
        KDConfig("out", **{field: None})
