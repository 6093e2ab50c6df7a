"""Matplotlib's SVG made fit for a page: own ids, no styles, theme colours, titles to hover on."""

import re
import xml.etree.ElementTree as ET  # only ever parses what matplotlib wrote
from collections.abc import Mapping, Sequence

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

BASE_SIZE = "13"  # of every text but titles: over 11 pixels where a panel is as wide as a phone

# Colours that are drawn with, and what the page puts for them. Each has a fallback, so that a figure is right
# where a content security policy blocks the page's style sheet.
THEME = {
    "#010203": "var(--fg,#1d2127)",
    "#040506": "var(--grid,#dfe3e8)",
    "#070809": "var(--panel,#ffffff)",
    "#0a0b0c": "var(--muted,#6a737d)",
    "#0d0e0f": "var(--accent,#c2410c)",
    "#100001": "var(--san,#c8500a)",
    "#100002": "var(--san-mlp,#a3439a)",
    "#100003": "var(--san-skip,#00845f)",
    "#100004": "var(--transformer,#0a6cb4)",
    "#100005": "var(--run-5,#8a5a00)",
    "#100006": "var(--run-6,#b3261e)",
    "#100007": "var(--run-7,#4b5bb5)",
    "#100008": "var(--run-8,#5d6670)",
}
FG, GRID, PANEL, MUTED, ACCENT, SAN, SAN_MLP, SAN_SKIP, TRANSFORMER, *MORE = THEME
# Of a map, from the colour nearest to the page to the one that stands out most, in light and dark.
_HEAT = (
    "#b7e6c5",
    "#82d8b0",
    "#50c6ad",
    "#3cb2ad",
    "#359baa",
    "#3485a5",
    "#3670a0",
    "#3b589a",
    "#414184",
    "#3c3162",
    "#312140",
    "#1f1220",
)
HEAT = [f"#2000{number:02x}" for number in range(1, len(_HEAT) + 1)]
THEME |= {
    drawn: f"var(--h{number},{shown})"
    for number, (drawn, shown) in enumerate(zip(HEAT, _HEAT, strict=True), 1)
}

_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_KEPT_FONT = {"font-size", "font-weight", "font-style"}
_INHERITED = (
    "fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-linecap", "stroke-linejoin",
    "stroke-dasharray", "stroke-dashoffset", "font-size", "font-weight", "text-anchor",
)  # fmt: skip


def _short(match: re.Match[str]) -> str:
    text = f"{float(match[0]):.1f}".removesuffix(".0")
    return "0" if text in ("-0", "") else text


def _unstyle(element: ET.Element) -> None:
    """Turn `style="a: b"` into presentation attributes, which no content security policy blocks."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # the shorthand is not a presentation attribute
            size = re.search(r"[\d.]+px", value)
            element.set("font-size", size[0].removesuffix("px") if size else "11")
            if "bold" in value.split() or re.match(r"[6-9]00\b", value):
                element.set("font-weight", "600")
        elif name and (not name.startswith("font") or name in _KEPT_FONT):
            element.set(name, THEME.get(value, value.removesuffix("px")))
    for name in ("fill", "stroke"):
        if (colour := element.get(name)) in THEME:
            element.set(name, THEME[colour])


def _own_ids(root: ET.Element, prefix: str) -> None:
    """Give every id that is referred to a new one with `prefix`, and drop the others."""
    used = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            used.update(_REFERENCE.findall(value))
            if name == f"{XLINK}href":
                used.add(value.removeprefix("#"))
    ids: dict[str, str] = {}
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in used and old is not None:
            element.set("id", ids.setdefault(old, f"{prefix}-{len(ids)}"))
    for element in root.iter():
        if target := element.attrib.pop(f"{XLINK}href", None):
            element.set("href", f"#{ids[target.removeprefix('#')]}")
        for name, value in element.attrib.items():
            element.set(name, _REFERENCE.sub(lambda match: f"url(#{ids[match[1]]})", value))


def _hoist(element: ET.Element) -> None:
    """Move inherited attributes that all children share to their parent, drop empty groups: half the size."""
    for child in list(element):
        _hoist(child)
        if child.tag == f"{SVG}g" and not len(child):
            element.remove(child)
    drawn = [child for child in element if child.tag not in (f"{SVG}defs", f"{SVG}title")]
    if element.tag != f"{SVG}g" or not drawn:
        return
    for name in _INHERITED:
        value = drawn[0].get(name)
        if value is not None and all(child.get(name) == value for child in drawn):
            element.set(name, value)
            for child in drawn:
                del child.attrib[name]


def _flatten(element: ET.Element) -> None:
    """Replace each group that says nothing by what it holds."""
    for place, child in reversed(list(enumerate(element))):
        _flatten(child)
        if child.tag == f"{SVG}g" and not child.attrib and child.find(f"{SVG}title") is None:
            element[place : place + 1] = list(child)


def _add_titles(root: ET.Element, titles: Mapping[str, Sequence[str]]) -> None:
    """Titles for the marks of each artist (by its gid) in the order of its data; a lone one for the whole."""
    groups = {element.get("id"): element for element in root.iter(f"{SVG}g")}
    for gid, texts in titles.items():
        group = groups[gid]
        marks = list(group.iter(f"{SVG}use"))
        if len(texts) == 1 and len(marks) != 1:
            marks = [group]
        marks = marks or list(group.iter(f"{SVG}path"))  # of a mesh: a path a cell
        for mark, text in zip(marks, texts, strict=True):
            title = ET.Element(f"{SVG}title")
            title.text = text
            mark.insert(0, title)


def clean(source: str, prefix: str, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The SVG `source` of matplotlib (`svg.fonttype: none`) for use inside a page.

    Parameters
    ----------
    prefix: begins every id, unique on the page
    label: the figure in words with its numbers, for those who do not see it
    titles: texts to hover on by the gid of the artist, one per mark in the order of its data
    """
    root = ET.fromstring(source)
    for child in list(root):
        if child.tag == f"{SVG}metadata":
            root.remove(child)
        for style in child.findall(f"{SVG}style"):  # `*{…}` would reach the whole page
            child.remove(style)
    for element in root.iter():
        _unstyle(element)
        element.text = element.text if (element.text or "").strip() else None
        element.tail = None
        if element.tag == f"{SVG}text" and "rotate(-0" in element.get("transform", ""):
            del element.attrib["transform"]
    _add_titles(root, titles)
    _own_ids(root, prefix)
    _hoist(root)
    _flatten(root)
    for element in root.iter():
        if element.get("font-size") == BASE_SIZE:
            del element.attrib["font-size"]
        element.tag = element.tag.removeprefix(SVG)  # inside HTML the parser knows the namespace
        for name in ("d", "x", "y", "width", "height", "transform", "stroke-dasharray"):
            if name in element.attrib:
                element.set(name, _NUMBER.sub(_short, element.attrib[name]))
        if "d" in element.attrib:
            element.set("d", re.sub(r"\s*([A-Za-z])\s*", r"\1", element.attrib["d"]).strip())
    *_, width, height = root.get("viewBox", "").split()
    root.attrib.clear()
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "width": width, "height": height, "role": "img"}
    root.attrib |= {"aria-label": label, "font-family": FONT, "font-size": BASE_SIZE}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ET.tostring(root, encoding="unicode")
