"""Threads in a mount namespace of the engine's own, in which it mounts and runs everything.

Why a namespace: the host's mount table does not grow with sandboxes; what a
killed shim leaves mounted goes with the last process in it; and crun, which
refuses a host with cgroup v1 and v2 side by side, finds only v1 there. Why
threads: a process inherits the namespace of the thread that starts it, so that
being in it costs nothing per call; runtimes are waited for without an event
loop's turns between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sandkeeper.shim.engines.oci import kernel

log = logging.getLogger(__name__)

T = TypeVar("T")


class Threads:
    """A pool of threads inside the engine's mount namespace.

    adopt: pid of a process, left by an earlier shim, in whose mount namespace to go on; 0 for a new one.
    hide: mount points that are not to be seen inside.
    prepare: called first in each thread of the pool.
    """

    def __init__(
        self,
        size: int,
        *,
        adopt: int = 0,
        hide: tuple[str, ...] = (),
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._namespace = self._open(adopt, hide)

        def begin() -> None:
            self._enter()
            prepare()

        self._pool = ThreadPoolExecutor(size, thread_name_prefix="oci", initializer=begin)

    def _open(self, adopt: int, hide: tuple[str, ...]) -> int:
        if adopt:
            try:
                return os.open(f"/proc/{adopt}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                log.warning("mount namespace not adopted", extra={"pid": adopt, "error": str(error)})

        def make() -> int:
            kernel.unshare(kernel.CLONE_FS | kernel.CLONE_NEWNS)
            # The host's later mounts come in; ours never go out.
            kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
            for target in hide:
                kernel.umount(target, kernel.MNT_DETACH)
            return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

        return apart(make)

    def _enter(self) -> None:
        # A thread can change its mount namespace only when it shares its root and cwd with no other.
        kernel.unshare(kernel.CLONE_FS)
        kernel.setns(self._namespace, kernel.CLONE_NEWNS)
        os.chdir("/")

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` to its end in a thread of the pool, even if the caller is cancelled before."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._pool, work))

    def apart(self, work: Callable[[], T]) -> T:
        """Runs `work` in a new thread inside the namespace: one whose credentials and namespaces may be spoiled."""

        def inside() -> T:
            self._enter()
            return work()

        return apart(inside)

    def submit(self, work: Callable[[], object]) -> None:
        self._pool.submit(work)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        os.close(self._namespace)


class Locks:
    """A lock per name, for as long as anyone holds it or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        with self._guard:
            lock, users = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks.pop(name)
                if users > 1:
                    self._locks[name] = (lock, users - 1)


def apart(work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own, waits for it and hands on what it returns or raises."""
    outcome: Future[T] = Future()

    def body() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join()
    return outcome.result()
