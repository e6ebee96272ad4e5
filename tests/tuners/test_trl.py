"""The TRL script that a user already has."""

from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer

from peft_dynamic import DyLoRAConfig
from tests.tuners.common import RankRecorder, schedule_of, tiny_llama
from tests.tuners.test_rank_schedule import expected_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ROWS = [{"prompt": f"Name: X{i}, food: thai ->", "completion": f" X{i} serves thai food."} for i in range(16)]


@pytest.mark.model("smollm2")  # for its tokenizer
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_draws_per_step_evaluates_at_the_set_rank_and_resumes(
    tmp_path: Path, model_path: Path, checkpointing: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def trainer() -> trl.SFTTrainer:
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=3,
            report_to=[],
            use_cpu=True,
            bf16=False,
            learning_rate=1e-2,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return trl.SFTTrainer(
            tiny_llama(len(tokenizer)),
            args=arguments,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:2]),
            processing_class=tokenizer,
            peft_config=DyLoRAConfig(r=8, ranks=[1, 2, 4, 8], rank_sampling="uniform", target_modules="all-linear"),
        )

    whole = trainer()
    whole.model.set_rank(4)
    recorder = RankRecorder(whole.model)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    passes = 2 * (2 if checkpointing else 1)  # two micro-batches, each run again by checkpointing
    assert recorder.training == [rank for rank in expected_ranks(5) for _ in range(passes)]
    assert set(recorder.evaluation) == {4}
    assert all(not torch.equal(p, before[name]) for name, p in whole.model.named_parameters() if p.requires_grad)

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert int(schedule_of(resumed.model).step) == 5
    for (name, p), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, other), name
    loaded = PeftModel.from_pretrained(tiny_llama(len(tokenizer)), tmp_path / "checkpoint-5")
    ids = torch.tensor([tokenizer(ROWS[0]["prompt"])["input_ids"]])
    whole.model.eval()
    for rank in (1, 8):
        with torch.no_grad(), loaded.at_rank(rank), whole.model.at_rank(rank):
            assert torch.equal(loaded(input_ids=ids).logits, whole.model(input_ids=ids).logits)
