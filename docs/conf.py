"""The documentation as a site, by Sphinx: `./docs.sh` builds it from the Markdown files as they stand in the repository.

Sphinx reads from the repository's root, so that relative links hold both in the repository's viewer and in the site. No page
loads anything from the network: formulas become MathML while the site is built.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

project = "SMDM"
html_title = "SMDM"
language = "en"
root_doc = "docs/index"
include_patterns = ["docs/**.md", "CONDA.md", "CONTRIBUTING.md", "data/README.md"]
# Folders that are not even searched.
exclude_patterns = [".*", "build", "models", "out", "quickstart", "tests", "workdir"]
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
# Links to headings, by the names that the repository's viewer gives them.
myst_heading_anchors = 4

html_theme = "furo"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_the_first_page.html"}
templates_path = ["site"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "native"
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))


def _formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode
