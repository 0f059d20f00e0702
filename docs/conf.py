"""The site, as Sphinx is told: built by `make docs`, with no request to a network."""

import os
import sys
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

SITE = Path(__file__).parent / "site"
sys.path.insert(0, str(SITE / "extensions"))

project = "geffect"
author = copyright = "The geffect authors"
version = release = version_of("geffect")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "docstrings",
    "mathml",
    "reference",
    "unbroken",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["docs/site/**", "docs/gallery/**", "gallery/*.ipynb", "**/.ipynb_checkpoints"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!geffect\b).*"),  # libraries, whose pages are elsewhere
    ("py:.*", r"geffect\..*\.(Of|Made|Tokenizer|_\w+)"),  # known to annotations alone
]

# What an error message and a command quote is searched for and copied as it is.
smartquotes = False

# Docstrings

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_use_type_comments = False
autosummary_generate = False
add_module_names = False
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"

# Pages and notebooks

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed says in a notebook what it found
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # would be fetched from a network
html_math_renderer = "mathml"

# Pictures

os.environ["MPLBACKEND"] = "Agg"
# What libraries say of their own next versions is no output of a script; it names files, too.
warnings.filterwarnings("ignore", category=DeprecationWarning)
sphinx_gallery_conf = {
    "examples_dirs": ["docs/gallery"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": None,
    "image_scrapers": ("figures",),
    "capture_repr": ("_repr_html_",),
    "download_all_examples": False,
    "abort_on_example_error": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "reset_modules": (),
    "remove_config_comments": True,
}

# The look

html_theme = "pydata_sphinx_theme"
html_title = "geffect"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "docs/index": [], "CHANGELOG": [], "CONTRIBUTING": [], "docs/faq": []}
html_theme_options = {
    "show_nav_level": 1,
    "navigation_depth": 2,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "primary_sidebar_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
