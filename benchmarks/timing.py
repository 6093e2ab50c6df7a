"""What the benchmarks measure with."""

import time
from collections.abc import Callable


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of a call, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start
