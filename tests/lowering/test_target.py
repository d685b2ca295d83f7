"""What a target says of itself: one row for each op, schemes that it has, a reason for what stays float."""

import pytest

from torchquant import backends
from torchquant.errors import SchemeError
from torchquant.lowering.target import Target
from torchquant.types import Capability


def target(*rows, schemes=()):
    return Target("mine", "", "", "", dict(schemes), rows)


def test_two_rows_for_one_op_are_refused():
    with pytest.raises(SchemeError, match=r"'mine'.*relu have more than one row"):
        target(Capability("relu", reason="float"), Capability("relu", reason="float too"))


def test_a_row_with_a_scheme_that_the_target_lacks_is_refused():
    with pytest.raises(SchemeError, match=r"'mine'.*does not have.*w3"):
        target(Capability("linear", ("w3",), "weighted"))


def test_a_target_says_why_an_op_stays_float():
    mine = target(Capability("relu", reason="it is cheap"))
    assert str(mine) == "mine"
    assert mine.why_float("relu") == "it is cheap"
    assert mine.why_float("gelu") == "mine has no entry for gelu"


@pytest.mark.parametrize("name", backends.names())
def test_each_folder_of_backends_is_a_target_with_its_quantizer(name):
    backend_target = backends.target(name)
    assert backend_target.name == name
    assert backend_target.quantizer_class().target is backend_target
    assert callable(backend_target.backend().lower)
    assert callable(backend_target.backend().load)
