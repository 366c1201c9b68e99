"""From a conversation to text, and which characters of the text the student learns.

``resolve_template`` turns a setting into a ``Template``; ``render`` writes conversations with it. Tokens are not known here.
"""

from limbeck.data.templates.named import NAMED
from limbeck.data.templates.render import Rendered, check_template_kwargs, render
from limbeck.data.templates.resolve import Template, resolve_template

__all__ = ["NAMED", "Rendered", "Template", "check_template_kwargs", "render", "resolve_template"]
