"""What really happened, seen from beside every proxy: all versions of every Sandbox, and all records of the shims."""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import yaml
from tests.cluster import eventually
from tests.histories import Object

from sandkeeper.api import API_VERSION, SANDBOXES
from sandkeeper.wire import node_pb2, node_pb2_grpc
from sandkeeper.wire.tls import ClientTLS, TLSFiles

_URL = f"/apis/{API_VERSION}/{SANDBOXES}"
_AGAIN = 0.1
_LIVE = (node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED)


class Objects:
    """Every version of every Sandbox that the API server has had since `start`, in order. Use as a context.

    An API server that was started anew may have forgotten the last few: then it goes on from what is there.
    """

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._tls.load_cert_chain(user["client-certificate"], user["client-key"])
        self._url = cluster["server"] + _URL
        self._news = threading.Condition()
        self._versions: dict[str, list[Object]] = {}
        self._gone: set[str] = set()
        self._uids: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self._error = ""
        self._stop = threading.Event()
        self._response: Any = None
        self._thread = threading.Thread(target=self._run, name="objects", daemon=True)

    def __enter__(self) -> Self:
        eventually(self._list, timeout=60)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._hang_up()
        self._thread.join(15)

    def history(self, namespace: str, name: str, life: int = -1) -> list[Object]:
        """All versions of one object. life: which of those that had the name; default: the newest."""
        with self._news:
            uids = self._uids[namespace, name]
            return list(self._versions[uids[life]]) if uids else []

    def histories(self) -> list[list[Object]]:
        """All versions of every object, object by object."""
        with self._news:
            return [list(versions) for versions in self._versions.values()]

    def uids(self, namespace: str, name: str) -> list[str]:
        """Of all objects that had the name, oldest first."""
        with self._news:
            return list(self._uids[namespace, name])

    def get(self, namespace: str, name: str) -> Object:
        """The newest version; {} where there is no such object now."""
        with self._news:
            return self._now(namespace, name)

    def names(self, namespace: str) -> list[str]:
        """All that there ever were."""
        with self._news:
            return sorted(name for space, name in self._uids if space == namespace)

    def until(
        self, namespace: str, name: str, wanted: Callable[[Object], Any], *, timeout: float = 60.0
    ) -> Object:
        """The newest version as soon as it is wanted; {} is asked about for an object that is gone.

        Raises AssertionError at the deadline, with the newest version.
        """
        deadline = time.monotonic() + timeout
        with self._news:
            while not _holds(wanted, body := self._now(namespace, name)):
                if self._error:
                    raise AssertionError(f"the recorder broke: {self._error}")
                left = deadline - time.monotonic()
                if left <= 0:
                    shown = {part: body.get(part) for part in ("metadata", "spec", "status")}
                    shown["metadata"] = {**(shown["metadata"] or {}), "managedFields": None}
                    raise AssertionError(
                        f"{name}: not within {timeout:g} s; seen: {json.dumps(shown, indent=1)}"
                    )
                self._news.wait(left)
        return body

    def _now(self, namespace: str, name: str) -> Object:
        uids = self._uids[namespace, name]
        return {} if not uids or uids[-1] in self._gone else self._versions[uids[-1]][-1]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except urllib.error.HTTPError as error:
                error.close()  # the API server is starting
            except OSError:
                pass
            except Exception as error:
                with self._news:
                    self._error = repr(error)
                    self._news.notify_all()
                return
            self._stop.wait(_AGAIN)

    def _follow(self) -> None:
        self._response = self._get(f"?watch=1&allowWatchBookmarks=true&resourceVersion={self._version}")
        with self._response:
            for line in self._response:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    self._list()
                    return
                self._version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self._note(event["type"], event["object"])

    def _list(self) -> bool:
        """False from an API server that has not read everything yet: it says 429 after a new CRD."""
        try:
            with self._get("") as answer:
                listed: Object = json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        self._version = listed["metadata"]["resourceVersion"]
        there = {item["metadata"]["uid"]: item for item in listed["items"]}
        for item in there.values():
            self._note("LISTED", {"kind": "Sandbox", "apiVersion": API_VERSION, **item})
        with self._news:
            self._gone |= self._versions.keys() - there.keys()
            self._news.notify_all()
        return True

    def _get(self, query: str) -> Any:
        return urllib.request.urlopen(self._url + query, timeout=600, context=self._tls)  # noqa: S310 - https

    def _hang_up(self) -> None:
        # Closing a response that another thread reads from would wait for that thread.
        with suppress(OSError, AttributeError):
            self._response.fp.raw._sock.shutdown(2)

    def _note(self, kind: str, body: Object) -> None:
        metadata = body["metadata"]
        uid, place = metadata["uid"], (metadata["namespace"], metadata["name"])
        with self._news:
            if uid not in self._versions:
                self._versions[uid] = []
                self._uids[place].append(uid)
            known = self._versions[uid]
            if not known or known[-1]["metadata"]["resourceVersion"] != metadata["resourceVersion"]:
                known.append(body)
            if kind == "DELETED":
                self._gone.add(uid)
            self._news.notify_all()


def _holds(wanted: Callable[[Object], Any], body: Object) -> Any:
    """An object that is not there, or not yet, is not as one wanted that is looked into."""
    try:
        return wanted(body)
    except KeyError:
        if body:
            raise
        return False


@dataclass(slots=True)
class Life:
    """One instance on one node, from the first record that was seen of it to its removal."""

    node: str
    owner: node_pb2.Owner
    record: node_pb2.SandboxRecord
    pids: set[int] = field(default_factory=set)
    removed_at: float | None = None

    @property
    def ran(self) -> bool:
        return bool(self.pids)

    @property
    def span(self) -> tuple[float, float] | None:
        """From its start to its end (or now), as Unix times; None where it did not start."""
        if not self.record.HasField("started_at"):
            return None
        began = self.record.started_at.ToMicroseconds() / 1e6
        if self.record.exit.HasField("exited_at"):
            return began, self.record.exit.exited_at.ToMicroseconds() / 1e6
        return began, time.time() if self.removed_at is None else self.removed_at


class Shims:
    """All that the shims have said of their sandboxes since `start`. Use as a context.

    addresses: by node; the shims' own, not a proxy's.
    """

    def __init__(self, addresses: Mapping[str, str], tls: TLSFiles) -> None:
        self._addresses = dict(addresses)
        self._tls = tls
        self._lock = threading.Lock()
        self._lives: dict[tuple[str, str], Life] = {}  # by node and sandbox id
        self._stop = threading.Event()
        self._calls: dict[str, Any] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(node,), name=f"records of {node}", daemon=True)
            for node in self._addresses
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for call in tuple(self._calls.values()):
            call.cancel()
        for thread in self._threads:
            thread.join(15)

    def lives(self, uid: str = "") -> list[Life]:
        """Of one owner, or all; those that are over among them."""
        with self._lock:
            return [life for life in self._lives.values() if uid in ("", life.owner.uid)]

    def present(self, uid: str = "") -> list[Life]:
        """Those that a node still has a record of."""
        return [life for life in self.lives(uid) if life.removed_at is None]

    def _run(self, node: str) -> None:
        while not self._stop.is_set():
            with suppress(grpc.RpcError, OSError):  # the shim is away, or its certificate is another
                self._follow(node)
            self._stop.wait(_AGAIN)

    def _follow(self, node: str) -> None:
        credentials = ClientTLS(self._tls).credentials()
        options = [("grpc.ssl_target_name_override", node), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(self._addresses[node], credentials, options=options) as channel:
            stub: Any = node_pb2_grpc.NodeStub(channel)
            listed = stub.List(node_pb2.ListRequest(), timeout=10)
            with self._lock:
                seen = {record.sandbox_id for record in listed.sandboxes}
                for record in listed.sandboxes:
                    self._note(node, record, removed=False)
                for (where, sandbox_id), life in self._lives.items():
                    if where == node and sandbox_id not in seen and life.removed_at is None:
                        life.removed_at = time.time()
            request = node_pb2.WatchRequest(epoch=listed.epoch, after_sequence=listed.sequence)
            call = self._calls[node] = stub.Watch(request)
            if self._stop.is_set():
                call.cancel()
            for event in call:
                with self._lock:
                    self._note(node, event.sandbox, removed=event.removed)

    def _note(self, node: str, record: node_pb2.SandboxRecord, *, removed: bool) -> None:
        life = self._lives.get((node, record.sandbox_id))
        if removed:
            if life is not None:
                life.removed_at = time.time()
            return
        if life is None:
            life = self._lives[node, record.sandbox_id] = Life(node, record.owner, record)
        life.record, life.removed_at = record, None
        if record.pid and record.state in _LIVE:
            life.pids.add(record.pid)
