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
html_theme_options = {  # the colours of the pages in relay/web/static/base.css
    "light_css_variables": {
        "color-brand-primary": "#0b7a5b",
        "color-brand-content": "#0b7a5b",
        "color-brand-visited": "#5d686b",
        "color-background-primary": "#fdfcf8",
        "color-background-secondary": "#f4f2eb",
        "color-background-border": "#dcd8cb",
        "color-foreground-primary": "#1c2528",
        "color-foreground-secondary": "#5d686b",
    },
    "dark_css_variables": {
        "color-brand-primary": "#52d6a8",
        "color-brand-content": "#52d6a8",
        "color-brand-visited": "#8b9a9b",
        "color-background-primary": "#0e1416",
        "color-background-secondary": "#151d20",
        "color-background-border": "#263236",
        "color-foreground-primary": "#e4e9e6",
        "color-foreground-secondary": "#8b9a9b",
    },
}
html_title = f"relay {__version__}"
html_favicon = "../relay/web/static/favicon.svg"
html_copy_source = False
html_show_sphinx = False

reference.write(HERE / "reference")
