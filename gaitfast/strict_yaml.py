"""Strict YAML into typed dataclasses and back: an unknown key or a bad value is one line that names it."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml


class UserError(Exception):
    """A mistake of the user's: one clear line that names the file or key, what is wrong and what to do. Exit code 2."""


def check(condition: bool, key: str, message: str) -> None:
    """UserError about `key` unless `condition`."""
    if not condition:
        raise UserError(f"{key}: {message}")


def check_choice(value: str, choices: typing.Sequence[str], key: str) -> None:
    """UserError unless `value` is one of `choices`."""
    check(value in choices, key, f"is one of {', '.join(choices)}, got {value!r}")


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` from YAML as `kind`, or a UserError that names the key."""
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), key, f"is a section, got {value!r}")
        return _build(kind, value, key)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[-1] is ...:
            check(isinstance(value, (list, tuple)), key, f"is a list, got {value!r}")
            items = items[:1] * len(value)
        check(
            isinstance(value, (list, tuple)) and len(value) == len(items),
            key,
            f"needs {len(items)} values, got {value!r}",
        )
        return tuple(_convert(v, k, f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, items)))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _build(cls: type, values: dict, prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            raise UserError(f"{key}: unknown key; did you mean {prefix + '.' if prefix else ''}{near[0]}?")
        if value is None and isinstance(hints[name], types.UnionType):
            arguments[name] = None
        else:
            arguments[name] = _convert(value, hints[name], key)
    return cls(**arguments)


def _override(tree: dict, assignment: str) -> None:
    """Put `a.b=c` into a nested dict."""
    key, equals, text = assignment.partition("=")
    check(bool(equals) and bool(key), f"--set {assignment}", "write --set section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not YAML ({error.__class__.__name__})") from None
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        check(isinstance(node, dict), f"--set {key}", f"{name} is not a section")
    node[last] = "" if value is None else value


def load(cls: type, path: str | Path, overrides: typing.Sequence[str] = ()) -> Any:
    """Read `cls` from a YAML file and `a.b=c` overrides. UserError for a missing file, bad YAML, a bad key or value."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    check(isinstance(tree, dict), str(path), "the top level must be keys and values")
    for assignment in overrides:
        _override(tree, assignment)
    try:
        return _build(cls, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict:
    """Plain nested dict of a config, tuples as lists, for YAML, JSON and checkpoint metadata."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def dump(config: Any) -> str:
    """The config as YAML, every value written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
