"""How is the documentation built? Sphinx's configuration; `_generate.py` writes the pages that are made from code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import _generate  # noqa: E402 - after the path
from pydantic import BaseModel  # noqa: E402 - likewise

import qbridge  # noqa: E402 - likewise

project = "qbridge"
author = "the qbridge authors"
version = release = qbridge.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_generated"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings are Google's, with reStructuredText inside.
napoleon_numpy_docstring = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autoclass_content = "both"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 100

# Strict about our own names; the others' are not looked up, so that the build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!qbridge\.).*"),
    # Type variables, and what people never name: it stands in signatures only.
    ("py:.*", r"qbridge\..+\.(?:_\w+|P|R|R_co|T|Call|Declares|Item|Run|Place|BridgeCelery)"),
]

html_theme = "furo"
html_title = f"qbridge {version}"
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


#: Made by a bridge or a decorator, never by hand: what their constructors take is nobody's business.
_NOT_CONSTRUCTED = {"qbridge.Task", "qbridge.AsyncTask", "qbridge.TaskResult"}


def without_signature(
    app: Any, what: str, name: str, thing: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """Leave out signatures that say less than the text: pydantic's are made of validators."""
    model = isinstance(thing, type) and issubclass(thing, BaseModel)
    return ("", "") if model or name in _NOT_CONSTRUCTED else None


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for pages."""
    _generate.write_pages(HERE)
    app.connect("autodoc-process-signature", without_signature)
