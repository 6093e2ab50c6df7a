"""Small work on the CPU is done by one thread, and then there are as many as before."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rc_probe.hooks.heads.forms import Circuit
from rc_probe.hooks.heads.rank import projector
from rc_probe.hooks.one_thread import one_thread, small_matrices
from rc_probe.measures.chained_products import first_eigenvector
from rc_probe.measures.heads import spectra
from rc_probe.metrics.pattern_metrics import singular_gap
from rc_probe.metrics.spectra import centred_rank


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_only_what_is_small() -> None:
    with one_thread(False):
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
    with pytest.raises(KeyError), one_thread(True):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3


BOTH = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
WORK: dict[str, tuple[tuple[str, ...], Callable[[], object]]] = {
    "patterns": (("eigvalsh",), lambda: singular_gap(torch.rand(1, 2, 8, 8))),
    "scores": (("eigh", "eigvalsh"), lambda: centred_rank(BOTH[None], BOTH[None], None)),
    "products": (("eigh",), lambda: first_eigenvector(BOTH)),
    "ranks": (("pinv",), lambda: projector(BOTH, BOTH[..., :2])),
    "heads": (("svdvals",), lambda: spectra._metrics(Circuit(BOTH, BOTH, BOTH, BOTH[0, 0], 8))),
}


@pytest.mark.parametrize("name", WORK)
def test_matrices_are_taken_apart_by_one_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, work = WORK[name]
    seen: dict[str, int] = {}

    def seeing(function: str) -> None:
        real = getattr(torch.linalg, function)

        def see(*args: Any, **options: Any) -> Any:
            seen[function] = torch.get_num_threads()
            return real(*args, **options)

        monkeypatch.setattr(torch.linalg, function, see)

    for function in functions:
        seeing(function)
    work()
    assert seen == dict.fromkeys(functions, 1)
    assert torch.get_num_threads() == 3
