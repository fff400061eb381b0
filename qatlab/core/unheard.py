"""Output into a closed pipe or onto a full disk, which is no reason for a run to stop."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Unheard:
    """A stand-in for a ``stream`` of text; once the stream cannot be written to, all text is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    # Everything but writing is left to the stream: rich asks for
    # its encoding, file number and whether it is a terminal.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, or drop it where the stream cannot be written to; returns its length either way."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what it holds where it cannot be written to."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Point the stream's file number to the null device."""
        # The stream keeps text that it could not write. Python would flush it at exit, fail, and exit with code 120.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        # Users know that they closed a pipe (`| head`), but not that
        # a disk is full. Nothing is left to report a broken stderr.
        if error.errno != errno.EPIPE and self._stream is not sys.__stderr__:
            with suppress(OSError):
                print(f"qatlab: the output cannot be written ({error.strerror}); the run goes on.", file=sys.stderr)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside this context nothing fails because stdout or stderr is closed, by its reader or from the start."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        # Python has None for a stream that was closed before the process began (`>&-`).
        sys.stdout, sys.stderr = (Unheard(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before
