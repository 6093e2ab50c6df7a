"""The curves: every metric at every layer, of the paper's four variants and of each intervention asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import Options, names_of, option
from rc_probe.registry import METRICS, select
from rc_probe.results.tables import LAYER, METRIC, STREAM, STREAMS, VARIANT, WEIGHTS, Column, Table

from .measurement import Found, Measurement

if TYPE_CHECKING:
    from rc_probe.budget import Shape
    from rc_probe.engine import PlainReader

    from .context import Context

RESIDUALS = Table("residuals", "Every metric at every layer, of every variant", (WEIGHTS, VARIANT, *STREAM))
INIT_SEEDS = Table("init_seeds", "Further initialisations", (
    Column("seed", "int64", "of the fresh weights"), VARIANT, LAYER, METRIC, Column("mean", "float64", "mean over samples"),
))  # fmt: skip
EACH = Table(
    "streams", "Every metric at every layer, of each of several streams", (WEIGHTS, STREAMS, *STREAM)
)
SVD_SAMPLES, SVD = 4, 16  # by default; multiply-adds, as measured
PASSES = 2  # plain passes over all samples that they may cost


def read_names(text: str | None) -> tuple[str, ...] | None:
    return tuple(METRICS) if (names := names_of(text)) == ("all",) else names


@dataclass(frozen=True)
class CurveOptions(Options):
    """Which metrics. None: the registry's defaults."""

    metrics: tuple[str, ...] | None = option(
        None, "Names, separated by commas, or 'all'. (default: all but the solvers)", typed=str | None,
        read=read_names, words=lambda names, chosen: ["--metrics", ",".join(names)],
    )  # fmt: skip
    svd_samples: int | None = option(
        None, "Samples that ranks are measured on (slow). (default: 4, fewer of long texts)", least=0
    )

    @property
    def measured(self) -> list[str]:
        """The metrics to measure, in display order; without `svd_samples` the cheap ones alone."""
        return [
            name for name in select(self.metrics) if self.svd_samples != 0 or METRICS[name].cost == "cheap"
        ]

    def check(self) -> None:
        super().check()
        costly = [name for name in select(self.metrics) if METRICS[name].cost != "cheap"]
        if self.svd_samples and not costly:
            todo = "Leave it out, or add effective_rank or another of its kind to --metrics"
            raise RcProbeError(
                "it changes nothing: no such metric is measured", where="--svd-samples", todo=todo
            )
        if not self.measured:
            todo = "Name one, or raise --svd-samples"
            raise RcProbeError("no metric is left to measure", where="--metrics", todo=todo)


class Curves(Measurement):
    """Of fresh weights, the statistics of all seeds together; with several seeds, the means of each besides."""

    name, subject = "curves", "Curves were"
    options = CurveOptions
    tables = (RESIDUALS, INIT_SEEDS)
    on_mixed = on_fresh = shared = needed = True

    def passes(self, context: Context) -> int:
        return len(context.numbers) * len(context.variants)

    def run(self, context: Context) -> Found:
        from rc_probe.metrics.layer_curves import check_finite, gather_curves

        from .variant_passes import measure_variants

        settings = context.settings
        noise, rounding = _rounding(context)
        few = settings.svd_samples
        if few is None:
            few = affordable(context.shape, len(context.variants))
        mine, notes = measure_variants(
            context.structure, context.batches.of(context.numbers), context.variants, settings.measured,
            noise=noise, few=few, readers=context.readers.values(), advance=lambda name: context.advance(name, passes=1),
        )  # fmt: skip
        if few < min(_asked(settings), len(context.samples.items)):
            notes.append(
                f"Ranks: on {few} sample{'s' * (few > 1)}, so that they cost no more than {PASSES} plain passes over all samples "
                "(docs/large-models.md): --svd-samples 4 takes more."
            )
        stage = "pretrained" if context.seed is None else f"init, seed {context.seed}"
        curves = gather_curves(mine, lambda value: context.world.gather(value, what=stage))
        if context.weights == "pretrained":
            check_finite(context.structure, curves)
        tables: dict[str, list[dict[str, Any]]] = {}
        if context.weights == "init" and settings.init_seeds > 1:
            here = (row for v in curves for row in curves[v].rows(seed=context.seed, variant=v))
            before = context.before.tables["init_seeds"] if context.before else []
            tables["init_seeds"] = before + [{key: row[key] for key in INIT_SEEDS.names} for row in here]
        if context.before is not None:
            for variant, earlier in context.before.kept.items():
                earlier.merge(curves[variant])
            curves = context.before.kept
        rows = [row for v in curves for row in curves[v].rows(weights=context.weights, variant=v)]
        return Found({"residuals": rows, **tables}, notes + rounding, kept=curves)

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        return {"metrics": settings.measured, "svd_samples": min(_asked(settings), samples)}


class Streams(Measurement):
    """Each of several streams side by side (hyper-connections, AltUp), by itself: the metrics of the run that are not slow.

    Reads the plain passes of the curves.
    """

    name, subject = "streams", "Single streams were"
    tables = (EACH,)
    on_mixed = on_fresh = shared = True

    def reader(self, context: Context) -> PlainReader | None:
        from rc_probe.engine import PlainReader
        from rc_probe.hooks.edits.stream_taps import each_stream
        from rc_probe.metrics.layer_curves import Curves as LayerCurves

        from .coarse_rounding import noise_by_stream

        count = context.structure.streams
        names = [name for name in context.settings.measured if METRICS[name].cost == "cheap"]
        if count == 1 or not names:
            return None
        noise = noise_by_stream(context.structure, next(iter(context.batches.of([0]))))

        class Reader(PlainReader):
            def __init__(self) -> None:
                self.curves = {
                    number: LayerCurves(names, noise=noise.get(number, {})) for number in range(1, count + 1)
                }

            def plain(self, layer: int, x: Any) -> None:
                for curves, part in zip(self.curves.values(), each_stream(x, count), strict=True):
                    curves.mask = self.batch.mask
                    curves.on_stream(layer, part)

        return Reader()

    def run(self, context: Context) -> Found:
        from rc_probe.metrics.layer_curves import gather_curves

        reader = context.readers.get(self.name)
        if reader is None:
            return Found()
        curves = gather_curves(
            reader.curves, lambda value: context.world.gather(value, what="single streams")
        )
        for number, earlier in (context.before.kept if context.before else {}).items():
            curves[number].merge(earlier)
        rows = [
            row for number in curves for row in curves[number].rows(weights=context.weights, stream=number)
        ]
        return Found({"streams": rows}, kept=curves)


def _asked(settings: Any) -> int:
    return SVD_SAMPLES if settings.svd_samples is None else int(settings.svd_samples)


def affordable(shape: Shape, variants: int) -> int:
    """Samples that ranks are measured on: SVD_SAMPLES, or as many of them as rc_probe.budget allows, at least one.

    Singular values of a stream (tokens, dim) take SVD times tokens × dim × the smaller of the two multiply-adds.
    """
    from rc_probe.budget import first_that_fits

    one = float(SVD) * shape.tokens * shape.dim * min(shape.tokens, shape.dim) * (shape.blocks + 1) * variants
    return first_that_fits(range(SVD_SAMPLES, 0, -1), shape, lambda n: n * one, passes=PASSES) or 1


def _rounding(context: Context) -> tuple[dict[str, dict[int, float]], list[str]]:
    """The measured noise of quantised models, on the first batch of the run, and a note on it."""
    from .coarse_rounding import measured_noise, name_of_rounding

    kinds = name_of_rounding(context.structure.model)
    if not kinds:
        return {}, []
    first = next(iter(context.batches.of([0])))
    noise = measured_noise(
        context.structure, first, {v.name: v.edits(context.structure) for v in context.variants}
    )
    return noise, [
        f"Its arithmetic is coarser than its floats ({kinds}): floors are measured, by passes that differ by rounding alone."
    ]
