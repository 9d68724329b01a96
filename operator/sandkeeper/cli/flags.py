"""Command line flags made from the fields of a settings class: one source for flags, environment and file."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

S = TypeVar("S", bound=BaseSettings)
CONFIG = "config_file"
_SEPARATOR = "__"  # between the parts of a nested setting's name, as in the environment


def settings_command(
    name: str,
    settings: type[S],
    run: Callable[[S], None],
    *,
    help: str,  # noqa: A002
) -> click.Command:
    """A command with `--config` and a flag per field; `run` gets the settings. Exit status 2 for wrong ones."""

    def callback(**given: Any) -> None:
        try:
            made = settings(**_nested({key: value for key, value in given.items() if value is not None}))
        except ValidationError as error:
            raise click.UsageError(
                "\n".join(_explain(part, settings) for part in error.errors(include_url=False))
            ) from None
        except ValueError as error:  # a file that cannot be read
            raise click.UsageError(str(error)) from None
        run(made)

    params = _options(settings, str(settings.model_config.get("env_prefix", "")), ())
    return click.Command(name, callback=callback, params=params, help=help)


def _options(model: type[BaseModel], prefix: str, path: tuple[str, ...]) -> list[click.Parameter]:
    options: list[click.Parameter] = []
    for name, info in model.model_fields.items():
        kind = _bare(info.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            options += _options(kind, prefix, (*path, name))
        else:
            options.append(_option((*path, name), info, kind, prefix))
    return options


def _option(path: tuple[str, ...], info: FieldInfo, kind: Any, prefix: str) -> click.Option:
    variable = prefix + _SEPARATOR.join(path).upper()
    flag = "--config" if path == (CONFIG,) else "--" + "-".join(path).replace("_", "-")
    default = "" if info.is_required() or info.default in (PydanticUndefined, None, (), "") else info.default
    text = " ".join(
        part
        for part in (
            info.description or "",
            f"[default: {default}]" if default != "" else "",
            f"[env: {variable}]",
        )
        if part
    )
    destination = _SEPARATOR.join(path)
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", destination], default=None, help=text)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return click.Option([flag, destination], type=click.Choice(choices), default=None, help=text)
    if kind in (tuple, list, set, frozenset) or origin in (tuple, list, set, frozenset, Sequence):
        return click.Option([flag, destination], callback=_split, default=None, metavar="A,B,...", help=text)
    return click.Option([flag, destination], default=None, metavar=_metavar(kind), help=text)


def _split(_context: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part for raw in value.split(",") if (part := raw.strip())]


def _metavar(kind: Any) -> str:
    return {int: "NUMBER", float: "NUMBER"}.get(kind, "TEXT" if kind is str else "VALUE")


def _bare(annotation: Any) -> Any:
    """The type without Annotated and without `| None`."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif typing.get_origin(annotation) in (Union, types.UnionType):
            kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
            if len(kinds) != 1:
                return str
            annotation = kinds[0]
        else:
            return annotation


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a__b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(_SEPARATOR)
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return nested


def _explain(part: Any, settings: type[BaseSettings]) -> str:
    where = [str(step) for step in part["loc"]]
    if not where:
        return str(part["msg"]).removeprefix("Value error, ")
    variable = str(settings.model_config.get("env_prefix", "")) + _SEPARATOR.join(where).upper()
    return f"{'.'.join(where)} ({variable}): {str(part['msg']).removeprefix('Value error, ')}"
