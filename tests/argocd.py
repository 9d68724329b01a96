"""What Argo CD makes of a Sandbox: the Lua of manifests/argocd, run by a Lua 5.1 interpreter as Argo CD runs it.

Source: argo-cd's util/lua/lua.go: a state of its own for each run, the libraries base, table and parts of os, the
object as the global `obj`; a health is a table {status, message}, an action answers with the object as it is to be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from lupa.lua51 import LuaRuntime, lua_type

Object = dict[str, Any]
Health = Literal["Healthy", "Suspended", "Progressing", "Degraded"]

CONFIG_MAP = Path(__file__).parents[1] / "manifests" / "argocd" / "argocd-cm.yaml"
_DATA: dict[str, str] = yaml.safe_load(CONFIG_MAP.read_text())["data"]
_HEALTH = _DATA["resource.customizations.health.sandkeeper.dev_Sandbox"]
_ACTIONS = yaml.safe_load(_DATA["resource.customizations.actions.sandkeeper.dev_Sandbox"])
# Argo CD opens no more than this: a script that uses another library fails there, so it must fail here.
_LIBRARIES = (
    *(
        "assert",
        "error",
        "ipairs",
        "next",
        "pairs",
        "pcall",
        "select",
        "table",
        "tonumber",
        "tostring",
        "type",
    ),
    *("unpack", "_G", "_VERSION"),
)


def health(body: Object) -> tuple[Health, str]:
    """Status and message. Raises lupa.LuaError for a script that fails."""
    answer = _run(_HEALTH, body)
    return answer["status"], answer["message"]


def actions(body: Object) -> set[str]:
    """The actions that are offered and not greyed out."""
    found = _run(_ACTIONS["discovery.lua"], body)
    return {name for name, properties in found.items() if not properties["disabled"]}


def act(name: str, body: Object) -> Object:
    """The object as the action wants it. Empty lists and maps are left out: Lua cannot tell them apart, and Argo CD
    takes those of the object as it was."""
    script = next(each["action.lua"] for each in _ACTIONS["definitions"] if each["name"] == name)
    found: Object = _run(script, body)
    return found


def defined() -> set[str]:
    """The actions that have a script."""
    return {each["name"] for each in _ACTIONS["definitions"]}


def without_empty(value: Any) -> Any:
    """As `act` answers where it changes nothing."""
    if isinstance(value, dict):
        return {
            key: bare for key, each in value.items() if (bare := without_empty(each)) not in ({}, [], None)
        }
    return [without_empty(each) for each in value] if isinstance(value, list | tuple) else value


def _run(script: str, body: Object) -> Any:
    lua = LuaRuntime(register_eval=False, register_builtins=False)
    names = lua.globals()
    for name in list(names):
        if name not in _LIBRARIES:
            names[name] = None
    names.obj = lua.table_from(without_empty(body), recursive=True)
    return _python(lua.execute(script))


def _python(value: Any) -> Any:
    if lua_type(value) != "table":
        return value
    if 1 in value:
        return [_python(each) for each in value.values()]
    return {key: bare for key, each in value.items() if (bare := _python(each)) != {}}
