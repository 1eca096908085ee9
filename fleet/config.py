"""Reads a run file: one YAML, a table per process, each table a dataclass of the process that owns it.

A process asks for its own tables only; the other tables of the file are known by name and left alone. Nothing is
guessed: an unknown key, a wrong type or an impossible combination is a ConfigError with file, key, value and rule.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from fleet.errors import ConfigError
from fleet.files import Files
from fleet.lookup import nearest

# Every table that some process owns. Whoever adds a process adds its table here.
KNOWN_TABLES = frozenset(
    (
        "run",
        "robot",
        "operator",
        "actor",
        "gateway",
        "buffer",
        "registry",
        "learner",
        "engine",
        "cluster",
        "evaluator",
        "policy",
        "algorithm",
        "start",
        "demo",
        "credential",
    )
)
MAX_FILE_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without duplicate keys, and with 1e-3 read as a number, as people mean it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice in one table", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes the texts that the loader above would read as numbers."""


_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load_run(
    path: Path | None,
    tables: Mapping[str, type],
    overrides: Sequence[str] = (),
    known_tables: Collection[str] = KNOWN_TABLES,
) -> dict[str, Any]:
    """The asked tables of a run file, as instances of their dataclasses.

    Args:
        path: The YAML file; None takes the defaults.
        tables: Dataclass by table name. A ``check(self) -> None`` of the class, or of a dataclass nested in it, is
            called on the finished instance.
        overrides: ``table.key=value``, the value in YAML, as on a command line; the last one wins. Those of known
            tables that were not asked for are ignored, as in the file.
        known_tables: Tables that the file may hold beside the asked ones.

    Raises:
        ConfigError: Names file or override, dotted key, value, rule and, for an unknown key, the nearest known one.
    """
    names = set(tables) | set(known_tables)
    sources: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        sources.append((str(path), _read(path)))
    sources += [(f"override {text!r}", _parse_override(text)) for text in overrides]
    for where, data in sources:
        for name, table in data.items():
            if name not in names:
                raise ConfigError(
                    f"{where}: table {name!r} is unknown", rule="a table per process", remedy=nearest(str(name), names)
                )
            if not isinstance(table, dict) and table is not None:
                raise ConfigError(
                    f"{where}: {name} = {table!r}", rule=f"{name} is a table of keys", remedy=f"{name}: {{key: value}}"
                )
    return {name: _load_table(name, cls, sources) for name, cls in tables.items()}


def dump(path: Path, data: Mapping[str, Any]) -> None:
    """Writes tables of plain data as YAML that ``load_run`` reads, whole or not at all. Tuples become lists."""
    text = yaml.dump(_plain(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    Files().write_atomic(path.resolve(), text.encode())  # where it is a link, the file that it names


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes", rule=f"a run file has at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}", rule="a YAML file", remedy="check the path") from None
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds a {type(data).__name__}", rule="a run file is a map of tables", remedy="table: {key: value}"
        )
    return data


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: {line}{error.problem}", rule="YAML, each key once") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}", rule="YAML, each key once") from None


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {text!r}", rule="table.key=value", remedy="for example learner.steps=4000")
    data: Any = _parse(value, f"override {text!r}")
    for part in reversed(parts):
        data = {part: data}
    result: dict[str, Any] = data
    return result


def _load_table(name: str, cls: type, sources: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    merged = OmegaConf.structured(cls)
    origin = "the defaults"
    for where, data in sources:
        # Key by key, because the library does not always say at which key a merge failed.
        for key, value in (data.get(name) or {}).items():
            origin = where
            try:
                merged = OmegaConf.merge(merged, {key: value})
            except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
                raise _explain(error, where, name, cls, key, value) from None
    try:
        table = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = f"{name}.{error.full_key}"
        raise ConfigError(f"{sources[0][0] if sources else origin}: {key} is missing", rule="it has no default") from None
    except OmegaConfBaseException as error:
        raise _explain(error, origin, name, cls, error.full_key or "", None) from None
    _check(table, name, " + ".join(where for where, _ in sources) or "the defaults")
    return table


def _explain(error: Exception, where: str, name: str, cls: type, key: Any, value: Any) -> ConfigError:
    full_key = f"{name}.{getattr(error, 'full_key', None) or key}"
    if isinstance(error, ConfigKeyError):
        owner = error.object_type if dataclasses.is_dataclass(error.object_type) else cls
        names = [field.name for field in dataclasses.fields(owner)] if isinstance(owner, type) else []
        last = full_key.rpartition(".")[2]
        return ConfigError(
            f"{where}: key {full_key!r} is unknown", rule=f"a key of {full_key[: -len(last) - 1]}", remedy=nearest(last, names)
        )
    for part in full_key.split(".")[2:]:  # down to the value that did not fit
        value = value.get(part, value) if isinstance(value, dict) else value
    expected = {field.name: field.type for field in dataclasses.fields(cls)}.get(str(key), "")
    message = (str(getattr(error, "msg", None) or error).splitlines() or [""])[0]
    nested = full_key.count(".") > 1
    rule = message if nested or not expected else f"{full_key} is of type {expected}"
    return ConfigError(f"{where}: {full_key} = {value!r}", rule=rule, remedy="" if nested else message)


def _check(table: Any, key: str, where: str) -> None:
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if dataclasses.is_dataclass(value):
            _check(value, f"{key}.{field.name}", where)
    check = getattr(table, "check", None)
    if check is None:
        return
    try:
        check()
    except ConfigError as error:
        what = error.what if error.what.startswith(f"{key}.") else f"{key}.{error.what}"
        raise ConfigError(f"{where}: {what}", rule=error.rule, remedy=error.remedy) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
