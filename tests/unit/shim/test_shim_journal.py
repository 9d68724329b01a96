"""The journal that Watch streams: nothing missed, nothing twice, or an error that asks for a new List."""

from __future__ import annotations

import asyncio

import pytest

from sandkeeper.shim.errors import Outdated
from sandkeeper.shim.watch import Journal
from sandkeeper.wire import node_pb2


def record(number: int) -> node_pb2.SandboxRecord:
    owner = node_pb2.Owner(namespace="ns", name="a", uid="uid", instance=number)
    return node_pb2.SandboxRecord(sandbox_id=f"uid-{number}", owner=owner, state=node_pb2.STATE_RUNNING)


async def take(journal: Journal, after: int, count: int) -> list[node_pb2.WatchResponse]:
    taken: list[node_pb2.WatchResponse] = []
    async with asyncio.timeout(10):
        changes = journal.follow(journal.epoch, after)
        while len(taken) < count:
            taken.append(await anext(changes))
    return taken


def noted(count: int, kept: int = 100) -> Journal:
    """A journal in which `count` changes have been noted."""
    journal = Journal(kept)
    for number in range(1, count + 1):
        journal.changed(record(number))
    return journal


def test_an_epoch_is_of_one_journal_and_starts_at_zero() -> None:
    assert Journal().epoch != Journal().epoch
    assert Journal().sequence == 0


@pytest.mark.parametrize("after", [0, 1, 4])
async def test_the_past_arrives_in_order(after: int) -> None:
    journal = noted(5)
    changes = await take(journal, after, 5 - after)
    assert [each.sequence for each in changes] == list(range(after + 1, 6))
    assert [each.sandbox.owner.instance for each in changes] == list(range(after + 1, 6))
    assert not any(each.removed for each in changes)


async def test_the_future_arrives_too() -> None:
    journal = noted(1)
    following = asyncio.create_task(take(journal, 1, 2))
    await asyncio.sleep(0)
    journal.changed(record(2))
    await asyncio.sleep(0)
    journal.removed(record(2))
    changes = await following
    assert [(each.sequence, each.removed) for each in changes] == [(2, False), (3, True)]


async def test_a_removal_carries_only_id_and_owner() -> None:
    journal = Journal()
    journal.removed(record(7))
    (change,) = await take(journal, 0, 1)
    bare = node_pb2.SandboxRecord(sandbox_id="uid-7", owner=record(7).owner)
    assert change == node_pb2.WatchResponse(sequence=1, sandbox=bare, removed=True)


async def test_a_change_is_the_record_as_it_was_then() -> None:
    journal, changing = Journal(), record(1)
    journal.changed(changing)
    changing.state = node_pb2.STATE_EXITED
    journal.changed(changing)
    first, second = await take(journal, 0, 2)
    assert first.sandbox.state == node_pb2.STATE_RUNNING
    assert second.sandbox.state == node_pb2.STATE_EXITED


async def test_many_follow_at_once_and_one_may_leave() -> None:
    journal = Journal()
    following = [asyncio.create_task(take(journal, 0, 3)) for _ in range(5)]
    await asyncio.sleep(0)
    following[0].cancel()
    for number in (1, 2, 3):
        journal.changed(record(number))
    for changes in await asyncio.gather(*following[1:]):
        assert [each.sequence for each in changes] == [1, 2, 3]


@pytest.mark.parametrize("name", ["", "another"])
async def test_another_epoch_is_outdated(name: str) -> None:
    with pytest.raises(Outdated, match="epoch"):
        await anext(noted(1).follow(name, 0))


async def test_what_has_not_happened_is_outdated() -> None:
    journal = noted(2)
    with pytest.raises(Outdated, match="after_sequence"):
        await anext(journal.follow(journal.epoch, 3))


@pytest.mark.parametrize(("after", "outdated"), [(0, True), (6, True), (7, False), (9, False)])
async def test_a_gap_is_outdated(after: int, outdated: bool) -> None:
    journal = noted(10, kept=3)
    if outdated:
        with pytest.raises(Outdated, match="after_sequence"):
            await anext(journal.follow(journal.epoch, after))
    else:
        assert [each.sequence for each in await take(journal, after, 10 - after)] == list(
            range(after + 1, 11)
        )


async def test_a_consumer_that_falls_too_far_behind_is_told() -> None:
    journal = noted(3, kept=3)
    changes = journal.follow(journal.epoch, 0)
    assert (await anext(changes)).sequence == 1
    for number in range(10):
        journal.changed(record(number))
    # What was there when it last looked still comes; then there is a gap.
    assert [(await anext(changes)).sequence for _ in range(2)] == [2, 3]
    with pytest.raises(Outdated):
        await anext(changes)


async def test_a_slow_consumer_within_bounds_misses_nothing() -> None:
    journal = Journal(kept=100)
    taken: list[int] = []

    async def consume() -> None:
        async for change in journal.follow(journal.epoch, 0):
            taken.append(change.sequence)
            await asyncio.sleep(0)
            if change.sequence == 60:
                return

    consuming = asyncio.create_task(consume())
    for number in range(20):
        for _ in range(3):
            journal.changed(record(number))
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await consuming
    assert taken == list(range(1, 61))


async def test_close_ends_those_who_wait_and_those_who_come() -> None:
    journal = noted(2)
    waiting = asyncio.create_task(take(journal, 2, 1))
    await asyncio.sleep(0)
    journal.close()
    async with asyncio.timeout(10):
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert [each.sequence async for each in journal.follow(journal.epoch, 0)] == [1, 2]
