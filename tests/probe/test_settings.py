"""Options: checked before anything is loaded, without torch, the same from the command and from Python."""

import re
import subprocess
import sys
from dataclasses import MISSING, fields
from typing import Any

import pytest
import typer

import rc_probe
from rc_probe.cli.app import app as main_app
from rc_probe.cli.app import path_numbers
from rc_probe.cli.generated import chosen_options
from rc_probe.common_options import DTYPES
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models import load
from rc_probe.registry import METRICS
from rc_probe.settings import Settings

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "samples": ({"samples": 0}, "--samples: 0 is too small. Give at least 1"),
    "length": ({"length": 1}, "--length: 1 is too small. Give at least 2"),
    "batch size": ({"batch_size": 0}, "--batch-size: 0 is too small. Give at least 1"),
    "svd samples": ({"svd_samples": -1}, "--svd-samples: -1 is too small. Give at least 0"),
    "init seeds": ({"init_seeds": 0}, "--init-seeds: 0 is too small. Give at least 1"),
    "seed": ({"seed": -1}, "--seed: -1 is too small. Give at least 0"),
    "large seed": ({"seed": 2**63}, "--seed: 9223372036854775808 is too large"),
    "text": ({"samples": "3"}, "--samples: '3' is not a whole number"),
    "half": ({"batch_size": 1.5}, "--batch-size: 1.5 is not a whole number"),
    "truth": ({"length": True}, "--length: True is not a whole number"),
    "dtype": ({"dtype": "float8"}, "--dtype: no such dtype 'float8'. Choose one of float32"),
    "metric": ({"metrics": ("residul",)}, "Did you mean 'residual'?"),
    "one metric": ({"metrics": "residul"}, "Did you mean 'residual'?"),
    "no metric": ({"metrics": ()}, "--metrics: no metric is left"),
    "only slow": ({"metrics": ("effective_rank",), "svd_samples": 0}, "--metrics: no metric is left"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_anything_is_loaded(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rc_probe import api

    monkeypatch.setattr(api, "load_model", lambda *args, **options: pytest.fail("loaded"))
    options, says = BAD[case]
    with pytest.raises(RcProbeError, match=re.escape(says)):
        Settings(**options).check()
    in_python = re.sub(r"^--([a-z-]+)", lambda match: match[1].replace("-", "_"), says)
    with pytest.raises(RcProbeError, match=re.escape(in_python)):
        rc_probe.probe("no-such/model", **options)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(RcProbeError, match=r"no option is called 'bach_size'.*batch_size"):
        rc_probe.probe("no-such/model", bach_size=3)


def test_the_command_refuses_without_torch() -> None:
    script = (
        "import sys\nsys.argv = ['rc-probe', 'gpt2', '--batch-size', '0']\nfrom rc_probe.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == "rc-probe: --batch-size: 0 is too small. Give at least 1\n"


def test_defaults_and_edges_are_good() -> None:
    Settings().check()
    Settings(length=2, samples=1, batch_size=1, svd_samples=0, seed=2**63 - 1, dtype="auto").check()


def test_what_is_measured() -> None:
    assert Settings().measured == [name for name, metric in METRICS.items() if metric.default]
    assert Settings(metrics="cosine").measured == ["cosine"]
    assert Settings(metrics=["stable_rank", "residual"], svd_samples=0).measured == ["residual"]


def test_one_text_stands_for_a_tuple_of_one() -> None:
    assert Settings(ablate="mlp@3").ablate == ("mlp@3",)  # type: ignore[arg-type]
    assert Settings(metrics="norm", ablate=["mlp@3"]).metrics == ("norm",)  # type: ignore[arg-type]


def test_dtypes_are_those_that_load() -> None:
    assert set(DTYPES) == set(load.DTYPES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stack": ""}, "--stack: it is empty"),
        ({"blocks": ""}, "--blocks: it is empty"),
        ({"label_column": ""}, "--label-column: it is empty"),
        ({"stack": "encoder", "blocks": "encoder.layer.*"}, "both are given"),
    ],
)
def test_names_of_stacks_and_blocks(options: dict[str, str], says: str) -> None:
    with pytest.raises(RcProbeError, match=says):
        Settings(**options).check()


OTHER: dict[str, Any] = {  # of options whose default cannot be turned into another value by itself
    "revision": "main", "dtype": "bfloat16", "device": "cpu", "device_map": "auto", "offload_folder": "off load",
    "stack": "encoder", "blocks": "encoder.layer.*", "data": "my texts.txt", "column": "text", "label_column": "folder",
    "metrics": ("residual", "cosine"), "ablate": ("mlp@3", "head@2:5+mlp@1=0.5"), "path_draws": (5, 20), "max_length": 3, "path_samples": 5, "svd_samples": 3,
    "samples": 5, "chains": True, "embeddings": True, "importance": "parts", "importance_samples": 5, "drop": 2, "drop_until": "loss>+0.1",
    "truncation": "2,5", "truncation_ranks": (1, 4), "drop_parts": ("attention", "mlp"), "map": ("temperature@all=0.5,2", "skip"),
}  # fmt: skip


@pytest.mark.parametrize("name", [each.name for each in fields(Settings)])
def test_every_option_is_in_the_command_that_repeats_a_run(name: str) -> None:
    """Written as a command line and read again by the command, it is what it was."""
    default = next(each.default for each in fields(Settings) if each.name == name)
    assert default is not MISSING
    other = OTHER.get(name, not default if isinstance(default, bool) else None)
    other = default + 1 if other is None else other
    chosen = Settings(**{name: other})
    assert chosen != Settings()
    words = chosen.words("m")
    assert words[:2] == ["rc-probe", "m"] and len(words) > 2
    context = typer.main.get_command(main_app).make_context("rc-probe", path_numbers(words[1:]))
    assert chosen_options(Settings, context.params) == chosen


def test_values_that_only_python_has_are_named() -> None:
    assert Settings(data=["a text"]).words("m") == ["rc-probe", "m", "--data", "DATA-GIVEN-IN-PYTHON"]
    assert Settings(paths=False, path_draws=(3,)).words("m") == ["rc-probe", "m", "--no-paths"]


def test_what_is_off_anyway_may_be_said_to_be_off() -> None:
    Settings(samples=8, importance="none").check()  # too few samples for it by default
    Settings(recursion=False, bounds=False).check()
    Settings(paths=False, chains=False).check()
    with pytest.raises(RcProbeError, match="--max-length: it changes nothing"):
        Settings(paths=False, max_length=0).check()
    with pytest.raises(RcProbeError, match="--importance-samples: it changes nothing"):
        Settings(samples=8, importance="none", importance_samples=4).check()
