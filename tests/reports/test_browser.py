"""The report in a real browser: drawn in light, dark and on a phone, sorted, and without an error."""

import base64
import colorsys
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.made_results import ABLATIONS, make_result

from rc_probe.comparison import Comparison, Run, compare

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("no Chromium on this machine: the report is not looked at", allow_module_level=True)

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip
LIGHT = {"san": "#c8500a", "san-mlp": "#a3439a", "san-skip": "#00845f", "transformer": "#0a6cb4"}
DARK = {"san": "#ff9a4d", "san-mlp": "#e48fdb", "san-skip": "#3fcf9f", "transformer": "#62b5f5"}


SMALLEST = (  # text of the figures, in pixels
    "Math.min(...[...document.querySelectorAll('.panel svg')].flatMap(svg => [...svg.querySelectorAll('text')]"
    ".map(text => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width"
    " * parseFloat(getComputedStyle(text).fontSize))))"
)
OUTSIDE = (  # texts that leave their panel
    "[...document.querySelectorAll('.panel svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(t => {"
    "const a = t.getBoundingClientRect(), b = svg.getBoundingClientRect(); return a.left < b.left - 1"
    "|| a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1 }).map(t => t.textContent))"
)


class Browser:
    """Chromium spoken to over its debugging pipe: JSON messages that end in a zero byte."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM, "Chromium is needed here: install it, or unset CI"
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        pipes = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, "chromium", *command],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._count = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "Chromium ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, *, width: int, dark: bool = False, phone: bool = False) -> None:
        """Load a page of the disk at a width, in a colour scheme."""
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=2 if phone else 1, mobile=phone)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, selector: str = "body") -> np.ndarray:
        """The page, or one element of it, as (height, width, 3) bytes."""
        box = self.run(
            f"(() => {{const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height, scale: 1}})()"
        )
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=box)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def complaints(self) -> list[str]:
        """Errors, warnings and policy violations, and any request beside the page itself."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Log.entryAdded":
                found.append(params["entry"]["text"])
            elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                found.append(json.dumps(params))
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [url] if url.split(":")[0] not in ("file", "data") else []
        return found

    def close(self) -> None:
        self.__dict__.pop("_session", None)
        self.send("Browser.close")
        os.close(self._out)
        self._process.wait(30)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    make_result(ablations=ABLATIONS).to_html(path)
    return path


def pixels(picture: np.ndarray, colour: str) -> int:
    """How many pixels have this colour, a little anti-aliasing allowed."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - wanted).max(axis=2) < 12).sum())


def background(picture: np.ndarray) -> float:
    """The lightness of the commonest colour, 0 to 1."""
    colours, counts = np.unique(picture.astype(int) @ (1 << 16, 1 << 8, 1), return_counts=True)
    commonest = int(colours[counts.argmax()])
    return colorsys.rgb_to_hls(*(byte / 255 for byte in commonest.to_bytes(3, "big")))[1]


VIEWS = {
    "light": ({"width": 1200}, LIGHT),
    "dark": ({"width": 1200, "dark": True}, DARK),
    "phone": ({"width": 375, "phone": True}, LIGHT),
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_curve_is_drawn_in_every_panel(browser: Browser, page: Path, view: str) -> None:
    options, colours = VIEWS[view]
    browser.open(page, **options)
    panels = browser.run("document.querySelectorAll('#figure-residual .panel').length")
    assert panels == 4
    for place in range(1, panels + 1):
        picture = browser.picture(f"#figure-residual .panel:nth-child({place}) svg")
        for variant, colour in colours.items():
            assert pixels(picture, colour) > 60, (place, variant)
        for colour in (DARK if colours is LIGHT else LIGHT).values():
            assert pixels(picture, colour) < 10, (place, colour)
        assert (background(picture) < 0.3) == (view == "dark")
    assert (background(browser.picture()) < 0.3) == (view == "dark")


# The curves of each panel of paths by the name of their colour, beside the foreground's.
PATHS = {
    "paths": [("san", "transformer", "san-skip"), ("san", "transformer", "san-skip"), ("san", "san-mlp")],
    "lengths": [("transformer",), ()],
    "chains": [("transformer", "san", "san-mlp")],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("figure", PATHS)
def test_paths_are_drawn_in_the_colours_of_the_scheme(
    browser: Browser, page: Path, view: str, figure: str
) -> None:
    options, colours = VIEWS[view]
    browser.open(page, **options)
    assert browser.run(f"document.querySelectorAll('#figure-{figure} .panel').length") == len(PATHS[figure])
    other = DARK if colours is LIGHT else LIGHT
    for place, names in enumerate(PATHS[figure], start=1):
        picture = browser.picture(f"#figure-{figure} .panel:nth-child({place}) svg")
        for name in names:
            assert pixels(picture, colours[name]) > 40, (place, name)
        assert not any(pixels(picture, colour) > 9 for colour in other.values())
        assert (background(picture) < 0.3) == (view == "dark")


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_loads_nothing_and_complains_of_nothing(browser: Browser, page: Path, view: str) -> None:
    browser.open(page, **VIEWS[view][0])
    assert browser.complaints() == []


def test_complaints_are_heard(browser: Browser, page: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    spoilt = "<p style='color: red'>x</p><script>1</script><img src='http://localhost:1/x.png'></main>"
    bad.write_text(page.read_text("utf-8").replace("</main>", spoilt), "utf-8")
    browser.open(bad, width=800)
    assert len(browser.complaints()) >= 3, "an inline style, a foreign script and an image"


def test_a_phone_scrolls_down_only_and_reads_the_figures(browser: Browser, page: Path) -> None:
    browser.open(page, width=375, phone=True)
    for details in (False, True):
        browser.run(f"document.querySelectorAll('details').forEach(d => d.open = {json.dumps(details)})")
        assert browser.run("document.documentElement.scrollWidth") == 375
    assert browser.run(SMALLEST) >= 11


@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_stay_inside_the_page_and_their_panels(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    result = make_result(blocks=2, ablations=["mlp@7"], id="a-very-long-name_" * 15)
    variants = result.tables["residuals"]["variant"]
    result.tables["residuals"]["variant"] = variants.replace("mlp@7", "mlp@7" + "+head@2:5" * 16)
    result.to_html(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=width, phone=width < 640)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(OUTSIDE) == []


def test_a_panel_alone_is_no_larger_than_one_of_two(browser: Browser, tmp_path: Path) -> None:
    make_result(init=False, blocks=2).to_html(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=1200)
    width = "document.querySelector('#figure-{} .panel').getBoundingClientRect().width"
    assert browser.run("document.querySelectorAll('#figure-recursion .panel').length") == 1
    assert browser.run(width.format("recursion")) == browser.run(width.format("residual"))


def test_figures_stand_without_style_and_script(browser: Browser, page: Path, tmp_path: Path) -> None:
    """As where a server's own policy blocks both: figures are drawn with attributes alone."""
    text = page.read_text("utf-8")
    start, end = text.index("default-src"), text.index("; base-uri")
    blocked = tmp_path / "blocked.html"
    blocked.write_text(text[:start] + "default-src 'none'; style-src 'self'" + text[end:], "utf-8")
    browser.open(blocked, width=1200)
    assert browser.run("getComputedStyle(document.body).maxWidth") == "none"
    assert browser.run("document.querySelectorAll('th button').length") == 0
    picture = browser.picture("#figure-residual .panel svg")
    assert background(picture) > 0.9
    for variant, colour in LIGHT.items():
        assert pixels(picture, colour) > 60, variant


def test_a_heading_sorts_its_table(browser: Browser, page: Path) -> None:
    browser.open(page, width=1200)
    column = "[...document.querySelectorAll('#table-ablations tbody tr')].map(r => r.cells[{0}].textContent)"
    values = "[...document.querySelectorAll('#table-ablations tbody tr')].map(r => +r.cells[4].dataset.value)"
    click = "document.querySelectorAll('#table-ablations thead button')[{0}].click()"
    before = browser.run(values)
    browser.run(click.format(4))
    assert browser.run(values) == sorted(before) != before
    assert browser.run("document.querySelectorAll('#table-ablations th')[4].ariaSort") == "ascending"
    browser.run(click.format(4))
    assert browser.run(values) == sorted(before, reverse=True)
    browser.run(click.format(3))
    names = browser.run(column.format(3))
    assert names == sorted(names) and len(set(names)) > 3
    assert browser.run("document.querySelectorAll('#table-ablations [aria-sort]').length") == 1
    browser.run(click.format(2))
    heads = browser.run(column.format(2))
    assert heads[0] == "5" and heads[-1] == "–", "a missing value sorts last"


def test_a_mark_tells_its_number(browser: Browser, page: Path) -> None:
    browser.open(page, width=1200)
    marks = "document.querySelectorAll('#figure-residual use title')"
    titles = browser.run(f"[...{marks}].map(t => t.textContent)")
    assert len(titles) == 2 * 2 * 4 * 13
    assert "SAN+skip, layer 3:" in " ".join(titles)


# ---- the report of a comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison")
    runs = [make_result(blocks=4, deep=False, init=False, id=f"model-{i}") for i in range(8)]
    runs[1].settings["length"] = 64
    compare(*runs).save(path)
    return path / "report.html"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    runs = [Run(f"step{s}", make_result(blocks=4, deep=False, init=False), s) for s in (0, 10, 1000)]
    Comparison(runs, title="over training").save(path)
    return path / "report.html"


@pytest.mark.parametrize("view", VIEWS)
def test_every_run_has_its_colour(browser: Browser, compared: Path, view: str) -> None:
    options, _ = VIEWS[view]
    browser.open(compared, **options)
    assert browser.complaints() == []
    colours = browser.run(
        "[...document.querySelectorAll('#figure-runs .legend line')].map(line => getComputedStyle(line).stroke)"
    )
    assert len(colours) == len(set(colours)) == 8
    picture = browser.picture("#figure-runs .panel svg")
    assert (background(picture) < 0.3) == (view == "dark")
    last = [f"#{int(r):02x}{int(g):02x}{int(b):02x}" for r, g, b in (re.findall(r"\d+", c) for c in colours)][
        -1
    ]
    assert pixels(picture, last) > 60, "curves of the same height: the last is on top"
    assert browser.run("document.documentElement.scrollWidth") == options["width"]


@pytest.mark.parametrize("view", VIEWS)
def test_training_is_drawn(browser: Browser, followed: Path, view: str) -> None:
    browser.open(followed, **VIEWS[view][0])
    assert browser.complaints() == []
    assert browser.run("document.querySelectorAll('#figure-map path title').length") == 3 * 5
    for figure in ("training", "map"):  # above the cells of the map, which keep their colours
        assert (background(browser.picture(f"#figure-{figure}")[:40]) < 0.3) == (view == "dark")
    assert browser.run("document.documentElement.scrollWidth") == VIEWS[view][0]["width"]


@pytest.mark.parametrize("width", [390, 700, 950, 1280])
@pytest.mark.parametrize("name", ["page", "compared", "followed"])
def test_the_text_of_figures_is_readable_and_inside(
    browser: Browser, request: pytest.FixtureRequest, name: str, width: int
) -> None:
    browser.open(request.getfixturevalue(name), width=width, phone=width < 640)
    assert browser.run(SMALLEST) >= 11
    assert browser.run(OUTSIDE) == []
    assert browser.run("document.documentElement.scrollWidth") == width


def test_levels_have_their_colour(browser: Browser, compared: Path) -> None:
    browser.open(compared, width=1280)
    colour = "getComputedStyle(document.querySelector('#table-runs td.level.healthy')).color"
    assert browser.run(colour) == "rgb(0, 112, 79)"
    assert browser.run("document.querySelectorAll('#figure-changes .panel').length") == 8
