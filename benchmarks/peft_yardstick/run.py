"""PEFT's own `tests/test_custom_models.py`, run with a config of ours in place of its cases.

Nothing in the checkout is changed. The twelve cases are MLP with one and two targets, modules_to_save, Embedding,
Conv1D, Conv1d, Conv2d, Conv3d and MultiheadAttention. LoraConfig is the yardstick itself.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.study import Cell, Context
from benchmarks.summary import table

CASES = [
    ("MLP one", "MLP", {"target_modules": ["lin0"]}),
    ("MLP two", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP regex", "MLP", {"target_modules": "lin0"}),
    ("Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d and Linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ("MultiheadAttention", "MHA", {"target_modules": ["mha"]}),
    ("MultiheadAttention and Linear", "MHA", {"target_modules": ["mha", "lin0"]}),
]
SOURCES = """
def _over_sources(kind):
    import tempfile

    class ScaLearnConfig(kind):  # made over two LoRA adapters of the model that PEFT's test names
        def __init__(self, model_id, target_modules=None, init_lora_weights=True, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                adapters = {}
                for name in ("first", "second"):
                    torch.manual_seed(len(adapters))
                    model = MockTransformerWrapper.from_pretrained(model_id)
                    config = LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False)
                    adapters[name] = folder + "/" + name
                    get_peft_model(model, config).save_pretrained(adapters[name])
                super().__init__(adapters=adapters, omega_dropout=0.0, **kwargs)

    return ScaLearnConfig


class _Drawn(str):  # a mixer that starts at random, where PEFT's test wants an adapter that is not the base model
    pass


def _lamda(kind):
    from peft_dynamic.tuners import mixer

    start = mixer._initialize
    mixer._initialize = lambda matrix, how: matrix.data.normal_() if isinstance(how, _Drawn) else start(matrix, how)

    class LaMDAConfig(kind):
        def __init__(self, *args, init_lora_weights=True, **kwargs):
            spectral = {"train_a": False, "freeze_b": 0.3, "total_steps": 100, "init_lora_weights": "spectral"}
            zero = "zero" if init_lora_weights is True else _Drawn("zero")
            super().__init__(*args, mixer_init=zero, **spectral, **kwargs)

    return LaMDAConfig
"""
INSERTED = (
    SOURCES
    + """
import json as _json, os as _os
import peft as _peft, peft_dynamic as _ours
_name = _os.environ["YARDSTICK_CONFIG"]
_of = {"LaMDAConfig": "MoSLoRAConfig"}
_config = getattr(_ours, _of.get(_name, _name), None) or getattr(_peft, _name)
if issubclass(_config, LoraConfig):  # PEFT's helper knows LoraConfig's field by the exact class
    from . import testing_common as _common

    def set_init_weights_false(config_cls, kwargs):
        field = {"init_weights": "reference"} if _name == "LorettaRepConfig" else {"init_lora_weights": False}
        return {**field, **kwargs}

    _common.set_init_weights_false = set_init_weights_false
if _name == "ScaLearnConfig":
    _config = _over_sources(_config)
if _name == "LaMDAConfig":
    _config = _lamda(_config)
TEST_CASES = [("yardstick " + n, m, _config, k) for n, m, k in _json.loads(_os.environ["YARDSTICK_CASES"])]
"""
)


# LoRETTA's factors are tensor trains of linear layers; other layers it refuses. These layers are tiny, and a
# larger alpha makes one of PEFT's tests diverge, which steps by plain gradients at a rate made for LoRA.
# LaMDA's are singular vectors of the weight, so its rank is at most the smaller side of these layers.
LINEAR_ONLY: dict[str, dict[str, Any]] = {
    "LorettaRepConfig": {"bottleneck": 4, "tensor_rank": 2, "lora_alpha": 2, "train_layer_norms": False},
    "LaMDAConfig": {"r": 2},
}
# A density loss counts the output of a named module where there are no blocks. Its weight is 0: PEFT's loops make their
# loss from the outputs, where the term would be missing, and so are refused.
COUNTED = {"MHA": "lin0", "EmbConv1D": "lin0"}
# PEFT's test that each parameter moves by 1e-4 in three steps has a list of methods that need a larger learning rate on
# the embedding: those whose factors start at zero and meet more than one other factor. Ours of that kind join it.
LARGER_RATE = ("MoSLoRAConfig", "LorettaRepConfig")
LISTED = "or issubclass(config_cls, AdamssConfig)"


def cases_of(config: str) -> list[tuple[str, str, dict[str, Any]]]:
    if config in LINEAR_ONLY:
        return [(name, model, kwargs | LINEAR_ONLY[config]) for name, model, kwargs in CASES if model == "MLP"]
    if config == "ScaLearnConfig":
        return [(name, model, kwargs | {"model_id": model}) for name, model, kwargs in CASES]
    if config != "DensityLoRAConfig":
        return CASES
    settings = {"density_weight": 0.0, "include_padding": True}
    return [
        (name, model, kwargs | settings | {"activation_modules": COUNTED.get(model, "relu")})
        for name, model, kwargs in CASES
    ]


def changed(source: str) -> str:
    """With our cases before the first model class: after PEFT's table, before the decorators that read it."""
    marker = "\nclass MLP(nn.Module):"
    assert source.count(marker) == 1, "PEFT's test file has changed its layout"
    assert source.count(LISTED) == 1, "PEFT's list of methods with a larger learning rate has changed"
    larger = f'{LISTED} or (model_id == "EmbConv1D" and config_cls.__name__ in {LARGER_RATE})'
    return source.replace(LISTED, larger).replace(marker, INSERTED + marker)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    config, root = cell["config"], str(Path(__file__).parents[2])
    cases = cases_of(config)
    with tempfile.TemporaryDirectory() as work:
        tests = Path(work, "tests")
        shutil.copytree(context.paths["peft"] / "tests", tests)
        target = tests / "test_custom_models.py"
        target.write_text(changed(target.read_text(encoding="utf-8")), encoding="utf-8")
        environment = os.environ | {"YARDSTICK_CONFIG": config, "YARDSTICK_CASES": json.dumps(cases)}
        environment["HF_HUB_OFFLINE"] = "1"  # these tests need nothing of the Hub, and would wait for it
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-W", "ignore"]
        # in PEFT's own order: in a random one some of them disturb each other
        command += ["-p", "no:randomly", "-p", "no:cacheprovider", "--tb=short", "-k", "yardstick", str(target)]
        result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    print(result.stdout, result.stderr[-2000:])
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
    versions = {"peft": version("peft"), "torch": version("torch")}
    return {config: {"config": config, **versions, "cases": len(cases), **counts}}


def report(record: dict[str, Any], context: Context) -> str:
    names = ("cases", "passed", "failed", "error", "skipped", "peft", "torch")
    counts = {config: found for config, found in record.items() if config != "conditions"}
    return table(
        ["config", *names], [[config, *(found.get(name, 0) for name in names)] for config, found in counts.items()]
    )
