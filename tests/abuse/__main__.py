"""The long runs: `python tests/abuse interrupts`, half an hour; `python tests/abuse gates`, minutes for 1,000 models;
`python tests/abuse kills`, minutes for 400 kills and 200 double writers; `python tests/abuse malformed`, a few minutes."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer

sys.path[0] = str(Path(__file__).resolve().parents[1])  # `python tests/abuse` put this folder there

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def interrupts(
    scenes: Annotated[
        list[str] | None, typer.Argument(help="attach, ablate, watch, probe. (default: all)")
    ] = None,
) -> None:
    """Interrupt at each line of rc-probe that a scene goes through, where it runs first and where it runs last: all is as before."""
    from abuse.interrupts import SCENES, Scene, prove

    warnings.simplefilter("ignore")
    for name in scenes or SCENES:
        for anew in (False, True):
            with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
                done = prove(Scene(Path(folder)), name, anew=anew)
            typer.echo(f"{name}, {'proved anew' if anew else 'known'}: as before after {done} interrupts")


@app.command()
def gates(
    models: Annotated[int, typer.Option(help="How many random models.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the first.")] = 0,
) -> None:
    """Gates on random small models, against the same weights set to zero by hand."""
    from abuse.random_gates import check

    for number in range(seed, seed + models):
        told = check(number)
        if number % 100 == 99 or told:
            typer.echo(f"{number + 1}: {told or 'right so far'}")


@app.command()
def kills(
    times: Annotated[
        int, typer.Option(help="Kills at random moments of each command; besides at every step.")
    ] = 80,
    doubles: Annotated[int, typer.Option(help="How often two runs write at once.")] = 200,
) -> None:
    """Kill run, sweep, checkpoint series and comparison while they save, and let two runs write at once."""
    from abuse.kills import SCENES, killed_at_every_step, killed_at_random, two_at_once

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for scene in SCENES:
            steps = killed_at_every_step(scene, Path(folder) / f"{scene}-steps")
            moments = killed_at_random(scene, Path(folder) / f"{scene}-moments", times)
            typer.echo(f"{scene}: whole after {steps} kills at every step, and {moments} at random moments")
        typer.echo(
            f"two at once, {len(list(two_at_once(Path(folder) / 'two', doubles)))} times: always one of them, whole"
        )


@app.command()
def malformed(seed: Annotated[int, typer.Option(help="Of what is made.")] = 0) -> None:
    """Malformed texts, files of results, data and checkpoints: each must be a value or one line."""
    from abuse.malformed import long_run

    raise typer.Exit(min(1, long_run(seed)))


if __name__ == "__main__":
    app()
