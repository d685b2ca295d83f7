"""Whose memory a value of a graph shares."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from torchquant.fx import ops

COPIES = ("copy_", "clone", "lift_fresh_copy")  # whatever their fake values say


def name_of(node: Node) -> str:
    """The bare name of the operator that a node calls, e.g. `slice`; empty for everything else."""
    schema = ops.schema_of(node)
    return "" if schema is None else schema.name.split("::")[-1]


def source_of(node: Node) -> Node | None:
    """The node whose memory the node's value shares, if it shares any."""
    if node.target is operator.getitem:
        several = node.args[0]
        return several if isinstance(several, Node) and source_of(several) is not None else None
    schema = ops.schema_of(node)
    first = next(iter(node.all_input_nodes), None)
    if schema is None or first is None or name_of(node) in COPIES:
        return None
    output_storages, input_storages = _storages(node.meta.get("val")), _storages(first.meta.get("val"))
    if output_storages and input_storages:
        return first if output_storages & input_storages else None
    viewed = schema.arguments[0].alias_info
    return first if viewed is not None and not viewed.is_write else None


def memory_of(node: Node) -> Node:
    """The node whose memory a node's value shares in the end; itself if it has its own."""
    while (source := source_of(node)) is not None:
        node = source
    return node


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)}
