"""Trainers that go with the adapters, for use with any PEFT adapter or none.

This folder is installed, and meant to be imported, as `peft_dynamic.trainers`. A name below is fetched from its module
when it is first asked for, so that a trainer brings in what it needs (TRL, for most) and nothing for the others.

From a checkout's root Python also finds it as a bare `trainers`. To keep that from making every class twice, the bare
name, and every module below it, is turned into the one under `peft_dynamic.trainers`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_dynamic.trainers.citation.collators import CitationDataCollator, FiDDataCollator
    from peft_dynamic.trainers.citation.data import CitationReport, build_citation_dataset
    from peft_dynamic.trainers.citation.entailment import EntailmentCache, EntailmentModel, measure_entailment
    from peft_dynamic.trainers.citation.evaluate import CitationEvaluation, evaluate_citations
    from peft_dynamic.trainers.citation.fid import FiDForConditionalGeneration
    from peft_dynamic.trainers.citation.formats import CitationFormat, citation_prompt_completion
    from peft_dynamic.trainers.citation.generate import answer_questions
    from peft_dynamic.trainers.ppo import PPOConfig, PPOTrainer
    from peft_dynamic.trainers.ppo.nlu import nlu_parse, nlu_prompt, nlu_reward, nlu_target
    from peft_dynamic.trainers.ppo.nlu_eval import evaluate_nlu, nlu_metrics
    from peft_dynamic.trainers.ppo.nlu_tasks import record_rows
    from peft_dynamic.trainers.soft.adaptive import generate_adaptive, paper_thresholds
    from peft_dynamic.trainers.soft.calibrate import calibrate_thresholds
    from peft_dynamic.trainers.soft.config import SoFTConfig
    from peft_dynamic.trainers.soft.curve import ExitCurve, exit_curve
    from peft_dynamic.trainers.soft.exits import exit_at, truncate_to_exit
    from peft_dynamic.trainers.soft.speculative import assisted_exit, generate_speculative
    from peft_dynamic.trainers.soft.trainer import SoFTTrainer

# Public name: the module that has it.
_PLACES: dict[str, str] = {
    "CitationDataCollator": "citation.collators",
    "CitationEvaluation": "citation.evaluate",
    "CitationFormat": "citation.formats",
    "CitationReport": "citation.data",
    "EntailmentCache": "citation.entailment",
    "EntailmentModel": "citation.entailment",
    "ExitCurve": "soft.curve",
    "FiDDataCollator": "citation.collators",
    "FiDForConditionalGeneration": "citation.fid",
    "PPOConfig": "ppo",
    "PPOTrainer": "ppo",
    "SoFTConfig": "soft.config",
    "SoFTTrainer": "soft.trainer",
    "answer_questions": "citation.generate",
    "assisted_exit": "soft.speculative",
    "build_citation_dataset": "citation.data",
    "calibrate_thresholds": "soft.calibrate",
    "citation_prompt_completion": "citation.formats",
    "evaluate_citations": "citation.evaluate",
    "evaluate_nlu": "ppo.nlu_eval",
    "exit_at": "soft.exits",
    "exit_curve": "soft.curve",
    "generate_adaptive": "soft.adaptive",
    "generate_speculative": "soft.speculative",
    "measure_entailment": "citation.entailment",
    "nlu_metrics": "ppo.nlu_eval",
    "nlu_parse": "ppo.nlu",
    "nlu_prompt": "ppo.nlu",
    "nlu_reward": "ppo.nlu",
    "nlu_target": "ppo.nlu",
    "paper_thresholds": "soft.adaptive",
    "record_rows": "ppo.nlu_tasks",
    "truncate_to_exit": "soft.exits",
}

__all__ = [
    "CitationDataCollator",
    "CitationEvaluation",
    "CitationFormat",
    "CitationReport",
    "EntailmentCache",
    "EntailmentModel",
    "ExitCurve",
    "FiDDataCollator",
    "FiDForConditionalGeneration",
    "PPOConfig",
    "PPOTrainer",
    "SoFTConfig",
    "SoFTTrainer",
    "answer_questions",
    "assisted_exit",
    "build_citation_dataset",
    "calibrate_thresholds",
    "citation_prompt_completion",
    "evaluate_citations",
    "evaluate_nlu",
    "exit_at",
    "exit_curve",
    "generate_adaptive",
    "generate_speculative",
    "measure_entailment",
    "nlu_metrics",
    "nlu_parse",
    "nlu_prompt",
    "nlu_reward",
    "nlu_target",
    "paper_thresholds",
    "record_rows",
    "truncate_to_exit",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"peft_dynamic.trainers.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import trainers.x` with the module `peft_dynamic.trainers.x`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("trainers.") or importlib.util.find_spec("peft_dynamic." + fullname) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # The import system hands out what it finds in sys.modules after this, not the empty `module`.
        sys.modules[module.__name__] = importlib.import_module("peft_dynamic." + module.__name__)


if __name__ == "trainers":
    sys.modules[__name__] = importlib.import_module("peft_dynamic.trainers")
    sys.meta_path.insert(0, _Alias())
