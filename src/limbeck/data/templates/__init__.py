"""Chat templates: ``resolve_template`` returns the ``Template`` of a setting, and ``render`` renders conversations with it."""

from limbeck.data.templates.named import NAMED
from limbeck.data.templates.render import Rendered, check_template_kwargs, render
from limbeck.data.templates.resolve import Template, resolve_template

__all__ = ["NAMED", "Rendered", "Template", "check_template_kwargs", "render", "resolve_template"]
