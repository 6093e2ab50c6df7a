"""Options: a field of a dataclass is an option of the command, of `rc_probe.probe`, and a word of the command that repeats a run.

No torch here: `rc-probe --help` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from rc_probe.hooks.errors import RcProbeError

KINDS = {str: "a text", int: "a whole number", bool: "True or False"}


@dataclass(frozen=True)
class About:
    """What is known of an option beside its name, type and default.

    help, panel: of `--help`. least: the smallest whole number that makes sense
    typed: what the command takes, where it is not the field's own type; read: from there to the field
    flags: how it is written, where not as --name (and --no-name); hidden: not in `--help`
    words: from a value and all options to the words of the command, where they are not --name VALUE
    """

    help: str = ""
    panel: str = "What is measured"
    least: int | None = None
    typed: Any = None
    read: Callable[[Any], Any] | None = None
    flags: tuple[str, ...] = ()
    hidden: bool = False
    words: Callable[[Any, Any], list[str]] | None = None


def option(default: Any, help: str = "", **about: Any) -> Any:
    """A field of an Options class; `about` are the fields of About."""
    return field(default=default, metadata={"about": About(help, **about)})


@dataclass(frozen=True)
class Options:
    """A group of options. Subclasses add fields made by `option`; Settings is all groups together."""

    def __post_init__(self) -> None:
        for name in many(type(self)):  # one value may stand for a tuple of one
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
                object.__setattr__(self, name, tuple(value))
            elif value is not None:
                object.__setattr__(self, name, (value,))
            elif (
                default := type(self).__dataclass_fields__[name].default
            ) is not None:  # None is no option's own
                object.__setattr__(self, name, default)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From a caller's options; RcProbeError for a name that is not an option."""
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                todo = f"There are {', '.join(known)}"
                raise RcProbeError(f"no option is called {name!r}", where="probe", todo=todo)
        return cls(**options)

    def check(self) -> None:
        """RcProbeError, naming the option, for what no model and no data could make right."""
        hints = get_type_hints(type(self))
        for each in fields(self):
            if what := _misfit(getattr(self, each.name), hints[each.name]):
                raise RcProbeError(what, where=flag(each), todo=f"{about(each).help}".strip() or None)
            least = about(each).least
            values = getattr(self, each.name)
            for value in values if isinstance(values, tuple) else (values,):
                if least is not None and value is not None:
                    at_least(flag(each), value, least)

    def words(self, model: str) -> list[str]:
        """The command line that measures `model` like this: every option that differs from its default."""
        return ["rc-probe", model, *(word for each in fields(self) for word in self._words(each))]

    def _words(self, each: Any) -> list[str]:
        value, name = getattr(self, each.name), flag(each)
        if value is each.default or (each.default is not None and value == each.default):
            return []  # data may be a frame, which has no truth value
        if (written := about(each).words) is not None:
            return written(value, self)
        if isinstance(value, bool):
            return [name if value else name.replace("--", "--no-", 1)]
        if isinstance(value, tuple):
            return [word for item in value for word in (name, str(item))]
        if isinstance(value, str | int):
            return [name, str(value)]
        return [name, f"{name.removeprefix('--').upper()}-GIVEN-IN-PYTHON"]


def about(each: Any) -> About:
    """Of a field of an Options class."""
    found: About = each.metadata.get("about", About())
    return found


def flag(each: Any) -> str:
    """How the option of a field is written."""
    return next(
        (name for name in about(each).flags if name.startswith("--")), f"--{each.name.replace('_', '-')}"
    ).split("/")[0]


def many(cls: type[Options]) -> Iterator[str]:
    """Names of the options that hold several values."""
    return (each.name for each in fields(cls) if "tuple" in str(each.type))


def at_least(name: str, value: Any, least: int) -> None:
    """RcProbeError where `value` is no whole number, or below `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RcProbeError(f"{value!r} is not a whole number", where=name, todo=f"Give {least} or more")
    if value < least:
        raise RcProbeError(f"{value} is too small", where=name, todo=f"Give at least {least}")


def _misfit(value: Any, hint: Any) -> str:
    """Why a value is none of the type of its field; "" where it is one. Whole numbers are looked at by `at_least`."""
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if Any in kinds or (value is None and NoneType in kinds):
        return ""
    if isinstance(value, tuple):
        of: type = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), object)
        wrong = [item for item in value if not _is(item, of)]
        return f"{wrong[0]!r:.80} is not {KINDS[of]}" if wrong else ""
    simple = [kind for kind in kinds if kind in KINDS]
    if not simple or any(_is(value, kind) for kind in simple):
        return ""
    return f"{value!r:.80} is not {KINDS[simple[0]]}"


def _is(value: Any, kind: type) -> bool:
    return (
        isinstance(value, kind)
        if kind is not int
        else isinstance(value, Integral) and not isinstance(value, bool)
    )


def in_python(error: RcProbeError, cls: type[Options] = Options) -> RcProbeError:
    """The error with options as Python writes them: `max_drop` for --max-drop, `init=False` for the --no-init of `cls`."""
    flags = {flag(each).removeprefix("--"): each.name for each in fields(cls)}

    def written(match: re.Match[str]) -> str:
        name = match.group(0).removeprefix("--")
        if (whole := name.removeprefix("no-")) != name and whole in flags:
            return f"{flags[whole]}=False"
        return flags.get(name, name.replace("-", "_"))

    parts = (error.what, error.where, error.todo)
    what, where, todo = (part and re.sub(r"(?<![\w-])--[a-z][a-z-]*", written, part) for part in parts)
    return RcProbeError(what or "", where=where, todo=todo)


def names_of(text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
