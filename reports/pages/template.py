"""The templates of the pages, filled: every text escaped, one style and one script, allowed by their hashes.

`base.html` is the frame of every page, `parts.html` what pages share, `run.html`, `difference.html` and `summary.html` (comparisons, experiments) are the
pages; the style and the script are files of their own.
"""

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup  # what `svg.clean` wrote, its texts escaped
    return environment


def fill(name: str, /, **values: Any) -> str:
    """The page of the template `name`: the same values give the same bytes."""
    style, script = _source("style.css"), _source("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = _templates().get_template(name)
    return page.render(policy=policy, style=Markup(style), script=Markup(script), **values)


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(source: str) -> str:
    """The content security policy's name for what stands between the tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
