"""Graphs and programs are called by one signature: any order of names and keys, constants, sizes that depend."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from nets import Call
from torch import nn
from torch.utils import _pytree as pytree

import torchquant as tq
from torchquant.artifacts.serialize import export_again
from torchquant.backends import inductor_x86
from torchquant.calibration import batches as data
from torchquant.fx.signature import Constant, InputSpec, Signature
from torchquant.quantizers import X86Quantizer

Pair = namedtuple("Pair", "first second")


@dataclass
class Scores:
    left: torch.Tensor
    right: torch.Tensor


pytree.register_dataclass(Scores)


class Match(nn.Module):
    """Dicts, keywords, None, a number and a bool among the arguments, a dataclass as the output."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, features, scale=1.0, *, weights, mask=None, flag=True):
        x = self.left(features["user"]) - 2 * self.right(features["item"]) * scale
        x = self.head(x.relu()) * weights.first - weights.second
        return Scores(x if mask is None else x * mask, x + flag)


def match_batch(n=4):
    features = {"user": torch.randn(n, 8), "item": torch.randn(n, 8) + 1}
    return features, Pair(torch.rand(n, 1), torch.rand(n, 1))


def match_graph():
    features, pair = match_batch()
    model = Match().eval()
    exported = torch.export.export(model, (features, 0.5), {"mask": None, "weights": pair, "flag": False}).module()
    return model, exported


def test_leaves_stand_in_the_order_of_the_placeholders_however_the_call_is_written():
    _, graph = match_graph()
    features, pair = match_batch()
    turned = OrderedDict(reversed(features.items()))
    signature = Signature.of(graph)
    wanted = [features["user"], features["item"], 0.5, None, *pair, False]
    calls = [
        ((features, 0.5), {"mask": None, "weights": pair, "flag": False}),
        ((turned,), {"flag": False, "weights": tuple(pair), "scale": 0.5}),
        ((), {"weights": list(pair), "features": turned, "flag": False, "scale": 0.5, "mask": None}),
        ((turned, 0.5, None, pair, False), {}),
    ]
    for args, kwargs in calls:
        leaves = signature.leaves(args, kwargs)
        assert all(a is b or a == b for a, b in zip(leaves, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, k: ((a[0], 0.7), k), "scale.*exported with 0.5.*got 0.7"),
        (lambda a, k: (a, {**k, "mask": torch.ones(4, 3)}), "mask.*exported with None.*tensor"),
        (lambda a, k: (a, {**k, "flag": True}), "flag.*exported with False"),
        (lambda a, k: (a, {"mask": None, "flag": False}), "has no 'weights'"),
        (lambda a, k: (a, {**k, "wieghts": 1}), "no argument 'wieghts'.*features, scale"),
        (lambda a, k: ((*a, 1, 2, 3, 4), {}), "has 6 arguments, the model takes 5"),
        (lambda a, k: (({"user": a[0]["user"]}, 0.5), k), r"keys \['user', 'item'\]"),
        (lambda a, k: (({**a[0], "item": a[0]["item"].double()}, 0.5), k), "expected torch.float32, got torch.float64"),
        (lambda a, k: (({**a[0], "item": a[0]["item"].numpy()}, 0.5), k), "torch.from_numpy"),
        (lambda a, k: (a, {**k, "features": a[0]}), "given twice"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_by_the_name_of_the_argument(change, words):
    _, graph = match_graph()
    features, pair = match_batch()
    args, kwargs = change((features, 0.5), {"mask": None, "weights": pair, "flag": False})
    with pytest.raises(tq.InputError, match=words):
        Signature.of(graph).leaves(args, kwargs)


def test_a_stored_signature_binds_and_restores_as_before_or_in_plain_dicts():
    _, graph = match_graph()
    features, pair = match_batch()
    signature = Signature.of(graph)
    again = Signature.from_json(signature.to_json())
    kwargs = {"weights": pair, "flag": False, "scale": 0.5}
    pairs = zip(signature.leaves((features,), kwargs), again.leaves((features,), kwargs), strict=True)
    assert all(a is b or a == b for a, b in pairs)
    assert isinstance(signature.outputs([1, 2]), Scores)
    assert again.outputs([1, 2]) == {"left": 1, "right": 2}  # Scores has no name that could be stored


def test_outputs_that_are_no_tensors_stand_where_the_model_has_them():
    graph = torch.export.export(Call(lambda m, x: {"a": (x + 1, None, 3), "b": "text"}), (torch.ones(2),)).module()
    outputs = Signature.from_json(Signature.of(graph).to_json()).outputs([torch.zeros(2)])
    assert outputs["a"][1:] == (None, 3)
    assert outputs["b"] == "text"


def test_a_program_takes_every_order_of_arguments_strided_tensors_and_is_the_same_after_loading(tmp_path):
    model, graph = match_graph()
    quantized = tq.quantize(
        graph,
        None,
        [(f, 0.5, None, p, False) for f, p in (match_batch() for _ in range(4))],
        quantizer=X86Quantizer(),
        algorithms=(),
        progress=False,
    )
    features, pair = match_batch()
    program = inductor_x86.lower(quantized, (features, 0.5, None, pair, False), tune=False)
    strided = {"item": torch.randn(8, 4).t() + 1, "user": torch.randn(8, 4).t()}
    assert (
        tq.sqnr_db(model(strided, 0.5, weights=pair, flag=False).left, program(strided, 0.5, None, pair, False).left)
        > 15
    )
    right = quantized(strided, 0.5, mask=None, weights=pair, flag=False)
    for run in (program, inductor_x86.load(program.save(tmp_path / "model.pt2"))):
        outputs = run(weights=pair, flag=False, features=strided, scale=0.5)
        assert isinstance(outputs, Scores if run is program else dict)
        outputs = outputs if isinstance(outputs, dict) else vars(outputs)
        assert all(tq.sqnr_db(vars(right)[name], outputs[name]) > 40 for name in ("left", "right"))
        with pytest.raises(tq.InputError, match=r"scale.*0\.5"):
            run(strided, 1.0, weights=pair, flag=False)


# sizes ---------------------------------------------------------------------------------------------------------------


def rows(m, x, index):
    """Row i of the first half plus row i of the second half, at given rows."""
    n = x.shape[0] // 2
    return m.inner(x[:n] + x[n:]) + m.inner(x[:n])[index].mean()


def rows_graph(most=8):
    n = torch.export.Dim("n", min=2, max=most)
    shapes = ({0: 2 * n}, {0: torch.export.Dim.AUTO})
    model = Call(lambda m, x, index: rows(m, x, index), inner=nn.Linear(4, 4)).eval()
    example = (torch.randn(6, 4), torch.tensor([0, 1, 1]))
    return model, tq.export(model, example, dynamic_shapes=(shapes,)), example


def test_sizes_that_derive_from_others_are_known_with_their_bounds():
    _, graph, _ = rows_graph()
    size = Signature.of(graph).tensors[0].sizes[0]
    assert (size.factor, size.maximum) == (2, 16)


@pytest.mark.parametrize(("n", "words"), [(7, "7"), (18, "<= 16")])
def test_a_size_that_the_export_excludes_is_refused(n, words):
    _, graph, example = rows_graph()
    with pytest.raises(tq.InputError, match=words):
        Signature.of(graph).leaves((torch.randn(n, 4), example[1]), {})


def test_inputs_that_share_a_size_must_agree():
    batch = torch.export.Dim("batch")
    model = Call(lambda m, x, y: m.inner(x) * y, inner=nn.Linear(4, 4))
    graph = tq.export(model, (torch.randn(3, 4), torch.randn(3, 4)), dynamic_shapes=(({0: batch}, {0: batch}),))
    with pytest.raises(tq.InputError, match="depend on each other"):
        Signature.of(graph).leaves((torch.randn(3, 4), torch.randn(2, 4)), {})


def test_a_graph_is_exported_again_with_its_sizes_whatever_the_example_has():
    _, graph, _ = rows_graph()
    for example in ((torch.randn(4, 4), torch.tensor([0])), (torch.randn(16, 4), torch.tensor([0, 1]))):
        again = export_again(graph, example).module()
        spec = Signature.of(again).tensors
        assert spec[0].shape == (None, 4)
        assert spec[1].shape == (None,)
        x, index = torch.randn(10, 4), torch.tensor([4, 0, 2, 2])
        assert torch.allclose(again(x, index), graph(x, index))


def test_a_program_with_derived_sizes_runs_at_all_of_them():
    _, graph, example = rows_graph()
    quantized = tq.quantize(
        graph, None, [example, (3 * example[0], example[1])], quantizer=X86Quantizer(), algorithms=(), progress=False
    )
    program = inductor_x86.lower(quantized, example, tune=False)
    for n, index in ((4, [1]), (10, [4, 0, 2, 2]), (16, [7, 7])):
        x, at = torch.randn(n, 4), torch.tensor(index)
        assert tq.sqnr_db(quantized(x, at), program(x, at)) > 40
    with pytest.raises(tq.InputError, match="<= 16"):
        program(torch.randn(18, 4), torch.tensor([0]))


def test_an_example_is_made_up_for_every_kind_of_input():
    _, graph = match_graph()
    args, kwargs = data.split(data.example_of(graph))
    assert len(Signature.of(graph).leaves(args, kwargs)) == 7
    assert [type(s) for s in Signature.of(graph).inputs[2:4]] == [Constant, Constant]
    assert isinstance(Signature.of(graph).inputs[0], InputSpec)


def test_the_largest_sizes_are_those_of_the_bounds_or_what_a_limit_allows():
    rows, length = torch.export.Dim("rows", max=8), torch.export.Dim("length", max=20)
    model = Call(lambda m, x, y: x.sum() + y, a=nn.Linear(1, 1))
    batch = (torch.randn(2, 5, 3), torch.randn(2))
    signature = Signature.of(tq.export(model, batch, dynamic_shapes=(({0: rows, 1: length}, {0: rows}),)))
    shapes = lambda limit: [tuple(t.shape) for t in data.with_largest_sizes(signature, list(batch), limit)]  # noqa: E731
    assert shapes(10_000) == [(8, 20, 3), (8,)]
    assert shapes(200) == [(4, 10, 3), (4,)]
    assert data.with_largest_sizes(signature, list(batch), 32) is None
    largest = data.with_largest_sizes(signature, list(batch), 10_000)
    assert torch.equal(largest[0][6:8, :5], batch[0])  # the example, repeated
