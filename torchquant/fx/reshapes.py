"""Where chunks of neighbouring elements on one axis of a reshaped tensor lay before the reshape."""

from __future__ import annotations

from torch.fx import Node

from torchquant.fx import ops
from torchquant.fx.producers import ROW_MAJOR, runs, shape_behind

__all__ = ["chunk_axis"]


def chunk_axis(node: Node, axis: int, size: int) -> int | None:
    """The axis of the input that holds the chunks of `size` elements that lie on `axis` of the output.

    None where the op takes chunks apart, repeats them, or is none that moves data only.
    """
    source = ops.argument(node, 0)
    assert source is not None
    before, after = shape_behind(source), shape_behind(node)
    name, arguments, rank = ops.overload_of(node).split(".")[0], ops.arguments(node), len(before)
    if name == "permute":
        return int(arguments["dims"][axis]) % rank
    if name in ("transpose", "t"):
        first, second = (arguments["dim0"] % rank, arguments["dim1"] % rank) if name == "transpose" else (0, rank - 1)
        return second if axis == first else first if axis == second else axis
    if name == "expand":
        at = axis - len(after) + rank
        return at if at >= 0 and before[at] == after[axis] else None
    if name not in ROW_MAJOR:
        return None
    for old, new in runs(before, after):
        if axis in new:
            inner_old, inner_new = ([a for a in part if shape[a] != 1] for part, shape in ((old, before), (new, after)))
            if not inner_new or inner_new[-1] != axis or not inner_old:
                return None
            width = before[inner_old[-1]]
            return inner_old[-1] if isinstance(width, int) and width % size == 0 else None
    return None
