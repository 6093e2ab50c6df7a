"""The table of the census: every model type built, attached and checked; written for the package and the docs."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from census import workers
from census.build import category
from census.examine import examine

import rc_probe
from rc_probe.models.architectures import PATHS, STATUS, counts, line
from rc_probe.results.tables import Row

HEAD = """# Which architectures

Every configuration class of the transformers library, built small with random weights, attached, and checked
by other arithmetic (`tests/census/check.py`): gates of 1 are bitwise nothing; with every branch off a block is
the identity, its norms or a fixed scaling; a branch off equals zeroing the last map that writes it; a skip off
leaves the branch alone; with everything off nothing depends on the input; kinds of branches by changing one
token; gates per sample; another shape, padding and bfloat16. `rc-probe architectures` shows the same table,
`python tests/census` makes it again (about ten minutes on two cores).

Blocks: `A` attention, `X` cross-attention, `C` another token mixer, `M` MLP, `n` a norm on the stream after the junction,
`|` the next junction, `+` parallel branches. *Not built* and *not run* are limits of the small random models,
not of the probe: attaching to such a model proves or refuses it as any other. *Inner skips*: there are further
skips inside a branch, which stay as they are (Swin2SR is read by whole stages, MobileBERT by whole bottlenecks). A group
norm over all features and tokens (PoolFormer) mixes tokens, too.

*Paths*: whether the stack's paths can be told apart (docs/paths.md): *exact* with the largest difference between the sum
of all lengths and the model's output, relative to that (float32), the paths of length 1 added up one by one, too; *exact, by
block* where single heads cannot be told apart; else why not.
"""


def make(
    types: Iterable[str],
    *,
    processes: int = 2,
    seconds: float = 120,
    done: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Run the census on the model types. Each has a process of its own, and `seconds` at most."""
    rows = []
    for row in _examined(types, processes, seconds):
        rows.append(row)
        if done:
            done(row)
    versions = {"rc-probe": rc_probe.__version__, "torch": torch.__version__.split("+")[0]}
    versions["transformers"] = transformers.__version__
    made = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"made": made, "versions": versions, "rows": sorted(rows, key=lambda row: row["model_type"])}


def _examined(types: Iterable[str], processes: int, seconds: float) -> Iterator[Row]:
    for model_type, found in workers.run(types, examine, processes=processes, seconds=seconds):
        lost = {"model_type": model_type, "category": category(model_type), "status": "not run"}
        yield found if isinstance(found, dict) else {**lost, "reason": str(found)}


def write(document: dict[str, Any], json_file: Path, page: Path) -> None:
    """The table as data and as a page of the docs, each file whole or not at all."""
    texts = {
        json_file: json.dumps(document, indent=1, ensure_ascii=False) + "\n",
        page: markdown(document),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def markdown(document: dict[str, Any]) -> str:
    """The table for the docs."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    columns = (*STATUS, PATHS)
    lines = [HEAD, f"Made {document['made']} with {versions}.", "", f"| category | {' | '.join(columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    lines += [
        f"| {name} | {' | '.join(str(n[s]) for s in columns)} |" for name, n in counts(document["rows"])
    ]
    lines += [
        "",
        "| model type | category | status | blocks | attention by | paths | other stacks, remarks |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    lines += ["| " + " | ".join(map(_cell, line(row))) + " |" for row in document["rows"]]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
