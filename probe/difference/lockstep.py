"""The lockstep runner: batch by batch the first model, then the second, then the second's blocks on the first's inputs.

Of the first model the streams of one batch are kept, and with sensitivities what its adds got; nothing else grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch, Batches
from rc_probe.engine import fitted_mask, refuse_packed
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.passes import Passes
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.pairs.given import Given, Record, Swapped, added
from rc_probe.hooks.structure.structure import Structure
from rc_probe.metrics.moments import Moments, pack, unpack
from rc_probe.metrics.stream_metrics import measure
from rc_probe.metrics.tokens import Tokens, ratio
from rc_probe.processes.world import World
from rc_probe.registry import CHANGE
from rc_probe.results.tables import Row

from .cka import Cka, affordable
from .options import DiffOptions
from .pair import Pair, two_batches
from .predictions import Predictions, on_the_data

Key = tuple[str, int | None, int | None, str]  # component, block, layer, metric
BLOCK, STREAM = "block", "stream"


class Lockstep:
    """Both models on this process's share of the samples. `run` and `run_task` fill the sums, `together` adds those of the
    other processes; `rows` are those of the table `differences`.

    notes: why something was not measured
    """

    def __init__(
        self, pair: Pair, chosen: DiffOptions, predictions: Predictions | None, world: World
    ) -> None:
        self.pair, self.chosen, self.predictions, self.world = pair, chosen, predictions, world
        self.sums: dict[Key, Moments] = {}
        self.notes: list[str] = []
        self.relative = pair.matched is not None and pair.same_width
        self.blocks = chosen.sensitivity and self.relative and pair.same_depth
        self.branches = self.blocks and pair.built_alike
        a, b = pair.a.structure, pair.b.structure
        layers = affordable(a.depth + 1, a.dim, b.dim) if chosen.cka or not self.relative else []
        self.cka = {layer: Cka() for layer in layers}
        self.mask: Tensor | None = None
        self._tell(layers)

    def _tell(self, layers: list[int]) -> None:
        a, b = self.pair.a.structure, self.pair.b.structure
        if self.chosen.sensitivity and not self.blocks:
            self.notes.append(
                "Sensitivities were not measured: blocks of other widths or numbers cannot be given the same inputs."
            )
        elif self.blocks and not self.branches:
            self.notes.append(
                f"Sensitivities of branches were not measured: the blocks are {a.signature} and {b.signature}."
            )
        if self.pair.matched is None:
            self.notes.append(
                f"Of {a.depth} and {b.depth} blocks no two are the same: streams were compared by CKA alone, layer l of the "
                f"first with layer round(l · {b.depth} / {a.depth}) of the second."
            )
        if (self.chosen.cka or not self.relative) and len(layers) <= a.depth:
            told = (
                f"CKA was measured at layers {', '.join(map(str, layers))}"
                if layers
                else "CKA was not measured"
            )
            self.notes.append(f"{told}: the sums of all layers at these widths take more than 4 GiB.")

    @property
    def passes(self) -> int:
        """Passes of one batch: of both models, of blocks, of branches."""
        return 2 + self.blocks + self.branches

    # ---- the runs

    def run(self, advance: Callable[[str], None]) -> None:
        a, b = self.pair.a, self.pair.b
        with measuring(a.model), measuring(b.model):
            for one, other in self._share(a.made, b.made):
                self._batch(one, other, advance)

    def run_task(self, advance: Callable[[str], None]) -> None:
        """The predictions, where they are not of the samples as they are: masked texts, halves of texts."""
        asked = self.predictions
        if asked is None or self._on_the_data(next(iter(self.pair.a.made))):
            return
        a, b = self.pair.a, self.pair.b
        made = two_batches((a.loaded, b.loaded), asked.task.samples, self.chosen)
        with measuring(a.model), measuring(b.model):
            for one, other in self._share(*made):
                prepared = asked.task.prepare(one)
                outputs = [
                    Passes(side.structure, inputs, model=task.model, shortcuts=False).plain()
                    for side, inputs, task in ((a, prepared.inputs, asked.task), (b, _moved(prepared.inputs, other), asked.task_b))
                ]  # fmt: skip
                asked.take(prepared, *outputs)
                advance("predictions")

    def _share(self, made_a: Batches, made_b: Batches) -> Iterator[tuple[Batch, Batch]]:
        numbers = self.world.share(range(len(made_a)))
        return self.pair.batches(made_a.of(numbers), made_b.of(numbers))

    def together(self) -> None:
        """What all processes have seen, in each."""
        world, a, b = self.world, self.pair.a.structure, self.pair.b.structure
        if world.size == 1:
            return
        self.sums = unpack(world.gather(pack(self.sums), "differences"))
        self.cka = {layer: cka.together(world, a.dim, b.dim) for layer, cka in self.cka.items()}
        if self.predictions is not None:
            self.predictions.together(world)

    def _on_the_data(self, batch: Batch) -> bool:
        asked = self.predictions
        return asked is not None and on_the_data(asked.task, self.pair.samples, batch)

    def _batch(self, one: Batch, other: Batch, advance: Callable[[str], None]) -> None:
        a, b = self.pair.a, self.pair.b
        asked = self.predictions if self._on_the_data(one) else None
        refuse_packed(a.structure, one)
        record = Record(a.structure, operands=self.branches)
        with record:
            output_a = self._plain(
                a.structure, one, record.on_stream, record, model=asked.task.model if asked else None
            )
        massive = [Tokens(x, self._real(x)).massive for x in record.streams]
        advance("first model")
        compare = self._comparer(record, massive)
        output_b = self._plain(b.structure, other, compare, model=asked.task_b.model if asked else None)
        advance("second model")
        if asked is not None:
            asked.take(asked.task.prepare(one), output_a, output_b)
        if self.blocks:
            self._sensitivities(record, massive, other, advance)

    def _plain(
        self, structure: Structure, batch: Batch, on_stream: Callable[[int, Tensor], None],
        record: Record | None = None, *, model: Any,
    ) -> Any:  # fmt: skip
        """One pass as the model is; the mask of the batch is that of its stream from layer 0 on."""
        edits = record.edits if record else None
        passes = Passes(structure, batch.inputs, base=edits, model=model, shortcuts=False)

        def hand_on(layer: int, x: Tensor) -> None:
            if layer == 0 and record is not None:
                self.mask = fitted_mask(batch, passes.structure, passes.tap, x)
            on_stream(layer, x)

        return passes.plain(hand_on, stop=model is None)

    # ---- streams

    def _comparer(self, record: Record, massive: list[Tensor]) -> Callable[[int, Tensor], None]:
        """Compares B's stream of a layer with A's, as it comes."""
        beside: dict[int, list[int]] = {}
        for layer, partner in self.pair.partners.items():
            beside.setdefault(partner, []).append(layer)

        def compare(number: int, y: Tensor) -> None:
            for layer in beside.get(number, []):
                self._compare(layer, record.streams[layer], y, massive[layer])

        return compare

    def _compare(self, layer: int, x: Tensor, y: Tensor, massive: Tensor) -> None:
        if x.shape[:2] != y.shape[:2]:
            what = f"its stream has {y.shape[1]} tokens at layer {layer}, that of {self.pair.a.name} {x.shape[1]}"
            todo = "Only the same tokens can be compared"
            raise RcProbeError(what, where=self.pair.b.name, todo=todo)
        y = y.to(x.device)
        mask = self._real(x)
        for side, stream in ((self.pair.a, x), (self.pair.b, y)):
            self._refuse_not_finite(side.name, layer, stream, mask)
        if layer in self.cka:
            real = torch.ones_like(massive) if mask is None else mask
            either = massive | Tokens(y, mask).massive
            self.cka[layer].add(x[real], y[real], either[real])
        if self.pair.matched is None:
            return
        if self.pair.same_width:
            self._relative((STREAM, None, layer), "difference", x, y, x, massive)
        names = self.chosen.measured
        mine, its = (measure(stream, mask, names) for stream in (x, y))
        for name in names:
            change = (its[name][0] - mine[name][0]).cpu()
            self._add((STREAM, None, layer, CHANGE + name), change, ~change.isnan())

    # ---- sensitivities

    def _sensitivities(
        self, record: Record, massive: list[Tensor], batch: Batch, advance: Callable[[str], None]
    ) -> None:
        """B's blocks, then its branches, on what A's got."""

        def block(number: int, y: Tensor) -> None:
            x = record.streams[number + 1]
            self._relative((BLOCK, number + 1, None), "sensitivity", x, y, x, massive[number + 1])

        self._given(record, batch, Edits(), block)
        advance("blocks")
        if not self.branches:
            return
        swapped = Swapped(self.pair.b.structure, record)

        def branches(number: int, y: Tensor) -> None:
            self._branches(number, record, swapped, massive[number + 1])
            swapped.got.clear()

        self._given(record, batch, swapped.edits, branches)
        advance("branches")

    def _given(
        self, record: Record, batch: Batch, edits: Edits, on_output: Callable[[int, Tensor], None]
    ) -> None:
        structure = self.pair.b.structure
        with Given(structure, record, on_output):
            Passes(structure, batch.inputs, base=edits, shortcuts=False).plain()

    def _branches(self, number: int, record: Record, swapped: Swapped, massive: Tensor) -> None:
        """Of each kind of branch of a block: the junctions of the block together."""
        mine, its = self.pair.a.structure.blocks[number], self.pair.b.structure.blocks[number]
        like = record.streams[number + 1]
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for one, other in zip(mine.junctions, its.junctions, strict=True):
            a, b = added(mine, one, record.operands, like), added(its, other, swapped.got, like)
            whole = torch.stack(list(a.values())).sum(0)  # the stream behind the add
            for kind in (kind for kind in a if kind):
                parts.setdefault(kind, []).append((a[kind], b[kind].to(like.device), whole))
        for kind, found in parts.items():
            x, y, whole = (torch.cat(part, -1) for part in zip(*found, strict=True))
            self._relative((kind, number + 1, None), "sensitivity", x, y, whole, massive)

    # ---- sums

    def _relative(
        self,
        place: tuple[str, int | None, int | None],
        name: str,
        x: Tensor,
        y: Tensor,
        whole: Tensor,
        massive: Tensor,
    ) -> None:
        """‖y − x‖ / ‖whole‖ of each sample, over its real tokens and over its bulk."""
        y = y.to(x.device)
        away = (y.double() - x.double()).square().sum(-1)
        size = whole.double().square().sum(-1)
        mask = self._real(x)
        real = torch.ones_like(massive) if mask is None else mask
        for metric, kept in ((name, real), (f"{name}_bulk", real & ~massive)):
            values = ratio(away.where(kept, 0).sum(1).sqrt(), size.where(kept, 0).sum(1).sqrt())
            self._add((*place, metric), values.cpu(), real.any(1).cpu())

    def _add(self, key: Key, values: Tensor, counted: Tensor) -> None:
        self.sums.setdefault(key, Moments()).add(values, counted)

    def _real(self, x: Tensor) -> Tensor | None:
        return None if self.mask is None else self.mask.to(x.device)

    def _refuse_not_finite(self, name: str, layer: int, x: Tensor, mask: Tensor | None) -> None:
        finite = x.isfinite().all(-1)
        if not bool((finite if mask is None else finite | ~mask).all()):
            todo = "Try --dtype float32, and check the model and the data"
            raise RcProbeError(f"its stream of layer {layer} holds NaN or infinity", where=name, todo=todo)

    def rows(self) -> list[Row]:
        """Streams by layer, then blocks and branches, then predictions."""
        rows = [
            {
                "component": component, "block": block, "layer": layer, "metric": metric, "mean": float(m.mean),
                "std": float(m.std) if m.count > 1 else None, "count": int(m.count),
            }
            for (component, block, layer, metric), m in self.sums.items()
            if m.count > 0
        ]  # fmt: skip
        samples = len(self.pair.a.made.items)
        rows += [
            {"component": STREAM, "block": None, "layer": layer, "metric": metric, "mean": value, "std": None, "count": samples}
            for layer, cka in self.cka.items()
            for metric, value in cka.values().items()
        ]  # fmt: skip
        order = {name: i for i, name in enumerate(dict.fromkeys(row["component"] for row in rows))}
        metrics = {name: i for i, name in enumerate(dict.fromkeys(row["metric"] for row in rows))}
        rows.sort(
            key=lambda row: (
                row["component"] != STREAM,
                order[row["component"]],
                metrics[row["metric"]],
                row["layer"] or 0,
                row["block"] or 0,
            )
        )
        return rows + (list(self.predictions.rows()) if self.predictions else [])


def _moved(inputs: dict[str, Any], like: Batch) -> dict[str, Any]:
    """A task's inputs of the first model, as the second takes them: its own names, device and dtype."""
    return {
        name: inputs[name].to(value.device) if name in inputs and not value.is_floating_point() else value
        for name, value in like.inputs.items()
    }
