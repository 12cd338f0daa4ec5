"""The templates of the pages and files that the tool writes."""

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

_PAGES = "nearfar.app.report"  # whose parts other pages use too


@cache
def templates(package: str, *, html: bool = True) -> Environment:
    """Those in the folder `templates` of a package, where a name that is missing is an error.

    Args:
        package: its name.
        html: whether values are escaped for HTML.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys([package, _PAGES])]),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
