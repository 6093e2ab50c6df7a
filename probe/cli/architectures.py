"""`rc-probe architectures`: what is proved about which model type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models import architectures as table
from rc_probe.results.tables import Row

from .errors import one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
WIDE = 110  # columns that the table needs
COLOURS = {"proved": "green", "refused": "red"}


@app.command()
def architectures(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="A part of a model type or category: llama, vision.")] = None,
    status: Annotated[str | None, typer.Option(help="proved, refused, 'not run' or 'not built'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:  # fmt: skip
    """What is proved about which model type of transformers, on small random models (the census).

    Your own model is proved anew, whatever stands here.
    """
    with one_line_errors():
        document = table.load()
        rows = table.select(document["rows"], text, status)
        if not rows:
            what = f"nothing of that name{f' is {status}' if status else ''}"
            raise RcProbeError(
                what, where=text or "architectures", todo="Give a part of a model type or category"
            )
        if as_json:
            typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
            return
        _show(document, rows)


def _show(document: dict[str, object], rows: list[Row]) -> None:
    from rich.console import Console

    console = Console()
    if console.width < WIDE:
        _paragraphs(console, rows)
    else:
        _table(console, rows)
    _, total = table.counts(rows)[-1]
    versions = document["versions"]
    assert isinstance(versions, dict)
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(
        ", ".join(f"{total[s]} {s}" for s in (*table.STATUS, table.PATHS))
        + f". Census of {document['made']} with {made}."
    )


def _paragraphs(console: Console, rows: list[Row]) -> None:
    """A type a paragraph, where a table would break its words."""
    from rich.markup import escape
    from rich.padding import Padding

    for row in rows:
        name, category, status, blocks, by, paths, rest = map(escape, table.line(row))
        console.print(f"[bold]{name}[/]  [{COLOURS.get(row['status'], 'dim')}]{status}[/]")
        said = (category, blocks, by and f"attention by {by}", paths and f"paths {paths}", rest)
        console.print(Padding("; ".join(filter(None, said)), (0, 0, 0, 2)))


def _table(console: Console, rows: list[Row]) -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("model type", "category", "status", "blocks", "attention by", "paths"):
        shown.add_column(name, overflow="fold")
    shown.add_column("other stacks, remarks", ratio=1)
    for row in rows:
        cells = [escape(cell) for cell in table.line(row)]
        colour = COLOURS.get(row["status"], "dim")
        shown.add_row(*cells[:2], f"[{colour}]{cells[2]}[/]", *cells[3:])
    console.print(shown)
