"""Settings of Sphinx, which makes one site of the pages and the docstrings: ``make docs``, warnings are errors."""

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
html_title = f"attnmonitor {version}"
exclude_patterns = ["_build"]

default_role = "py:obj"  # a link where the name is on the page below, code where it is not

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3


def name_linked_files(app: Sphinx, relative_path: Path, parent: str, content: list[str]) -> None:
    """Turn the README's links to files that are not pages into the files' names."""
    content[0] = re.sub(r"\[([^\]]+)\]\(((?:examples/|attnmonitor/|[A-Z]+\.md)[^)]*)\)", r"\1 (`\2`)", content[0])


def link_to_front_page(app: Sphinx, page: str, content: list[str]) -> None:
    """Point links to the README at the site's front page, which includes it."""
    content[0] = content[0].replace("](../README.md", "](index.md")


def write_formula(translator: HTML5Translator, formula: nodes.math) -> None:
    """Write a formula as MathML, which browsers show without any script."""
    translator.body.append(convert(formula.astext()))
    raise nodes.SkipNode


def write_displayed_formula(translator: HTML5Translator, formula: nodes.math_block) -> None:
    """Write a formula that stands on its own line."""
    translator.body.append(convert(formula.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the above; Sphinx calls this."""
    app.add_html_math_renderer("mathml", (write_formula, None), (write_displayed_formula, None))
    app.connect("include-read", name_linked_files)
    app.connect("source-read", link_to_front_page)
