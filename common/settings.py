"""YAML + `key=value` -> a checked dataclass: strict keys, types, and errors a person can act on.

The dataclasses themselves live next to the code that owns them: pydantic's, with bounds and a
sentence in the `Field` of each key; `config.RunConfig` composes them.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.errors import ExpectedError
from common.strict_config import SAME, nearest

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid")  # of every dataclass of settings
RULES = {  # pydantic's kind of error -> ours
    "greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}", "less_than_equal": "must be at most {le}",
    "finite_number": "must be finite",
}


class ConfigError(ExpectedError, ValueError):
    """A configuration that cannot run; the message names key, value, rule and fix."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (plain YAML keeps the last one silently)."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    loader.flatten_mapping(node)
    mapping: dict = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{loader.name}:{line}: a key must be a single word")
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise ConfigError(f"{loader.name}:{line}: key '{key}' is given twice; keep one")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping
)


def _parse_yaml(text: str, where: str) -> Any:
    loader = _StrictLoader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def read_yaml(path: str | Path, above: tuple[Path, ...] = ()) -> dict:
    """One YAML file as a dict; `base: other.yaml` is read first and overlaid, key by key.

    A t2v twin is its t2av file plus `task: t2v`: the two cannot drift apart.
    """
    here = Path(path).resolve()
    if here in above:
        raise ConfigError(f"{path}: base={here.name} is based on itself; remove one `base:`")
    values, base = read_yaml_file(Path(path))
    if base is None:
        return values
    return overlay(read_yaml(Path(path).parent / base, (*above, here)), values)


def read_yaml_file(path: Path) -> tuple[dict, str | None]:
    """One file's own keys, and its base."""
    if not path.is_file():
        raise ConfigError(f"config={path}: no such file; the shipped ones are in configs/")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    values = _parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    base = values.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base={base!r} must be the name of another YAML file")
    return values, base


def overlay(base: dict, top: dict) -> dict:
    """`base` with the keys of `top` replaced, nested dicts merged."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = (
            overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1e-5}} -> {"optimizer.lr": 1e-5}; a list or an empty dict is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_overrides(arguments: list[str]) -> dict:
    """`["optimizer.lr=1e-4", "task=t2v"]` -> nested dict; values are YAML."""
    values: dict = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{argument}' must be key=value, e.g. optimizer.lr=1e-4")
        nested: Any = _parse_yaml(text, argument)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = overlay(values, nested)
    return values


def load_config(cls: type[T], path: str | Path, arguments: list[str]) -> T:
    """The checked config: file, then overrides."""
    return parse_config(cls, overlay(read_yaml(path), parse_overrides(arguments)), str(path))


def parse_config(cls: type[T], values: dict, where: str = "config") -> T:
    """Checked `cls` from nested plain values.

    Raises:
        ConfigError: on an unknown key (naming the nearest), a missing key or a wrong type.
    """
    _check_keys(cls, values, where, "")
    try:
        return TypeAdapter(cls).validate_python(_typed(cls, values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(f"{where}: key '{key}' is missing; add it") from error
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":  # a dataclass's own check, which names its key
            raise ConfigError(f"{where}: {message}") from error
        if first["type"] in RULES:
            rule = RULES[first["type"]].format(**first.get("ctx", {}))
            raise ConfigError(f"{where}: {key}={first['input']} {rule}") from error
        raise ConfigError(f"{where}: {key}={first['input']!r}: {message}") from error


def _check_keys(cls: Any, values: Any, where: str, prefix: str) -> None:
    if typing.get_origin(cls) is list and isinstance(values, list):
        for index, value in enumerate(values):
            _check_keys(typing.get_args(cls)[0], value, where, f"{prefix}{index}.")
    owner = _dataclass_of(cls)
    if owner is None or not isinstance(values, dict):
        return
    hints = typing.get_type_hints(owner)
    known = [field.name for field in dataclasses.fields(owner)]
    for key, value in values.items():
        if key not in known:
            name = prefix + str(key)
            word = SAME.get(key, key)
            deeper = [f"{field}.{word}" for field in known if word in _field_names(hints[field])]
            hint = f"did you mean '{prefix}{deeper[0]}'?" if deeper else \
                nearest(str(key), known, prefix)
            raise ConfigError(f"{where}: unknown key '{name}'; {hint}")
        _check_keys(hints[key], value, where, f"{prefix}{key}.")


def _field_names(annotation: Any) -> list[str]:
    owner = _dataclass_of(annotation)
    return [field.name for field in dataclasses.fields(owner)] if owner else []


def _dataclass_of(annotation: Any) -> type | None:
    """The dataclass in `X` or `X | None`."""
    if dataclasses.is_dataclass(annotation):
        return annotation if isinstance(annotation, type) else None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_dataclass_of(option) for option in typing.get_args(annotation)]
        return next((option for option in found if option is not None), None)
    return None


def _typed(annotation: Any, values: Any) -> Any:
    """Numbers that YAML 1.1 reads as text (`1e-5`, no dot), made numbers where one is expected.

    Also true and false for a number are refused here: Python would count with them.
    """
    owner = _dataclass_of(annotation)
    if owner is not None and isinstance(values, dict):
        hints = typing.get_type_hints(owner)
        return {key: _typed(hints[key], value) for key, value in values.items()}
    options = typing.get_args(annotation) or (annotation,)
    if isinstance(values, list):
        return [_typed(options[0], value) for value in values]
    if isinstance(values, bool) and bool not in options and {int, float} & set(options):
        return str(values).lower()
    if isinstance(values, str) and float in options:
        try:
            return float(values)
        except ValueError:
            return values
    return values
