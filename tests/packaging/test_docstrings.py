"""The code in docstrings runs, on tiny models. It is what is indented and names something public of the package."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_dynamic
import peft_dynamic.trainers
from tests.packaging.tiny import adapter, distilling, llama

ROOT = Path(__file__).parents[2]
PUBLIC = {*peft_dynamic.__all__, *peft_dynamic.trainers.__all__}
INDENTED = re.compile(r"\n\n((?: {4,}.*\n?)(?:(?: {4,}.*)?\n?)*)")
# Those that a reader looks up first have one
MOST_USED = {
    *("DyLoRAConfig", "rank_curve", "resize_adapter", "merge_adapters", "average_adapters", "at_rank", "set_rank"),
    *("SoFTTrainer", "PPOTrainer", "ActivationDensityLoss", "cut_activations", "calibrate_cut"),
}


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:  # an equation
        return False
    return True


def blocks() -> dict[str, str]:
    """Name of a function or class -> the code in its docstring."""
    found = {}
    for path in [*(ROOT / "peft_dynamic").rglob("*.py"), *(ROOT / "trainers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in PUBLIC:
                text = (ast.get_docstring(node) or "") + "\n"
                about = re.split(r"\n(?:Args|Attributes|Returns|Raises):\n", text)[0] + "\n"
                codes = [textwrap.dedent(each).strip() for each in INDENTED.findall(about)]
                codes = [each for each in codes if PUBLIC & set(re.findall(r"\w+", each)) and parses(each)]
                if codes:
                    found[node.name] = "\n".join(codes)
    return found


BLOCKS = blocks()


def test_the_most_used_have_code_in_their_docstrings() -> None:
    assert set(BLOCKS) >= MOST_USED
    assert len(BLOCKS) == 24, sorted(BLOCKS)
    paths = [*(ROOT / "peft_dynamic").rglob("*.py"), *(ROOT / "trainers").rglob("*.py")]
    fences = [path for path in paths if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.M)]
    assert not fences, "code in a docstring is indented by four more, as everywhere here"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code takes for the reader's own, in a folder with the models and adapters that it names."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, T5ForConditionalGeneration
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

    from tests.trainers.citation.common import ROWS, tiny_t5, tokenizer

    monkeypatch.chdir(tmp_path)
    words = "train.py --output_dir out --dataset_name my --adapter dylora --bf16 false"  # of AdapterParser's script
    monkeypatch.setattr("sys.argv", words.split())
    llama(2).save_pretrained("my/model")
    tokenizer(chat=True).save_pretrained("my/model")
    T5ForConditionalGeneration(tiny_t5()).save_pretrained("google/flan-t5-small")
    for name in ("runs/sql", "runs/chat", "run/checkpoint-100", "run/checkpoint-200"):
        adapter(Path(name))
    base = AutoModelForCausalLM.from_pretrained("my/model")
    config = peft_dynamic.DyLoRAConfig(r=8, ranks=[2, 8], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ids = torch.randint(2, 330, (2, 6))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    public = {name: getattr(peft_dynamic, name) for name in peft_dynamic.__all__}
    public |= {name: getattr(peft_dynamic.trainers, name) for name in peft_dynamic.trainers.__all__}
    hosts = {each.__name__: each for each in (ModelConfig, PeftModel, ScriptArguments, SFTConfig, SFTTrainer)}
    return {
        **public,
        **hosts,
        **distilling(),
        "torch": torch,
        "Dataset": Dataset,
        "get_peft_model": get_peft_model,
        "base": base,
        "model": get_peft_model(AutoModelForCausalLM.from_pretrained("my/model"), config),
        "settings": SFTConfig("out", bf16=False, report_to="none"),
        "inputs": {"input_ids": ids},
        "train_batches": batches,
        "my_loss": lambda model: float(model(**batches[0]).loss),
        "my_reward": lambda completions, **others: [float(len(each)) for each in completions],
        "texts": Dataset.from_list([{"text": "The sea is wide."}] * 2),
        "prompts": Dataset.from_list([{"prompt": "The sea is "}] * 2),
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        "tokenizer": tokenizer(end=True),
        "rows": ROWS[:1] * 2,
    }


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.filterwarnings("ignore:no rank is better than the base model")  # of an adapter that was not trained
def test_the_code_in_a_docstring_runs(name: str, names: dict[str, Any]) -> None:
    if name == "sparse_inference":  # which takes no adapter
        names["model"] = llama(2)
    exec(compile(BLOCKS[name], f"docstring of {name}", "exec"), names)
