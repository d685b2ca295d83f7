"""Every error torchquant raises on purpose: it names the thing and what to do about it."""


class TorchquantError(Exception):
    """Base of all torchquant errors."""


class TorchquantWarning(UserWarning):
    """Something the user should know that does not stop the work."""


class ExportError(TorchquantError):
    """`torch.export` could not capture the model."""


class InputError(TorchquantError, ValueError):
    """An argument, a batch or a file's content has the wrong type, shape, dtype or value."""


class PatternError(TorchquantError, ValueError):
    """An exclusion or override pattern matches nothing in the model, or is malformed."""


class PrepareError(TorchquantError):
    """A Quantizer failed on a graph, or torchao on what the Quantizer asked for."""


class CalibrationError(TorchquantError):
    """Calibration is missing, empty, or met values that no range can be fitted to."""


class SchemeError(TorchquantError, ValueError):
    """A scheme or format that is unknown, malformed, or that a target does not run."""


class TrainingError(TorchquantError):
    """Training went where it cannot go on: a loss or gradients that are no numbers, a step that is not positive."""


class ParallelError(TorchquantError):
    """Under `torchrun`: another process failed, ended, or did something else; its message is in this one's."""


class LoweringError(TorchquantError):
    """A backend could not build, run or prove the artefact."""


class ArtifactError(TorchquantError):
    """A saved file is foreign, truncated, from another version, or cannot be written."""


class MissingDependencyError(TorchquantError, ImportError):
    """An optional dependency is not installed; the message names the extra."""
