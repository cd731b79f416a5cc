"""How the pages and the docstrings become one site: ``make docs``, warnings are errors."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from attnmonitor import __version__

project = "attnmonitor"
author = "The attnmonitor developers"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "attnmonitor"
exclude_patterns = ["_build"]

default_role = "py:obj"  # a link where the name is on the page below, code where it is not

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3


def point_into_the_repository(app: Sphinx, relative_path: Path, parent: str, content: list[str]) -> None:
    """The README links to files beside it, which are no pages: name them instead."""
    content[0] = re.sub(r"\[([^\]]+)\]\(((?:examples/|[A-Z]+\.md)[^)]*)\)", r"\1 (`\2`)", content[0])


def write_formula(translator: HTML5Translator, formula: nodes.math) -> None:
    """Formulas as MathML, which browsers show by themselves: no script is fetched from anywhere to read a page."""
    translator.body.append(convert(formula.astext()))
    raise nodes.SkipNode


def write_displayed_formula(translator: HTML5Translator, formula: nodes.math_block) -> None:
    """The same on a line of its own."""
    translator.body.append(convert(formula.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (write_formula, None), (write_displayed_formula, None))
    app.connect("include-read", point_into_the_repository)
