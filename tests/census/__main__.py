"""`python tests/census`: run the census and write its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.architectures import KEPT, PATHS, STATUS, counts, line
from rc_probe.results.tables import Row

sys.path[0] = str(Path(__file__).resolve().parents[1])  # `python tests/census` put this folder there

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def census(
    types: Annotated[list[str] | None, typer.Argument(help="Model types. (default: every one)")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for architectures.json and architectures.md. (default: the table of the package)"),
    ] = None,
    processes: Annotated[int, typer.Option(help="Types at a time, a process each.")] = 2,
    seconds: Annotated[float, typer.Option(help="For one type, at most.")] = 120,
) -> None:  # fmt: skip
    """Build every model type of transformers small, attach, check, and write the table.

    Ends with 1 if a model was attached that does not behave as attaching said. Without --out the table
    becomes the one that `rc-probe architectures` shows, and docs/architectures.md.
    """
    import torch
    import transformers
    from census import table
    from census.build import model_types

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the children inherit it
    unknown = sorted(set(types or []) - set(model_types()))
    if unknown:
        raise RcProbeError(f"no model type {unknown[0]!r}", where="census", todo="See rc-probe architectures")
    if types and out is None:
        raise RcProbeError("a part of the census is not the table", where="census", todo="Give --out FOLDER")
    wrong = []

    def show(row: Row) -> None:
        if row["status"] == "wrong":
            wrong.append(row)
        typer.echo("  ".join(filter(None, line(row)))[:160], err=True)

    document = table.make(types or model_types(), processes=processes, seconds=seconds, done=show)
    json_file = out / "architectures.json" if out else KEPT
    table.write(document, json_file, (out or Path("docs")) / "architectures.md")
    for name, number in counts(document["rows"]):
        typer.echo(f"{name}: " + ", ".join(f"{number[s]} {s}" for s in (*STATUS, PATHS)))
    for row in wrong:
        typer.echo(f"WRONG {row['model_type']}: {row['reason']}", err=True)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    try:
        app()
    except RcProbeError as error:
        sys.exit(f"rc-probe: {error}")
