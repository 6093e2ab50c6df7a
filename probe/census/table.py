"""The table of the census: made by running it, kept in the package, shown by the command and in the docs."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError

Row = dict[str, Any]
KEPT = Path(__file__).with_name("architectures.json")
STATUS = ("proved", "refused", "not run", "not built")
PATHS = "paths exact"
HEAD = """# Which architectures

Every configuration class of the transformers library, built small with random weights, attached, and checked
by other arithmetic (`probe/census/check.py`): gates of 1 are bitwise nothing; with every branch off a block is
the identity, its norms or a fixed scaling; a branch off equals zeroing the last map that writes it; a skip off
leaves the branch alone; with everything off nothing depends on the input; kinds of branches by changing one
token; gates per sample; another shape, padding and bfloat16. `rc-probe architectures` shows the same table,
`python -m rc_probe.census` makes it again (about ten minutes on two cores).

Blocks: `A` attention, `X` cross-attention, `C` another token mixer, `M` MLP, `n` a norm on the stream after the junction,
`|` the next junction, `+` parallel branches. *Not built* and *not run* are limits of the small random models,
not of the probe: attaching to such a model proves or refuses it as any other. *Inner skips*: there are further
skips inside a branch, which stay as they are (Swin2SR is read by whole stages, MobileBERT by whole bottlenecks). A group
norm over all features and tokens (PoolFormer) mixes tokens, too.

*Paths*: whether the stack's paths can be told apart (docs/paths.md): *exact* with the largest difference between the sum
of all lengths and the model's output, relative to that (float32), the paths of length 1 added up one by one, too; *exact, by
block* where single heads cannot be told apart; else why not.
"""


def load() -> dict[str, Any]:
    """The table that comes with the package: {"made", "versions", "rows"}."""
    document: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return document


def make(
    types: Iterable[str],
    *,
    processes: int = 2,
    seconds: float = 120,
    done: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Run the census on the model types. Each has a process of its own, and `seconds` at most."""
    import torch
    import transformers

    import rc_probe

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
    from . import workers
    from .build import category
    from .examine import examine

    for model_type, found in workers.run(types, examine, processes=processes, seconds=seconds):
        lost = {"model_type": model_type, "category": category(model_type), "status": "not run"}
        yield found if isinstance(found, dict) else {**lost, "reason": str(found)}


def select(rows: list[Row], text: str | None, status: str | None) -> list[Row]:
    """The rows whose model type or category holds `text`, and of that status."""
    if status and status not in STATUS:
        what = f"no such status {status!r}"
        raise RcProbeError(what, where="--status", todo=f"Choose one of {', '.join(STATUS)}")
    low = (text or "").lower().replace("-", "_")
    found = [
        row for row in rows if low in row["model_type"].lower().replace("-", "_") or low in row["category"]
    ]
    return [row for row in found if status in (None, row["status"])]


def counts(rows: list[Row]) -> list[tuple[str, Counter[str]]]:
    """(category, how many types of each status, and of PATHS), the largest category first; the last is the total."""
    categories = Counter(row["category"] for row in rows)
    each = [(c, _count(r for r in rows if r["category"] == c)) for c, _ in categories.most_common()]
    return [*each, ("total", _count(rows))]


def _count(rows: Iterable[Row]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in rows:
        found[row["status"]] += 1
        found[PATHS] += row["status"] == "proved" and row["paths_error"] is not None
    return found


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


def line(row: Row) -> tuple[str, ...]:
    """A row as it is shown: type, category, status, blocks, attention, paths, remarks."""
    others = [f"{s['stack']}: {s['signature']}" for s in row.get("stacks", [])[1:]]
    remarks = [*others, *row.get("peculiar", []), *filter(None, [row["reason"]])]
    return (
        row["model_type"], row["category"], row["status"], row.get("signature", ""), row.get("attention_op", ""),
        _paths(row), "; ".join(remarks),
    )  # fmt: skip


def _paths(row: Row) -> str:
    error = row.get("paths_error")
    return str(row.get("paths", "")) if error is None else f"{row['paths']} ({error:.0e})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
