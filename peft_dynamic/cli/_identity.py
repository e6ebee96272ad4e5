"""Which run a folder holds: run.yaml says it, and a run goes on only where the two are the same.

Notable: the file is JSON, which is YAML too, so that no reader of YAML is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from peft_dynamic import __version__
from peft_dynamic.cli._data import Example
from peft_dynamic.cli._job import Job
from peft_dynamic.cli._version import installed

NAME = "run.yaml"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes")
ADAPTER_FIELDS = (
    *("peft_type", "r", "ranks", "lora_alpha", "target_modules"),
    *("rank_seed", "truncation", "scaling", "rank_sampling", "update"),
)
# What a run writes into its folder; nothing else there is touched.
FILES = (NAME, "curve.json", "curve.png", "curve.svg", "report.md", "sft.yaml", "rows.jsonl")
FOLDERS = ("adapter", "lora")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def identity(job: Job) -> dict[str, Any]:
    """What makes two runs the same."""
    config = job.config.to_dict()
    settings = {name: config[name] for name in ADAPTER_FIELDS}
    settings["target_modules"] = _plain(settings["target_modules"])
    return {
        "model": model_files(job.model),
        "adapter": {name: getattr(value, "value", value) for name, value in settings.items()},
        "training": {
            "steps": job.steps if job.steps > 0 else None,
            "epochs": job.epochs if job.steps <= 0 else None,
            "batch_size": job.batch_size,
            "learning_rate": job.learning_rate,
            "max_length": job.max_length,
            "seed": job.seed,
            "4bit": job.four_bit,
        },
        "data": {
            "source": job.data,
            "rows": len(job.examples),
            "sha256": digest(job.examples),
            "held_out_source": job.eval_data,
            "held_out_rows": len(job.held_out),
            "held_out_sha256": digest(job.held_out),
            "split_seed": job.seed if job.eval_data is None else None,
        },
    }


def digest(examples: list[Example]) -> str:
    """SHA-256 of what is trained on, in its order."""
    seen = hashlib.sha256()
    for example in examples:
        text = json.dumps([example.messages, example.learns, example.template], sort_keys=True)
        seen.update(text.encode() + b"\n")
    return seen.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def model_files(name: str) -> dict[str, Any]:
    """What tells a model from another: its name, and of a folder the files and their sizes."""
    folder = Path(name)
    if not folder.is_dir():
        return {"name": name}
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    kept = {file: size for file, size in sizes.items() if file.endswith((".safetensors", ".bin")) or "config" in file}
    return {"name": str(folder.resolve()), "files": kept}


def versions() -> dict[str, str | None]:
    """Of what computes a run."""
    return {"python": platform.python_version(), "peft_dynamic": __version__, **installed(PACKAGES)}


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write run.yaml, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{NAME}.new"
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / NAME)


def read(folder: Path) -> dict[str, Any]:
    """What run.yaml says.

    Raises:
        ValueError: it is missing or no such file; the message says why.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if not all(isinstance(content[key], dict) for key in ("run", "versions")) or "dtype" not in content:
            raise KeyError("run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise ValueError(f"{folder / NAME} {problem}, so which run it was is not known") from error
    return content


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Each value that is another now, as text."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            line
            for key in dict.fromkeys([*then, *now])
            for line in differences(then.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if then == now else [f"{name} was {then!r} and is {now!r}"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output folder, the last one first."""
    found = [path for path in folder.glob("checkpoints/checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from: it was half written, or damaged. None if it is whole."""
    from safetensors import safe_open

    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] != _step(checkpoint):
            return f"trainer_state.json is of step {state['global_step']}"
        json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as weights:
            if not list(weights.keys()):
                return "adapter_model.safetensors is empty"
        saved = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
        if len(saved) < 3:
            return "it has no rng_state.pth"
        for path in saved:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    return f"{path.name}: {damaged} is damaged"
    except Exception as error:  # a damaged file raises anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def clear(folder: Path) -> None:
    """Remove what an earlier run left in its folder, and nothing else."""
    for path in [*checkpoints(folder), *(folder / name for name in FOLDERS)]:
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
