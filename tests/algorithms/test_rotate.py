"""Rotations of networks that are no decoders: what can be rotated computes the same, all else is refused by reason."""

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, calibrated, dynamic, groupwise, per_channel, per_tensor
from nets import Block, Decoder
from torch import nn

import torchquant as tq
from torchquant.algorithms.channels.orthogonal import hadamard, rotation
from torchquant.algorithms.rotate import Rotate
from torchquant.calibration.calibrate import Recorder
from torchquant.quantizers import WeightOnlyQuantizer

pytestmark = pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # what a Quantizer leaves
KINDS = ("linear", "conv2d")
QUANTIZERS = {
    "weights": lambda: WeightOnlyQuantizer("w4_g16"),
    "static": lambda: SpecQuantizer((*KINDS, "add"), per_tensor(torch.uint8, 0, 255), per_channel()),
    "dynamic": lambda: SpecQuantizer(KINDS, dynamic(), per_channel(low=-7, high=7)),
    "groups": lambda: SpecQuantizer(("linear",), per_tensor(), groupwise(16)),
}


class Words(nn.Module):
    """A pre-norm transformer from words to words."""

    def __init__(self, block=Block, norm=nn.LayerNorm, features=32):
        super().__init__()
        self.words = nn.Embedding(50, features)
        self.blocks = nn.Sequential(block(features), block(features))
        self.norm, self.head = norm(features), nn.Linear(features, 50, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.words(ids))))


class Patches(nn.Module):
    """A vision transformer: patches by a convolution, a class token, learned places, and the class token's head."""

    def __init__(self, features=48):
        super().__init__()
        self.patches = nn.Conv2d(3, features, 4, stride=4)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, features)) for n in (1, 17))
        self.block, self.norm, self.head = Block(features), nn.LayerNorm(features), nn.Linear(features, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.block(x))[:, 0])


class Plain(nn.Module):
    """A stream between convolutions that is added to, scaled by numbers and by rows, and read without a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 20, 3, padding=1)
        self.norm, self.inside, self.last = nn.RMSNorm(20), nn.Linear(20, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = self.first(x)
        x = (x - 0.5 * self.second(x)).permute(0, 2, 3, 1)
        y = self.inside(self.norm(x)) * x.new_ones(x.shape[1], 1)
        return self.last((x + y).mean((1, 2)) / 3)


NETWORKS = {  # network, its input, spaces that are rotated
    "words": (Words, lambda: torch.randint(0, 50, (2, 9)), 3),
    "rms": (lambda: Words(Decoder, nn.RMSNorm, 64), lambda: torch.randint(0, 50, (2, 9)), 3),
    "odd": (lambda: Words(lambda n: Block(n, 1), features=52), lambda: torch.randint(0, 50, (2, 9)), 3),
    "patches": (Patches, lambda: torch.randn(2, 3, 16, 16), 2),
    "plain": (Plain, lambda: torch.randn(2, 3, 8, 8), 1),
}


def prepared_of(network, quantizer):
    torch.manual_seed(0)
    make, draw, spaces = NETWORKS[network]
    net, batches = make().eval(), [draw() for _ in range(2)]
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or "words" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return calibrated(net, batches, quantizer), batches, spaces


def float_outputs(prepared, batches):
    run = Recorder(prepared, {}, observe=False)
    with torch.no_grad():
        return torch.cat([run(batch) for batch in batches])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_float_function_stays_the_same_under_any_quantizer(network, quantizer):
    if (network, quantizer) in (("odd", "weights"), ("odd", "groups"), ("plain", "weights"), ("plain", "groups")):
        pytest.skip("its features are no whole groups")
    prepared, batches, spaces = prepared_of(network, QUANTIZERS[quantizer]())
    before = float_outputs(prepared, batches)
    algorithm = Rotate(seed=3)
    assert algorithm.transform(prepared, batches) == spaces, algorithm.notes
    assert tq.sqnr_db(before, float_outputs(prepared, batches)) > 100
    twice = prepared_of(network, QUANTIZERS[quantizer]())[0]
    Rotate(seed=3).transform(twice, batches)
    assert torch.equal(float_outputs(twice, batches), float_outputs(prepared, batches))  # the same in every process


@pytest.mark.parametrize("network", ["words", "patches", "plain"])
def test_weights_really_turn(network):
    prepared, batches, _ = prepared_of(network, QUANTIZERS["dynamic"]())
    layers = [n for n in prepared.graph.nodes if n.op == "get_attr" and n.meta["val"].ndim > 1]
    before = {str(n.target) for n in layers}
    Rotate().transform(prepared, batches)
    assert len(before) == {"words": 10, "patches": 8, "plain": 4}[network]
    assert not {str(n.target) for n in prepared.graph.nodes if n.op == "get_attr"} & before


class Refused(nn.Module):
    """A stream of two linears with something in it that no rotation passes."""

    def __init__(self, between):
        super().__init__()
        self.words, self.norm = nn.Embedding(20, 16), nn.RMSNorm(16)
        self.inside, self.last, self.between = nn.Linear(16, 16), nn.Linear(16, 16), between
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, ids):
        x = self.words(ids)
        return self.last(self.between(self, x + self.inside(self.norm(x)), x))


REFUSALS = {
    "a nonlinear op": (lambda net, y, x: F.gelu(y), "gelu gelu tells the features"),
    "a factor for each feature": (lambda net, y, x: y * net.scale, "mul mul"),
    "a norm that is added": (lambda net, y, x: y + net.norm(y), "is a normalization's output"),
    "a number that is added": (lambda net, y, x: y + 1.0, "tells the features"),
    "features taken apart": (lambda net, y, x: torch.cat([y[..., 8:], y[..., :8]], -1), "tells the features"),
    "a product of the stream with itself": (lambda net, y, x: (y @ y.transpose(1, 2)) @ y, "tells the features"),
    "a norm read by an activation": (lambda net, y, x: y + net.inside(F.silu(net.norm(y))), "not read by layers alone"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_rotated_is_left_and_the_reason_given(name):
    between, reason = REFUSALS[name]
    ids = torch.randint(0, 20, (2, 5))
    prepared = calibrated(Refused(between), [ids], QUANTIZERS["dynamic"]())
    before = float_outputs(prepared, [ids])
    algorithm = Rotate()
    assert algorithm.transform(prepared, [ids]) == 0
    assert any(reason in note for note in algorithm.notes), algorithm.notes
    assert torch.equal(float_outputs(prepared, [ids]), before)


def test_without_a_stream_nothing_is_rotated():
    x = torch.randn(2, 9, 32)
    prepared = calibrated(Block(), [x], QUANTIZERS["weights"]())
    algorithm = Rotate(heads=False)
    assert algorithm.transform(prepared, [x]) == 0
    assert algorithm.notes[0] == "stream at x: left as it is: x is an input of the graph"
    assert Rotate().transform(prepared, [x]) == 1  # the values of its heads


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tied": "both"}, "tied is 'both'; it must be one of 'gain', 'untie', 'leave'"),
        ({"stream": False, "heads": False}, "neither streams nor heads"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(tq.InputError, match=match):
        Rotate(**options)


# matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 48, 60, 64, 96, 200, 576, 896, 960])
def test_hadamard_matrices_are_of_signs_with_orthogonal_rows(size):
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 45, 52, 92])
def test_sizes_without_a_known_one_have_none(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [2, 3, 45, 64, 576])
def test_rotations_are_orthogonal_and_keep_means_where_they_should(size, keeps_mean):
    matrix, one = rotation(size, 1, keeps_mean=keeps_mean), torch.ones(size, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix @ one, one, atol=1e-11) is (keeps_mean or torch.equal(matrix @ one, one))
    assert size < 64 or float(matrix.abs().max()) < 6 / size**0.5  # no feature keeps to itself
    assert not keeps_mean or torch.allclose(one @ matrix, one, atol=1e-11)
