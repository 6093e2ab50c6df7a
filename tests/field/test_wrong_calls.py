"""Wrong calls of the Python API: one line each, an RcProbeError, in Python's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import tiny, zoo

import rc_probe
from rc_probe import Gate, ProbeResult, RcProbeError
from rc_probe.paths.decompose import decompose

TEXTS = ["w1 w2 w3", "w2 w4 w5"]
FAST: dict[str, Any] = {"init": False, "paths": False, "recursion": False, "metrics": ["residual"]}


@pytest.fixture(scope="module")
def held() -> Any:
    return tiny.bert().eval()


@pytest.fixture(scope="module")
def result(held: Any) -> ProbeResult:
    return rc_probe.probe(held, TEXTS, processor=tiny.tokenizer(), **FAST)


def refused(says: str, call: Callable[[], object]) -> None:
    with pytest.raises(RcProbeError) as error:
        call()
    line = str(error.value)
    assert says in line and "\n" not in line and " --" not in f" {line}", line


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "NoneType: no model in memory. Load it first"),
        (
            "m/bert",
            "'m/bert': no model in memory. Load it first: AutoModel.from_pretrained(…), or measure it by name",
        ),
        (transformers.BertModel, "BertModel: no model in memory"),
        (5, "int: no model in memory"),
    ],
)
def test_what_is_no_model(given: Any, says: str) -> None:
    for call in (
        rc_probe.attach,
        lambda x: rc_probe.ablate(x, "mlp"),
        lambda x: decompose(x, {}),
        rc_probe.Monitor,
    ):
        refused(says, lambda call=call: call(given))  # type: ignore[misc]
    refused("no Trainer", lambda: rc_probe.watch(given))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inputs": 5}, "inputs: int are no inputs. Give the keyword arguments"),
        ({"inputs": [torch.ones(1)]}, "inputs: list are no inputs"),
        ({"metrics": ["resid"]}, "no metric is called 'resid'. Did you mean 'residual'?"),
        ({"metrics": 5}, "no metric is called 5"),
        ({"mask": "x"}, "mask: 'x' is no mask"),
        ({"mask": 5}, "mask: 5 is no mask"),
        ({"stack": 5}, "stack: 5 is not a text"),
        ({"blocks": ["a"]}, "blocks: ['a'] is not a text"),
    ],
)
def test_attach(options: dict[str, Any], says: str) -> None:
    model, inputs = zoo.build("bert")
    refused(says, lambda: rc_probe.attach(model, **{"inputs": inputs} | options))


@pytest.mark.parametrize(
    "what",
    [
        5,
        None,
        [None],
        {"mlp": 1},
        b"mlp",
        "mlpp",
        "mlp@1-99999999999999999999",
        "mlp@1-1000000000",
        "mlp@" + "9" * 5000,
    ],
)
def test_ablate(what: Any) -> None:
    model, inputs = zoo.build("bert")
    refused("ablate", lambda: rc_probe.ablate(model, what, inputs=inputs))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("mlp", 1, (), "x"), "the value 'x' is not a number"), (("mlp", 1, (), None), "the value None is not a number"),
        (("mlp", 1, (), float("nan")), "no finite number"), (("mlp", 1, (), torch.ones(2, 2)), "tensor (batch,)"),
        (("mlp", True), "blocks True are not whole numbers"), ((None,), "there is no component None"),
    ],
)  # fmt: skip
def test_gates(given: tuple[Any, ...], says: str) -> None:
    refused(says, lambda: Gate(*given))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": "x"}, "samples: 'x' is not a whole number"), ({"length": None}, "length: None is not a whole number"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"), ({"init": "no"}, "init: 'no' is not True or False"),
        ({"stack": 5}, "stack: 5 is not a text"), ({"column": 5}, "column: 5 is not a text"),
        ({"metrics": 5}, "metrics: 5 is not a text"), ({"metrics": ["residual", 5]}, "metrics: 5 is not a text"),
        ({"ablate": 5}, "ablate: 5 is not a text"), ({"ablate": {"mlp": 1}}, "ablate: {'mlp': 1} is not a text"),
        ({"paths": "5 20"}, "paths: '5 20' is not True or False"), ({"path_draws": "x"}, "is not a whole number"),
        ({"progress": 5}, "progress: int is none"), ({"world": 5}, "world: int is none"), ({"processor": "x"}, "processor: str is none"),
        ({"revision": "x"}, "revision: it says how a model is loaded, and this one is"), ({"device": "cpu"}, "device: it says how"),
        ({"trust_remote_code": True}, "trust_remote_code: it says how"), ({"data": 5}, "int holds no samples"),
        ({"data": [5]}, "row 0 is a int"), ({"samples": 0}, "samples: 0 is too small"),
    ],
)  # fmt: skip
def test_probe(held: Any, options: dict[str, Any], says: str) -> None:
    given = FAST | {"data": TEXTS, "processor": tiny.tokenizer()} | options
    refused(says, lambda: rc_probe.probe(held, **given))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"paths": False, "count_mlp": True}, "count_mlp: it changes nothing: paths are not measured. Leave it out, or leave paths=False out"),
        ({"paths": False, "max_length": 3}, "max_length: it changes nothing"),
        ({"init": False, "init_seeds": 2}, "init_seeds: it changes nothing: fresh weights are not measured"),
        ({"repeats": 9}, "repeats: it changes nothing: no paths are drawn"),
        ({"metrics": ["cosine"], "svd_samples": 9}, "svd_samples: it changes nothing"),
        ({"revision": "x"}, "revision x: demo lies on this machine"),
        ({"offload_folder": "x"}, "offload_folder: nothing is offloaded without a device map. Add device_map auto"),
        ({"processor": tiny.tokenizer()}, "processor: a model that is loaded by name brings its own"),
    ],
)  # fmt: skip
def test_options_that_change_nothing(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(says, lambda: rc_probe.probe("demo", **options))


def test_compare_and_load() -> None:
    refused("load: int is no path", lambda: rc_probe.compare(1, 2))  # type: ignore[arg-type]
    for place, says in ((5, "int is no path"), (None, "NoneType is no path"), ("", "'' is no path"), ("a\0b", "is no path"),
                        ("x" * 5000, "cannot read the results"), ("nowhere", "cannot read the results")):  # fmt: skip
        refused(says, lambda place=place: ProbeResult.load(place))  # type: ignore[misc]


def test_saving_and_checking(result: ProbeResult) -> None:
    for call in (result.save, result.to_html):
        for place in (5, "", "a\0b"):
            refused("is no path", lambda call=call, place=place: call(place))  # type: ignore[misc]
    for condition in (5, None, "residual@" + "9" * 5000 + "<0.1", "residual@²<0.1"):
        refused("fail_if ", lambda condition=condition: result.fail_if(condition))  # type: ignore[misc]
    refused("max_drop: it needs baseline", lambda: result.fail_if(max_drop=0.1))
    refused("load: int is no path", lambda: result.fail_if(baseline=5))  # type: ignore[arg-type]
    (outcome,) = result.fail_if(["residual@last<0.0001"])  # a list of conditions, too
    assert outcome.passed


def test_a_path_is_a_model_too(tmp_path: Any) -> None:
    folder = tiny.saved(tmp_path / "bert", tiny.bert(), tiny.tokenizer())
    from pathlib import Path

    assert rc_probe.probe(Path(folder), TEXTS, **FAST).model["class"] == "BertModel"


def test_a_limit_that_no_path_reaches_is_said(held: Any) -> None:
    """Meant as tokens, perhaps."""
    options = FAST | {"paths": True, "chains": False, "max_length": 64}
    result = rc_probe.probe(held, TEXTS, processor=tiny.tokenizer(), **options)
    assert any(
        "--max-length 64 grouped nothing: no path is longer than 2" in note for note in result.model["notes"]
    )
