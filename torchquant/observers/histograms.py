"""The search for a quantization range: on a histogram of streamed values, and on the rows of a weight.

Legend: counts (bins,), edges (bins + 1,) float64, evenly spaced; for K candidates low, high, scale, zero_point (K,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = [
    "count_values",
    "fold",
    "kl_divergence",
    "lp_error",
    "placement",
    "quantiles",
    "search_factor",
    "search_range",
    "widest_factor",
]

Pair = tuple[torch.Tensor, torch.Tensor]
Codes = tuple[int, int]  # quant_min, quant_max


# the histogram -----------------------------------------------------------------------------------------------


def placement(low: float, high: float, bins: int) -> tuple[int, int]:
    """Where a histogram of `bins` bins lies: bin i is [(first + i) * 2**exponent, (first + i + 1) * 2**exponent).

    Zero is an edge, and growing doubles the width: bins merge in pairs and no count is ever split. So the histogram
    depends on the values alone, not on how they came in batches. Between half of the bins and all are in use.
    """
    width = max((high - low) / (bins - 1), max(abs(low), abs(high)) * 2**-22, 2**-126)
    mantissa, exponent = math.frexp(width)
    exponent -= mantissa == 0.5
    return exponent, math.floor(math.ldexp(low, -exponent))


def count_values(x: torch.Tensor, exponent: int, first: int, bins: int) -> Pair:
    """Counts (bins,) int64 of the values other than zero of float32 `x`, and how many zeros it holds, () int64."""
    index = (x.flatten() * 2.0**-exponent).floor_().to(torch.int32) - first
    counts = torch.bincount(index.clamp_(0, bins - 1), minlength=bins)
    zeros = x.numel() - torch.count_nonzero(x)
    if 0 <= -first < bins:
        counts[-first] -= zeros
    return counts, zeros


def fold(counts: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """The same counts in the bins of another (exponent, first) that covers them."""
    index = old[1] + torch.arange(len(counts), device=counts.device)
    index = ((index >> min(new[0] - old[0], 62)) - new[1]).clamp_(0, len(counts) - 1)
    return torch.zeros_like(counts).index_add_(0, index, counts)


def quantiles(counts: torch.Tensor, edges: torch.Tensor, zeros: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The quantiles `q` (float64, in [0, 1]) as `torch.quantile` has them, each less than a bin's width off."""
    split = int((edges < 0).sum().clamp(max=len(counts)))
    zero = edges.new_zeros(1)
    counts = torch.cat([counts[:split], zeros.reshape(1).to(counts), counts[split:]])
    left = torch.cat([edges[:split], zero, edges[split:-1]])
    right = torch.cat([edges[1 : split + 1], zero, edges[split + 1 :]])
    below = counts.cumsum(0)
    rank = q * (below[-1] - 1)

    def value(rank: torch.Tensor) -> torch.Tensor:
        i = torch.searchsorted(below, rank, right=True).clamp_(max=len(counts) - 1)
        share = (rank - below[i] + counts[i] + 0.5) / counts[i]
        return left[i] + share * (right - left)[i]

    return torch.lerp(value(rank.floor()), value(rank.ceil()), rank.frac())


# scores of candidates ----------------------------------------------------------------------------------------


def lp_error(counts: torch.Tensor, edges: torch.Tensor, grid: Pair, codes: Codes, p: float) -> torch.Tensor:
    """Sum of |x - Q(x)|**p for each of the K grids (scale, zero_point), exact for values spread evenly in each bin.

    With k(x) the code less the zero point and d = x - k s, the integral of |x - Q(x)|**p up to x is
    F(x) = [2 k (s/2)**(p+1) + sign(d) |d|**(p+1)] / (p+1), clipping included; a bin's error is F over its ends.
    So bins may be wider than the scale, as they are for 16 bits.
    """
    scale, zero_point = (t.double().unsqueeze(1) for t in grid)
    k = (edges / scale).round_().clamp_(codes[0] - zero_point, codes[1] - zero_point)
    d = edges - k * scale
    integral = d.abs().pow_(p + 1).copysign_(d).add_(k.mul_(2 * (scale / 2) ** (p + 1)))
    return integral.diff(dim=1) @ (counts / edges.diff()) / (p + 1)


def kl_divergence(counts: torch.Tensor, edges: torch.Tensor, grid: Pair, codes: Codes) -> torch.Tensor:
    """KL(P || Q) for each of the K grids, in nats; infinite where fewer bins are kept than there are codes.

    Migacz: "8-bit Inference with TensorRT", GTC 2017. P: the kept bins, what is clipped added to the outermost ones.
    Q: the kept bins without it, each code's mass spread evenly over those of its bins that P does not have empty; a
    code that clipped values alone reach counts one value, so that a range may end in a gap.
    The limit is the paper's: a range of fewer bins loses nothing to rounding, and of a single bin nothing at all.
    """
    bins, total = len(counts), counts.sum()
    scale, zero_point = (t.double().unsqueeze(1) for t in grid)
    k = torch.arange(codes[0], codes[1] + 2, dtype=torch.float64) - 0.5
    cut = (((k - zero_point) * scale - edges[0]) / (edges[1] - edges[0])).round_().clamp_(0, bins).long()
    first, last = cut[:, 0].clamp(max=bins - 1), (cut[:, -1] - 1).clamp(min=0)

    def between(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.new_zeros(1), values.cumsum(0)])[cut].diff(dim=1)

    mass, filled = between(counts), between((counts > 0).double())
    entropy = between(torch.xlogy(counts, counts)).sum(1)
    clipped = mass.clone()  # P of each code
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    for end, column, outside in ((first, 0, below[cut[:, 0]]), (last, -1, total - below[cut[:, -1]])):
        at = counts[end]
        entropy += torch.xlogy(at + outside, at + outside) - torch.xlogy(at, at)
        clipped[:, column] += outside
        filled[:, column] += (at == 0) & (outside > 0)
    mass += (mass == 0) & (clipped > 0)
    cross = torch.xlogy(clipped, mass / filled.clamp(min=1)).sum(1)
    divergence = (entropy - cross) / total + torch.log(mass.sum(1) / total)
    return divergence.where(cut[:, -1] - cut[:, 0] > codes[1] - codes[0], torch.inf)


# searches ----------------------------------------------------------------------------------------------------


def widest_factor(codes: Codes, symmetric: bool) -> float:
    """What a symmetric range is to be stretched by so that its ends get codes, where the codes are an even number."""
    half = (codes[1] - codes[0]) / 2
    return half / max(half // 1, 0.5) if symmetric else 1.0


def search_range(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], low: float, high: float, *, symmetric: bool, top: float
) -> Pair:
    """The (low, high) of least score, by zooming: factors from `top` down to 2**-8 for each end, then around the best.

    Args:
        score: takes low and high (K,), gives (K,); a candidate must score less than the given range to be taken.
        low, high: the range of the values; it is widened to hold zero, which every grid represents.
        symmetric: one factor for both ends.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    one = symmetric or low == 0 or high == 0
    best = torch.ones(2, dtype=torch.float64)
    least = score(best[:1] * low, best[:1] * high)[0]
    centre, coarse = best * top, torch.linspace(-8, 0, 65 if one else 17, dtype=torch.float64)
    zooms = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for octaves in (coarse, zooms / 2, zooms / 8, zooms / 32):
        steps = 2**octaves
        pairs = torch.stack([steps, steps], 1) if one else torch.cartesian_prod(steps, steps)
        pairs = (centre * pairs).clamp(max=top)
        scores = score(pairs[:, 0] * low, pairs[:, 1] * high)
        i = scores.argmin()
        if scores[i] < least:
            best, least = pairs[i], scores[i]
        centre = best
    return best[0] * low, best[1] * high


def search_factor(
    rows: torch.Tensor, qparams: Callable[[torch.Tensor], Pair], codes: Codes, p: float, top: float
) -> torch.Tensor:
    """For each row (rows, n) the factor (rows,) of its range that gives the least sum of |w - Q(w)|**p.

    Args:
        qparams: takes factors (rows,), gives scale and zero_point (rows,): what the observer would emit.
        top: the largest factor tried, besides 1; 80 steps lead down to 0.2.
    """
    few = max(2**16 // rows.shape[1], 1)  # rows whose temporaries stay in the cache
    best = torch.ones(len(rows), device=rows.device)
    least = torch.full_like(best, torch.inf, dtype=torch.float64)
    for factor in (1.0, *torch.linspace(top, 0.2, 80).tolist()):
        grids = (t.reshape(-1, 1).split(few) for t in qparams(torch.full_like(best, factor)))
        parts = zip(rows.split(few), *grids, strict=True)
        error = torch.cat([_row_errors(w, s, z, codes, p) for w, s, z in parts])
        best, least = best.where(error >= least, factor), torch.minimum(error, least)
    return best


def _row_errors(
    rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, codes: Codes, p: float
) -> torch.Tensor:
    """Sum of |w - Q(w)|**p (rows,) float64, computed as the converted graph computes Q."""
    q = (rows * (1.0 / scale)).round_().add_(zero_point).clamp_(*codes).sub_(zero_point).mul_(scale)
    return q.sub_(rows).abs_().pow_(p).sum(1, dtype=torch.float64)
