"""Fixtures shared by the tests: the packaged model, loaded once."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from support import trained
from support.command import run, texts  # noqa: F401 - fixtures

from rc_probe.experiments.sorting import Trained, train_sorting
from rc_probe.models.load import Loaded, load_model


@pytest.fixture(scope="session")
def demo() -> Loaded:
    """all-MiniLM-L6-v2, real weights. Tests must leave it as it is."""
    return load_model("demo")


@pytest.fixture(scope="session")
def sorting_san() -> Trained:
    """The SAN that sorts, trained once (about 15 s). Tests must leave it as it is."""
    return train_sorting()


@pytest.fixture(scope="session")
def trained_causal() -> Loaded:
    """A GPT-2 that knows the walks of tests/trained.py. Tests must leave it as it is; 5 seconds."""
    return trained.causal()


@pytest.fixture(scope="session")
def trained_masked() -> Loaded:
    """A BERT that fills hidden words of walks in; 5 seconds."""
    return trained.masked()


@pytest.fixture(scope="session")
def trained_classifier() -> Loaded:
    """A BERT that names the steps of walks; 3 seconds."""
    return trained.classifier()
