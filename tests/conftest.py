"""Fixtures shared by the tests: the packaged model, loaded once."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from rc_probe.experiments.sorting import Trained, train_sorting
from rc_probe.load import Loaded, load_model


@pytest.fixture(scope="session")
def demo() -> Loaded:
    """all-MiniLM-L6-v2, real weights. Tests must leave it as it is."""
    return load_model("demo")


@pytest.fixture(scope="session")
def sorting_san() -> Trained:
    """The SAN that sorts, trained once (about 15 s). Tests must leave it as it is."""
    return train_sorting()
