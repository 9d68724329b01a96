"""CustomResourceDefinitions from the models. Why not a library: docs/decisions/0002-crd-generation.md.

pydantic's JSON schema is turned into a Kubernetes structural schema: references inlined, `X | None` becomes
an optional X, titles dropped, and only the defaults kept that the API server should fill in.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from sandkeeper.api.names import (
    CATEGORY,
    GROUP,
    READY,
    SANDBOX,
    SANDBOX_NODE,
    SANDBOX_NODES,
    SANDBOXES,
    VERSION,
)
from sandkeeper.api.node import SandboxNode
from sandkeeper.api.sandbox import Sandbox
from sandkeeper.api.schema import Model, rule

Schema = dict[str, Any]

STATUS_DEFAULT: Schema = {
    "observedGeneration": 0,
    "conditions": [
        {
            "type": READY,
            "status": "Unknown",
            "reason": "Pending",
            "message": "Waiting for controller",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }
    ],
}
"""The status of an object that no operator has seen yet: kstatus, Flux and `kubectl wait` see it unready from
its first instant. The Gateway API's GatewayClass does the same."""

_NAME_RULE = rule(
    "self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
    "`metadata.name` must be a DNS label of at most 63 lower-case letters, digits and `-`",
)


def _column(name: str, type_: str, path: str, description: str, *, wide: bool = False) -> Schema:
    column: Schema = {"name": name, "type": type_, "jsonPath": path, "description": description}
    return column | {"priority": 1} if wide else column


_READY_PATH = '.status.conditions[?(@.type=="Ready")].status'
_REASON_PATH = '.status.conditions[?(@.type=="Ready")].reason'
_AGE = _column("Age", "date", ".metadata.creationTimestamp", "Time since the object was created.")


@dataclass(frozen=True)
class Resource:
    """One kind: its model and how the API server serves it."""

    model: type[Model]
    kind: str
    plural: str
    short_name: str
    scope: str
    columns: tuple[Schema, ...]
    selectable: tuple[str, ...] = ()
    rules: tuple[Schema, ...] = ()

    @property
    def crd_name(self) -> str:
        return f"{self.plural}.{GROUP}"


RESOURCES = (
    Resource(
        model=Sandbox,
        kind=SANDBOX,
        plural=SANDBOXES,
        short_name="sbx",
        scope="Namespaced",
        columns=(
            _column("Phase", "string", ".status.phase", "The conditions in one word."),
            _column("Ready", "string", _READY_PATH, "Whether what is observed is what the spec asks for."),
            _column("Reason", "string", _REASON_PATH, "Why it is ready or not."),
            _column("Node", "string", ".status.nodeName", "The SandboxNode that it is on."),
            _column("Exit", "integer", ".status.exitStatus", "Exit status, once it has ended."),
            _AGE,
            _column("Exit-Reason", "string", ".status.exitReason", "Why it ended.", wide=True),
            _column("Instance", "integer", ".status.instance", "Number of the instance.", wide=True),
            _column("Runtime", "string", ".status.runtime", "The runtime that runs it.", wide=True),
            _column("Started", "date", ".status.startedAt", "Time since the instance's start.", wide=True),
            _column("PID", "integer", ".status.pid", "Sandbox process on the node.", wide=True),
            _column("Sandbox-ID", "string", ".status.sandboxID", "The instance's id on the node.", wide=True),
        ),
        selectable=(".spec.nodeName", ".status.nodeName"),
        rules=(_NAME_RULE,),
    ),
    Resource(
        model=SandboxNode,
        kind=SANDBOX_NODE,
        plural=SANDBOX_NODES,
        short_name="sbn",
        scope="Cluster",
        columns=(
            _column("Ready", "string", _READY_PATH, "Whether the operator reaches the shim and it works."),
            _column("Engine", "string", ".status.engine", "How processes are made."),
            _column("Runtime", "string", ".status.defaultRuntime", "Runtime of a Sandbox that names none."),
            _column("Sandboxes", "integer", ".status.sandboxes", "Sandboxes on the node."),
            _column("Unschedulable", "boolean", ".spec.unschedulable", "Whether no more are placed here."),
            _column("Version", "string", ".status.version", "The shim's version."),
            _AGE,
            _column("Reason", "string", _REASON_PATH, "Why it is ready or not.", wide=True),
            _column("Address", "string", ".spec.address", "Where the shim listens.", wide=True),
            _column("CPU", "string", ".status.allocatable.cpu", "CPU cores for sandboxes.", wide=True),
            _column("Memory", "string", ".status.allocatable.memory", "Memory for sandboxes.", wide=True),
        ),
    ),
)


def definition(resource: Resource) -> Schema:
    """The CustomResourceDefinition (apiextensions.k8s.io/v1) of one kind."""
    version: Schema = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": object_schema(resource)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": list(resource.columns),
    }
    if resource.selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in resource.selectable]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": resource.crd_name,
            "labels": {"app.kubernetes.io/name": "sandkeeper", "app.kubernetes.io/part-of": "sandkeeper"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
                "shortNames": [resource.short_name],
                "categories": [CATEGORY],
            },
            "scope": resource.scope,
            "versions": [version],
        },
    }


def object_schema(resource: Resource) -> Schema:
    """The structural schema of one kind, with `spec` required and the default on `status`."""
    raw = resource.model.model_json_schema(by_alias=True)
    definitions = raw["$defs"]
    spec = _structural(raw["properties"]["spec"], definitions, defaults=True)
    status = _structural(raw["properties"]["status"], definitions, defaults=False)
    schema: Schema = {
        "type": "object",
        "description": raw["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {
                "type": "string",
                "maxLength": 64,
                "description": "Version of the schema: sandkeeper.dev/v1alpha1.",
            },
            "kind": {
                "type": "string",
                "maxLength": 64,
                "description": f"Kind of the object: {resource.kind}.",
            },
            "metadata": {"type": "object"},  # the API server describes it itself and lets nobody else
            "spec": spec,
            "status": status | {"default": STATUS_DEFAULT},
        },
    }
    if resource.rules:
        schema["x-kubernetes-validations"] = list(resource.rules)
    return schema


def _structural(schema: Schema, definitions: Schema, *, defaults: bool) -> Schema:
    """One node of pydantic's JSON schema as a structural schema. Raises TypeError where there is no such."""
    node = dict(schema)
    if "$ref" in node:
        target = definitions[node.pop("$ref").removeprefix("#/$defs/")]
        node = {**target, **node}
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    if "anyOf" in node and not node.get("x-kubernetes-int-or-string"):
        if len(options) != 1:
            raise TypeError(f"a union has no structural schema: {node}")
        del node["anyOf"]
        optional = {key: value for key, value in node.items() if key != "default" or value is not None}
        return _structural({**options[0], **optional}, definitions, defaults=defaults)
    node.pop("title", None)
    default = node.pop("default", None)
    # Only scalars that say something: empty strings, false and empty lists are what absence means anyway.
    if defaults and default and not isinstance(default, dict | list):
        node["default"] = default
    if "description" in node:
        node["description"] = " ".join(inspect.cleandoc(node["description"]).split())
    if "properties" in node:
        node["properties"] = {
            name: _structural(child, definitions, defaults=defaults)
            for name, child in node["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = _structural(node[key], definitions, defaults=defaults)
    node.pop("propertyNames", None)  # not in OpenAPI v3.0; a CEL rule bounds keys instead
    return {key: node[key] for key in sorted(node, key=_order)}


_ORDER = ("description", "type", "format", "enum", "default", "required", "properties", "items")


def _order(key: str) -> tuple[int, str]:
    return (_ORDER.index(key) if key in _ORDER else len(_ORDER), key)
