"""The API reference: every public name has its place in it, and says what it takes."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import torchquant as tq
from torchquant import backends
from torchquant.quantizers import CapabilityQuantizer

PAGES = Path(__file__).parents[1] / "docs" / "api"
MODULES = ["torchquant", "torchquant.qat", "torchquant.quantizers"]
MODULES += [f"torchquant.backends.{name}" for name in backends.names()]
MADE = (tq.Program, BaseException)  # constructed by nobody but us, or from a message
PUBLIC = [(module, name) for module in MODULES for name in import_module(module).__all__]
DATA = ("SCHEMES", "CAPABILITIES", "TARGET")
DOCUMENTED = [(m, n) for m, n in PUBLIC if n not in DATA and not inspect.ismodule(getattr(import_module(m), n))]


def described():
    """Names that the pages take in, with their modules."""
    found = set()
    for page in PAGES.glob("*.md"):
        module = ""
        for kind, value in re.findall(r"\.\. (currentmodule|auto\w+):: (\S+)", page.read_text(encoding="utf-8")):
            if kind == "currentmodule":
                module = value
            elif kind != "automodule":
                found.add(value if value.startswith("torchquant.") else f"{module}.{value}")
    return found


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_a_public_name_stands_in_the_reference(module, name):
    assert f"{module}.{name}" in described()


def test_the_reference_has_no_name_that_is_not_public():
    assert described() <= {f"{module}.{name}" for module, name in PUBLIC}


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_a_public_name_says_what_each_argument_is(module, name):
    thing = getattr(import_module(module), name)
    if inspect.isclass(thing) and issubclass(thing, MADE):
        assert inspect.getdoc(thing)
        return
    text = " ".join(inspect.getdoc(part) or "" for part in (thing, getattr(thing, "__init__", None)) if part)
    arguments = [
        p for p in inspect.signature(thing).parameters if not p.startswith("_") and p not in ("args", "kwargs")
    ]
    assert [a for a in arguments if not re.search(rf"\b{a}\b", text)] == []


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m, n in DOCUMENTED if inspect.isclass(getattr(import_module(m), n))]
)
def test_the_methods_of_a_public_class_are_described(module, name):
    kinds = (property, staticmethod, classmethod)
    own = vars(getattr(import_module(module), name))
    methods = [n for n, v in own.items() if not n.startswith("_") and (inspect.isfunction(v) or isinstance(v, kinds))]
    assert [n for n in methods if not inspect.getdoc(own[n])] == []


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m, n in DOCUMENTED if inspect.isfunction(getattr(import_module(m), n))]
)
def test_a_function_that_refuses_input_says_with_what(module, name):
    """A typed error in its body stands under `Raises`, or under that of what it names."""
    function = inspect.unwrap(getattr(import_module(module), name))
    raised = set(re.findall(r"raise (\w+Error)\(", inspect.getsource(function)))
    text = inspect.getdoc(function) or ""
    assert [error for error in raised if error not in text] == []


ALGORITHMS = [n for n in tq.__all__ if getattr(getattr(tq, n), "__module__", "").startswith("torchquant.algorithms")]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_names_its_source(name):
    text = import_module(getattr(tq, name).__module__).__doc__
    assert re.search(r"\b(19|20)\d\d\b|AIMET", text), "no paper with its year, and no tool"


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_no_argument_is_described_that_is_not_there(module, name):
    thing = getattr(import_module(module), name)
    if inspect.isclass(thing) and issubclass(thing, MADE):
        return
    section = re.split(r"\n(?:Returns|Raises|Attributes):", (inspect.getdoc(thing) or "").partition("Args:\n")[2])[0]
    told = {n for entry in re.findall(r"^    (\w+(?:, \w+)*): ", section, re.MULTILINE) for n in entry.split(", ")}
    parameters = inspect.signature(thing).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        told -= set(inspect.signature(CapabilityQuantizer).parameters)  # that they are handed on to
    assert told <= {p.name for p in parameters}
