"""`rc-probe lm-eval`: scores of lm-evaluation-harness without parts of a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rc_probe.results.json_file import given_path
from rc_probe.results.saving import check_folder
from rc_probe.settings import Settings

from .errors import interrupts, one_line_errors
from .generated import with_options

if TYPE_CHECKING:
    import pandas as pd

OF_THE_MODEL = ("revision", "dtype", "device", "allow_pickle", "trust_remote_code", "stack", "blocks")
app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
EXAMPLE = """
Example:

  rc-probe lm-eval gpt2 --tasks lambada_openai,hellaswag --ablate mlp@7 --ablate attention@11 --limit 200
"""


@app.command(epilog=EXAMPLE)
@with_options(Settings, only=(*OF_THE_MODEL, "ablate"))
def lm_eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id or a folder: a causal language model.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of the harness, separated by commas.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    include_path: Annotated[str | None, typer.Option(help="A folder of task files of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in one forward pass.")] = 8,
    out: Annotated[str | None, typer.Option(help="Folder for lm_eval.csv and lm_eval.json.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    **chosen: Any,
) -> None:  # fmt: skip
    """Accuracy of a language model without parts of it, measured by lm-evaluation-harness.

    Each task is run on the whole model first, then without each --ablate. Needs the extra lm-eval.
    """
    with one_line_errors(), interrupts() as check:
        target = None if out is None else given_path(out, "--out")
        if target is not None:
            check_folder(target, f"--out {target}", names=())
        from rc_probe.interventions.grammar import parse_intervention

        ablate = list(dict.fromkeys(chosen.pop("ablate") or ()))
        for text in ablate:
            parse_intervention(text)
        from rc_probe.integrations.lm_eval import ablated_scores
        from rc_probe.models.load import load_model
        from rc_probe.results.files import to_csv
        from rc_probe.results.saving import write_files

        from .terminal import progress_bar

        with progress_bar(hidden=quiet) as show:

            def report(stage: str, done: int, total: int) -> None:
                check()
                show(stage, done, total)

            report("loading", 0, 1)
            loaded = load_model(
                model, **chosen
            )  # fmt: skip
            frame = ablated_scores(
                loaded.model, loaded.processor, [task.strip() for task in tasks.split(",") if task.strip()],
                ablate, limit=limit, include_path=include_path, batch_size=batch_size,
                stack=loaded.stack, blocks=chosen["blocks"], progress=report, num_fewshot=num_fewshot,
            )  # fmt: skip
        rows = json.dumps(_rows(frame), indent=1)
        if target is not None:
            write_files(target, {"lm_eval.csv": to_csv(frame), "lm_eval.json": rows + "\n"})
        if as_json:
            typer.echo(rows)
        elif not quiet:
            _show(frame)


def _rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    plain = frame.astype(object).where(frame.notna(), None)
    return [dict(zip(plain.columns, row, strict=True)) for row in plain.itertuples(index=False)]


def _show(frame: pd.DataFrame) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric", "ablation"):
        shown.add_column(name, overflow="fold")
    for name in ("value", "± stderr", "change"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in frame.sort_values(["task", "metric"], kind="stable").to_dict("records"):
        whole = row["ablation"] == "none"
        error = "" if row["stderr"] != row["stderr"] else f"{row['stderr']:.4f}"
        numbers = (f"{row['value']:.4f}", error, "" if whole else f"{row['change']:+.4f}")
        shown.add_row(*(escape(str(row[name])) for name in ("task", "metric", "ablation")), *numbers)
    Console().print(shown)
