"""How the pages become a site: `make docs` writes `build/docs`, without network."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import torchquant  # noqa: F401  its parts are documented from their docstrings

project = "torchquant"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["images"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure"]  # links into the repository; tests check them
default_role = "code"  # docstrings have single backticks, as Markdown has
highlight_language = "text"
html_theme = "furo"
html_title = "torchquant"
html_show_copyright = False
html_use_index = False
html_show_search_summary = False  # it would be fetched, which browsers refuse to pages of a folder
html_math_renderer = "mathml"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False


def _mathml(display: str) -> tuple[Any, None]:
    """A visitor that writes formulas as MathML, which browsers show without a script."""

    def visit(writer: Any, node: nodes.Element) -> None:
        writer.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def _formulas(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Indented lines of a module's docstring, which are formulas, stay as they are."""
    if what == "module":
        text, literal = [], False
        for line in lines:
            if line.startswith("    ") and not literal:
                text += ["", "::", ""]
            literal = line.startswith("    ") or (literal and not line)
            text += [line] if literal or text[-1:] != [""] or line else []
        lines[:] = text


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
    app.connect("autodoc-process-docstring", _formulas)
