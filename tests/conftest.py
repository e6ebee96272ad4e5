"""What every test runs under: one thread per worker, no hub, and models only from the cache of `make models`."""

import os
from pathlib import Path

# Read by the libraries when they are imported, so set before any test module imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: more threads than that only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# On a shared machine the time that one example takes says nothing. All else stays as hypothesis sets it, in CI too.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

MODELS = Path(os.environ.get("PEFT_DYNAMIC_CACHE", "~/.cache/peft_dynamic")).expanduser() / "models"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose `model` marker names a model that is not there; where CI is set that is an error."""
    wanted = [name for mark in item.iter_markers("model") for name in mark.args]
    missing = [name for name in wanted if not (MODELS / name / "config.json").is_file()]
    if missing:
        report = pytest.fail if os.environ.get("CI") else pytest.skip
        report(f"needs {', '.join(missing)} in {MODELS}: run `make models`")


@pytest.fixture
def model_path(request: pytest.FixtureRequest) -> Path:
    """The folder of the one model which the test's `model` marker names."""
    marker = request.node.get_closest_marker("model")
    if marker is None or len(marker.args) != 1:
        raise pytest.UsageError("model_path needs a test marked with one model, e.g. @pytest.mark.model('smollm2')")
    return MODELS / marker.args[0]
