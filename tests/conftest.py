"""What all tests share: how they run, and the packaged and trained models, each made once in a process."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # children's, too: the tests themselves run side by side

import filelock
import hypothesis
import pytest
import torch
from support import trained
from support.command import run, texts  # noqa: F401 - fixtures
from support.pages import no_figures  # noqa: F401 - a fixture
from support.sorting import Trained, train_sorting

from rc_probe.models.load import Loaded, load_model

torch.set_num_threads(1)
hypothesis.settings.register_profile("no clock", deadline=None)
hypothesis.settings.load_profile("no clock")

# The files that take longest start first, so that no process is left with one of them at the end.
LONGEST = (
    "test_processes", "test_run_page", "test_many_runs", "test_paths", "test_architectures", "test_path_section",
    "test_result", "test_comparison", "test_unusual_models", "test_checks",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def demo() -> Loaded:
    """all-MiniLM-L6-v2, real weights. Tests must leave it as it is."""
    return load_model("demo")


@pytest.fixture(scope="session")
def sorting_san(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The SAN that sorts, trained once (about 20 s) for all workers. Tests must leave it as it is."""
    base = tmp_path_factory.getbasetemp()  # of this worker, in the folder of the run
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sorting.pt"
    with filelock.FileLock(f"{place}.lock"):
        if not place.exists():
            torch.save(train_sorting(), place)
        trained_once: Trained = torch.load(place, weights_only=False)
        return trained_once


@pytest.fixture(scope="session")
def trained_causal() -> Loaded:
    """A GPT-2 that knows the walks of support/trained.py. Tests must leave it as it is; 5 seconds."""
    return trained.causal()


@pytest.fixture(scope="session")
def trained_masked() -> Loaded:
    """A BERT that fills hidden words of walks in; 5 seconds."""
    return trained.masked()


@pytest.fixture(scope="session")
def trained_classifier() -> Loaded:
    """A BERT that names the steps of walks; 3 seconds."""
    return trained.classifier()
