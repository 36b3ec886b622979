"""What the keys of a config may be: what the table in `configs.base` is made of."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
#: beyond, a float32 is infinite
_LARGEST = 3.4e38


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes:
        default: what it is where nothing sets it; its type is that of the key.
        about: what it means, in a line.
        least: of numbers, the smallest that it may be.
        most: the largest.
        below: what it must stay below.
        choices: of text, all that there are.
        of: of a tuple, the type of its items; pairs are those of a study.
    """

    default: Any
    about: str
    _: dataclasses.KW_ONLY
    least: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    of: type | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises a ValueError, with the key's `name`, unless it can be `value`."""
        if not self.accepts(value):
            shown = reprlib.repr(plain(value))
            raise ValueError(f"{name} is {shown}; expected {self.expected}.")

    def accepts(self, value: Any) -> bool:
        """Whether the key can have this value."""
        if isinstance(self.default, ConfigDict):
            return _is_options(value)
        if isinstance(self.default, tuple):
            return isinstance(value, tuple) and all(map(self._accepts_item, value))
        return self._accepts_one(value, type(self.default))

    @property
    def expected(self) -> str:
        """What the key can be, in words."""
        if isinstance(self.default, ConfigDict):
            return "options by name, numbers or text each"
        if self.of is tuple:
            return "a tuple of pairs (name, {key: value})"
        if self.choices:
            return f"one of {list(self.choices)}"
        kind = _KINDS[self.of or type(self.default)]
        if self.of:
            kind = f"a tuple, each {kind}"
        bounds = [
            f"{word} {bound:,}"
            for word, bound in (
                ("at least", self.least),
                ("at most", self.most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return ", ".join([kind, " and ".join(bounds)] if bounds else [kind])

    def _accepts_item(self, item: Any) -> bool:
        if self.of is not tuple:
            return self._accepts_one(item, self.of)
        return (
            isinstance(item, tuple | list)
            and len(item) == 2
            and isinstance(item[0], str)
            and item[0].isprintable()  # it stands in tables and pictures
            and isinstance(item[1], Mapping)
        )

    def _accepts_one(self, value: Any, kind: type | None) -> bool:
        if kind is bool or kind is str:
            right = isinstance(value, kind)
            return right and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(
            value, int if kind is int else int | float
        ):
            return False
        # In this order, for NaN is none of it.
        return (
            (kind is int or -_LARGEST <= value <= _LARGEST)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def _is_options(value: Any) -> bool:
    def simple(option: Any) -> bool:
        if isinstance(option, tuple | list):
            return all(map(simple, option))
        return option is None or isinstance(option, bool | int | float | str)

    return isinstance(value, Mapping | ConfigDict) and all(
        isinstance(name, str) and simple(option) for name, option in value.items()
    )


def check(config: Any, keys: Mapping[str, Key]) -> None:
    """Refuses a config with other keys than `keys`, or with values that cannot be.

    Raises:
        ValueError: the message names the key.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"the config is {reprlib.repr(config)}; expected a ConfigDict, such as"
            " configs.base.get_config() returns."
        )
    check_names(config, keys)
    if missing := [key for key in keys if key not in config]:
        raise ValueError(
            f"the config lacks {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} other keys" if missing[5:] else "")
            + "; start from configs.base.get_config(), which has them all."
        )
    for name, key in keys.items():
        key.check(name, config[name])


def check_names(names: Iterable[Any], keys: Mapping[str, Key]) -> None:
    """Refuses, with a ValueError, names that no key has.

    The command line would take any key, for those of nested options are not known
    beforehand.
    """
    for name in sorted(set(names) - set(keys), key=str):
        close = difflib.get_close_matches(str(name), keys, 1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"a config has no key {name!r}.{hint}")


def plain(value: Any) -> Any:
    """Returns options as a dict, and all else as it is."""
    return value.to_dict() if isinstance(value, ConfigDict) else value
