"""Work done ahead by other processes, in order, of which any may be killed at any moment.

multiprocessing's pools and torch's DataLoader share queues among their processes: one that is killed while it holds a
queue's lock, or after half of a result, leaves all others, and whom they work for, waiting for ever. Here each helper
has a connection of its own, which its death closes wherever it was; and over it go only descriptors of nameless memory,
so that nothing is left of a dead helper. Nobody else can reach such a connection, which is why this module alone may
pickle.
"""

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import cycle
from multiprocessing.connection import wait
from typing import IO, Any, Generic, TypeVar, cast
from weakref import WeakSet

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from metamixer_ray.errors import ProcessKilled, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

MOST_EACH = 64
"""A socket holds a few hundred messages; beyond that, whoever sends would wait for whom it sends to."""

SILENCE = 30.0
"""Seconds without a result, again and again, after which it is asked whether somebody stopped (SIGSTOP) who owes it."""

_NUMBER = struct.Struct("Q")
_ALIGNED = 64
"""Bytes, to multiples of which parts of a message are filled up: what NumPy and torch like to read."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM}

_ends: WeakSet[socket.socket] = WeakSet()
"""Both ends of all connections of this process. Helpers inherit those there are, and close them: who has a copy of an
end hides that its owner is dead, and keeps in memory what was sent and never read."""


def helped(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, processes: int, each: int, who: str, remedy: str
) -> Generator[Result, None, None]:
    """``work(job)`` of each job, in order, done by processes that end with this generator, and with its process.

    Jobs are asked for in the calling thread; an error of theirs is raised after the results of those before it.
    Arrays and tensors (on the CPU) without gaps in their memory travel in shared memory, which is freed with the last
    of those that came in one result; each result that is kept holds a file descriptor open.

    Args:
        work: called in the helpers, which know it by being forked (it is sent only where there is no safe fork).
        each: jobs that are with each helper, done or not, while the caller uses a result. At most ``MOST_EACH``.
        who: what a person calls such a process, with its article.
        remedy: what to do when one is killed.

    Raises:
        ProcessKilled: a helper was, which is nearly always the machine running out of memory, or ended by itself.
            Noticed when its result is due, or while that of another one is waited for. Or it was stopped.
        Exception: what ``work`` or ``jobs`` raises.
        ValueError: ``processes`` or ``each`` is out of range.
    """
    if processes < 1 or not 1 <= each <= MOST_EACH:
        raise ValueError(f"processes {processes}, each {each}: give at least 1, and {MOST_EACH} each at most")
    helpers: list[_Helper[Job, Result]] = []
    busy: deque[_Helper[Job, Result]] = deque()
    failed: Exception | None = None
    try:
        helpers.extend(_Helper(work) for _ in range(processes))
        turns, coming = cycle(helpers), iter(jobs)
        while True:
            try:
                job = next(coming)
            except StopIteration:
                break
            except Exception as error:
                failed = error
                break
            helper = next(turns)
            helper.give(job)
            busy.append(helper)
            if len(busy) > each * processes:
                yield busy.popleft().result(helpers)
        while busy:
            yield busy.popleft().result(helpers)
        if failed is not None:
            raise failed
    except _Died as died:
        raise ProcessKilled(f"{who} {died}; {remedy}") from None
    finally:
        del failed  # its traceback knows this frame
        for helper in helpers:
            helper.end()


class _Died(Exception):
    """A helper is no more; says how it ended."""


class _Helper(Generic[Job, Result]):
    """One process, as seen by the one that it works for."""

    def __init__(self, work: Callable[[Job], Result]) -> None:
        # fork shares what ``work`` knows at no cost: a spawned child would run the main script again, import everything
        # anew and take seconds. Elsewhere than on Linux fork isn't safe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self._owner = os.getpid()
        self._connection, helpers_end = socket.socketpair()
        _ends.update((self._connection, helpers_end))
        with helpers_end:
            for end in (self._connection, helpers_end):
                end.settimeout(None)  # whatever default some library sets
            # Until it has handlers of its own, the child would hear signals with those of this process.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                self._process = context.Process(target=_serve, args=(work, helpers_end, self._owner), daemon=True)
                self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def give(self, job: Job) -> None:
        """Have it do ``job`` after those it was given before."""
        try:
            _send(self._connection, job)
        except ConnectionError:
            raise self._death() from None

    def result(self, helpers: "list[_Helper[Job, Result]]") -> Result:
        """That of the first job whose result was not asked for yet; waits for it, while all ``helpers`` live."""
        sentinels = [helper._process.sentinel for helper in helpers]
        stopped = False
        while not (ready := wait([self._connection, *sentinels], SILENCE)):
            # A job may take as long as it likes, but who was stopped, and wasn't for a moment only, is at none.
            before, stopped = stopped, _is_stopped(self._process.pid)
            if before and stopped:
                raise _Died(f"was stopped, and has not gone on for {SILENCE:g} seconds (process {self._process.pid})")
        if self._connection not in ready:
            raise next(helper for helper in helpers if helper._process.sentinel in ready)._death()
        try:
            result, error = _unpacked(_receive(self._connection))
        except (EOFError, ConnectionError):
            raise self._death() from None
        if error is not None:
            raise error
        return cast(Result, result)

    def _death(self) -> _Died:
        # Its connection is closed a moment before it is over, and another thread may be just about to know its end.
        patient = time.monotonic() + 5
        while (code := self._process.exitcode) is None and time.monotonic() < patient:
            time.sleep(0.01)
        number = f"process {self._process.pid}"
        if code == -signal.SIGKILL:
            return _Died(f"was killed, most likely because memory ran out ({number})")
        if code is not None and code < 0:
            return _Died(f"was ended by {signal.Signals(-code).name} ({number})")
        return _Died(f"ended in the midst of its work ({number}, exit code {code}); its log may say why")

    def end(self) -> None:
        """Whatever it is doing: it has nothing to lose."""
        if os.getpid() != self._owner:
            return  # a forked process collects the garbage that it inherited
        self._connection.close()
        self._process.kill()
        # One that waits for a disk which doesn't answer ends when that does.
        self._process.join(5)
        if self._process.exitcode is not None:
            self._process.close()


def _serve(work: Callable[[Any], Any], connection: socket.socket, owner: int) -> None:
    """A helper's life: job after job, until nobody is there to give one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whom it works for, whose end ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a worker's handler takes it for a notice
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for end in list(_ends):
        if end is not connection:
            end.close()
    threading.Thread(target=_end_with, args=(owner,), name="owner", daemon=True).start()
    torch.set_num_threads(1)
    try:
        while True:
            message = _receive(connection)
            outcome: tuple[Any, Exception | None]
            try:
                outcome = work(_unpacked(message)), None
            except Exception as error:
                outcome = None, _sendable(error)
            try:
                _send(connection, outcome)
            except ConnectionError:
                raise
            except Exception as error:
                _send(connection, (None, _sendable(error)))
            del message, outcome
    except (EOFError, ConnectionError):
        return


def _is_stopped(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False  # it is ending


def _end_with(owner: int) -> None:
    """Asks, since a connection tells of the owner's death only between jobs, and not while others hold its end."""
    while os.getppid() == owner:
        time.sleep(0.2)
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """An error that arrives in another process, and says where it arose unless it is a person's."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, UserError):
        error.add_note(f"raised in another process:\n{trace}")
    return error


class _Pickler(pickle.Pickler):
    """Tensors are sent as NumPy arrays, whose memory pickle leaves aside, in the order in which it lies."""

    def reducer_override(self, value: object) -> Any:
        """See :class:`pickle.Pickler`."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        outermost_first = sorted(range(value.dim()), key=value.stride, reverse=True)
        back = [outermost_first.index(axis) for axis in range(value.dim())]
        return _as_it_lay, (value.permute(outermost_first).numpy(force=True), back)


def _as_it_lay(array: NDArray[Any], axes: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements="W")).permute(axes)


def _send(connection: socket.socket, value: object) -> None:
    """As a nameless file: how many parts there are, their sizes in bytes, the pickled value, the memory of its arrays.

    Raises:
        ConnectionError: nobody is at the other end.
        Exception: what cannot be pickled, or has no room.
    """
    aside: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=aside.append).dump(value)
    parts = [pickled.getbuffer(), *(buffer.raw() for buffer in aside)]
    with _nameless() as file:
        head = memoryview(struct.pack(f"{1 + len(parts)}Q", len(parts), *map(len, parts)))
        for part in (head, *parts):
            file.write(part)
            file.write(bytes(-len(part) % _ALIGNED))
        file.flush()
        socket.send_fds(connection, [b"."], [file.fileno()])


def _receive(connection: socket.socket) -> memoryview:
    """What :func:`_send` sent; waits for it.

    Raises:
        EOFError, ConnectionError: nobody is at the other end.
        OSError: this process has too many open files.
    """
    message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not message:
        raise EOFError
    if not descriptors:
        raise OSError("too many open files: raise their limit (ulimit -n)")
    with open(descriptors[0], "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0))


def _unpacked(message: memoryview) -> Any:
    """The value in it, whose arrays are parts of its memory."""
    (count,) = _NUMBER.unpack_from(message)
    start = 0
    parts = []
    for size in (_NUMBER.size * (1 + count), *struct.unpack_from(f"{count}Q", message, _NUMBER.size)):
        parts.append(message[start : start + size])
        start += size + -size % _ALIGNED
    return pickle.loads(parts[1], buffers=parts[2:])


def _nameless() -> IO[bytes]:
    """An open file that is gone when nobody has it open: in memory, or where the system has no such, on disk."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("metamixer_ray"), "w+b")
    return tempfile.TemporaryFile()
