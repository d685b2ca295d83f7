"""sqnr_db and compare against closed forms."""

import math

import pytest
import torch

import torchquant as tq


def test_a_tenth_of_the_amplitude_as_noise_is_20_db():
    x = torch.randn(100)
    assert tq.sqnr_db(x, 1.1 * x) == pytest.approx(20, abs=1e-4)


def test_halving_the_noise_gains_6_db():
    x, noise = torch.randn(100), torch.randn(100)
    assert tq.sqnr_db(x, x + noise / 2) - tq.sqnr_db(x, x + noise) == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_equal_tensors_are_infinitely_close_and_nan_infinitely_far():
    x = torch.randn(5)
    assert tq.sqnr_db(x, x) == math.inf
    assert tq.sqnr_db(torch.zeros(5), torch.zeros(5)) == math.inf
    assert tq.sqnr_db(torch.zeros(5), x) == -math.inf
    assert tq.sqnr_db(x, x * math.nan) == -math.inf


def test_sqnr_of_tensors_that_only_broadcast_is_refused():
    with pytest.raises(tq.InputError, match="shape"):
        tq.sqnr_db(torch.ones(3), torch.ones(3, 1))


def test_compare_sums_over_batches_and_outputs():
    batches = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    comparison = tq.compare(lambda x: (x, x), lambda x: (x, x + 0.5), batches)
    assert comparison.sqnr_db == pytest.approx(10 * math.log10(50 / 1.0))
    assert comparison.max_abs == 0.5
    assert comparison.agreement == 1.0


def test_agreement_is_the_share_of_rows_with_the_same_largest_element():
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 9.0], [9.0, 0.0]])
    other = rows.clone()
    other[0] = other[0].flip(0)
    assert tq.compare(lambda x: x, lambda x: other, [rows]).agreement == 0.75


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (lambda x: x[:, :1], "differ in shape"),
        (lambda x: (x, x), "differ in shape"),
        (lambda x: x.long(), "differ in shape"),
    ],
)
def test_outputs_that_do_not_match_are_refused(candidate, words):
    with pytest.raises(tq.InputError, match=words):
        tq.compare(lambda x: x, candidate, [torch.randn(2, 3)])


def test_nothing_to_compare_is_refused():
    with pytest.raises(tq.InputError, match="no batch"):
        tq.compare(lambda x: x, lambda x: x, [])
    with pytest.raises(tq.InputError, match="no tensor"):
        tq.compare(lambda x: None, lambda x: None, [torch.randn(2, 3)])


def test_integers_are_compared_for_equality():
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 9.0], [9.0, 0.0]])
    comparison = tq.compare(lambda x: (x.argmax(1), x), lambda x: (torch.tensor([1, 0, 1, 1]), x), [x])
    assert comparison.agreement == 0.75
    assert [o.is_float for o in comparison.outputs] == [False, True]
    assert comparison.sqnr_db == math.inf


def test_a_channel_whose_values_are_lost_is_named_though_the_others_drown_it():
    x = torch.randn(2, 8, 4, 4) * torch.tensor([1e3] * 7 + [1.0]).reshape(1, 8, 1, 1)
    close = x + 1e-3 * torch.randn(2, 8, 4, 4)
    lost = close.clone()
    lost[:, 7] = 0
    outputs = [tq.compare(lambda x: x, lambda x, y=y: y, [x]).outputs[0] for y in (close, lost)]
    assert [o.lost for o in outputs] == [None, (1, 7)]
    assert outputs[1].sqnr_db > 60


def test_a_model_that_writes_into_its_input_is_compared_on_the_same_input():
    assert tq.compare(lambda x: x.mul_(2), lambda x: x.mul_(2), [torch.randn(2, 3)]).sqnr_db == math.inf


def test_a_nan_output_has_no_largest_difference():
    comparison = tq.compare(lambda x: x, lambda x: x * math.nan, [torch.randn(2, 3)])
    assert comparison.sqnr_db == -math.inf
    assert not comparison.max_abs < math.inf


def test_infinities_at_the_same_places_are_no_noise():
    """Masked logits are minus infinity on both sides."""
    comparison = tq.compare(lambda x: x, lambda x: x.clone(), [torch.tensor([[1.0, -math.inf]])])
    assert comparison.sqnr_db == math.inf
    assert comparison.max_abs == 0
