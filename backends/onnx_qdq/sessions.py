"""A model in ONNX Runtime: as it stands, or with the runtime's own kernels, and what the runtime made of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from torchquant.backends.onnx_qdq.packages import runtime_package
from torchquant.errors import LoweringError
from torchquant.files.owned import OwnFolder

__all__ = ["Session", "optimized"]

_SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "1"}  # else it rounds the activations of such products to bytes


class Session:
    """A loaded model: tensors in, a tuple of tensors out; calls from several threads run side by side.

    Args:
        model: the bytes of a `.onnx` file, or its path where its weights lie beside it.
        optimize: let the runtime fuse; else it runs the operators as they stand.
        threads: of one call; as many as torch uses if None.
        optimized: where to write the model as the runtime runs it.
        profile: beginning of the name of a file with the time of each operator, written by `profile`.

    Raises:
        LoweringError: the runtime does not take the model.
    """

    def __init__(
        self,
        model: bytes | Path,
        *,
        optimize: bool = True,
        threads: int | None = None,
        optimized: Path | None = None,
        profile: Path | None = None,
    ) -> None:
        runtime = runtime_package().runtime
        options = runtime.SessionOptions()
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4
        for name, value in _SETTINGS.items():
            options.add_session_config_entry(name, value)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            weights = f"{optimized.name}.weights"  # beside it: more than 2 GB fit in no file of this kind
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        try:
            source = os.fspath(model) if isinstance(model, Path) else model
            self._session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise LoweringError(
                f"ONNX Runtime {runtime.__version__} does not take the model: {_short(error)}"
            ) from error
        self.inputs = list(self._session.get_inputs())
        self._inputs = [i.name for i in self.inputs]
        self._outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arrays = {n: t.detach().contiguous().numpy() for n, t in zip(self._inputs, tensors, strict=True)}
        try:
            values = self._session.run(self._outputs, arrays)
        except Exception as error:
            sizes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise LoweringError(f"ONNX Runtime cannot run the model on tensors of {sizes}: {_short(error)}") from error
        return tuple(torch.from_numpy(v) if v.flags.writeable else torch.from_numpy(v.copy()) for v in values)

    def profile(self) -> Path:
        """End profiling; the file with the times."""
        return Path(self._session.end_profiling())


def optimized(model: bytes | Path) -> Any:
    """The model as the runtime runs it, an `onnx.ModelProto` without its weights, and a session that runs it."""
    with OwnFolder("torchquant-onnx-") as folder:
        file = folder / "optimized.onnx"
        session = Session(model, optimized=file)
        return runtime_package().onnx.load(str(file), load_external_data=False), session


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:1500]
