"""Imports of optional dependencies, with an error that names the pip command when one is missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from langchain_datashunt.exceptions import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        MissingExtraError: If it is not installed. The message gives the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        # An import that fails inside the package is a different problem, so it is raised unchanged.
        if error.name is None or not error.name.startswith(package):
            raise
        raise MissingExtraError(package, extra) from error
