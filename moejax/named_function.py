"""Functions of the user's own, named in settings as "package.module:function"."""

import difflib
import importlib
import re
from collections.abc import Callable
from typing import Any

from moejax.errors import MoejaxError


def check_spelling(name: str, setting: str) -> None:
    """Refuses what does not read "package.module:function"; imports nothing.

    Raises:
      MoejaxError: it names the setting.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise MoejaxError(f"{setting}={name!r} names no function; write package.module:function")


def named_function(name: str, setting: str) -> Callable[..., Any]:
    """The function of that name, its module imported. What goes wrong inside the module keeps its traceback.

    Args:
      name: "package.module:function".
      setting: what the name was given for, to be named in messages.

    Raises:
      MoejaxError: a name of another form, no such module, or no such function in it.
    """
    check_spelling(name, setting)
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself wants to import
        raise MoejaxError(
            f"{setting}={name!r}: there is no module {error.name!r}; add the folder it is in to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    if function is not None:
        raise MoejaxError(f"{setting}={name!r} is of type {type(function).__name__}, and no function")
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(function_name, functions, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise MoejaxError(f"{setting}={name!r}: {module_name} has no {function_name}{hint}")
