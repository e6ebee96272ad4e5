"""A new user's first hour, as examples/first_hour.sh has it, with a tiny model."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("trl")

from tests.cli import common
from tests.cli.common import FORKED, HERE, environment
from tests.processes import programs

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '!' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_the_first_hour(tmp_path: Path, tiny: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    env = environment(OUT=str(tmp_path / "out"), STEPS="2")
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    script = ["bash", str(HERE / "examples" / "first_hour.sh"), str(model)]
    with programs(tmp_path / "bin", peft_dynamic=FORKED.format(before=""), python=""):
        done = subprocess.run(script, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 2 says:" in done.stdout
    assert {"adapter_config.json", "run.yaml"} <= {path.name for path in (tmp_path / "out" / "run").iterdir()}
    assert (tmp_path / "out" / "curve.json").is_file()
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").is_file()
