"""What the benchmarks measure with."""

import statistics
import time
from collections.abc import Callable, Sequence


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of a call, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile; of one value, that."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
