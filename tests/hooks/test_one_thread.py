"""Small work on the CPU is done by one thread, and then there are as many as before."""

from collections.abc import Iterator

import pytest
import torch

from rc_probe.hooks.one_thread import one_thread, small_matrices
from rc_probe.metrics.pattern_metrics import singular_gap


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_only_what_is_small() -> None:
    with one_thread(small=False):
        assert torch.get_num_threads() == 3
    small, large, elsewhere = (
        torch.zeros(9, 256, 8),
        torch.zeros(8, 257),
        torch.zeros(2, 2, device="meta"),
    )
    for matrices, wanted in ((small, 1), (large, 3), (elsewhere, 3)):
        with small_matrices(matrices):
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == 3


def test_an_error_gives_the_threads_back() -> None:
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3


def test_patterns_are_taken_apart_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: seen.append(torch.get_num_threads()) or real(a))  # type: ignore[func-returns-value]
    singular_gap(torch.rand(1, 2, 8, 8))
    assert seen == [1] and torch.get_num_threads() == 3
