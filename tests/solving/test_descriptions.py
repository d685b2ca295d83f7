"""What a folder of checkpoints is told apart by: all that settings hold, and nothing that another process has anew."""

import os
import subprocess
import sys
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import SpecQuantizer, per_tensor
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import MappingType
from torchao.quantization.pt2e.quantizer import QuantizationSpec

import torchquant as tq
from torchquant.solving.descriptions import description


class Settings:
    def __init__(self, **held):
        self.__dict__.update(held)


class Slots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class Choice(Enum):
    FIRST = 1
    SECOND = 2


def above(least):
    return lambda value: value > least


LONG = np.zeros(5000)
ONE = np.r_[np.zeros(2500), 1.0, np.zeros(2499)]  # which a repr leaves out
PAIRS = {
    "numbers": (1, 1.0),
    "a number and a text": (1, "1"),
    "tensors": (torch.from_numpy(LONG), torch.from_numpy(ONE)),
    "dtypes of tensors": (torch.zeros(3), torch.zeros(3).half()),
    "shapes of tensors": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "arrays": (LONG, ONE),
    "tensors in a dict": ({"a": torch.zeros(2)}, {"a": torch.ones(2)}),
    "a dict and its pairs": ({"a": 1}, [("a", 1)]),
    "sets": ({"a", "b"}, {"a", "c"}),
    "algorithms in algorithms": (tq.BRECQ(start=tq.AdaRound(3)), tq.BRECQ(start=tq.AdaRound(4))),
    "lambdas": (lambda value: value, lambda value: value * 2),
    "constants of lambdas": (lambda value: value * 3, lambda value: value * 2),
    "closures": (above(1), above(2)),
    "arguments that are bound": (partial(max, 1), partial(max, 2)),
    "methods": (Settings(a=1).__init__, Settings(a=2).__init__),
    "slots": (Slots(1), Slots(2)),
    "enumerations": (Choice.FIRST, Choice.SECOND),
    "parameters of modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    "kinds": (tq.AdaRound, tq.BRECQ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_settings_that_differ_have_other_descriptions(pair):
    one, other = PAIRS[pair]
    assert description(Settings(held=one)) == description(Settings(held=one))
    assert description(Settings(held=one)) != description(Settings(held=other))


def test_an_object_that_holds_itself_is_described():
    ring = Settings()
    ring.next = Settings(next=ring)
    assert "2 around" in description(ring)


SCRIPT = """
import torch, torchquant as tq
from torchquant.solving.descriptions import description
class Plain: pass
torch.manual_seed(0)
module = torch.nn.Linear(2, 2)
module.register_forward_hook(lambda *_: None)
print(description([tq.BRECQ(), tq.SmoothQuant(), {"a", "b", "c"}, module, Plain(), lambda v: [lambda w: w, v], max]))
"""


def test_another_process_describes_the_same_settings_alike():
    environment = {**os.environ, "PYTHONPATH": str(Path(tq.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    processes = [
        subprocess.run(command, env={**environment, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]
    assert processes[0].stdout == processes[1].stdout


def of_groups(group_size, mapping):
    observer = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=mapping,
        target_dtype=torch.int8,
        granularity=PerGroup(group_size),
        quant_min=-8,
        quant_max=7,
        eps=1e-6,
    )
    return QuantizationSpec(torch.int8, observer, -8, 7, torch.per_channel_affine, 0)


@pytest.mark.parametrize("other", [(8, MappingType.SYMMETRIC), (16, MappingType.ASYMMETRIC)])
def test_checkpoints_of_other_groups_or_zero_points_are_those_of_another_run(tmp_path, other):
    x = torch.randn(4, 16)
    exported = tq.export(torch.nn.Linear(16, 8).eval(), x)

    def optimize(spec):
        prepared = tq.prepare(exported, SpecQuantizer(("linear",), per_tensor(), spec))
        tq.calibrate(prepared, [x], progress=False)
        tq.optimize(prepared, [x], [tq.BiasCorrection()], checkpoint=tmp_path / "kept", progress=False)

    optimize(of_groups(16, MappingType.SYMMETRIC))
    with pytest.raises(tq.ArtifactError, match="another run"):
        optimize(of_groups(*other))
