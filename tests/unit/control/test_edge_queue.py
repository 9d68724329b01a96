"""The queue: one pass per key at a time, coalescing, delays, back-off, bounds, drain."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from sandkeeper.control.queue import Queue

DEADLINE = 5.0


class Bench:
    """A queue under test: its worker notes what it did and waits where it is told to."""

    def __init__(self, **options: object) -> None:
        self.passes: list[str] = []
        self.now_running: Counter[str] = Counter()
        self.most_at_once = 0
        self.overlapped = False
        self.gates: dict[str, asyncio.Event] = {}
        self.answers: dict[str, Callable[[], Awaitable[float | None]]] = {}
        self.ended = asyncio.Condition()
        self.outcomes: list[str] = []
        self.waits: list[float] = []
        self.depths: list[tuple[int, int, int]] = []
        self.queue: Queue[str] = Queue(self.work, observer=self, **options)  # type: ignore[arg-type]

    def depth(self, waiting: int, running: int, delayed: int) -> None:
        self.depths.append((waiting, running, delayed))

    def started(self, waited: float) -> None:
        self.waits.append(waited)

    def finished(self, outcome: str, took: float) -> None:
        self.outcomes.append(outcome)

    async def work(self, key: str) -> float | None:
        self.overlapped |= self.now_running[key] > 0
        self.now_running[key] += 1
        self.most_at_once = max(self.most_at_once, self.now_running.total())
        try:
            if key in self.gates:
                await self.gates[key].wait()
            return await self.answers[key]() if key in self.answers else None
        finally:
            self.now_running[key] -= 1
            self.passes.append(key)
            async with self.ended:
                self.ended.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE), self.ended:
            await self.ended.wait_for(condition)


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.queue.run())
    try:
        yield bench
    finally:
        await bench.queue.stop()
        await task


async def test_each_key_gets_a_pass() -> None:
    async with running(Bench()) as bench:
        for key in "abc":
            bench.queue.add(key)
        await bench.until(lambda: sorted(bench.passes) == ["a", "b", "c"])


async def test_adds_before_the_start_wait_for_it_and_are_one() -> None:
    bench = Bench()
    for _ in range(5):
        bench.queue.add("a")
    assert (bench.queue.waiting, bench.queue.running) == (1, 0)
    async with running(bench):
        await bench.until(lambda: bench.passes == ["a"])
    assert bench.passes == ["a"]


async def test_any_number_of_adds_during_a_pass_make_one_more_and_never_two_at_once() -> None:
    bench = Bench()
    bench.gates["a"] = asyncio.Event()
    async with running(bench):
        bench.queue.add("a")
        await asyncio.sleep(0)
        for _ in range(10):
            bench.queue.add("a")
        bench.gates["a"].set()
        bench.queue.add("b")
        await bench.until(lambda: bench.passes.count("a") == 2 and "b" in bench.passes)
    assert bench.passes.count("a") == 2
    assert not bench.overlapped


async def test_the_answer_is_the_time_of_the_next_look() -> None:
    bench = Bench()
    answers = iter([0.01, 0.0, None])

    async def answer() -> float | None:
        return next(answers)

    bench.answers["a"] = answer
    async with running(bench):
        bench.queue.add("a")
        await bench.until(lambda: bench.passes == ["a"] * 3)
    assert bench.outcomes == ["requeue", "requeue", "done"]


async def test_of_several_delays_the_earliest_holds() -> None:
    async with running(Bench()) as bench:
        bench.queue.add_after("a", 60)
        bench.queue.add_after("a", 0.01)
        bench.queue.add_after("a", 30)
        assert bench.queue.delayed == 1
        await bench.until(lambda: bench.passes == ["a"])
        assert bench.queue.delayed == 0


async def test_a_pass_makes_earlier_delays_void() -> None:
    async with running(Bench()) as bench:
        bench.queue.add_after("a", 60)
        bench.queue.add("a")
        await bench.until(lambda: bench.passes == ["a"])
        assert bench.queue.delayed == 0


async def test_a_failing_key_backs_off_and_recovers() -> None:
    bench = Bench(backoff_base=0.001, backoff_max=0.01)
    failures = iter([True, True, True, False])

    async def answer() -> float | None:
        if next(failures):
            raise OSError("no")
        return None

    bench.answers["a"] = answer
    async with running(bench):
        bench.queue.add("a")
        await bench.until(lambda: len(bench.passes) == 4)
    assert bench.outcomes == ["error"] * 3 + ["done"]
    assert bench.queue.delayed == 0


async def test_backoff_doubles_up_to_its_bound_with_jitter() -> None:
    queue: Queue[str] = Queue(_nothing, backoff_base=1.0, backoff_max=60.0)
    for failures, full in [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (1000, 60)]:
        for _ in range(20):
            assert full / 2 <= queue._backoff(failures) <= full


async def test_news_shortens_a_backoff_but_makes_no_busy_loop() -> None:
    bench = Bench(backoff_base=50.0, event_wait_max=0.02)

    async def fail() -> float | None:
        raise OSError("no")

    bench.answers["a"] = fail
    async with running(bench):
        bench.queue.add("a")
        await bench.until(lambda: len(bench.passes) == 1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(0)
        for _ in range(100):
            bench.queue.add("a")
        await bench.until(lambda: len(bench.passes) == 2)
        assert loop.time() - began >= 0.009


async def test_one_keys_failure_does_not_delay_the_others() -> None:
    bench = Bench(concurrency=1, backoff_base=30.0)

    async def fail() -> float | None:
        raise OSError("no")

    bench.answers["bad"] = fail
    async with running(bench):
        bench.queue.add("bad")
        bench.queue.add("good")
        await bench.until(lambda: bench.passes == ["bad", "good"])


async def test_concurrency_is_bounded() -> None:
    bench = Bench(concurrency=3)
    gate = asyncio.Event()
    bench.gates = {str(number): gate for number in range(20)}
    async with running(bench):
        for key in bench.gates:
            bench.queue.add(key)
        async with asyncio.timeout(DEADLINE):
            while bench.now_running.total() < 3:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert (bench.queue.running, bench.queue.waiting) == (3, 17)
        gate.set()
        await bench.until(lambda: len(bench.passes) == 20)
    assert bench.most_at_once == 3
    assert max(waiting for waiting, _, _ in bench.depths) == 17


async def test_a_pass_that_steps_aside_holds_up_nobody() -> None:
    bench = Bench(concurrency=2)
    gate = asyncio.Event()
    bench.gates = {"hung-1": gate, "hung-2": gate}
    async with running(bench):
        for key in ["hung-1", "hung-2", "good-1", "good-2", "good-3"]:
            bench.queue.add(key)
        await asyncio.sleep(0)
        for key in [*bench.gates, "good-1", "unknown"]:
            bench.queue.step_aside(key)
        await bench.until(lambda: len(bench.passes) == 3)
        assert all(key.startswith("good") for key in bench.passes)
        assert bench.queue.running == 2
        gate.set()
        await bench.until(lambda: len(bench.passes) == 5)
    assert not bench.overlapped


async def test_passes_that_stepped_aside_are_bounded_too() -> None:
    bench = Bench(concurrency=1, slow_limit=1)
    gate = asyncio.Event()
    bench.gates = {"hung-1": gate, "hung-2": gate}
    async with running(bench):
        for key in ["hung-1", "hung-2", "good"]:
            bench.queue.add(key)
        await asyncio.sleep(0)
        bench.queue.step_aside("hung-1")
        assert (bench.queue.running, bench.queue.waiting) == (2, 1)
        bench.queue.step_aside("hung-2")
        assert (bench.queue.running, bench.queue.waiting) == (2, 1)
        gate.set()
        await bench.until(lambda: len(bench.passes) == 3)


async def test_stop_waits_for_running_passes_and_drops_the_waiting() -> None:
    bench = Bench(concurrency=1)
    bench.gates["a"] = asyncio.Event()
    task = asyncio.create_task(bench.queue.run())
    bench.queue.add("a")
    bench.queue.add("b")
    bench.queue.add_after("c", 0.0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    stopping = asyncio.create_task(bench.queue.stop(grace=DEADLINE))
    await asyncio.sleep(0)
    bench.queue.add("d")
    bench.gates["a"].set()
    assert await stopping
    await task
    assert bench.passes == ["a"]


async def test_stop_cuts_off_what_exceeds_the_grace() -> None:
    bench = Bench()
    bench.gates["a"] = asyncio.Event()
    task = asyncio.create_task(bench.queue.run())
    bench.queue.add("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not await bench.queue.stop(grace=0.01)
    await task
    assert bench.outcomes == ["cancelled"]
    assert bench.queue.running == 0


async def test_cancelling_run_cancels_the_passes() -> None:
    bench = Bench()
    bench.gates["a"] = asyncio.Event()
    task = asyncio.create_task(bench.queue.run())
    await asyncio.sleep(0)
    bench.queue.add("a")
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert bench.queue.running == 0


async def test_waits_and_ages_are_measured() -> None:
    bench = Bench(concurrency=1)
    bench.gates["a"] = asyncio.Event()
    async with running(bench):
        assert (bench.queue.oldest_waiting(), bench.queue.oldest_running()) == (0.0, 0.0)
        bench.queue.add("a")
        bench.queue.add("b")
        await asyncio.sleep(0.01)
        assert bench.queue.oldest_waiting() >= 0.009
        assert bench.queue.oldest_running() >= 0.009
        bench.gates["a"].set()
        await bench.until(lambda: len(bench.passes) == 2)
    assert bench.waits[1] >= 0.009


async def test_a_burst_of_thousands_of_keys_and_adds() -> None:
    async with running(Bench(concurrency=16)) as bench:
        for _ in range(3):
            for number in range(3000):
                bench.queue.add(str(number))
        await bench.until(lambda: len(set(bench.passes)) == 3000)
    assert not bench.overlapped
    assert bench.most_at_once <= 16


async def _nothing(key: str) -> float | None:
    return None
