"""Work done ahead by other processes, in order, of which any may be killed at any moment.

multiprocessing's pools and torch's DataLoader share queues among their processes: one that is killed while it holds a
queue's lock, or after half of a result, leaves all others, and whom they work for, waiting for ever. Here each helper
has a connection of its own, which its death closes wherever it was; and over it go only descriptors of nameless memory,
so that nobody waits for a reader, and nothing is left of a dead helper. Nobody else can reach such a connection, which
is why this module alone may pickle.
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
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import cycle
from typing import IO, Any, Generic, TypeVar, cast

import torch

from metamixer_ray.errors import ProcessKilled, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_NUMBER = struct.Struct("Q")
_ALIGNED = 64
"""Bytes, to multiples of which parts of a message are filled up: what NumPy and torch like to read."""

_starting = threading.Lock()
"""A process begun by another thread meanwhile would hold the helper's end of a connection open, and hide its death."""


def helped(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, processes: int, each: int, who: str, remedy: str
) -> Generator[Result, None, None]:
    """``work(job)`` of each job, in order, done by processes that end with this generator, and with its process.

    Jobs are asked for in the calling thread. NumPy arrays and tensors in a result lie in shared memory that is freed
    with them; they may be written to.

    Args:
        work: called in the helpers, which know it by being forked (it is not sent, but where there is no safe fork).
        each: jobs that a helper is given before the result of its first one is asked for.
        who: what a person calls such a process, with its article.
        remedy: what to do when one is killed.

    Raises:
        ProcessKilled: a helper was, which is nearly always the machine running out of memory.
        Exception: what ``work`` or ``jobs`` raises.
    """
    helpers: list[_Helper[Job, Result]] = []
    busy: deque[_Helper[Job, Result]] = deque()
    try:
        helpers.extend(_Helper(work) for _ in range(processes))
        for helper, job in zip(cycle(helpers), jobs, strict=False):
            helper.give(job)
            busy.append(helper)
            if len(busy) > each * processes:
                yield busy.popleft().result()
        while busy:
            yield busy.popleft().result()
    except _Died as died:
        raise ProcessKilled(f"{who} was killed, most likely because memory ran out ({died}); {remedy}") from None
    finally:
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
        self._whose = os.getpid()
        with _starting:
            self._connection, theirs = socket.socketpair()
            with theirs:
                ends = self._connection, theirs
                self._process = context.Process(target=_serve, args=(work, *ends), daemon=True)
                self._process.start()

    def give(self, job: Job) -> None:
        """Have it do ``job`` after those it was given before."""
        try:
            _send(self._connection, job)
        except ConnectionError:
            raise self._death() from None

    def result(self) -> Result:
        """That of the first job whose result was not asked for yet; waits for it."""
        try:
            result, error = _receive(self._connection)
        except (EOFError, ConnectionError):
            raise self._death() from None
        if error is not None:
            raise error
        return cast(Result, result)

    def _death(self) -> _Died:
        # Its connection is closed a moment before it is over.
        self._process.join(1)
        code = self._process.exitcode
        return _Died(f"process {self._process.pid}, " + ("it hung up" if code is None else f"exit code {code}"))

    def end(self) -> None:
        """Whatever it is doing: it has nothing to lose."""
        if os.getpid() != self._whose:
            return  # another helper collects the garbage that it inherited
        self._connection.close()
        self._process.kill()
        # One that waits for a disk which doesn't answer ends when that does.
        self._process.join(5)


def _serve(work: Callable[[Any], Any], theirs: socket.socket, connection: socket.socket) -> None:
    """A helper's life: job after job, until nobody is there to give one."""
    theirs.close()  # or it would keep itself company
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whom it works for, whose end ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a worker's handler takes it for a notice
    torch.set_num_threads(1)
    try:
        while True:
            job = _receive(connection)
            outcome: tuple[Any, Exception | None]
            try:
                outcome = work(job), None
            except Exception as error:
                outcome = None, _sendable(error)
            try:
                _send(connection, outcome)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                _send(connection, (None, _sendable(error)))
            del job, outcome
    except (EOFError, ConnectionError):
        return


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
    """Tensors are sent as the NumPy arrays that they are, whose memory pickle leaves aside."""

    def reducer_override(self, value: object) -> Any:
        """See :class:`pickle.Pickler`."""
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _send(connection: socket.socket, value: object) -> None:
    """As a nameless file: how many parts there are, their sizes in bytes, the pickled value, the memory of its arrays.

    Raises:
        ConnectionError: nobody is at the other end.
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


def _receive(connection: socket.socket) -> Any:
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
        memory = memoryview(mmap.mmap(file.fileno(), 0))
    (count,) = _NUMBER.unpack_from(memory)
    start = 0
    parts = []
    for size in (_NUMBER.size * (1 + count), *struct.unpack_from(f"{count}Q", memory, _NUMBER.size)):
        parts.append(memory[start : start + size])
        start += size + -size % _ALIGNED
    return pickle.loads(parts[1], buffers=parts[2:])


def _nameless() -> IO[bytes]:
    """An open file that is gone when nobody has it open: in memory, or where the system has no such, on disk."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("metamixer_ray"), "w+b")
    return tempfile.TemporaryFile()
