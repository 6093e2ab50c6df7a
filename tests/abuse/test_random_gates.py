"""Gates on random small models; `python tests/abuse gates` takes 1,000."""

import pytest
from abuse.random_gates import FAMILIES, check


@pytest.mark.parametrize("family", range(len(FAMILIES)), ids=[family.cls for family in FAMILIES])
def test_a_gate_is_what_weights_by_hand_are(family: int) -> None:
    told = [check(number) for number in range(family, 100, len(FAMILIES))]
    assert not any(told), [each for each in told if each]
