"""What is generated: no drift, and nothing in the schema without a bound or a description."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandkeeper.api import Sandbox
from sandkeeper.api.crd import RESOURCES, Resource, definition, object_schema
from sandkeeper.api.generate import generated_files

ROOT = Path(__file__).resolve().parents[3]
each_kind = pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)


def nodes(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


def parts(resource: Resource) -> list[tuple[str, dict[str, Any]]]:
    schema = object_schema(resource)
    return [
        node
        for part in ("spec", "status")
        for node in nodes(schema["properties"][part], f"{resource.kind}.{part}")
    ]


@pytest.mark.parametrize("name", sorted(generated_files()))
def test_no_drift(name: str) -> None:
    assert (ROOT / name).read_text() == generated_files()[name], "run `make crds`"


@each_kind
def test_every_field_is_described(resource: Resource) -> None:
    assert not [
        path for path, node in parts(resource) if not path.endswith("[]") and not node.get("description")
    ]


@each_kind
def test_everything_is_bounded(resource: Resource) -> None:
    bounds = {
        "string": ("maxLength", "enum"),
        "array": ("maxItems",),
        "integer": ("maximum",),
        "boolean": ("type",),
    }
    for path, node in parts(resource):
        if node.get("x-kubernetes-int-or-string"):
            assert "x-kubernetes-validations" in node, path
        elif node["type"] == "object":
            assert "properties" in node or "maxProperties" in node, path
        else:
            assert any(key in node for key in bounds[node["type"]]), path


@each_kind
def test_the_schema_is_structural(resource: Resource) -> None:
    for path, node in parts(resource):
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not {"$ref", "title", "nullable", "oneOf", "allOf", "const", "prefixItems"} & node.keys(), path
        assert "x-kubernetes-preserve-unknown-fields" not in node, path


@each_kind
def test_named_lists_are_maps(resource: Resource) -> None:
    for path, node in parts(resource):
        if "properties" in node.get("items", {}):
            (key,) = node["x-kubernetes-list-map-keys"]
            assert key in node["items"]["required"], path


@each_kind
def test_rules_say_what_must_be(resource: Resource) -> None:
    for path, node in parts(resource):
        for entry in node.get("x-kubernetes-validations", ()):
            assert "must" in entry["message"], path


@each_kind
def test_names(resource: Resource) -> None:
    names = definition(resource)["spec"]["names"]
    assert definition(resource)["metadata"]["name"] == f"{names['plural']}.sandkeeper.dev"
    assert names["categories"] == ["sandkeeper"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_read(path: Path) -> None:
    sandbox = Sandbox.model_validate(yaml.safe_load(path.read_text()))
    assert sandbox.metadata.name == path.stem
