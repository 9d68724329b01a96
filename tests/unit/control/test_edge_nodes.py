"""Nodes: List and Watch make one picture, its age is the node's health, and many lost at once are an outage."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from sandkeeper.control.nodelink import IDENTITY_MISMATCH, UNREACHABLE, Timing
from sandkeeper.control.nodes import Nodes
from sandkeeper.control.observation import Absent, Present, Unknown
from sandkeeper.control.ports import Gone, Raw
from sandkeeper.wire import node_pb2
from sandkeeper.wire.errors import OutOfRange, Unavailable

DEADLINE = 5.0
VERSIONS = itertools.count(1)
QUICK = Timing(relist=0.02, unreachable=0.25, call=1.0, retry_first=0.005, retry_max=0.01)
# The relist never comes by itself.
STREAMED = Timing(relist=60.0, unreachable=120.0, call=1.0, retry_first=0.005, retry_max=0.01)


def record(uid: str, instance: int = 1, state: int = node_pb2.STATE_RUNNING) -> node_pb2.SandboxRecord:
    owner = node_pb2.Owner(namespace="default", name=f"name-{uid}", uid=uid, instance=instance)
    return node_pb2.SandboxRecord(sandbox_id=f"{uid}-{instance}", owner=owner, state=state)  # type: ignore[arg-type]


class FakeShim:
    """A shim in memory, with switches for what may go wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.epoch = "epoch-1"
        self.sequence = 0
        self.records: dict[str, node_pb2.SandboxRecord] = {}
        self.down = False
        self.deaf = False  # List hangs
        self.listing: Callable[[], Any] | None = None  # called while a List is under way
        self.lists = 0
        self.watches: list[tuple[str, int]] = []
        self.closed = False
        self._streams: list[asyncio.Queue[node_pb2.WatchResponse | Exception]] = []

    def put(self, one: node_pb2.SandboxRecord, *, silently: bool = False) -> None:
        self.sequence += 1
        self.records[one.sandbox_id] = one
        if not silently:
            self.tell(node_pb2.WatchResponse(sequence=self.sequence, sandbox=one))

    def drop(self, sandbox_id: str, *, silently: bool = False) -> None:
        self.sequence += 1
        gone = self.records.pop(sandbox_id)
        if not silently:
            self.tell(node_pb2.WatchResponse(sequence=self.sequence, sandbox=gone, removed=True))

    def tell(self, event: node_pb2.WatchResponse | Exception) -> None:
        for stream in self._streams:
            stream.put_nowait(event)

    @property
    def watched(self) -> bool:
        return bool(self._streams)

    async def info(self) -> node_pb2.InfoResponse:
        if self.down:
            raise Unavailable("down")
        runtime = node_pb2.Runtime(name="crun", ready=True)
        broken = node_pb2.Runtime(name="runsc", ready=False)
        return node_pb2.InfoResponse(
            node_name=self.name,
            runtimes=[runtime, broken],
            default_runtime="crun",
            allocatable=node_pb2.NodeResources(cpu_millis=2000, memory_bytes=1 << 30, pids=10, sandboxes=5),
        )

    async def list(self) -> node_pb2.ListResponse:
        if self.deaf:
            await asyncio.Event().wait()
        self.lists += 1
        answer = node_pb2.ListResponse(
            epoch=self.epoch, sequence=self.sequence, sandboxes=list(self.records.values())
        )
        if self.listing is not None:
            self.listing()
            for _ in range(10):
                await asyncio.sleep(0)
        return answer

    async def watch(self, epoch: str, after: int) -> AsyncIterator[node_pb2.WatchResponse]:
        if epoch != self.epoch:
            raise OutOfRange("another epoch")
        self.watches.append((epoch, after))
        stream: asyncio.Queue[node_pb2.WatchResponse | Exception] = asyncio.Queue()
        self._streams.append(stream)
        try:
            while True:
                event = await stream.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self._streams.remove(stream)

    async def close(self) -> None:
        self.closed = True


class World:
    """Nodes under test, their shims, and what they told."""

    def __init__(self, timing: Timing = STREAMED, min_nodes: int = 3) -> None:
        self.shims: dict[str, FakeShim] = {}
        self.connected: list[tuple[str, str]] = []
        self.changed: list[str] = []
        self.nodes_changed: list[str] = []
        self.existing: set[str] = set()
        self.news = asyncio.Event()
        self.nodes = Nodes(
            connect=self.connect,
            read=self.read,
            timing=timing,
            outage_min_nodes=min_nodes,
            on_records=self.on_records,
            on_node=self.on_node,
            on_status=lambda name: self.news.set(),
        )

    def connect(self, address: str, server_name: str) -> FakeShim:
        self.connected.append((address, server_name))
        if address == "nowhere":
            raise ValueError("no such address")
        return self.shims.setdefault(address, FakeShim(address))

    async def read(self, name: str) -> Raw:
        if name not in self.existing:
            raise Gone(name)
        return {}

    def on_records(self, uids: Iterable[str]) -> None:
        self.changed.extend(uids)
        self.news.set()

    def on_node(self, name: str) -> None:
        self.nodes_changed.append(name)
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 0.01)


@contextlib.asynccontextmanager
async def world(*names: str, timing: Timing = STREAMED, min_nodes: int = 3) -> AsyncIterator[World]:
    made = World(timing, min_nodes)
    for name in names:
        made.shims[name] = FakeShim(name)
        made.nodes.put(node(name))
    try:
        yield made
    finally:
        await made.nodes.close()


def node(name: str, address: str = "", *, uid: str = "", **spec: Any) -> Raw:
    """Newer than all before."""
    return {
        "metadata": {
            "name": name,
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(next(VERSIONS)),
            "labels": {"zone": "a"},
        },
        "spec": {"address": address or name, **spec},
    }


async def test_a_node_is_listed_then_watched_from_there() -> None:
    async with world() as w:
        w.shims["a"] = shim = FakeShim("a")
        shim.put(record("u1"))
        w.nodes.put(node("a"))
        assert await w.nodes.settled(DEADLINE)
        await w.until(lambda: shim.watched)
        assert shim.watches == [("epoch-1", 1)]
        assert w.changed == ["u1"]
        view = w.nodes.view("a")
        assert view is not None
        assert (view.reachable, view.settled, view.default_runtime) == (True, True, "crun")
        assert view.runtimes == {"crun"}
        assert view.allocatable.sandboxes == 5
        assert isinstance(w.nodes.record("a", "u1-1"), Present)
        assert isinstance(w.nodes.record("a", "u2-1"), Absent)
        assert isinstance(w.nodes.record("b", "u1-1"), Unknown)


async def test_the_stream_tells_of_changes_and_removals() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        await w.until(lambda: shim.watched)
        shim.put(record("u1"))
        await w.until(lambda: w.changed == ["u1"])
        shim.put(record("u1", state=node_pb2.STATE_EXITED))
        await w.until(lambda: w.changed == ["u1", "u1"])
        seen = w.nodes.record("a", "u1-1")
        assert isinstance(seen, Present)
        assert seen.record.state == node_pb2.STATE_EXITED
        shim.drop("u1-1")
        await w.until(lambda: len(w.changed) == 3)
        assert isinstance(w.nodes.record("a", "u1-1"), Absent)
        assert w.nodes.holdings("u1") == ()


async def test_a_relist_repairs_what_the_stream_missed() -> None:
    async with world("a", timing=QUICK) as w:
        shim = w.shims["a"]
        await w.until(lambda: shim.watched)
        shim.put(record("u1"), silently=True)
        await w.until(lambda: w.changed == ["u1"])
        shim.drop("u1-1", silently=True)
        await w.until(lambda: w.changed == ["u1", "u1"])
        assert isinstance(w.nodes.record("a", "u1-1"), Absent)


async def test_a_list_older_than_the_stream_does_not_undo_it() -> None:
    async with world("a", timing=QUICK) as w:
        shim = w.shims["a"]
        shim.put(record("old"))
        await w.until(lambda: shim.watched)

        def meanwhile() -> None:
            shim.listing = None
            shim.put(record("new"))
            shim.drop("old-1")

        shim.listing = meanwhile
        lists = shim.lists
        await w.until(lambda: shim.lists > lists and "new" in w.changed)
        assert isinstance(w.nodes.record("a", "new-1"), Present)
        assert isinstance(w.nodes.record("a", "old-1"), Absent)


async def test_an_event_older_than_the_list_does_not_undo_it() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        shim.sequence = 7
        shim.records["u1-1"] = record("u1")
        await w.until(lambda: shim.watched)
        link = w.nodes.links()["a"]
        shim.tell(ConnectionError("cut"))
        await w.until(lambda: len(shim.watches) == 2)
        assert shim.watches[-1] == ("epoch-1", 7)
        shim.tell(node_pb2.WatchResponse(sequence=3, sandbox=record("u1"), removed=True))
        shim.put(record("u2"))
        await w.until(lambda: "u2" in w.changed)
        assert isinstance(link.record("u1-1"), Present)


async def test_usage_alone_is_no_news_but_is_kept() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        await w.until(lambda: shim.watched)
        shim.put(record("u1"))
        await w.until(lambda: w.changed == ["u1"])
        used = record("u1")
        used.usage.memory_bytes = 4096
        shim.put(used)
        shim.put(record("u2"))
        await w.until(lambda: "u2" in w.changed)
        assert w.changed == ["u1", "u2"]
        seen = w.nodes.record("a", "u1-1")
        assert isinstance(seen, Present)
        assert seen.record.usage.memory_bytes == 4096


async def test_a_broken_stream_lists_at_once_and_the_node_stays_reachable() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        await w.until(lambda: shim.watched)
        shim.put(record("missed"), silently=True)
        shim.tell(Unavailable("cut"))
        await w.until(lambda: "missed" in w.changed and shim.watched)
        view = w.nodes.view("a")
        assert view is not None
        assert view.reachable


async def test_while_the_line_is_broken_nothing_is_called_absent() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        shim.put(record("u1"))
        await w.until(lambda: shim.watched)
        assert isinstance(w.nodes.record("a", "u2-1"), Absent)
        shim.down = True
        shim.tell(Unavailable("cut"))
        await w.until(lambda: not shim.watched)
        await w.until(lambda: isinstance(w.nodes.record("a", "u2-1"), Unknown))
        assert isinstance(w.nodes.record("a", "u1-1"), Present)


async def test_when_the_line_is_whole_again_everybody_looks() -> None:
    """Also for a node that was reachable all the time: what it did not say in between it says now."""
    async with world("a") as w:
        shim = w.shims["a"]
        await w.until(lambda: shim.watched)
        shim.down = True
        shim.tell(Unavailable("cut"))
        await w.until(lambda: isinstance(w.nodes.record("a", "u1-1"), Unknown))
        told = len(w.nodes_changed)
        shim.down = False
        await w.until(lambda: len(w.nodes_changed) > told)
        assert isinstance(w.nodes.record("a", "u1-1"), Absent)


async def test_a_restarted_shim_is_listed_anew() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        shim.sequence = 50
        shim.records["u1-1"] = record("u1")
        await w.until(lambda: shim.watched)
        shim.epoch, shim.sequence = "epoch-2", 1
        shim.records = {"u2-1": record("u2")}
        shim.tell(Unavailable("restarted"))
        await w.until(lambda: shim.watches[-1] == ("epoch-2", 1))
        shim.put(record("u3"))
        await w.until(lambda: "u3" in w.changed)
        assert isinstance(w.nodes.record("a", "u1-1"), Absent)
        assert isinstance(w.nodes.record("a", "u2-1"), Present)


async def test_a_silent_node_becomes_unreachable_and_comes_back() -> None:
    async with world("a", timing=QUICK) as w:
        shim = w.shims["a"]
        shim.put(record("u1"))
        await w.until(lambda: shim.watched)
        shim.down = True
        shim.tell(Unavailable("cut"))
        told = len(w.nodes_changed)
        await w.until(lambda: not (w.nodes.view("a") or node_view()).reachable)
        assert len(w.nodes_changed) > told
        assert isinstance(w.nodes.record("a", "u1-1"), Unknown)
        assert w.nodes.links()["a"].reason == UNREACHABLE
        shim.down = False
        await w.until(lambda: (w.nodes.view("a") or node_view()).reachable)
        assert isinstance(w.nodes.record("a", "u1-1"), Present)


async def test_a_node_that_hangs_becomes_unreachable() -> None:
    timing = Timing(relist=0.02, unreachable=0.25, call=0.05, retry_first=0.005, retry_max=0.01)
    async with world("a", timing=timing) as w:
        await w.until(lambda: w.shims["a"].watched)
        w.shims["a"].deaf = True
        await w.until(lambda: not (w.nodes.view("a") or node_view()).reachable)


async def test_a_node_never_heard_is_not_settled_until_its_time_is_over() -> None:
    async with world(timing=QUICK) as w:
        w.shims["a"] = shim = FakeShim("a")
        shim.down = True
        w.nodes.put(node("a"))
        assert await w.nodes.settled(DEADLINE)
        view = w.nodes.view("a")
        assert view is not None
        assert (view.reachable, view.settled) == (False, False)
        await w.until(lambda: (w.nodes.view("a") or node_view()).settled)
        assert not (w.nodes.view("a") or node_view()).reachable


async def test_another_nodes_shim_is_not_believed() -> None:
    async with world(timing=QUICK) as w:
        w.shims["a"] = FakeShim("b")
        w.shims["a"].put(record("u1"))
        w.nodes.put(node("a"))
        await w.until(lambda: w.nodes.links()["a"].reason == IDENTITY_MISMATCH)
        assert w.changed == []
        assert w.nodes.client("a") is None
        assert isinstance(w.nodes.record("a", "u1-1"), Unknown)
        view = w.nodes.view("a")
        assert view is not None
        assert not view.reachable


async def test_a_node_whose_shim_becomes_another_nodes_is_dropped_at_once() -> None:
    async with world("a", timing=QUICK) as w:
        await w.until(lambda: w.shims["a"].watched)
        w.shims["a"].name = "b"
        await w.until(lambda: w.nodes.links()["a"].reason == IDENTITY_MISMATCH)
        assert not (w.nodes.view("a") or node_view()).reachable


async def test_an_address_that_cannot_be_used_is_told_and_harms_nobody() -> None:
    async with world("good", timing=QUICK) as w:
        w.nodes.put(node("bad", address="nowhere"))
        assert await w.nodes.settled(DEADLINE)
        assert w.nodes.client("bad") is None
        assert "no such address" in w.nodes.links()["bad"].message
        assert (w.nodes.view("good") or node_view()).reachable


async def test_a_new_address_makes_a_new_line_and_closes_the_old() -> None:
    async with world("a") as w:
        await w.until(lambda: w.shims["a"].watched)
        w.shims["elsewhere"] = FakeShim("a")
        w.nodes.put(node("a", address="elsewhere", serverName="name"))
        await w.until(lambda: w.shims["elsewhere"].watched and w.shims["a"].closed)
        assert w.connected[-1] == ("elsewhere", "name")


async def test_spec_and_label_changes_are_seen_without_a_new_line() -> None:
    async with world("a") as w:
        await w.until(lambda: w.shims["a"].watched)
        told = len(w.nodes_changed)
        w.nodes.put(node("a"))
        assert len(w.nodes_changed) == told
        w.nodes.put(node("a", unschedulable=True, outOfService=True))
        view = w.nodes.view("a")
        assert view is not None
        assert (view.unschedulable, view.out_of_service) == (True, True)
        assert len(w.nodes_changed) == told + 1
        assert len(w.connected) == 1


async def test_a_removed_node_is_gone_from_every_answer() -> None:
    async with world("a") as w:
        shim = w.shims["a"]
        shim.put(record("u1"))
        await w.until(lambda: shim.watched)
        w.nodes.remove("a", "uid-a")
        assert w.nodes.view("a") is None
        assert w.nodes.views() == ()
        assert w.nodes.client("a") is None
        assert w.nodes_changed[-1] == "a"
        await w.until(lambda: shim.closed)
        w.nodes.remove("a", "uid-a")


async def test_an_older_version_of_a_node_is_no_news() -> None:
    async with world("a") as w:
        gone = node("a", outOfService=True)
        w.nodes.put(node("a"))
        told = len(w.nodes_changed)
        w.nodes.put(gone)
        view = w.nodes.view("a")
        assert view is not None
        assert not view.out_of_service
        assert len(w.nodes_changed) == told


async def test_the_end_of_a_former_node_is_not_that_of_the_one_with_its_name() -> None:
    async with world("a") as w:
        w.nodes.put(node("a", uid="later"))
        w.nodes.remove("a", "uid-a")
        assert w.nodes.uids() == {"a": "later"}


async def test_a_node_that_is_gone_is_not_brought_back_by_an_older_list() -> None:
    async with world("a") as w:
        w.nodes.remove("a", "uid-a")
        w.nodes.put(node("a"))
        assert w.nodes.view("a") is None
        w.nodes.put(node("a", uid="later"))
        assert w.nodes.uids() == {"a": "later"}


async def test_gone_is_a_live_read() -> None:
    async with world("a") as w:
        assert await w.nodes.gone("a")
        w.existing.add("a")
        assert not await w.nodes.gone("a")


async def test_holdings_name_every_node_that_has_a_record_of_the_owner() -> None:
    async with world("a", "b") as w:
        w.shims["a"].put(record("u1", 1))
        w.shims["b"].put(record("u1", 2))
        w.shims["b"].put(record("u2", 1))
        await w.until(lambda: len(w.nodes.holdings("u1")) == 2)
        assert {(n, r.owner.instance) for n, r in w.nodes.holdings("u1")} == {("a", 1), ("b", 2)}


async def test_many_nodes_lost_at_once_are_an_outage_and_its_end_wakes_all() -> None:
    async with world("a", "b", "c", "d", timing=QUICK) as w:
        await w.until(lambda: all(shim.watched for shim in w.shims.values()))
        for name in "ab":
            w.shims[name].down = True
            w.shims[name].tell(Unavailable("cut"))
        await w.until(lambda: sum(not view.reachable for view in w.nodes.views()) == 2)
        assert not w.nodes.mass_outage  # half of them, but fewer than three
        w.shims["c"].down = True
        w.shims["c"].tell(Unavailable("cut"))
        await w.until(lambda: w.nodes.mass_outage)
        w.nodes_changed.clear()
        for name in "abc":
            w.shims[name].down = False
        await w.until(lambda: not w.nodes.mass_outage)
        await w.until(lambda: set(w.nodes_changed) == set("abcd"))


async def test_nodes_out_of_service_do_not_count_as_an_outage() -> None:
    async with world(timing=QUICK, min_nodes=1) as w:
        w.shims["a"] = FakeShim("a")
        w.shims["a"].down = True
        w.nodes.put(node("a", outOfService=True))
        w.shims["b"] = FakeShim("b")
        w.nodes.put(node("b"))
        await w.until(lambda: all(view.settled for view in w.nodes.views()))
        assert not w.nodes.mass_outage


def node_view() -> Any:
    raise AssertionError("the node has no view")
