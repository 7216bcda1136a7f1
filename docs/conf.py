"""Sphinx's configuration: `sphinx-build -W docs site` writes the documentation, with the docs extra installed."""

import msf_core

project = "msf_core"
author = "The msf_core developers"
release = version = msf_core.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks that run when the site is built
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings in Google's style
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
default_role = "py:obj"  # `name` in a docstring links to what it names, where that is on a page

myst_enable_extensions = ["colon_fence", "deflist"]  # deflist: the messages in the FAQ
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 3600  # a minute on an idle machine; with other jobs beside it, much more

autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "extra_repr, get_extra_state, set_extra_state"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = ">>> "

html_theme = "pydata_sphinx_theme"
html_title = "msf_core"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}
html_static_path = ["_static"]
html_css_files = ["wide.css"]  # room for tables
# Pages without pages below them, and those with wide tables, leave the room of the navigation to their tables.
html_sidebars = {
    page: []
    for page in (
        "tutorial",
        "performance",
        "reliability",
        "limits",
        "faq",
        "changelog",
        "contributing",
        "guides/choosing",
        "guides/methods",
        "guides/experiments",
    )
}
html_show_sourcelink = False
