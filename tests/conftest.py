"""What every test runs under: one thread per worker, no hub, fixed random numbers, and models only from the cache of
`make models`. Nothing here may depend on the order of the tests, which is random."""

import gc
import os
import random
import sys
from pathlib import Path
from zlib import crc32

# Read by the libraries when they are imported, so set before any test module imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: more threads than that only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch
from hypothesis import settings

# The same examples in every run, without those that an earlier run left behind: a change is red by its own fault only.
# Fresh ones are for `make test-matrix`, where a failure prints how to see it again.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("fresh", deadline=None, max_examples=2000, database=None, print_blob=True)
settings.load_profile("fixed")

MODELS = Path(os.environ.get("PEFT_DYNAMIC_CACHE", "~/.cache/peft_dynamic")).expanduser() / "models"


def _seed(what: str) -> None:
    """Start torch's, numpy's and python's generators anew, from the name of what runs now."""
    seed = crc32(what.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """A shared fixture has the same random numbers whichever test asks for it first."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """A test has the same random numbers whatever ran before it."""
    _seed(item.nodeid)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where processes of their own will be needed, what they are forked from gets ready while other tests run."""
    if "tests.processes" in sys.modules and not session.config.option.collectonly:
        sys.modules["tests.processes"].prepare()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose `model` marker names a model that is not there; where CI is set that is an error."""
    wanted = [name for mark in item.iter_markers("model") for name in mark.args]
    missing = [name for name in wanted if not (MODELS / name / "config.json").is_file()]
    if missing:
        report = pytest.fail if os.environ.get("CI") else pytest.skip
        report(f"needs {', '.join(missing)} in {MODELS}: run `make models`")


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_collected() -> None:
    """Trainers call the garbage collector, which would look through what torch and the hosts made on import each time:
    that is most of its work, a fifth of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def model_path(request: pytest.FixtureRequest) -> Path:
    """The folder of the one model which the test's `model` marker names."""
    marker = request.node.get_closest_marker("model")
    if marker is None or len(marker.args) != 1:
        raise pytest.UsageError("model_path needs a test marked with one model, e.g. @pytest.mark.model('smollm2')")
    return MODELS / marker.args[0]
