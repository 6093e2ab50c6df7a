"""What a measurement is run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rc_probe.budget import Shape
from rc_probe.data.batches import Batch, Batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.structure.example_inputs import batch_size
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.intervention import Variant
from rc_probe.interventions.paper import paper_variants
from rc_probe.models.load import Loaded
from rc_probe.paths.sample import stream_size
from rc_probe.processes.world import World

from .measurement import Found

if TYPE_CHECKING:
    from .attention.first_patterns import FirstPatterns


@dataclass(frozen=True)
class Context:
    """One model with its weights, the run's batches, and what was found before.

    settings: an instance of Settings, and so of the measurement's own options
    name: the model's, for tables. weights: `pretrained` or `init`; seed: of fresh weights
    plans: what each measurement's own `plan` gave, by its name
    readers: of all measurements that read the curves' passes, by name
    patterns: of the first samples, read once for all measurements that want them
    before: what it found on earlier fresh weights. found: by other measurements on these weights, by name
    report: called as report(stage, passes done since the last call)
    """

    loaded: Loaded
    structure: Structure
    samples: Samples
    batches: Batches
    settings: Any
    world: World
    name: str
    weights: str = "pretrained"
    seed: int | None = None
    plans: Mapping[str, Any] = field(default_factory=dict)
    readers: Mapping[str, Any] = field(default_factory=dict)
    patterns: FirstPatterns | None = None
    before: Found | None = None
    found: dict[str, Found] = field(default_factory=dict)
    report: Callable[[str, int], None] = lambda stage, passes: None

    def advance(self, stage: str, passes: int = 0) -> None:
        """Say what is being done; raises the error of another process, and an interrupt."""
        weights = f"init, seed {self.seed}" if self.weights == "init" else self.weights
        self.report(f"{weights}: {stage}", passes)

    @property
    def variants(self) -> list[Variant]:
        """The paper's four, and of pretrained weights those that were asked for."""
        return [
            *paper_variants(self.structure),
            *(self.settings.asked() if self.weights == "pretrained" else ()),
        ]

    @property
    def everywhere(self) -> list[Any]:
        """The readers that read every plain pass of the run, not those of the curves alone."""
        return [reader for reader in self.readers.values() if getattr(reader, "every_run", False)]

    @property
    def numbers(self) -> Sequence[int]:
        """Of the batches that this process measures, from 0."""
        return self.world.share(range(len(self.batches)))

    @property
    def shape(self) -> Shape:
        """Of the run, from which is chosen what is affordable."""
        first = self.first
        tokens = self.batches.longest or stream_size(self.structure, first.inputs) // (
            (batch_size(first.inputs) or 1) * self.structure.dim * self.structure.streams
        )
        return Shape.of(self.structure, tokens, len(self.samples.items))

    @property
    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self.batches))
