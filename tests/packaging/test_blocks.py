"""Every Python block of the README and of docs/ runs, from top to bottom of its page, on tiny models.

Sybil finds the blocks and runs those of one page in one namespace. What a page takes for the reader's own (a model,
batches, a function that scores) stands in `yours`; names of models, data sets and adapters are folders that `home`
makes. Everything else a page has to import or to make itself. A block that cannot run here has a reason before it, as
`<!-- not run: reason -->`, and the reason has to be one of `REASONS`.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.region import Lexeme

from peft_dynamic import measure_density
from tests.packaging.tiny import adapter, bert, distilling, llama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->\s*$")
REASONS = {
    "needs a judge of 11 billion weights": 1,
    "needs an engine of yours": 1,
    "pushes to the Hub": 2,
}


def examples(page: Path) -> list[Example]:
    document = Document.parse(str(page), CodeBlockParser("python", PythonEvaluator()))
    return list(document.examples())


def reason(example: Example) -> str | None:
    """Why a block is not run, if the page says so right before it."""
    found = NOT_RUN.search(example.document.text[: example.region.start])
    return found[1] if found else None


WITH_PYTHON = [page for page in PAGES if examples(page)]


def test_no_block_is_passed_over() -> None:
    fences = sum(len(re.findall(r"^ *```(?:python|py)\b", page.read_text(encoding="utf-8"), re.M)) for page in PAGES)
    assert fences == sum(len(examples(page)) for page in WITH_PYTHON)
    assert fences > 50
    # the words by which the test knows where a page trains
    assert sum(page.read_text(encoding="utf-8").count("\n# ... train as usual") for page in PAGES) == 6


def test_blocks_that_do_not_run_say_why() -> None:
    found = [why for page in WITH_PYTHON for each in examples(page) if (why := reason(each))]
    assert {why: found.count(why) for why in found} == REASONS
    marks = sum(page.read_text(encoding="utf-8").count("<!-- not run:") for page in PAGES)
    assert marks == len(found), "a mark stands right before a block"


@pytest.fixture
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, where the names of models, adapters and data sets that the pages use are folders."""
    from transformers import T5ForConditionalGeneration

    from tests.trainers.citation.common import tiny_t5, tokenizer

    monkeypatch.chdir(tmp_path)
    readme = request.node.callspec.params["page"].name == "README.md"  # trains exits after up to 30 layers
    for name, layers in {"my/model": 30 if readme else 2, "HuggingFaceTB/SmolLM2-135M-Instruct": 4}.items():
        llama(layers).save_pretrained(name)
        tokenizer(chat=True).save_pretrained(name)
    T5ForConditionalGeneration(tiny_t5()).save_pretrained("google/flan-t5-small")
    tokenizer(end=True).save_pretrained("google/flan-t5-small")
    return tmp_path


def adapters() -> None:
    """Finished adapters, where the pages have theirs."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from peft_dynamic import adapter_moments

    for name in ("runs/sql", "runs/chat", "run/checkpoint-100", "run/checkpoint-200"):
        adapter(Path(name))
        if name.startswith("runs"):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("my/model"), name)
            adapter_moments(model, batches()).save(f"{name}/moments.safetensors")


def glue() -> None:
    """RTE's columns, of two rows."""
    import json

    folder = Path("nyu-mll/glue")
    folder.mkdir(parents=True)
    row = {"sentence1": "The sea is wide.", "sentence2": "It is wide.", "label": 0}
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"label": 1}) + "\n")
    files = "".join(f"      - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n  - config_name: rte\n    data_files:\n{files}---\n")


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(2, 330, (2, 2, 6))
    return [{"input_ids": each, "labels": each} for each in ids]


def own_base(page: str) -> Any:
    """A base model such as the page is about."""
    if page in ("loretta.md", "few-neurons.md"):
        return bert()
    return llama(13 if page == "exit-early.md" else 2)  # which leaves after the 12th layer


def trained(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """What a block means by "... train as usual ...", for an adapter that it has just made."""
    factors = [value for name, value in getattr(model, "named_parameters", list)() if "lora_B" in name]
    if not factors or any(each.any() for each in factors):
        return
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
    for _ in range(10):
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def yours(page: str) -> dict[str, Any]:
    """What a page takes for the reader's own."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from peft_dynamic import DyLoRAConfig
    from tests.trainers.citation.common import ROWS, tokenizer

    given = batches()

    def loss(model: Any) -> float:
        return float(model(**given[0]).loss)

    base = own_base(page)
    labelled = [{"input_ids": each["input_ids"], "labels": torch.tensor([0, 1])} for each in batches()]
    prompts = Dataset.from_list([{"prompt": "The sea is "}, {"prompt": "An old man "}])
    texts = Dataset.from_list([{"text": "The sea is wide."}, {"text": "An old man went fishing."}])
    dylora = DyLoRAConfig(r=32, ranks=[2, 8, 32], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora = LoraConfig(r=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model: Callable[[], Any] = {
        "exit-early.md": lambda: get_peft_model(base, replace(dylora, layers_to_transform=[0, 11])),
        "rank-of-a-lora.md": lambda: get_peft_model(base, lora),
        "resize.md": lambda: get_peft_model(base, lora),
    }.get(page, lambda: base)
    ids = torch.randint(2, 330, (3 if page == "dylora.md" else 1, 5))
    return {
        "base": base,
        "model": model(),
        "tokenizer": tokenizer(chat=True, end=page == "fid.md"),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "batches": given,
        "train_batches": labelled,
        "validation_batches": [{"input_ids": each["input_ids"]} for each in batches()],
        "dataloader": labelled,
        "validation_set": None,
        "my_eval": lambda model: {"loss": loss(model)},
        "evaluate": lambda model: {"loss": loss(model)},
        "my_loss": loss,
        "my_accuracy": lambda model, rows: 1 / loss(model),
        "my_loss_of_each_row": lambda model, rows: torch.stack([model(**each).loss for each in given]),
        "my_reward": lambda completions, **others: [float(len(each)) for each in completions],
        "texts": texts,
        "train": texts,
        "test": texts,
        "prompts": prompts,
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        **(distilling() if page == "distil.md" else {}),
        "rows": [row | {"passages": row["passages"] + [f"It is {i}." for i in range(5)]} for row in ROWS],
    }


def hub_folder() -> None:
    """What `push_adapter` makes of an adapter, as a folder."""
    from peft_dynamic import DyLoRAConfig

    for place in ("me/poet", "me/poet/dynamic"):
        adapter(Path(place), config=DyLoRAConfig, r=8, ranks=[4, 8])
    adapter(Path("me/poet/rank-4"), r=4)


def settings_file() -> None:
    """The page's sft.yaml without its evaluation, as the page says, for two steps on a CPU; and its data."""
    text = (ROOT / "docs/train.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    settings = yaml.safe_load(text)
    for key in ("eval_data", *list(settings)[list(settings).index("eval_strategy") :][:5]):
        del settings[key]
    assert list(settings)[-2:] == ["report_to", "output_dir"]
    Path("sft.yaml").write_text(yaml.safe_dump(settings | {"max_steps": 2, "bf16": False}))
    for name in ("my.jsonl", "held-out.jsonl"):
        Path(name).write_text('{"text": "The sea is wide."}\n' * 4)


PREPARED: dict[str, Callable[[], None]] = {
    "merging.md": adapters,
    "resize.md": adapters,
    "scalearn.md": adapters,
    "ppo-nlu.md": glue,
    "share.md": hub_folder,
    "train.md": settings_file,
}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
@pytest.mark.usefixtures("home")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_blocks_of_a_page_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # train.md's block is a script that reads its command line
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "sft.yaml"])
    PREPARED.get(page.name, lambda: None)()
    todo = examples(page)
    names = todo[0].document.namespace
    names.update(yours(page.name))
    base = names["base"]
    mine = names["dataloader"] if base.config.model_type == "bert" else names["batches"]
    names["trained"] = lambda model: trained(model, mine)
    for example in todo:
        if names["base"] is base:
            names["base"] = base = own_base(page.name)  # a block has the reader's model as it was
        if "sparse_inference" in example.parsed:
            names["model"] = llama(2)
        if "report_without" in example.parsed:
            names["report_without"] = measure_density(names["model"], names["dataloader"])
        if reason(example) is None:
            code = example.parsed
            text = re.sub(r"^# \.\.\. train as usual.*$", "trained(model)", code.text, flags=re.M)
            example.parsed = Lexeme(text, code.offset, code.line_offset)
            example.evaluate()
            if ".calibrate(" not in text:
                names["trained"](names["model"])
