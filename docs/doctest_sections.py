"""For mkdocstrings: the doctest that ends a docstring is its example, not a quotation in a quotation."""

import re

import griffe


class DoctestSections(griffe.Extension):
    """Put "Examples:" above the ``>>>`` lines at the end of a docstring, as the Google style has it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Change the docstring of any object that has one."""
        if obj.docstring is not None:
            text, *example = re.split(r"\n\n(?=>>> )", obj.docstring.value, maxsplit=1)
            if example:
                obj.docstring.value = "\n".join([text, "", "Examples:", *(f"    {x}" for x in example[0].split("\n"))])
