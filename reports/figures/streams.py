"""The residual of each of several streams side by side."""

from collections.abc import Mapping

from rc_probe.results.curves import Curve

from .canvas import panel_of
from .panels import Figure, Key, Styles, by_layer, draw, set_scale, svg_dashes
from .svg import MUTED, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER

WHOLE = "all streams together"
_COLOURS = (SAN, SAN_SKIP, SAN_MLP, MUTED)
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2.2), (1.2, 1.8), (6.5, 2, 1.2, 2))


def streams_figure(shown: Mapping[int, Curve], whole: Curve | None, title: str) -> Figure:
    """The curves of each stream by its number, and that of all together."""
    styles: Styles = {
        name(number): (_COLOURS[at % len(_COLOURS)], _DASHES[at // len(_COLOURS) % len(_DASHES)])
        for at, number in enumerate(shown)
    }
    curves = {name(number): curve for number, curve in shown.items()}
    if whole is not None:
        curves, styles = {WHOLE: whole, **curves}, {WHOLE: (TRANSFORMER, ()), **styles}
    with panel_of("streams", title) as panel:
        by_layer(panel.axes, max(curve.layers[-1] for curve in curves.values()))
        set_scale(
            panel.axes, [value for curve in curves.values() for value in curve.means], log=False, full=True
        )
        draw(panel, curves, styles, band=False, width=1.7)
    keys = [Key(label, THEME[colour], svg_dashes(dashes)) for label, (colour, dashes) in styles.items()]
    caption = (
        "Pretrained weights, means over samples. Below the rounding floor (hollow marks) a number is noise."
    )
    return Figure("streams", f"{title} of each stream, by layer", caption, keys, [panel.svg])


def name(number: int) -> str:
    """What a stream is called."""
    return f"stream {number}"
