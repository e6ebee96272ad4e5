"""The text that the demo trains on; NOTICE says where it comes from."""

from pathlib import Path

FOLDER = Path(__file__).parent
E2E_TRAIN = FOLDER / "e2e_nlg_train.jsonl"
E2E_VALIDATION = FOLDER / "e2e_nlg_validation.jsonl"
