"""Things that are found by the file they lie in: modules of a folder, a class of the same name."""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def names(folder: Iterable[str]) -> list[str]:
    """Names of the modules of a package, given its `__path__`; packages in it are no such things.

    >>> import sagec.runtime.strategies as strategies
    >>> "slo-aware" in names(strategies.__path__), "choosers" in names(strategies.__path__)
    (True, False)
    """
    modules = (module.name for module in pkgutil.iter_modules(folder) if not module.ispkg)
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def class_of(package: str, name: str) -> Any:
    """The class that the module of this name is there for: `SloAware` of `slo-aware`."""
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    return getattr(module, "".join(part.capitalize() for part in name.split("-")))


def no_such(what: str, name: str, there: Sequence[str]) -> str:
    """Says that there is nothing of this name, and what was probably meant.

    >>> no_such("policy", "lry", ["arc", "lru"])
    "no policy 'lry'; did you mean 'lru'? (there are: arc, lru)"
    >>> no_such("strategy", "slo", ["fifo", "slo-aware"])
    "no strategy 'slo'; did you mean 'slo-aware'? (there are: fifo, slo-aware)"
    """
    longer = [each for each in there if len(name) > 1 and each.startswith(name)]
    close = longer or difflib.get_close_matches(name[:100], there, n=1)
    listed = f"there are: {', '.join(there)}" if there else "there are none"
    hint = f"did you mean {close[0]!r}? ({listed})" if close else listed
    return f"no {what} {name!r}; {hint}"


def options_of(
    kind: Any, owner: str, given: Mapping[str, Any] | None, error: type[ValueError]
) -> dict[str, Any]:
    """Values for the fields of the dataclass `kind`, checked against the types of its defaults.

    owner: what the options are of, in words. Raises `error` for one that is not there or does not
    fit; dashes and underscores are the same in their names.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    found = {}
    for option, value in (given or {}).items():
        if (field := fields.get(option.replace("-", "_"))) is None:
            known = [name.replace("_", "-") for name in fields]
            raise error(f"{owner}: {no_such('option', option, known)}")
        wanted = type(field.default)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise error(f"{owner}: option {option}: {value!r} is not {_KINDS[wanted]}")
        found[field.name] = value
    return found
