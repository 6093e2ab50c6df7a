"""What a build shows of the checks: one line each, GitHub's annotations, and its summary of the job."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rc_probe.results.checks import Outcome

MARKS = {True: "✅ pass", False: "❌ fail", None: "⚠️ not evaluated"}


def tell(
    name: str, sentence: str, outcomes: Sequence[Outcome], say: Callable[[str], None], *, quiet: bool
) -> None:
    """Say a line for each check; with `quiet` for those alone that did not pass. On GitHub also tell it there.

    name, sentence: the model and its verdict, for the summary of the job
    """
    for outcome in outcomes:
        if not (quiet and outcome.passed):
            say(outcome.line)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for outcome in outcomes:
            if not outcome.passed:
                say(annotation(f"{name}: {outcome.line}"))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        try:
            with open(summary, "a", encoding="utf-8") as file:
                file.write(markdown(name, sentence, outcomes))
        except OSError as error:
            say(f"rc-probe: $GITHUB_STEP_SUMMARY cannot be written ({error.strerror})")


def annotation(text: str) -> str:
    """GitHub's command that marks a job with an error; a line break in `text` would end it."""
    for sign, code in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(sign, code)
    return f"::error title=rc-probe::{text}"


def markdown(name: str, sentence: str, outcomes: Sequence[Outcome]) -> str:
    """The verdict and a table of the checks."""
    rows = [
        f"| {MARKS[outcome.passed]} | {_cell(outcome.check)} | {_cell(outcome.said)} |"
        for outcome in outcomes
    ]
    head = [
        f"### rc-probe: {_cell(name)}",
        "",
        _cell(sentence),
        "",
        "| | fails if | measured |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n\n"


def _cell(text: str) -> str:
    """`text` as text: names of models and files could hold markup."""
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
