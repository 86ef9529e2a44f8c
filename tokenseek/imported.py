"""What a user wrote and names by its import path, ``my_package.my_module:my_name``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean


def import_named(path: str, setting: str) -> Any:
    """The object at an import path.

    Args:
        setting: that holds the path, for the errors.

    Raises:
        UserError: the path is not one, importing its module fails, or there is no such name in it.
    """
    module_name, _, attribute = path.partition(":")
    where = f"{setting} is {path!r}, and"
    if not module_name or not attribute:
        raise UserError(f"{where} an import path is written my_package.my_module:{_example(setting)}.")
    try:
        module = import_module(module_name)
    except Exception as error:  # importing runs code that is not ours: whatever it raises is reported with the path
        raise UserError(
            f"{where} importing {module_name} fails: {type(error).__name__}: {error}. It must be installed, or its "
            "folder be on PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{where} {module_name} has no {attribute}{did_you_mean(attribute, dir(module))}.")
    return getattr(module, attribute)


def _example(setting: str) -> str:
    return f"my_{setting.rpartition('.')[2]}"
