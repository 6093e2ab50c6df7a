"""The options of `Settings` as options of a command: one declaration for Python, the command line and `--help`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from rc_probe.options import Options, about


def with_options(
    options: type[Options], *, only: Collection[str] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Put an option for each field (or those in `only`) where the function takes **chosen, which then has their values."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function, eval_str=True)
        hints = get_type_hints(options)
        made = [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY,
                default=each.default if about(each).typed is None else _unset(each.default),
                annotation=Annotated[
                    about(each).typed or hints[each.name],
                    typer.Option(
                        *about(each).flags, help=about(each).help, rich_help_panel=about(each).panel,
                        hidden=about(each).hidden,
                    ),
                ],
            )
            for each in fields(options) if only is None or each.name in only
        ]  # fmt: skip
        before = [
            p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name in ("ctx", "model")
        ]
        after = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD and p not in before]
        keyword = [p.replace(kind=p.KEYWORD_ONLY) for p in (*before, *made, *after)]
        function.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in keyword}
        return function

    return decorate


def _unset(default: Any) -> Any:
    """What the command has where the option is not given: a tuple is no default of an option that is repeated."""
    return None if isinstance(default, tuple) else default


def chosen_options(options: type[Options], given: Mapping[str, Any]) -> Options:
    """The options as the command line has them."""
    values = {}
    for each in fields(options):
        if each.name in given:
            read = about(each).read
            values[each.name] = given[each.name] if read is None else read(given[each.name])
    return options(**values)
