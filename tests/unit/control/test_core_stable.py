"""Eventually stable: after any finite sequence of faults and changes the system is as desired, and then does nothing
more. And at no moment do two copies of one sandbox run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.control.fakes import SPEC, FakeStore, World

from sandkeeper.control.observation import Key
from sandkeeper.control.ports import Gone
from sandkeeper.wire import node_pb2

NODES = ("n1", "n2")
METHODS = ("create", "start", "stop", "shutdown", "status", "pause", "resume")
HOUR = 3600.0
POLICY = {"recreate": "OnFailure", "limit": 3, "backoffSeconds": 1}


class Life(RuleBasedStateMachine):
    """One sandbox, two nodes, two operators, and everything that can go wrong between them."""

    world: World
    key: Key

    @initialize(policy=st.booleans(), deadline=st.booleans())
    def begin(self, policy: bool, deadline: bool) -> None:
        self.world = World(*NODES)
        spec = {**SPEC, **({"failurePolicy": POLICY} if policy else {})}
        self.key = self.world.kube.create(
            spec={**spec, **({"activeDeadlineSeconds": 50} if deadline else {})}
        )
        # The second operator's cache lags.
        self.lagging = FakeStore(self.world.kube)
        self.lagging.freeze()
        self.second = self.world.another(store=self.lagging)
        self.images = 37

    def alive(self) -> bool:
        return self.world.kube.exists(self.key)

    def run_pass(self, reconciler: Any) -> None:
        asyncio.run(reconciler.reconcile(self.key))

    @rule()
    def look(self) -> None:
        self.run_pass(self.world.reconciler)

    @rule()
    def other_looks(self) -> None:
        self.run_pass(self.second)

    @rule()
    def other_catches_up(self) -> None:
        self.lagging.freeze()

    @rule()
    def operator_restarts(self) -> None:
        self.world.reconciler = self.world.another()

    @precondition(alive)
    @rule(state=st.sampled_from(["Running", "Paused", "Stopped"]))
    def wish(self, state: str) -> None:
        self.world.kube.edit(self.key, desiredState=state)

    @precondition(alive)
    @rule()
    def new_image(self) -> None:
        self.images += 1
        self.world.kube.edit(self.key, containers=[{"name": "main", "image": f"busybox:1.{self.images}"}])

    @precondition(alive)
    @rule(what=st.sampled_from(["wipe", "spoil"]))
    def annotation(self, what: str) -> None:
        finalizers = self.world.kube.of(self.key)["metadata"].get("finalizers") or []
        if what == "wipe":
            self.world.kube.annotate(self.key, None, finalizers=finalizers)
        else:
            self.world.kube.annotate(self.key, {"sandkeeper.dev/assignment": "{}"}, finalizers=finalizers)

    @precondition(alive)
    @rule()
    def delete(self) -> None:
        self.world.kube.mark_deleted(self.key)

    @rule(node=st.sampled_from(NODES), reachable=st.booleans())
    def network(self, node: str, reachable: bool) -> None:
        self.world.nodes.set(node, reachable=reachable)

    @rule(node=st.sampled_from(NODES), on=st.booleans())
    def cordon(self, node: str, on: bool) -> None:
        self.world.nodes.set(node, unschedulable=on)

    @rule(frozen=st.booleans())
    def watch_lags(self, frozen: bool) -> None:
        (self.world.nodes.freeze if frozen else self.world.nodes.thaw)()

    @rule(
        node=st.sampled_from(NODES),
        method=st.sampled_from(METHODS),
        when=st.sampled_from(["before", "after"]),
    )
    def shim_fault(self, node: str, method: str, when: str) -> None:
        self.world.nodes.shims[node].faults.setdefault(method, []).append(when)

    @rule(when=st.sampled_from(["before", "after", "none"]))
    def api_fault(self, when: str) -> None:
        self.world.kube.faults.append(when)

    @rule(node=st.sampled_from(NODES), status=st.sampled_from([0, 1]))
    def process_ends(self, node: str, status: int) -> None:
        shim = self.world.nodes.shims[node]
        for sandbox_id in shim.running(self.key.uid):
            shim.exit(sandbox_id, status)

    @rule(node=st.sampled_from(NODES))
    def node_loses_everything(self, node: str) -> None:
        self.world.nodes.shims[node].records.clear()

    @rule(seconds=st.sampled_from([1, 10, 100]))
    def time_passes(self, seconds: int) -> None:
        self.world.clock.advance(seconds)

    @rule(whose=st.sampled_from(["operator", *NODES]), seconds=st.sampled_from([HOUR, -HOUR]))
    def clock_is_set(self, whose: str, seconds: float) -> None:
        clock = self.world.clock if whose == "operator" else self.world.nodes.shims[whose].clock
        clock.ahead += seconds

    @invariant()
    def never_two(self) -> None:
        if not hasattr(self, "world"):
            return
        running = [id_ for shim in self.world.nodes.shims.values() for id_ in shim.running(self.key.uid)]
        assert len(running) <= 1, running

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.kube.faults.clear()
        world.nodes.thaw()
        for name, shim in world.nodes.shims.items():
            shim.faults.clear()
            world.nodes.set(name, reachable=True, unschedulable=False)
        asyncio.run(self.calm())

    async def calm(self) -> None:
        world, key = self.world, self.key
        for _ in range(20):
            wait = await world.settle(key)
            if wait is None:
                break
            world.clock.advance(wait)
        else:
            raise AssertionError("asks for another look forever")
        before = world.effects()
        for reconciler in (world.reconciler, world.another()):
            assert await reconciler.reconcile(key) is None
        assert world.effects() == before, "does something though nothing changed"
        try:
            raw = world.kube.of(key)
        except Gone:
            # Our finalizer was never off while something could run.
            assert not [id_ for shim in world.nodes.shims.values() for id_ in shim.running(key.uid)]
            return
        assert not raw["metadata"].get("deletionTimestamp")
        ready, ended = world.condition(key, "Ready"), "exitedAt" in raw["status"]
        assert raw["status"]["observedGeneration"] == raw["metadata"]["generation"]
        records = [record for shim in world.nodes.shims.values() for record in shim.records.values()]
        if ended:
            assert not [record for record in records if record.state != node_pb2.STATE_EXITED]
            assert (ready is not None and ready[0] == "True") == (
                raw["status"].get("exitStatus") == 0 or raw["spec"].get("desiredState") == "Stopped"
            )
        else:
            assert ready == ("True", raw["spec"].get("desiredState", "Running"))
        self.never_two()


Life.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class TestLife(Life.TestCase):  # type: ignore[misc,valid-type]
    @pytest.mark.timeout(300)
    def runTest(self) -> None:  # noqa: N802
        super().runTest()
