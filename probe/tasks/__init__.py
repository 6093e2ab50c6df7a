"""What a model predicts, and how well: its own head, read at the places where a prediction can be judged."""

from .base import FULL, Prepared, Readout, Tally, Task
from .choose import choose_task, each_once, embedding_task
from .plan import Plan, first

__all__ = [
    "FULL",
    "Plan",
    "Prepared",
    "Readout",
    "Tally",
    "Task",
    "choose_task",
    "each_once",
    "embedding_task",
    "first",
]
