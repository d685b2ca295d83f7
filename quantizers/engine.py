"""The one Quantizer: it annotates from a target's capability table and from nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_

from torchquant.errors import SchemeError, TorchquantWarning
from torchquant.formats.encoded import EncodedFormat
from torchquant.fx import dataflow, ops, passes
from torchquant.fx.batch_axes import add_batch_axes
from torchquant.fx.functional import functionalize
from torchquant.fx.patterns import match
from torchquant.fx.reading import is_observer
from torchquant.fx.sites import CONSTANT, note
from torchquant.fx.windows import window_of
from torchquant.lowering.target import Target, brief
from torchquant.observers.encoded import EncodedWeight
from torchquant.observers.minmax import (
    ActivationMinMax,
    DynamicActivation,
    GroupWeight,
    MovingActivation,
    PerChannelWeight,
    PerTokenActivation,
)
from torchquant.observers.scaled import ScaledActivation, ScaledDynamicActivation, ScaledTensorWeight, ScaledWeight
from torchquant.training.fakes import Fake
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CapabilityQuantizer", "has_quantized_output", "is_annotated"]


class CapabilityQuantizer(Quantizer):
    """Annotates every op that `capabilities` runs in the scheme asked for, and records why the others stay float.

    Args:
        scheme: name of the scheme for the whole model; the target's default if None.
        exclude: patterns (see `torchquant.fx.patterns.match`) of what shall stay float.
        overrides: pattern -> scheme name, or None to exclude; later entries win.
        is_qat: insert fake quantizers, for `torchquant.qat.prepare` and `prepare_qat_pt2e`.
        observer: constructor of the static activation observer.

    Raises:
        SchemeError: an unknown scheme.
        PatternError: a pattern matches nothing (raised by `prepare_pt2e`).
    """

    target: ClassVar[Target]
    capabilities: ClassVar[tuple[Capability, ...]]  # these four are the target's unless a class has its own
    schemes: ClassVar[Mapping[str, Scheme]]
    default_scheme: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "target" in vars(cls):
            target = cls.target
            own = {"capabilities": target.capabilities, "schemes": target.schemes, "dtypes": target.dtypes}
            for name, value in {**own, "default_scheme": next(iter(target.schemes))}.items():
                if name not in vars(cls):
                    setattr(cls, name, value)

    def __init__(
        self,
        scheme: str | None = None,
        *,
        exclude: Sequence[str] = (),
        overrides: Mapping[str, str | None] | None = None,
        is_qat: bool = False,
        observer: Callable[..., Any] = ActivationMinMax,
    ) -> None:
        super().__init__()
        if isinstance(exclude, str):
            raise SchemeError(f"exclude takes a list of patterns; write exclude=[{exclude!r}]")
        self.scheme = self._known(scheme or self.default_scheme)
        self.overrides: dict[str, str | None] = {**dict.fromkeys(exclude), **(overrides or {})}
        self.is_qat = is_qat
        for name in (self.scheme, *self.overrides.values()):
            if name is not None:
                self._known(name)
        self.observer = observer
        self._fakes: dict[tuple[TensorSpec, int, bool], Any] = {}
        self._rows = {row.op: row for row in self.capabilities}

    def _known(self, scheme: str) -> str:
        if scheme not in self.schemes:
            raise SchemeError(f"{self.target} runs no scheme {scheme!r}; choose from {brief(self.schemes)}")
        return scheme

    # torchao's interface -------------------------------------------------------------------------------------

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Make ops visible: no_grad regions inlined, products as linears of batches, writes in place as values."""
        inlined = passes.inline_regions(model)
        functionalize(model)
        if inlined and not self.is_qat:
            _fuse_conv_bn_(model)
            _fuse_linear_bn_(model)
        passes.constant_matmul_to_linear(model)
        add_batch_axes(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate in graph order; ops that another Quantizer has annotated are left to it."""
        wanted = self._wanted(model)
        data = dataflow.data_nodes(model)
        self._derived = dataflow.derived_nodes(model)
        for node in [n for n, scheme in wanted.items() if scheme is None and ops.is_higher_order(n)]:
            note(node, "excluded", "excluded by the user")
        for node in [n for n in model.graph.nodes if ops.is_op(n) and (n in data or _is_compute(n))]:
            if passes.is_rotation(model, node):
                note(node, "excluded", "a Hadamard rotation, whose entries are signs")
            elif not is_annotated(node):
                self._annotate(node, wanted, data)
        self._warn_of_dtype(model)
        return model

    def _warn_of_dtype(self, model: GraphModule) -> None:
        """Say so where nothing is annotated because the model computes in another dtype than the target's kernels."""
        nodes = [n for n in model.graph.nodes if _is_compute(n)]
        inputs = [i for n in nodes for i in ops.data_inputs(n, ops.kind_of(n)) if "val" in i.meta]  # type: ignore[arg-type]
        others = {i.meta["val"].dtype for i in inputs} - set(self.dtypes)
        if others and not any(map(is_annotated, nodes)) and not any(i.meta["val"].dtype in self.dtypes for i in inputs):
            computed, taken = (" or ".join(sorted(_name(d) for d in dtypes)) for dtypes in (others, self.dtypes))
            warnings.warn(
                f"{type(self).__name__} annotated nothing: the model computes in {computed}, and {self.target} takes "
                f"{taken}. Convert the model first, e.g. with model.float(), and its inputs, then export it again.",
                TorchquantWarning,
                stacklevel=5,
            )

    def validate(self, model: GraphModule) -> None:
        """Nothing is left to check: `annotate` accounts for every op as it goes."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Name each observer's site, and run the weight observers: weights need no calibration data."""
        for place, observer in edge_or_node_to_obs_or_fq.items():
            producer, user = place if isinstance(place, tuple) else (place, None)
            inner = getattr(observer, "activation_post_process", observer)
            if hasattr(inner, "site"):
                inner.site = _describe_place(producer, user)
            if getattr(inner, "observes_weight", False) and is_observer(observer):
                inner(ops.constant_value(model, producer))

    # the engine ----------------------------------------------------------------------------------------------

    def _wanted(self, model: GraphModule) -> dict[Node, str | None]:
        """What the user's patterns ask of each node: a scheme name, or None for float."""
        return {n: scheme for pattern, scheme in self.overrides.items() for n in match(model, pattern)}

    def _annotate(self, node: Node, wanted: Mapping[Node, str | None], data: set[Node]) -> None:
        scheme = wanted.get(node, self.scheme)
        if scheme is None:
            note(node, "excluded", "excluded by the user")
            return
        row = self._rows.get(ops.op_name(node))
        scheme, why = self.scheme_for(node, scheme)
        reason = self.why_float(node, row, scheme, data)
        if reason or row is None:
            note(node, "unsupported", reason)
        elif row.role == "shared":
            self._share(node, row, scheme)
        else:
            self._observe(node, row, scheme, why, [n for n, s in wanted.items() if s is None])

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """The scheme that this node gets where `scheme` was asked for, and why it is another one."""
        return scheme, ""

    def smaller_groups(self, node: Node, scheme: str) -> tuple[str, str]:
        """The scheme alike with the largest group of weights that divides the input features, and why it is taken.

        Without a group that does, and for transposed convolutions, whose second axis are outputs: one scale for each
        output channel, if there is such a scheme.
        """
        weight, kind = self.schemes[scheme].weight, ops.kind_of(node)
        if weight is None or weight.group_size is None or kind is None or kind.weight is None:
            return scheme, ""
        source = ops.argument(node, kind.weight)
        shape = None if source is None else ops.shape_of(source)
        if shape is None or (kind.axis == 0 and shape[1] % weight.group_size == 0):
            return scheme, ""
        alike = {
            s.weight.group_size: s.name
            for s in self.schemes.values()
            if s.weight is not None
            and s.activation == self.schemes[scheme].activation
            and (s.weight.format.bits, s.weight.symmetric) == (weight.format.bits, weight.symmetric)
        }
        fitting = [n for n in alike if n and n < weight.group_size and kind.axis == 0 and shape[1] % n == 0]
        chosen = max(fitting) if fitting else None
        why = f"its {shape[1]} inputs are no multiple of {weight.group_size}" if kind.axis == 0 else "it is transposed"
        return (alike[chosen], why) if chosen in alike else (scheme, "")

    def why_float(self, node: Node, row: Capability | None, scheme: str, data: set[Node]) -> str:
        """The reason why `node` cannot run in `scheme` here; empty if it can."""
        kind = ops.kind_of(node)
        if row is None or kind is None:
            return f"{self.target} has no quantized kernel for {ops.op_name(node)}, so it runs in float"
        if not row.schemes:
            return row.reason
        if scheme not in row.schemes:
            return f"{self.target} runs {row.op} in {brief(row.schemes)}, not in {scheme}"
        inputs = ops.data_inputs(node, kind)
        if row.role == "weighted" and any(n not in self._derived for n in inputs):
            return CONSTANT
        reads_data = kind.data != ()  # a lookup reads its weight and integers alone
        if (reads_data and not inputs) or (row.role != "weighted" and any(n not in data for n in inputs)):
            return "an operand does not depend on the model's data (a mask, a position, a constant)"
        floats = inputs if reads_data else [n for n in node.all_input_nodes if ops.is_float(n)]
        if any(n.meta["val"].dtype not in self.dtypes for n in floats if "val" in n.meta):
            names = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"its input is not {names}; export a {names} model"
        if row.role != "weighted" and not all(has_quantized_output(n) for n in inputs):
            return "its input is float here, so running it in int8 would only add rounding"
        if row.role == "weighted":
            weights = ops.weights_of(node, kind)
            if not weights or not all(map(ops.is_constant, weights)):
                return "its weight is computed at run time, so it has no codes to store"
        return (row.condition(node, scheme) if row.condition else None) or ""

    def _observe(self, node: Node, row: Capability, scheme: str, why: str, excluded: Sequence[Node]) -> None:
        kind = ops.BY_NAME[row.op]
        spec = self.schemes[scheme]
        tensor = spec.activation
        if tensor is not None and tensor.granularity == "token" and not _has_tokens(node, row, tensor):
            tensor = replace(tensor, granularity="tensor")
        activation = self._spec(tensor, -1 if row.op == "linear" else 1) if tensor is not None else None
        inputs: dict[Node, Any] = dict.fromkeys(ops.data_inputs(node, kind), activation) if activation else {}
        if row.role == "weighted" and spec.weight is not None:
            for weight in ops.weights_of(node, kind):
                inputs[weight] = self._spec(spec.weight, kind.axis, is_weight=True)
        tail = self._fused_tail(node, row, excluded)
        output = activation if row.observe_output and not spec.dynamic else None
        _mark(node, inputs, output if tail is node else None)
        note(node, "quantized", why, scheme)
        if tail is not node:
            _mark(tail, {}, output)
            note(tail, "quantized", f"fused into {node.name}")

    def _fused_tail(self, node: Node, row: Capability, excluded: Sequence[Node]) -> Node:
        """The last node that the target computes in the same kernel as `node`."""
        folded = self.is_qat and row.op.startswith("conv")  # torchao folds BatchNorm into convolutions alone
        fuses = (*row.fuses, "batch_norm") if folded else row.fuses
        tail = node
        while len(tail.users) == 1:
            user = next(iter(tail.users))
            if ops.op_name(user) not in fuses or is_annotated(user) or user in excluded or ops.kind_of(user) is None:
                break
            tail = user
            if ops.op_name(user) != "batch_norm":
                break
        return tail

    def _share(self, node: Node, row: Capability, scheme: str) -> None:
        """Keep the qparams of the input, if the inputs are quantized already."""
        inputs = ops.data_inputs(node, ops.BY_NAME[row.op])
        activation = self.schemes[scheme].activation
        assert activation is not None
        first = (inputs[0], node)
        specs: dict[Node, Any] = {n: SharedQuantizationSpec(first) for n in inputs}
        specs[inputs[0]] = self._spec(activation)
        _mark(node, specs, SharedQuantizationSpec(first))
        note(node, "quantized", "shares its input's qparams")

    def _spec(self, tensor: TensorSpec, axis: int = 0, *, is_weight: bool = False) -> QuantizationSpec:
        """torchao's spec for a tensor of ours; `axis` is a weight's channel axis or the axis that makes up a token."""
        per_channel, by_token = tensor.granularity == "channel", tensor.granularity == "token"
        own_chain = by_token or (tensor.dynamic and tensor.symmetric)
        return QuantizationSpec(
            dtype=tensor.format.dtype,
            observer_or_fake_quant_ctr=self._constructor(tensor, axis, is_weight),
            quant_min=tensor.format.quant_min,
            quant_max=tensor.format.quant_max,
            qscheme=tensor.qscheme,
            # torchao shares an observer between users whose specs are alike, and takes no negative axis
            ch_axis=axis % 64 if per_channel or by_token else None,
            is_dynamic=tensor.dynamic and not own_chain,  # torchao's passes know one form of dynamic chain only
        )

    def _constructor(self, tensor: TensorSpec, axis: int, is_weight: bool) -> Any:
        """Constructor of the observer, or of the fake quantizer around it: one for like specs, which torchao shares."""
        observer = self._observer(tensor, axis, is_weight)
        if not self.is_qat:
            return observer
        channels = {"ch_axis": axis} if is_weight and tensor.granularity == "channel" else {}
        return self._fakes.setdefault((tensor, axis, is_weight), Fake.with_args(observer=observer, **channels))

    def _observer(self, tensor: TensorSpec, axis: int, is_weight: bool) -> Any:
        """Constructor of the observer."""
        per_channel, is_float = tensor.granularity == "channel", tensor.format.is_float
        if isinstance(tensor.format, EncodedFormat):
            axis_of_cells = axis if per_channel else None
            form = {"format": tensor.format, "axis": axis_of_cells, "group_size": tensor.group_size}
            return EncodedWeight.with_args(**form)
        if tensor.dynamic and tensor.symmetric:
            return ScaledDynamicActivation.with_args(axis=axis if tensor.granularity == "token" else None)
        if tensor.dynamic:
            return PerTokenActivation if tensor.granularity == "token" else DynamicActivation
        if is_float and is_weight:
            return ScaledWeight if per_channel else ScaledTensorWeight
        if is_float:
            return ScaledActivation
        if tensor.granularity == "group":
            options = {"symmetric": tensor.symmetric, "stored_as": tensor.scale_dtype}
            return GroupWeight.with_args(group_size=tensor.group_size, **options)
        if per_channel:
            return PerChannelWeight
        moves = self.is_qat and self.observer is ActivationMinMax  # extremes of a training only grow
        return MovingActivation if moves else self.observer


def _has_tokens(node: Node, row: Capability, tensor: TensorSpec) -> bool:
    """Whether vectors of the activation may have a scale each: rows of a linear, pixels that are read one by one."""
    if row.op == "linear":
        return True
    kernel = ops.shape_of(node.args[1])[2:] if row.op.startswith("conv") else ()  # type: ignore[arg-type,index]
    return tensor.symmetric and (not kernel or window_of(node, kernel).one_pixel)  # type: ignore[arg-type]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_compute(node: Node) -> bool:
    kind = ops.kind_of(node)
    return kind is not None and kind.compute


def is_annotated(node: Node) -> bool:
    """Whether a Quantizer has annotated the node."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation._annotated


def _mark(node: Node, inputs: dict[Node, Any], output: Any) -> None:
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, output, _annotated=True)


def has_quantized_output(node: Node) -> bool:
    """Whether the node's output is annotated to be quantized."""
    return is_annotated(node) and node.meta[Q_ANNOTATION_KEY].output_qspec is not None


def _describe_place(producer: Node, user: Node | None) -> str:
    node = user or producer
    module = ops.module_path(node)
    where = f" in {module}" if module else ""
    return f"output of {producer.name}{where}" if user is None else f"{producer.name}, input of {user.name}{where}"
