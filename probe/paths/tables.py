"""The paths of one model on the first samples of a run: every table, and what could not be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rc_probe.data.batches import Batch, batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.models.load import Loaded
from rc_probe.processes.heartbeat import ElsewhereError
from rc_probe.processes.world import World
from rc_probe.results.tables import Row
from rc_probe.tasks import Task, choose_task

from .decompose import hops
from .effectiveness import Budget, effectiveness
from .effects import Effects
from .path_counts import architecture_rows, count_rows
from .sample import stream_size

MEMORY = 2**30  # bytes
DEEP, LONGEST = 12, 8  # in models of more than DEEP blocks, paths longer than LONGEST are one part by default


@dataclass
class PathTables:
    """tables: paths, path_sources, path_counts, where they could be measured; notes: sentences for the reader.

    facts: of the results' entry model["paths"]: task, samples, euler_error, repeats; empty if paths cannot be told apart
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PathPlan:
    """What the paths of a run are measured on. samples: the first few of the run; task: what is scored, None for nothing."""

    samples: Samples
    task: Task | None
    notes: list[str]


def plan_paths(loaded: Loaded, samples: Samples, chosen: Any) -> PathPlan:
    """The samples and the task. Raises RcProbeError for labels that cannot be meant."""
    few = first(samples, chosen.path_samples)
    task, notes = choose_task(
        loaded, few, length=chosen.length, batch_size=chosen.batch_size, special_tokens=chosen.special_tokens,
        seed=chosen.seed,
    )  # fmt: skip
    return PathPlan(few, task, notes)


def measure_paths(
    loaded: Loaded,
    structure: Structure,
    plan: PathPlan,
    chosen: Any,
    name: str,
    advance: Callable[[str], None] = lambda stage: None,
    world: World | None = None,
) -> PathTables:
    """Count, decompose and sample the paths of a model, as `chosen` says (PathOptions and the common ones).

    name: the model's, for the tables; world: the processes that share the batches
    """
    found = PathTables(notes=list(plan.notes))
    scored = plan.task.samples if plan.task else plan.samples
    try:
        chosen = with_longest(chosen, structure.depth, found.notes)
        one = in_batches(loaded, scored, chosen, 1)[0]
        made = in_batches(loaded, scored, chosen, path_rows(structure, chosen, one))
        budget = Budget(chosen.path_draws, chosen.repeats, chosen.max_length, chosen.count_mlp, chosen.seed)
        effects = effectiveness(structure, plan.task, made, budget, advance, world)
        _fill(found, effects, structure, plan, chosen, name)
    except ElsewhereError:
        raise
    except RcProbeError as error:
        found.notes.append(f"Paths were not measured: {error}")
    return found


def _fill(
    found: PathTables, effects: Effects, structure: Structure, plan: PathPlan, chosen: Any, name: str
) -> None:
    heads = [step.heads for step in hops(structure, count_mlp=chosen.count_mlp)]
    found.tables["paths"] = effects.rows
    found.tables["path_counts"] = [*count_rows(name, heads), *architecture_rows()]
    if effects.sources:
        found.tables["path_sources"] = effects.sources
    found.notes += effects.notes
    found.facts = {
        "task": plan.task.name if plan.task else None, "euler_error": effects.error, "repeats": chosen.repeats,
        "draws": list(chosen.path_draws), "count_mlp": chosen.count_mlp, "max_length": chosen.max_length,
        "samples": len(plan.samples.items),
    }  # fmt: skip


def first(samples: Samples, count: int) -> Samples:
    """The first samples of a run, with their labels."""
    return replace(samples, items=samples.items[:count], labels=samples.labels and samples.labels[:count])


def with_longest(chosen: Any, depth: int, notes: list[str]) -> Any:
    """The settings with what `max_length` is by default; a note where it makes long paths one part."""
    if chosen.max_length is not None or depth <= DEEP:
        return chosen
    notes.append(
        f"Paths longer than {LONGEST} are one part, since the model has {depth} blocks: "
        f"--max-length {depth} tells all lengths apart."
    )
    return replace(chosen, max_length=LONGEST)


def path_rows(structure: Structure, chosen: Any, one: Batch) -> int:
    """Samples in a batch of paths, so that parts and patterns take about MEMORY bytes.

    A sample has a stream for every part, of which an MLP makes four times as much; and of the widest attention four
    tables (scores, masked, softmax, pattern) of a number for each head and pair of tokens. A number has eight bytes.
    """
    parts = structure.depth * (2 if chosen.count_mlp else 1) + 2
    if chosen.max_length is not None:
        parts = min(parts, chosen.max_length + 3)  # with biases, and what is longer
    tokens = _tokens(structure, chosen, one)
    numbers = 4 * parts * tokens * structure.blocks[0].dim + 4 * max(_heads(structure), default=0) * tokens**2
    return max(1, MEMORY // (8 * numbers))


def pattern_rows(structure: Structure, chosen: Any, one: Batch, room: int) -> int:
    """Samples in a batch, so that the patterns of all layers take at most `room` bytes: eight for a number."""
    return max(1, room // (8 * max(1, sum(_heads(structure))) * _tokens(structure, chosen, one) ** 2))


def _heads(structure: Structure) -> list[int]:
    return [branch.heads for block in structure.blocks for branch in block.branches if branch.ops]


def _tokens(structure: Structure, chosen: Any, one: Batch) -> int:
    """Tokens of a sample at most; other texts may be longer than this one."""
    text = chosen.length if "input_ids" in one.inputs else 0
    return max(text, stream_size(structure, one.inputs) // structure.blocks[0].dim)


def in_batches(loaded: Loaded, samples: Samples, chosen: Any, most: int) -> list[Batch]:
    """The batches of samples, of at most `most` each."""
    return list(
        batches(
            samples, loaded, length=chosen.length, batch_size=min(chosen.batch_size, most),
            special_tokens=chosen.special_tokens,
        )
    )  # fmt: skip
