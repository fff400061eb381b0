"""A ``python`` for tests that start commands: its processes are forked from one that has imported torch and the rest already.

Importing them takes seconds of each start, which is most of what a small run takes. ``server()`` starts the process that
imports them once, and gives the path of a program to be called like ``python``. That program, the client, hands its
arguments, environment, folder, limits and standard files to the server, and ends as the forked process ends: with its exit code, or
of its signal. Signals to the client go on to the forked process, which dies with the client. In the forked process
``sys.executable`` is that program too, so that what it starts itself (a sweep its runs, Lightning its other ranks) is
forked as well.

It differs from a real start in what was imported before, and its pictures are blank (pictures.py): some tests of every
program start it for real.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)


@contextmanager
def server(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Inside this context, the path of the ``python``, which lies in ``folder``, whose path has at most 90 letters."""
    program, address = folder / "python", folder / "server"
    # As a shell script, because the first line of a script takes one argument only.
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" client "{address}" "$@"\n')
    program.chmod(0o700)
    command = [sys.executable, __file__, "serve", str(address), str(program)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    try:
        yield str(program)
    finally:
        # A closed stdin ends it too, as where the tests die; but a process that was forked from the tests and is left over
        # from one, such as a loader's, has a copy of it.
        process.stdin.close()
        process.terminate()
        process.wait()


# -- the client: imports little, as it is started for every command -------------------------------------------------------


def client(address: str, arguments: list[str]) -> None:
    """Have the server run ``python *arguments``, and end as that ends."""
    if not _can_be_forked(arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a number must not come into the middle of the request
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        limits = [resource.getrlimit(limit) for limit in LIMITS]
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "limits": limits}
        message = json.dumps(request).encode()
        socket.send_fds(connection, [len(message).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(message)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        status = int.from_bytes(_received(connection, 4), "big")
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # SIGKILL has no other
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _can_be_forked(arguments: list[str]) -> bool:
    """Return whether it is a module, a line or a script without options of Python, and given no files beside the usual."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c")):
        return False
    for file in range(3, 256):
        with suppress(OSError):  # not open
            os.fstat(file)
            return False
    return True


def _received(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise SystemExit("the server of forked processes has ended")
        found += piece
    return found


# -- the server -----------------------------------------------------------------------------------------------------------


def serve(address: str) -> dict[str, Any]:
    """Wait for commands. Returns in a forked process, with the request that it is to run."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("listening", flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            with suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin in ready:  # closed: the tests have ended
                os._exit(0)
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    listening.close()
                    return _look_after(connection)


def _look_after(connection: socket.socket) -> dict[str, Any]:
    """Return the request in a process forked for it; the one that forked it never returns, but tells how that ended."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    request: dict[str, Any] = json.loads(_received(connection, int.from_bytes(size, "big")))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    process = os.fork()
    if process == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for file in (woken, wake, connection.detach()):
            os.close(file)
        for standard, file in enumerate(files):
            os.dup2(file, standard)
            os.close(file)
        return request
    for file in (0, 1, 2, *files):  # else who reads what the process writes would wait for this one too
        os.close(file)
    waited: list[Any] = [connection, woken]
    while True:
        ready, _, _ = select.select(waited, [], [])
        if woken in ready:
            with suppress(OSError):
                connection.sendall(os.waitpid(process, 0)[1].to_bytes(4, "big"))
            os._exit(0)
        number = connection.recv(1)
        os.kill(process, number[0] if number else signal.SIGKILL)  # without its client the process does not live on
        if not number:
            os.waitpid(process, 0)
            os._exit(0)


def become(request: dict[str, Any], program: str) -> None:
    """Make of this process what ``program`` would be, started for real, and run what it was asked to."""
    import random
    import tempfile
    import types

    import numpy as np
    import torch
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for limit, values in zip(LIMITS, request["limits"], strict=True):
        resource.setrlimit(limit, values)
    # What the libraries have read of the environment, and what chance they have taken, when they were imported.
    tempfile.tempdir = None
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    rank_zero_only.rank = _get_rank() or 0  # type: ignore[attr-defined]
    path = os.environ.get("PYTHONPATH", "")
    sys.path[:] = list(dict.fromkeys([*filter(None, path.split(os.pathsep)), *sys.path]))
    sys.executable = program

    # As runpy does it, which would warn of modules that are imported already, and take this one's place only for a time.
    first, *rest = request["arguments"]
    main = types.ModuleType("__main__")
    if first == "-m":
        from importlib.util import find_spec

        sys.path.insert(0, os.getcwd())
        spec = find_spec(rest[0])
        assert spec is not None
        if spec.submodule_search_locations is not None:
            spec = find_spec(f"{rest[0]}.__main__")
        assert spec is not None
        main.__spec__, main.__package__, main.__file__ = spec, spec.parent, spec.origin
        code: Any = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
        sys.argv = [str(spec.origin), *rest[1:]]
    elif first == "-c":
        code = compile(rest[0], "<string>", "exec")
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
    else:
        main.__file__ = first
        code = compile(Path(first).read_text(), first, "exec")
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [first, *rest]
    sys.modules["__main__"] = main
    _end(code, main.__dict__)


def _end(code: Any, variables: dict[str, Any]) -> NoReturn:
    """Run the code, and end with its exit code as Python does, but without the half second of taking all modules apart."""
    import atexit

    number, interrupted = 0, False
    try:
        exec(code, variables)
    except SystemExit as end:
        number = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        number, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(number & 0xFF)


def _import_all() -> None:
    """Import what commands import, many of them only when they run."""
    import gc
    import importlib

    import pictures

    sys.path.pop(0)  # this file's folder
    for name in ("fit", "evaluate", "export", "bench", "sweep", "callbacks", "reports.terminal", "reports.files"):
        importlib.import_module(f"qatlab.{name}")
    for name in ("experiment", "export", "loggers", "quantize", "requested", "score", "train"):
        importlib.import_module(f"qatlab.stages.{name}")
    pictures.leave_blank()
    gc.freeze()  # else a collection in a forked process would copy all of it


if __name__ == "__main__":
    if sys.argv[1] == "client":
        client(sys.argv[2], sys.argv[3:])
    _import_all()
    become(serve(sys.argv[2]), sys.argv[3])
