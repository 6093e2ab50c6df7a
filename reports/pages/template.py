"""The templates of the pages, filled: every text escaped, one style and one script, allowed by their hashes."""

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

LAYOUT = "report.html"  # holds the style and the script of every page


def fill(name: str, /, **values: Any) -> str:
    """The page of the template `name`: the same values give the same bytes."""
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup  # what `svg.clean` wrote, its texts escaped
    layout = _source(LAYOUT)
    policy = (
        f"default-src 'none'; style-src '{_hash(layout, 'style')}'; script-src '{_hash(layout, 'script')}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(name).render(policy=policy, **values)


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(source: str, tag: str) -> str:
    """The content security policy's name for the one `<tag>` of the template."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
    assert found, f"the template has no <{tag}>"
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
