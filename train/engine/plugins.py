"""What a config may name beyond what the engine itself knows.

A plugin is a module, named in ``config.plugins``, with a dict ``NORMALIZERS``,
``TASKS`` or ``DETECTORS`` of its own, by name. The engine imports it where a config
asks for it, and so depends on none.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Literal


def known(
    config: Any,
    kind: Literal["NORMALIZERS", "TASKS", "DETECTORS"],
    ours: dict[str, Any],
) -> dict[str, Any]:
    """Returns `ours`, and what the plugins of `config` add to it.

    Raises:
        ValueError: a plugin that cannot be imported, or a name that is there already.
    """
    found = dict(ours)
    for name in config.plugins:
        added = getattr(_load(name), kind, {})
        if twice := sorted(found.keys() & added.keys()):
            raise ValueError(f"plugin {name} has {twice}, which there are already.")
        found |= added
    return found


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"plugins names {name!r}, which cannot be imported ({error}); expected a"
            " module, such as 'train.studies.controls'."
        ) from error
