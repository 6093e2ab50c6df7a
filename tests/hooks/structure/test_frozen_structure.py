"""Nothing writes to a structure: no field of it can be assigned, and none of its collections can be changed."""

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from support import zoo

from rc_probe.hooks.attach import find_structure

FIXED = (str, int, bool, type(None), weakref.ref)


def held(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The value and all that it holds, each with its place."""
    yield place, value
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from held(getattr(value, field.name), f"{place}.{field.name}")
    elif isinstance(value, (tuple, frozenset)):
        for item in value:
            yield from held(item, f"{place}[…]")


@pytest.mark.parametrize("name", ["bert_mlm", "falcon", "t5_encoder"])
def test_a_structure_is_frozen_all_the_way_down(name: str) -> None:
    structure = find_structure(*zoo.build(name))
    kinds = set()
    for place, value in held(structure, "structure"):
        kinds.add(type(value).__name__)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(value, field.name, None)
                with pytest.raises(dataclasses.FrozenInstanceError):
                    delattr(value, field.name)
        else:
            assert isinstance(value, (tuple, frozenset, *FIXED)), f"{place} can be written to"
    assert {"Structure", "Block", "Junction", "Branch", "AttentionOp", "Site", "Flow", "InnerCall"} <= kinds
    with pytest.raises(TypeError):
        structure.blocks[0] = structure.blocks[1]  # type: ignore[index]


def test_a_new_attribute_is_refused() -> None:
    structure = find_structure(*zoo.build("bert_mlm"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.note = "mine"  # type: ignore[attr-defined]
