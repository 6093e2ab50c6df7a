"""One panel: matplotlib draws its data, once; grid, ticks and labels are written around it.

Matplotlib's own axes, layout and `savefig` would cost ten times as much: a panel is small, and a page has twenty.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from rc_probe.results.words import number

from .svg import BASE_SIZE, FG, GRID, MUTED, PANEL, clean

EDGE, GAP, LINE, TITLE = 4.0, 3.5, 1.25 * float(BASE_SIZE), 30.0  # around the axes, in units of the SVG
MORE = 17.0  # for a second line of the title
_RC: dict[Any, Any] = {  # over seaborn's whitegrid
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": float(BASE_SIZE),
    "text.color": FG,
    "hatch.linewidth": 0.6,
    "hatch.color": MUTED,
}


@dataclass
class Panel:
    """One panel while it is drawn: its axes, the texts to hover on, and what it shows in words.

    grid: across these axes, of `x` and `y`
    """

    axes: Axes
    titles: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    grid: str = "y"
    svg: str = ""

    def hover(self, texts: list[str]) -> str:
        """A gid for an artist with `texts` to hover on."""
        gid = f"hover-{len(self.titles)}"
        self.titles[gid] = texts
        return gid


def fitted(text: str, width: float) -> str:
    """`text` cut in its middle where a panel of `width` has no room for it; tables and labels have it whole."""
    most = _letters(width)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def _letters(width: float) -> int:
    """How many bold letters stand beside each other in a panel, right of its ticks."""
    return int((width - 55) / 9.5)


def _title(text: str, width: float) -> list[str]:
    """A panel's title in two lines at most, each `fitted`."""
    most = _letters(width)
    first = next(iter(wrap(text, most, break_long_words=False, break_on_hyphens=False)), "")
    rest = text[len(first) :].strip()
    return [fitted(line, width) for line in (first, rest) if line]


@cache
def _style() -> dict[Any, Any]:
    return {**sns.axes_style("whitegrid"), **_RC}


@contextmanager
def panel_of(name: str, title: str, *, width: float = 400, height: float = 290) -> Iterator[Panel]:
    """A panel of `width` × `height` in SVG units; its `svg` is there when the context closes."""
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's settings are; the backend stays
        mpl.rcParams.update(_style())
        canvas = Figure(figsize=(width / 72, height / 72), dpi=72)
        canvas.patch.set_visible(False)
        panel = Panel(canvas.add_axes((0, 0, 1, 1)))
        yield panel
        buffer = io.StringIO()
        renderer = RendererSVG(width, height, buffer, image_dpi=72)
        frame = _Frame(panel, renderer, width, height, _title(title, width))
        frame.write_grid()
        panel.axes.set_axis_off()
        canvas.draw(renderer)
        frame.write_labels()
        renderer.finalize()  # its ids and its date do not outlive `clean`
    label = f"{title}. {'; '.join(panel.words)}." if panel.words else title
    panel.svg = clean(buffer.getvalue(), name, label, panel.titles)


@cache
def _advance(character: str, renderer_of: type[RendererSVG]) -> float:
    """How wide a character is in the font of the labels."""
    renderer = renderer_of(1, 1, io.StringIO(), image_dpi=72)
    return float(
        renderer.get_text_width_height_descent(character, FontProperties(size=float(BASE_SIZE)), False)[0]
    )


def _wide(text: str) -> float:
    return sum(_advance(character, RendererSVG) for character in text)


class _Frame:
    """What is around the data of a panel: laid out from the ticks, then written in two steps, below and above it."""

    def __init__(
        self, panel: Panel, renderer: RendererSVG, width: float, height: float, title: list[str]
    ) -> None:
        self.panel, self.axes, self.size, self.title = panel, panel.axes, (width, height), title
        self.write = renderer.writer.element
        axes = panel.axes
        self.ticks = {axis.axis_name: _ticks(axis) for axis in (axes.xaxis, axes.yaxis)}
        self.left = EDGE + GAP + max((_wide(text) for _, text in self.ticks["y"]), default=0.0)
        self.left += LINE if axes.get_ylabel() else 0
        self.bottom = height - EDGE - GAP - LINE - (LINE if axes.get_xlabel() else 0)
        self.top, self.right = EDGE + TITLE + MORE * (len(title) - 1), width - EDGE
        self._place()
        ends = [self.x(at) + _wide(text) / 2 for at, text in self.ticks["x"]]
        ends += [text.get_window_extent(renderer).x1 for text in axes.texts]
        starts = [self.x(at) - _wide(text) / 2 for at, text in self.ticks["x"]]
        self.left += max(0.0, EDGE - min(starts, default=EDGE))
        self.right -= max(0.0, max(ends, default=0.0) - self.right)
        self._place()

    def _place(self) -> None:
        width, height = self.size
        inside = (self.right - self.left, self.bottom - self.top)
        self.axes.set_position(
            (self.left / width, 1 - self.bottom / height, inside[0] / width, inside[1] / height)
        )

    def x(self, at: float) -> float:
        return float(self.axes.transData.transform((at, self.axes.get_ylim()[0]))[0])

    def y(self, at: float) -> float:
        return self.size[1] - float(self.axes.transData.transform((self.axes.get_xlim()[0], at))[1])

    def _line(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        path = f"M {x1:.1f} {y1:.1f} L {x2:.1f} {y2:.1f}"
        self.write("path", d=path, style=f"fill: none; stroke: {colour}; stroke-width: 0.8")

    def _text(self, text: str, x: float, y: float, anchor: str, colour: str = MUTED, **more: str) -> None:
        style = f"font: {more.pop('font', f'{BASE_SIZE}px')}; text-anchor: {anchor}; fill: {colour}"
        self.write("text", text, x=f"{x:.1f}", y=f"{y:.1f}", style=style, **more)

    def write_grid(self) -> None:
        """The panel's ground, and a line across it at each tick."""
        width, height = self.size
        self.write("rect", width=f"{width:g}", height=f"{height:g}", style=f"fill: {PANEL}")
        for at, _ in self.ticks["y"] if "y" in self.panel.grid else ():
            self._line(self.left, self.y(at), self.right, self.y(at), GRID)
        for at, _ in self.ticks["x"] if "x" in self.panel.grid else ():
            self._line(self.x(at), self.top, self.x(at), self.bottom, GRID)

    def write_labels(self) -> None:
        """The lower edge, and all texts around the data."""
        self._line(self.left, self.bottom, self.right, self.bottom, MUTED)
        for below, line in enumerate(reversed(self.title)):
            self._text(line, self.left, self.top - 10 - MORE * below, "start", FG, font="600 14px")
        for at, text in self.ticks["x"]:
            self._text(text, self.x(at), self.bottom + GAP + 0.76 * LINE, "middle")
        for at, text in self.ticks["y"]:
            self._text(text, self.left - GAP, self.y(at) + 0.36 * float(BASE_SIZE), "end")
        middle = (self.left + self.right) / 2
        self._text(self.axes.get_xlabel(), middle, self.bottom + GAP + 1.7 * LINE, "middle")
        if label := self.axes.get_ylabel():
            x, y = EDGE + 0.76 * LINE, (self.top + self.bottom) / 2
            self._text(label, x, y, "middle", transform=f"rotate(-90 {x:.1f} {y:.1f})")


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    """Where the ticks are that the scale shows, and their labels."""
    places, formatter = [*map(float, axis.get_majorticklocs())], axis.get_major_formatter()
    texts = formatter.format_ticks(places)
    if formatter.get_offset():  # matplotlib would write it in a corner
        texts = [number(place) for place in places]
    low, high = sorted(axis.get_view_interval())
    low, high = low - 1e-9 * (abs(low) or high), high + 1e-9 * abs(high)  # relative: of a log scale, too
    return [(at, text) for at, text in zip(places, texts, strict=True) if low <= at <= high]
