"""The census: its checks find what is wrong, a sample of it runs, and the table that is shipped holds."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from census import table as making
from census.check import Checks, Wrong
from census.examine import CHECKS, examine
from support import zoo
from support.places import ROOT
from support.structures import with_block, with_branch, with_junction

from rc_probe import RcProbeError
from rc_probe.cli.app import main
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.structure.structure import NormCall, Structure
from rc_probe.models import architectures as table

# One model type for each structural pattern: the blocks of its main stack, read off the library's code.
PATTERNS = {
    "bert": "An|Mn",
    "gpt2": "A|M",
    "gpt_neox": "A+M",  # parallel
    "gemma2": "A|M",  # norms at both ends of a branch
    "t5": "A|X|M",
    "bart": "An|Xn|Mn",
    "xmod": "An|Mn|Mn",  # adapters
    "mixtral": "A|M",  # experts
    "longcat_flash": "A|M|A|M|M",  # the experts are added at the end
    "mamba": "C",
    "jamba": "C|M, A|M",  # blocks of two classes
    "fnet": "Cn|Mn",
    "wav2vec2-conformer": "M|A|C|Mn",
    "swin": "A|M",  # stages, windows
    "segformer": "A|C",  # convolution in the MLP
    "poolformer": "C|C",  # features before height and width
    "clip": "A|M",  # two towers
    "qwen2_vl": "A|M",  # images packed into one row
    "doge": "A|M",  # scaled skips
    "lxmert": "An|Mn, Xn|An|Mn",  # two towers that look at each other
    "rt_detr": "An|Xn|Mn",  # deformable attention
    "patchtsmixer": "C|M",  # channels and patches, a softmax that is a gate
    "swin2sr": "A",  # whole stages, with blocks and skips inside
}


@pytest.mark.parametrize("model_type", PATTERNS)
def test_a_sample_of_the_census(model_type: str) -> None:
    row = examine(model_type)
    assert (row["status"], row["signature"]) == ("proved", PATTERNS[model_type]), row["reason"]
    kept = next(r for r in table.load()["rows"] if r["model_type"] == model_type)
    found, shipped = ([{**stack, "paths_error": None} for stack in r["stacks"]] for r in (row, kept))
    assert found == shipped  # but for the rounding, which depends on the machine
    assert all((stack["paths_error"] or 0) < 1e-5 for stack in row["stacks"])
    assert row["checks"]["gates at one"] == len(row["stacks"])
    assert row["checks"]["everything off"] >= len(row["stacks"])


def test_what_is_peculiar_is_said() -> None:
    peculiar = {row["model_type"]: row.get("peculiar") for row in table.load()["rows"]}
    assert peculiar["bert"] == []
    assert "scaled skips" in peculiar["doge"]
    assert "inner skips" in peculiar["swin2sr"]
    assert "features first" in peculiar["poolformer"]
    assert "no batch axis" in peculiar["qwen2_vl_vision"]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("reformer", "a second stream"),
        (
            "deepseek_v4",
            "4 streams side by side and mix them, and no skip carries one of them as it is; each of them is measured",
        ),
        ("xlm", "its blocks are no modules"),
        ("squeezebert", "by their `forward` method, past all hooks"),
        ("resnet", "not held by modules"),
        # its first block has no skip; the convolutions inside attention have, and are no stack
        ("fun_asr_nano_encoder", "does not enter the block"),
    ],
)
def test_what_the_census_refuses(model_type: str, reason: str) -> None:
    row = examine(model_type)
    assert row["status"] == "refused"
    assert reason in row["reason"]


# ---- the checks, on structures that were found and then spoiled


def other_site(structure: Structure) -> Structure:
    """The branch of the first junction said to be at the second one's add, and the other way round."""
    first, second = (j.branches[0].site for j in structure.blocks[0].junctions)
    return with_branch(with_branch(structure, 0, 0, site=second), 0, 1, site=first)


def other_operand(structure: Structure) -> Structure:
    """Skip and branch exchanged."""
    for number, junction in enumerate(structure.blocks[0].junctions):
        structure = with_branch(structure, 0, number, site=junction.skip)
        structure = with_junction(structure, 0, number, skip=junction.branches[0].site)
    return structure


def other_kind(structure: Structure) -> Structure:
    for block in structure.blocks:
        for number, junction in enumerate(block.junctions):
            kind = {"attention": "mlp", "mlp": "attention"}[junction.branches[0].kind]
            structure = with_branch(structure, block.index, number, kind=kind)
    return structure


def no_norm(structure: Structure) -> Structure:
    return with_junction(structure, -1, -1, norms=())


def other_norm(structure: Structure) -> Structure:
    name = structure.blocks[0].junctions[0].norms[0].name
    return with_junction(structure, -1, -1, norms=(NormCall(name, 0),))


def missed_junction(structure: Structure) -> Structure:
    for block in structure.blocks:
        structure = with_block(structure, block.index, junctions=block.junctions[:-1])
    return structure


def wrong_ordinal(structure: Structure) -> Structure:
    """The second skip said to be at the first add."""
    skip = structure.blocks[0].junctions[1].skip
    return with_junction(structure, 0, 1, skip=replace(skip, ordinal=0))


SPOILED: list[tuple[str, Callable[[Structure], Structure], set[str]]] = [
    ("bert", other_site, {"last map zeroed", "kinds", "skips off"}),
    ("bert", other_operand, {"branches off", "last map zeroed", "skips off", "kinds"}),
    ("gpt2", other_operand, {"branches off", "last map zeroed", "skips off", "kinds"}),
    ("gpt2", other_kind, {"kinds"}),
    ("bert", no_norm, {"branches off", "skips off"}),
    ("bert", other_norm, {"branches off", "skips off"}),
    ("llama", missed_junction, {"branches off", "everything off", "skips off", "kinds"}),
    ("vit", wrong_ordinal, {"everything off", "skips off"}),
]


@pytest.mark.parametrize(("name", "spoil", "expected"), SPOILED, ids=lambda x: getattr(x, "__name__", None))
def test_checks_find_what_is_wrong(name: str, spoil: Any, expected: set[str]) -> None:
    model, inputs = zoo.build(name)
    _, others = zoo.build(name, seed=5)
    structure = find_structure(model, inputs)

    def failing(structure: Structure) -> set[str]:
        found = set()
        for check, run in CHECKS.items():
            try:
                run(Checks(structure, inputs, others))
            except Wrong:
                found.add(check)
        return found

    assert not failing(structure)
    assert failing(spoil(structure)) & expected


# ---- the table


def test_the_shipped_table() -> None:
    document = table.load()
    rows = document["rows"]
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert document["versions"]["transformers"] == pinned[1]
    assert sum(row["status"] == "proved" for row in rows) >= 400
    assert {row["status"] for row in rows} <= set(table.STATUS)
    for row in rows:
        assert row["signature"] if row["status"] == "proved" else row["reason"], row
    proved = sum(row["status"] == "proved" for row in rows)
    assert f"of {len(rows)} types {proved} are proved" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8") == making.markdown(document)


def test_paths_of_the_shipped_table() -> None:
    """Every proved type says whether its paths are exact, how exact, or why there are none."""
    rows = [row for row in table.load()["rows"] if row["status"] == "proved"]
    for row in rows:
        assert row["paths"] == row["stacks"][0]["paths"]
        for stack in row["stacks"]:
            exact = stack["paths"] in {"exact", "exact, by block"}
            assert stack["paths"] and exact == (stack["paths_error"] is not None)
            assert not exact or stack["paths_error"] < 1e-4
    found = sum(row["paths_error"] is not None for row in rows)
    assert found > 500 and dict(table.counts(table.load()["rows"]))["total"][table.PATHS] == found
    assert f"the paths of {found} of these" in (ROOT / "README.md").read_text(encoding="utf-8")
    said = {row["model_type"]: row["paths"] for row in rows}
    for name in [
        "bert",
        "albert",
        "gpt2",
        "gpt_neox",
        "llama",
        "mixtral",
        "gemma2",
        "t5",
        "vit",
        "swin",
        "xlnet",
        "deberta-v2",
        "bloom",
        "cohere",
        "fnet",
    ]:
        assert said[name] == "exact", name
    assert "multiplies values of the stream" in said["mamba"]
    assert said["mobilebert"] == "exact"  # its blocks count as one way each


def test_the_paths_of_a_stack_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are not told apart, as if they were, do not add up."""
    from census import examine
    from support import zoo

    from rc_probe.hooks.frozen import head_choice as choice
    from rc_probe.paths import path_proofs

    model, inputs = zoo.build("gpt2")
    structure = find_structure(model, inputs)
    assert examine.paths_of(structure, inputs)["paths"] == "exact"
    monkeypatch.setattr(choice, "keep", lambda parts, labels, chosen: parts)
    path_proofs.heads_alone.add(structure)
    with pytest.raises(Wrong, match="add up to that length only"):
        examine.paths_of(structure, inputs)


def test_models_that_users_name_are_proved() -> None:
    status = {row["model_type"]: row["status"] for row in table.load()["rows"]}
    encoders = (
        "bert roberta distilbert albert electra deberta-v2 mpnet modernbert xlm-roberta nomic_bert eurobert"
    )
    decoders = "gpt2 gpt_neo gptj gpt_neox opt bloom falcon llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo2 deepseek_v3 gpt_oss stablelm cohere granite"
    both = "t5 mt5 umt5 bart mbart pegasus marian m2m_100 longt5 whisper"
    images = "vit deit beit dinov2 dinov2_with_registers dinov3_vit swin swinv2 convnext segformer clip_vision_model siglip_vision_model"
    several = "clip siglip blip llava qwen2_vl qwen2_5_vl qwen3_vl idefics3 paligemma"
    sounds = "wav2vec2 hubert wavlm audio-spectrogram-transformer wav2vec2-bert"
    for name in " ".join((encoders, decoders, both, images, several, sounds)).split():
        assert status[name] == "proved", name


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_command_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("architectures", "llama", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"llama", "codellama", "llama4"} & {row["model_type"] for row in rows}
    assert all("llama" in row["model_type"] for row in rows)
    assert {"model_type", "category", "status", "signature", "reason"} <= set(rows[0])
    assert run("architectures", "reformer") == 0
    assert "a second stream" in " ".join(capsys.readouterr().out.split())
    assert run("architectures", "no such type") == 2
    assert "nothing of that name" in capsys.readouterr().err
    assert run("architectures", "--status", "proven") == 2
    assert "no such status 'proven'" in capsys.readouterr().err


def test_a_census_of_a_few_types_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from census import __main__ as command

    before = table.KEPT.read_bytes()
    with pytest.raises(SystemExit) as end:
        command.app(["bert", "reformer", "--out", str(tmp_path)])
    assert end.value.code == 0
    made = json.loads((tmp_path / "architectures.json").read_text(encoding="utf-8"))
    assert [(row["model_type"], row["status"]) for row in made["rows"]] == [
        ("bert", "proved"),
        ("reformer", "refused"),
    ]
    assert (tmp_path / "architectures.md").read_text(encoding="utf-8") == making.markdown(made)
    with pytest.raises(RcProbeError, match="a part of the census is not the table"):
        command.app(["bert"], standalone_mode=False)
    assert table.KEPT.read_bytes() == before


def test_a_wrong_model_ends_the_census_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from census import __main__ as command

    row = {"model_type": "bert", "category": "text encoder", "status": "wrong", "reason": "gates"}
    monkeypatch.setattr(making, "_examined", lambda *a: iter([row]))
    with pytest.raises(SystemExit) as end:
        command.app(["bert", "--out", str(tmp_path)])
    assert end.value.code == 1
