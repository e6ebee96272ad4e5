"""PEFT's own `tests/test_custom_models.py`, run with a config of ours in place of its cases.

    python benchmarks/peft_yardstick/run.py --peft-checkout DIR [--config DyLoRAConfig] [--out result.json]

DIR is a checkout of huggingface/peft (its tests are not in the wheel); nothing in it is changed. The twelve cases are
MLP with one and two targets, modules_to_save, Embedding, Conv1D, Conv1d, Conv2d, Conv3d and MultiheadAttention.
`--config LoraConfig` is the yardstick itself.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

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
INSERTED = """
import json as _json, os as _os
import peft as _peft, peft_dynamic as _ours
_name = _os.environ["YARDSTICK_CONFIG"]
_config = getattr(_ours, _name, None) or getattr(_peft, _name)
if issubclass(_config, LoraConfig):  # PEFT's helper knows LoraConfig's field by the exact class
    from . import testing_common as _common

    def set_init_weights_false(config_cls, kwargs):
        field = {"init_weights": "reference"} if _name == "LorettaRepConfig" else {"init_lora_weights": False}
        return {**field, **kwargs}

    _common.set_init_weights_false = set_init_weights_false
TEST_CASES = [("yardstick " + n, m, _config, k) for n, m, k in _json.loads(_os.environ["YARDSTICK_CASES"])]
"""


# LoRETTA's factors are tensor trains of linear layers; other layers it refuses. These layers are tiny, and a
# larger alpha makes one of PEFT's tests diverge, which steps by plain gradients at a rate made for LoRA.
LINEAR_ONLY = {"LorettaRepConfig": {"bottleneck": 4, "tensor_rank": 2, "lora_alpha": 2, "train_layer_norms": False}}
# A density loss counts the output of a named module where there are no blocks. Its weight is 0: PEFT's loops make their
# loss from the outputs, where the term would be missing, and so are refused.
COUNTED = {"MHA": "lin0", "EmbConv1D": "lin0"}
# PEFT's test that each parameter moves by 1e-4 in three steps has a list of methods that need a larger learning rate on
# the embedding: those whose factors start at zero and meet more than one other factor. Ours of that kind join it.
LARGER_RATE = ("MoSLoRAConfig", "LorettaRepConfig")
LISTED = "or issubclass(config_cls, AdamssConfig)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peft-checkout", type=Path, required=True)
    parser.add_argument("--config", default="DyLoRAConfig", help="a config class of peft_dynamic or peft")
    parser.add_argument("--out", type=Path, help="where to write the counts as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        tests = Path(work, "tests")
        shutil.copytree(args.peft_checkout / "tests", tests)
        target = tests / "test_custom_models.py"
        source = target.read_text(encoding="utf-8")
        # before the first model class: after the table, before the decorators that read it
        marker = "\nclass MLP(nn.Module):"
        assert source.count(marker) == 1, "PEFT's test file has changed its layout"
        assert source.count(LISTED) == 1, "PEFT's list of methods with a larger learning rate has changed"
        source = source.replace(
            LISTED, f'{LISTED} or (model_id == "EmbConv1D" and config_cls.__name__ in {LARGER_RATE})'
        )
        target.write_text(source.replace(marker, INSERTED + marker), encoding="utf-8")
        cases = CASES
        if args.config in LINEAR_ONLY:
            cases = [
                (name, model, kwargs | LINEAR_ONLY[args.config]) for name, model, kwargs in CASES if model == "MLP"
            ]
        if args.config == "DensityLoRAConfig":
            settings = {"density_weight": 0.0, "include_padding": True}
            cases = [
                (name, model, kwargs | settings | {"activation_modules": COUNTED.get(model, "relu")})
                for name, model, kwargs in CASES
            ]
        environment = os.environ | {"YARDSTICK_CONFIG": args.config, "YARDSTICK_CASES": json.dumps(cases)}
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-W", "ignore"]
        command += ["-p", "no:cacheprovider", "--tb=short", "-k", "yardstick", str(target)]
        result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    print(result.stdout, result.stderr[-2000:])
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
    print(args.config, counts)
    if args.out:
        record = {
            "config": args.config,
            "peft": version("peft"),
            "torch": version("torch"),
            "cases": len(cases),
            **counts,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
