"""The grammar of interventions: one parser for the command, for Python and for kinds that are still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from support import zoo
from support.streams import same, streams

import rc_probe
from rc_probe import Gate, RcProbeError, interventions
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.interventions.gate import Gated
from rc_probe.interventions.grammar import interventions as given
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.intervention import Intervention, Spec


@dataclass(frozen=True)
class Scratch(Intervention):
    parts = {"scratch": "what a test adds"}  # noqa: RUF012 - a constant

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        if spec.value is None:
            raise spec.error("a value is missing", "Write scratch@all=sink:4")
        return cls(spec.part, spec.blocks, spec.heads, spec.value)

    def edits(self, structure: Any) -> Edits:
        edits = Edits()
        edits.at(structure.blocks[0].branches[0].site, lambda x: x * float(self.value))
        return edits


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mlp", [Gated("mlp")]),
        ("mlp@all", [Gated("mlp")]),
        ("mlp@2=1e+1", [Gated("mlp", (2,), (), 10.0)]),
        ("head@1,3-4:2", [Gated("head", (1, 3, 4), (2,))]),
        ("mlp@1 + attention.skip@2-3=0.5", [Gated("mlp", (1,)), Gated("attention.skip", (2, 3), (), 0.5)]),
        ("scratch@2:1=sink:4,window:64+mlp@3", [Scratch("scratch", (2,), (1,), "sink:4,window:64"), Gated("mlp", (3,))]),
        ("scratch=a=b+4", [Scratch("scratch", None, (), "a=b+4")]),
    ],
)  # fmt: skip
def test_what_a_text_means(text: str, wanted: list[Intervention], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rc_probe.interventions.grammar.KINDS", (*interventions.KINDS, Scratch))
    assert list(parse_intervention(text).interventions) == wanted
    again = parse_intervention("+".join(one.label for one in wanted))
    assert list(again.interventions) == wanted, "labels are specs"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scrtch@2=4", "there is no part 'scrtch'; did you mean 'scratch'?"),
        ("scratch", "--ablate scratch: a value is missing. Write scratch@all=sink:4"),
        ("mlp@1-1000000000", "'1-1000000000' is beyond 9,999"),
        ("mlp@5-3", "runs backwards"),
        ("head@2", "heads are named as head@BLOCK:HEAD"),
    ],
)
def test_what_is_misspelt(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rc_probe.interventions.grammar.KINDS", (*interventions.KINDS, Scratch))
    with pytest.raises(RcProbeError) as error:
        parse_intervention(text)
    assert says in str(error.value)


def test_python_gives_texts_gates_and_lists() -> None:
    value = torch.tensor([0.5, 2.0])
    asked = given("mlp@1", [Gate("head", 2, (1, 3)), ("block@3", Gate("mlp", 2, value=value))])
    assert asked.name.startswith("mlp@1+head@2:1,3+block@3+mlp@2=")
    assert [(one.part, one.blocks, one.heads) for one in asked.interventions] == [
        ("mlp", (1,), ()), ("head", (2,), (1, 3)), ("block", (3,), ()), ("mlp", (2,), ()),
    ]  # fmt: skip
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    plain = streams(structure, inputs)
    with torch.no_grad(), rc_probe.ablate(model, ["mlp@1", Gate("head", 2, 1)], inputs=inputs):
        listed = model(**inputs)
    with torch.no_grad(), rc_probe.ablate(model, "mlp@1+head@2:1", inputs=inputs):
        joined = model(**inputs)
    assert torch.equal(listed[0], joined[0])
    same(streams(structure, inputs), plain)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (5, "ablate: 5 is not an intervention. Write PART[@BLOCKS"),
        ([None], "ablate: None is not an intervention"),
        ([], "nothing to ablate"),
    ],
)
def test_python_gives_what_it_should_not(what: Any, says: str) -> None:
    model, inputs = zoo.build("bert")
    with pytest.raises(RcProbeError) as error:
        rc_probe.ablate(model, what, inputs=inputs)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"component": "mpl"}, "Gate: there is no component 'mpl'"),
        ({"component": "mlp", "blocks": ("1",)}, "Gate: blocks ('1',) are not whole numbers"),
        ({"component": "mlp", "blocks": (1,), "value": "x"}, "Gate: the value 'x' is not a number"),
    ],
)
def test_gates_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RcProbeError) as error:
        Gate(**options)
    assert says in str(error.value)


def test_a_new_kind_runs_in_every_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class and one entry of the list; the probe, `ablate` and the table know it."""
    monkeypatch.setattr("rc_probe.interventions.grammar.KINDS", (*interventions.KINDS, Scratch))
    model, inputs = zoo.build("bert")
    with torch.no_grad(), rc_probe.ablate(model, "scratch@1=0", inputs=inputs):
        off = model(**inputs)
    with torch.no_grad(), rc_probe.ablate(model, "attention@1", inputs=inputs):
        gate = model(**inputs)
    assert torch.equal(off[0], gate[0])
