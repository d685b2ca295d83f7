"""What a long call is doing, said on a terminal and nowhere else."""

import inspect
import io

import pytest
from rich.console import Console

from torchquant.backends import executorch_xnnpack, inductor_x86
from torchquant.lowering.stages import stages


def shown(terminal: bool, progress: bool) -> str:
    file = io.StringIO()
    with stages("lowering", progress, Console(file=file, force_terminal=terminal, width=80)) as stage:
        stage("compiling")
        stage("proving it")
    return file.getvalue()


def test_a_terminal_shows_the_stage_and_forgets_the_line():
    text = shown(terminal=True, progress=True)
    assert "lowering: proving it" in text
    assert text.rstrip().endswith("\x1b[2K")  # the line is erased


def test_nothing_is_shown_without_a_terminal_or_when_nobody_wants_it():
    assert shown(terminal=False, progress=True) == shown(terminal=True, progress=False) == ""


def test_an_error_inside_goes_through():
    with pytest.raises(ValueError, match="inside"), stages("lowering", True):
        raise ValueError("inside")


@pytest.mark.parametrize("backend", [executorch_xnnpack, inductor_x86])
def test_lowering_has_the_parameter_of_calibration(backend):
    assert inspect.signature(backend.lower).parameters["progress"].default is True
