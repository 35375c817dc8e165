"""The form of JSON that comes from outside, checked before anything is taken from it.

A form is made of: a type (`float` takes whole numbers too, `dict` an object of anything); a compiled pattern, which a
string must match as a whole; a list of one form, for lists of it; a mapping {str: form}, for objects of any keys; a
mapping of names, for objects of exactly these keys; and a tuple, for one form or None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qalora.errors import FormatError

__all__ = ["check_shape"]

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def check_shape(value: Any, form: Any, where: str) -> None:
    """Raise FormatError, with the place as `file: key.key[n]`, for the first thing that does not have its form."""
    problem = _problem(value, form, "")
    if problem is not None:
        path, expected, got = problem
        raise FormatError(f"{where}: {path or 'content'}", expected=expected, got=got)


def _problem(value: Any, form: Any, path: str) -> tuple[str, str, str] | None:
    if isinstance(form, tuple):
        return None if value is None else _problem(value, form[0], path)
    if isinstance(form, re.Pattern):
        matches = isinstance(value, str) and form.fullmatch(value) is not None
        return None if matches else (path, f"text like {form.pattern}", _shown(value))
    if isinstance(form, list):
        if not isinstance(value, list):
            return path, "a list", _shown(value)
        found = (_problem(item, form[0], f"{path}[{n}]") for n, item in enumerate(value))
        return next((problem for problem in found if problem is not None), None)
    if isinstance(form, Mapping):
        return _object_problem(value, form, path)
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if form is int else (whole or isinstance(value, float)) if form is float else isinstance(value, form)
    return None if fits else (path, _WORDS[form], _shown(value))


def _object_problem(value: Any, form: Mapping[Any, Any], path: str) -> tuple[str, str, str] | None:
    if not isinstance(value, dict):
        return path, "an object", _shown(value)
    forms = dict.fromkeys(value, form[str]) if str in form else form
    for key in sorted(set(value) ^ set(forms)):
        return _join(path, key), "a known key" if key in value else "this key", "another" if key in value else "none"
    found = (_problem(value[key], inner, _join(path, key)) for key, inner in forms.items())
    return next((problem for problem in found if problem is not None), None)


def _join(path: str, key: str) -> str:
    return f"{path}.{key[:80]}" if path else key[:80]


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if not isinstance(value, dict | list) else type(value).__name__
