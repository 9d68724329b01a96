"""A shim's own SandboxNode: where it is reached, under which name, with its Node's labels.

By server-side apply: what an administrator adds (labels of their own, unschedulable, outOfService) stays theirs.
"""

from __future__ import annotations

import asyncio
import logging
import random
from urllib.parse import quote, urlencode

from sandkeeper.api import API_VERSION, SANDBOX_NODE, SANDBOX_NODES
from sandkeeper.shim.kubeapi import KubeApi, KubeError, Raw
from sandkeeper.shim.settings import ShimSettings

log = logging.getLogger(__name__)

MANAGER = "sandkeeper-shim"
_KEPT_FOR_ADMINISTRATORS = "node-restriction.kubernetes.io/"
_HOSTNAME = "kubernetes.io/hostname"
_AGAIN = 300.0
_RETRY_FIRST, _RETRY_MAX = 1.0, 60.0


def sandbox_node(name: str, address: str, labels: dict[str, str]) -> Raw:
    """What this shim says of itself. labels: its Node's.

    Those that are kept for administrators (as kubelet's are, by NodeRestriction) are not the node's to say.
    """
    own = {key: value for key, value in labels.items() if not _kept(key)}
    return {
        "apiVersion": API_VERSION,
        "kind": SANDBOX_NODE,
        "metadata": {"name": name, "labels": {_HOSTNAME: name, **own}},
        "spec": {"address": address, "serverName": name},
    }


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _kept(label: str) -> bool:
    prefix = label.partition("/")[0] + "/"
    return prefix == _KEPT_FOR_ADMINISTRATORS or prefix.endswith(f".{_KEPT_FOR_ADMINISTRATORS}")


class Registration:
    """`run` for ever: registers at once, and again at intervals, as labels change and objects are deleted."""

    def __init__(self, settings: ShimSettings, api: KubeApi, port: int) -> None:
        """port: on which the shim listens."""
        self._name = settings.node_name
        self._address = address(settings.advertise_host, port)
        self._api = api

    async def run(self) -> None:
        """Raises nothing: what fails is said, and tried again."""
        retry, said = _RETRY_FIRST, False
        while True:
            try:
                await self._register()
                if not said:
                    log.info("Registered", extra={"node": self._name, "address": self._address})
                wait, retry, said = _AGAIN, _RETRY_FIRST, True
            except KubeError as error:
                log.warning("Cannot register this node", extra={"node": self._name, "error": str(error)})
                wait, retry, said = retry, min(retry * 2, _RETRY_MAX), False
            await asyncio.sleep(wait * random.uniform(0.8, 1.0))  # noqa: S311 - not for secrets

    async def _register(self) -> None:
        query = urlencode({"fieldManager": MANAGER, "force": "true"})
        path = f"/apis/{API_VERSION}/{SANDBOX_NODES}/{quote(self._name)}?{query}"
        await self._api.apply(path, sandbox_node(self._name, self._address, await self._labels()))

    async def _labels(self) -> dict[str, str]:
        try:
            node = await self._api.get(f"/api/v1/nodes/{quote(self._name)}")
        except KubeError as error:
            if error.code == 404:
                return {}
            raise
        labels: dict[str, str] = (node.get("metadata") or {}).get("labels") or {}
        return labels
