"""`--device-map`: a model spread over devices and disk gives the numbers of the model in one place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import rc_probe
from rc_probe.cli.app import main
from rc_probe.hooks.errors import RcProbeError
from rc_probe.metrics.layer_curves import Curves
from rc_probe.models.load import load_model
from rc_probe.registry import METRICS, select

TEXTS = [tiny.words(3 + i, i + 1) for i in range(5)]
MIXED = {"embeddings": "cpu", "encoder.layer.0": "disk", "encoder.layer.1": "cpu", "pooler": "disk"}
Maps = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return tiny.saved(tmp_path_factory.mktemp("map") / "model", tiny.bert(), tiny.tokenizer())


def measured(saved: str, **options: Any) -> rc_probe.ProbeResult:
    return rc_probe.probe(saved, TEXTS, batch_size=2, ablate=("mlp@1", "head@2:1"), **options)


@pytest.mark.parametrize(
    ("places", "devices", "on_disk"),
    [("auto", "cpu", 0), (MIXED, "cpu, disk", 18), ({"": "disk"}, "disk", 39)],
)
def test_the_same_tables(saved: str, tmp_path: Path, places: Any, devices: str, on_disk: int) -> None:
    """Proofs, all variants, heads, the recursion and the bound, all through accelerate's hooks: bitwise."""
    spread = {"device_map": places, "offload_folder": str(tmp_path / "off")}
    model = load_model(saved, **spread).model
    assert sum(p.is_meta for p in model.parameters()) == on_disk
    plain, found = measured(saved), measured(saved, **spread)
    assert found.settings["device"] == devices
    assert set(found.tables) == set(plain.tables)
    for name, table in plain.tables.items():
        init = on_disk and "weights" in table
        wanted = table.query("weights == 'pretrained'").reset_index(drop=True) if init else table
        assert found.tables[name].equals(wanted), name
    notes = " ".join(found.model["notes"])
    assert ("Fresh weights were not measured" in notes) == bool(on_disk)


def test_the_command(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "map.json").write_text(json.dumps(MIXED))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    words = [saved, "--data", str(tmp_path / "texts.txt"), "--no-init", "--no-recursion", "--json"]
    words += ["--out", str(tmp_path / "out"), "--offload-folder", str(tmp_path / "off")]
    with pytest.raises(SystemExit) as end:
        main([*words, "--device-map", str(tmp_path / "map.json")])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["settings"]["device"] == "cpu, disk"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_map": "every"}, "device_map: no such device map 'every'.*auto, balanced"),
        ({"device_map": "none.json"}, "device_map: no such device map"),
        ({"device_map": "auto", "device": "cpu"}, "device, device_map: both are given"),
        ({"offload_folder": "x"}, "offload_folder: nothing is offloaded.*device_map auto"),
        ({"device_map": {"": "cuda:77"}}, "the model does not load.*device_map"),
    ],
)
def test_refused(saved: str, options: Maps, says: str) -> None:
    with pytest.raises(RcProbeError, match=says) as caught:
        rc_probe.probe(saved, TEXTS, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"encoder": null}', '{"encoder": [0]}'])
def test_files_that_are_no_maps(saved: str, tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(RcProbeError, match=re.escape(str(path))):
        load_model(saved, device_map=str(path))


# ---- the loop never waits for the device


class Crossing(TorchFunctionMode):
    """Notes every call that brings numbers from the host, or takes them there."""

    NAMES = frozenset(
        {"new_tensor", "tensor", "as_tensor", "cpu", "numpy", "item", "tolist", "nonzero", "masked_select"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if name in self.NAMES or any(t.device.type == "cpu" for t in tensors):
            self.seen.append(name)
        return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_metrics_and_sums_stay_on_the_device(dtype: torch.dtype, masked: bool) -> None:
    """On a device that holds no numbers (meta) reading one raises, and what crosses over is seen.

    On a GPU each number that comes from the host or goes there makes the host wait.
    """
    curves = Curves([name for name in select() if METRICS[name].cost == "cheap"])
    curves.mask = torch.ones(3, 7, dtype=torch.bool, device="meta") if masked else None
    with Crossing() as crossing:
        for _ in range(2):
            curves.on_stream(1, torch.zeros(3, 7, 16, dtype=dtype, device="meta"))
        assert not crossing.seen
        torch.zeros(2, device="meta").new_tensor(7)  # as a sum once counted its samples
        torch.zeros(2).to("meta")
        assert crossing.seen[0] == "new_tensor"
        assert len(crossing.seen) == 3
        with pytest.raises(RuntimeError):
            bool(torch.zeros((), device="meta"))
    assert {m.mean.device.type for m in curves.values.values()} == {"meta"}
