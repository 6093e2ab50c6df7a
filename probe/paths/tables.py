"""The paths of one model on the first samples of a run: every table, and what could not be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rc_probe.budget import MEMORY, Shape, first_that_fits
from rc_probe.data.batches import Batch, batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.models.load import Loaded
from rc_probe.processes.heartbeat import ElsewhereError
from rc_probe.processes.world import World
from rc_probe.results.tables import Row
from rc_probe.tasks import Plan, first

from .decompose import hops
from .effectiveness import Budget, Streams, effectiveness
from .effects import Effects
from .path_counts import architecture_rows, count_rows
from .sample import stream_size

SAMPLES = 16  # that paths are measured on by default
FEW = 4  # fewer only where shorter texts do not help
PASSES = 8  # plain passes over all samples that the exact numbers may cost
FROM_HALF = 1.7  # of a half-precision model: what its weights, made float32 again and again, cost beside the same in float32
DEEP, LONGEST = 12, 8  # in models of more than DEEP blocks, paths longer than LONGEST are one part by default


@dataclass
class PathTables:
    """tables: paths, path_sources, path_counts, where they could be measured; notes: sentences for the reader.

    facts: of the results' entry model["paths"]: task, samples, euler_error, repeats; empty if paths cannot be told apart
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_paths(loaded: Loaded, samples: Samples, chosen: Any) -> Plan:
    """The samples and the task. Raises RcProbeError for labels that cannot be meant."""
    return Plan.of(loaded, first(samples, chosen.path_samples or SAMPLES), chosen)


def measure_paths(
    loaded: Loaded,
    structure: Structure,
    plan: Plan,
    chosen: Any,
    name: str,
    advance: Callable[[str], None] = lambda stage: None,
    world: World | None = None,
    shape: Shape | None = None,
    streams: Streams | None = None,
) -> PathTables:
    """Count, decompose and sample the paths of a model, as `chosen` says (PathOptions and the common ones).

    name: the model's, for the tables; world: the processes that share the batches; shape: of the run, which says what is
    affordable where no number of samples was asked for; streams: of plain passes that others have made
    """
    found = PathTables(notes=list(plan.notes))
    try:
        chosen = with_longest(chosen, structure.depth, found.notes)
        if shape is not None and chosen.path_samples is None:
            plan, chosen = cut(loaded, plan, chosen, shape, found.notes)
        one = in_batches(loaded, plan.scored, chosen, 1)[0]
        made = in_batches(loaded, plan.scored, chosen, path_rows(structure, chosen, one))
        budget = Budget(chosen.path_draws, chosen.repeats, chosen.max_length, chosen.count_mlp, chosen.seed)
        effects = effectiveness(structure, plan.task, made, budget, advance, world, streams)
        _fill(found, effects, structure, plan, chosen, name)
    except ElsewhereError:
        raise
    except RcProbeError as error:
        found.notes.append(f"Paths were not measured: {error}")
    return found


def _fill(
    found: PathTables, effects: Effects, structure: Structure, plan: Plan, chosen: Any, name: str
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


def cut(loaded: Loaded, plan: Plan, chosen: Any, shape: Shape, notes: list[str]) -> tuple[Plan, Any]:
    """A plan and settings of fewer samples, or of their first tokens, where the whole is not affordable; a note says so."""
    most = len(plan.samples.items)
    few = affordable(shape, most, _parts(shape.blocks, chosen), cut=loaded.modality == "text")
    if few is None:
        what = f"{shape.tokens} tokens take more than is allowed for"
        raise RcProbeError(what, where="paths", todo="Say on how many: --path-samples 1")
    samples, tokens = few
    if few == (most, shape.tokens):
        return plan, chosen
    of = f" of {tokens} tokens" if tokens < shape.tokens else ""
    notes.append(
        f"Paths: on {samples} of {most} samples{of}, so that they cost no more than {PASSES} plain passes over all samples "
        f"(docs/large-models.md): --path-samples {most} takes all."
    )
    chosen = replace(chosen, path_samples=samples, length=min(chosen.length, tokens))
    return plan_paths(loaded, plan.samples, chosen), chosen


def affordable(shape: Shape, most: int, parts: int, *, cut: bool) -> tuple[int, int] | None:
    """Samples and tokens: the first within the limits of rc_probe.budget of half as many samples, a quarter … down to FEW,
    then of half of the tokens, …, at last of fewer samples.

    A sample costs half as many plain passes as its stream has parts, two of the proofs, and three runs of the head a part; of
    a half-precision model FROM_HALF times as much, since each operation's weights are made float32 when it runs.
    cut: whether the first tokens of a sample can be had alone
    """
    tokens = shape.halved() if cut else [shape.tokens]
    counts = [most]
    while counts[-1] > FEW:
        counts.append(max(FEW, counts[-1] // 2))
    fewer = [n for n in (2, 1) if n < counts[-1]]
    choices = [(n, t) for t in tokens for n in counts] + [(n, tokens[-1]) for n in fewer]

    def work(choice: tuple[int, int]) -> float:
        n, t = choice
        one = shape.plain(t) * (parts / 2 + 2) + 3.0 * parts * shape.head * t
        return n * one * (FROM_HALF if shape.half else 1)

    def memory(choice: tuple[int, int]) -> float:
        return 8.0 * _numbers(parts, choice[1], shape.dim, max(shape.heads, default=0))

    return first_that_fits(choices, shape, work, memory, passes=PASSES)


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
    parts, tokens = _parts(structure.depth, chosen), _tokens(structure, chosen, one)
    most = max(_heads(structure), default=0)
    return max(1, MEMORY // (8 * _numbers(parts, tokens, structure.blocks[0].dim, most)))


def _parts(blocks: int, chosen: Any) -> int:
    """Of the stream: one of biases, one of every length, and one of what is longer."""
    parts = blocks * (2 if chosen.count_mlp else 1) + 2
    return parts if chosen.max_length is None else min(parts, chosen.max_length + 3)


def _numbers(parts: int, tokens: int, dim: int, heads: int) -> int:
    return 4 * parts * tokens * dim + 4 * heads * tokens**2


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
