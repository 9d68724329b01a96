"""What is generated from the models: crds/ and docs/reference.md. A unit test compares them with the tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sandkeeper.api.crd import RESOURCES, Resource, Schema, definition, object_schema
from sandkeeper.api.names import API_VERSION, CATEGORY

_HEADER = "# Generated from operator/sandkeeper/api by `make crds`. Do not edit.\n"


class _Dumper(yaml.SafeDumper):
    """Block style, no anchors, lists indented."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _yaml(document: Any) -> str:
    return _HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def generated_files() -> dict[str, str]:
    """Path in the repository -> content."""
    files = {f"crds/{resource.plural}.yaml": _yaml(definition(resource)) for resource in RESOURCES}
    files["crds/kustomization.yaml"] = _yaml(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"{resource.plural}.yaml" for resource in RESOURCES],
        }
    )
    files["docs/reference.md"] = reference()
    return files


def write(root: Path) -> list[str]:
    """Writes what differs below `root`; returns the paths written."""
    changed = []
    for name, text in generated_files().items():
        path = root / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(name)
    return changed


def reference() -> str:
    """docs/reference.md: every field of every kind, with its bounds."""
    lines = [
        "<!-- Generated from operator/sandkeeper/api by `make crds`. Do not edit. -->",
        "# API reference",
        "",
        f"`{API_VERSION}`. `kubectl get {CATEGORY}` lists the objects; `kubectl explain sandbox.spec` has",
        "the same texts. What the words mean: [concepts](concepts.md).",
    ]
    for resource in RESOURCES:
        lines += _kind(resource)
    return "\n".join(lines) + "\n"


def _kind(resource: Resource) -> Iterator[str]:
    schema = object_schema(resource)
    yield from ("", f"## {resource.kind}", "", schema["description"], "")
    yield f"{resource.scope}; plural `{resource.plural}`, short name `{resource.short_name}`."
    if resource.selectable:
        paths = ", ".join(f"`{path.removeprefix('.')}`" for path in resource.selectable)
        yield f"Field selectors: {paths}."
    for entry in schema.get("x-kubernetes-validations", ()):
        yield f"{_sentence(entry['message'])}"
    for part in ("spec", "status"):
        yield from _table(f"{resource.kind}.{part}", schema["properties"][part])


def _table(path: str, schema: Schema) -> Iterator[str]:
    yield from ("", f"### {path}", "", schema["description"])
    for entry in schema.get("x-kubernetes-validations", ()):
        yield f"{_sentence(entry['message'])}"
    yield from ("", "| field | type | meaning | bounds |", "| --- | --- | --- | --- |")
    nested = []
    for name, field in schema["properties"].items():
        required = "**required**; " if name in schema.get("required", ()) else ""
        bounds = (required + _bounds(field)).rstrip("; ")
        yield f"| {name} | {_type(field)} | {_cell(field['description'])} | {_cell(bounds)} |"
        inner = field.get("items", field)
        if inner.get("properties"):
            nested.append((f"{path}.{name}" + ("[]" if "items" in field else ""), inner))
    for inner_path, inner in nested:
        yield from _table(inner_path, inner)


def _type(field: Schema) -> str:
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    if field["type"] == "array":
        return f"[]{_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    return "time" if field.get("format") == "date-time" else str(field["type"])


def _bounds(field: Schema) -> str:
    parts = []
    if "default" in field:
        parts.append(f"default `{field['default']}`")
    if "enum" in field:
        parts.append("one of " + ", ".join(f"`{value}`" if value else "empty" for value in field["enum"]))
    if "x-kubernetes-list-map-keys" in field:
        parts.append(f"unique by `{field['x-kubernetes-list-map-keys'][0]}`")
    for low, high, unit in (
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " entries"),
        ("minProperties", "maxProperties", " entries"),
        ("minimum", "maximum", ""),
    ):
        plain = field.get("format") != "date-time" and not field.get("x-kubernetes-int-or-string")
        if high in field and plain:
            parts.append(f"{field.get(low, 0)} to {field[high]}{unit}")
    parts += [entry["message"] for entry in field.get("x-kubernetes-validations", ())]
    if "items" in field and not field["items"].get("properties"):
        inner = _bounds(field["items"])
        parts += [f"each {inner}"] if inner else []
    return "; ".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sentence(message: str) -> str:
    return f"{message[0].upper()}{message[1:]}."
