"""How Sphinx makes a site of this directory (``make docs``). The pages are plain Markdown, readable as they stand."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "clients" / "python")]

from relay.version import __version__  # noqa: E402 - the line above finds it
from tools import reference  # noqa: E402

project = "relay"
author = "The relay authors"
release = version = __version__
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["conf.py"]
myst_heading_anchors = 4  # links to #headings, as forges make them
myst_enable_extensions = ["html_image"]
smartquotes = False  # what stands in a page may be typed
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"relay {__version__}"
html_favicon = "../relay/web/static/favicon.svg"
html_copy_source = False
html_show_sphinx = False

reference.write(HERE / "reference")
