"""Model cards that say what an adapter needs, and the push to the Hugging Face Hub.

PEFT stops with a bare `KeyError: 'DYLORA'` when it meets an adapter of ours without our import, so every card we write
carries the line `import peft_dynamic`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_dynamic.hosts.registry import is_ours
from peft_dynamic.methods import method_of

START, END = "<!-- peft_dynamic: usage -->", "<!-- peft_dynamic: end of usage -->"
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def write_model_card(directory: str | Path, repo_id: str | None = None) -> Path:
    """Write how to use an adapter into the README.md beside it: with `import peft_dynamic` for an adapter of ours.

    A README that is there already stays, but for the part that an earlier call wrote: the usage goes to its top, and
    what its metadata lacks is added.

    Args:
        directory: a saved adapter, i.e. a folder with an adapter_config.json.
        repo_id: the name to load it by; None for the folder's own name.

    Returns:
        The path of the README.md.

    Raises:
        FileNotFoundError: the folder holds no adapter.

    Warns:
        UserWarning: the adapter says neither its task nor its model's class, so the card cannot say how to load it.
    """
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"directory={str(directory)!r} has no adapter_config.json: pass a folder that save_pretrained or "
            "export_lora wrote."
        )
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    body = re.sub(f"{re.escape(START)}.*?{re.escape(END)}", "", card.text, flags=re.DOTALL).strip()
    card.text = "\n" + "\n\n".join(
        part for part in (f"{START}\n{_usage(config, directory, repo_id)}\n{END}", body) if part
    )
    data: Any = card.data
    data.library_name = "peft"
    base = _base_repo(config)
    if base and not data.base_model:
        data.base_model = base
    method = method_of(config)
    own = method.tags if method is not None else [str(config["peft_type"]).lower()]
    tags = list(data.tags or [])
    data.tags = [*tags, *(tag for tag in own if tag not in tags)]
    card.save(path)
    return path


def push_adapter(
    model: nn.Module,
    repo_id: str,
    adapter_name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> str:
    """Push an adapter, a DyLoRA adapter at all its ranks, to the Hub, with a model card that says how to load it.

    The repository is made if it does not exist. To push one rank that loads without this package, write it with
    `export_lora` and upload that folder.

    Args:
        model: a `PeftModel`, or a transformers model with the adapter added by `add_adapter`.
        repo_id: the repository, e.g. "me/my-adapter".
        adapter_name: the adapter; None for the first active one.
        private: whether a new repository is private; None for the account's default.
        token: the access token; None for the one that `hf auth login` stored.
        revision: the branch to push to.
        commit_message: as in `HfApi.upload_folder`.
        create_pr: open a pull request instead of pushing.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the model has no such adapter, or `repo_id` is no repository name.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} is no repository name: pass 'user/name'.")
    name = _our_adapter(model, adapter_name)
    with tempfile.TemporaryDirectory() as work:
        folder = _save(model, Path(work), name)
        # what save_pretrained wrote is a form with nothing filled in
        (folder / "README.md").unlink(missing_ok=True)
        write_model_card(folder, repo_id)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(getattr(commit, "commit_url", commit))


def _our_adapter(model: Any, adapter_name: str | None) -> str:
    """The named adapter of ours, or the first active one."""
    configs = getattr(model, "peft_config", {})
    ours = sorted(name for name, config in configs.items() if is_ours(config))
    if not ours:
        raise ValueError("the model has no adapter of peft_dynamic. For others use PEFT's push_to_hub.")
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    active = [name for name in layer.active_adapters if name in ours]
    name = adapter_name if adapter_name is not None else next(iter(active), None)
    if name is None or name not in ours:
        raise ValueError(f"adapter_name={name!r} is no adapter of peft_dynamic in the model. Pass one of {ours}.")
    return name


def _save(model: Any, work: Path, name: str) -> Path:
    if isinstance(model, PeftModel):
        model.save_pretrained(str(work), selected_adapters=[name])
        return work if name == "default" else work / name
    if model.active_adapters() != [name]:  # transformers saves the active adapter only
        raise ValueError(
            f"adapter_name={name!r} is not the one active adapter: call model.set_adapter({name!r}) first."
        )
    model.save_pretrained(work)
    path = work / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("task_type") and not config.get("auto_mapping"):  # PeftModel notes the class, transformers not
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return work


def _base_repo(config: dict[str, Any]) -> str | None:
    """The base model's name on the Hub; None for a folder, which means nothing elsewhere."""
    base = config.get("base_model_name_or_path") or ""
    return base if REPO_ID.fullmatch(base) and not Path(base).exists() else None


def model_class_name(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The class of an adapter's base model, as library and name; None for the name if the adapter does not say it.

    Args:
        config: the values of an adapter_config.json. PEFT writes `auto_mapping` there if there is no `task_type`.
    """
    task = config.get("task_type")
    task = getattr(task, "value", task)
    if isinstance(task, str) and task in AUTO_CLASSES:
        return "transformers", AUTO_CLASSES[task]
    noted = config.get("auto_mapping")
    noted = noted if isinstance(noted, dict) else {}
    library, name = noted.get("parent_library"), noted.get("base_model_class")
    if isinstance(library, str) and isinstance(name, str):
        return library, name
    return "transformers", None


def _loading(config: dict[str, Any], base: str) -> list[str]:
    """The lines that load the base model."""
    library, name = model_class_name(config)
    if name is None:
        warnings.warn(
            "the adapter says neither its task_type nor its model's class, so the card cannot say how to load its base "
            "model. Pass task_type to the adapter's config, e.g. task_type='CAUSAL_LM'.",
            stacklevel=4,
        )
        return ["from transformers import AutoModel", "", f'base = AutoModel.from_pretrained("{base}")  # or its class']
    if library.partition(".")[0] == "transformers":
        return [f"from transformers import {name}", "", f'base = {name}.from_pretrained("{base}")']
    return ["", f"base = ...  # the {name} that it was trained on"]


def _ranks(config: dict[str, Any]) -> str:
    trained = config.get("ranks") or range(1, config["r"] + 1)
    listed = ", ".join(map(str, trained)) if len(trained) <= 16 else f"1 to {config['r']}"
    prefix = config.get("truncation") == "prefix"
    kept = "first b rows and columns of its factors" if prefix else "b leading singular components of its update"
    return f": one training run, usable at the ranks {listed}. Rank b is the {kept}."


def _usage(config: dict[str, Any], directory: Path, repo_id: str | None) -> str:
    source = repo_id or Path(os.path.abspath(directory)).name  # "." and ".." have no name to call it by
    base = _base_repo(config) or "path/to/the/base/model"
    method = method_of(config)
    ranked = method is not None and method.ranked
    if method is None:
        ranks = sorted({config["r"], *(config.get("rank_pattern") or {}).values()}) if "r" in config else []
        of_rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        kind = "LoRA" if config["peft_type"] == "LORA" else config["peft_type"]
        about = f"A {kind} adapter{of_rank}. It loads in PEFT as it is."
    else:
        what = _ranks(config) if ranked else f": {method.summary}."
        authors, number = method.paper
        about = (
            f"A {method.name} adapter{what} It needs the package `peft-dynamic`: without the line "
            f"`import peft_dynamic`, PEFT stops with `KeyError: '{method.name}'`. The method is {method.title}, of "
            f"[{authors}](https://arxiv.org/abs/{number})."
        )
    code = [
        *([] if method is None else [f"import peft_dynamic  # registers {method.name} with PEFT"]),
        "from peft import PeftModel",
        *_loading(config, base),
        f'model = PeftModel.from_pretrained(base, "{source}")',
    ]
    if ranked:
        code += [
            f"model.set_rank({config['r']})  # the rank to run at, up to {config['r']}",
            f'# peft_dynamic.export_lora(model, "lora", rank={config["r"]}) writes that rank as a stock LoRA adapter',
        ]
    return "\n".join([f"# {source}", "", about, "", "```python", *code, "```"])
