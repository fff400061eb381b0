"""The ``python`` whose processes are forked (forked.py) does what Python does, seen from where it is started and from inside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENDINGS = {
    "well": ("print('done')", 0),
    "a number": ("raise SystemExit(75)", 75),
    "a sentence": ("raise SystemExit('no')", 1),
    "an error": ("1 / 0", 1),
    "Ctrl-C": ("raise KeyboardInterrupt", -signal.SIGINT),
    "a kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "at exit": ("import atexit; atexit.register(print, 'bye'); raise SystemExit(3)", 3),
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_it_ends_as_python_does(python: str, kind: str) -> None:
    line, code = ENDINGS[kind]
    ended = [
        subprocess.run([program, "-c", line], capture_output=True, text=True) for program in (python, sys.executable)
    ]
    assert [process.returncode for process in ended] == [code, code]
    assert ended[0].stdout == ended[1].stdout
    assert ended[0].stderr.splitlines()[-1:] == ended[1].stderr.splitlines()[-1:]


SEEN = """
import json, os, sys, __main__
told = [sys.argv, __name__, __main__.__spec__ and __main__.__spec__.name, os.getcwd(), os.environ.get("HERE"), sys.stdin.read()]
print(json.dumps([*told, sys.path[0]]))
"""


@pytest.mark.parametrize("way", ["-m", "-c", "a script"])
def test_a_process_sees_what_it_was_started_with(
    python: str, subprocess_environment: dict[str, str], tmp_path: Path, way: str
) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    line = {"-m": ["-m", "seen"], "-c": ["-c", SEEN], "a script": [str(tmp_path / "seen.py")]}[way]
    told = []
    for program in (python, sys.executable):
        environment = {**subprocess_environment, "HERE": "yes"}
        ended = subprocess.run(
            [program, *line, "a b", "--c"], cwd=tmp_path, env=environment, input="asked", capture_output=True, text=True
        )
        told.append(json.loads(ended.stdout))
    assert told[0] == told[1]


def test_torch_is_there_at_once_and_what_is_started_inside_is_forked_too(python: str) -> None:
    inner = "import sys; print('lightning' in sys.modules)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}]); print('torch' in sys.modules)"
    assert subprocess.run([python, "-c", outer], capture_output=True, text=True).stdout == "True\nTrue\n"


def test_a_signal_reaches_it_and_it_dies_with_what_stands_for_it(python: str) -> None:
    heeding = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True));"
    line = f"{heeding} print('ready', flush=True); signal.pause(); signal.pause()"
    process = subprocess.Popen([python, "-c", line], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "heard\n"
    process.kill()
    assert process.communicate(timeout=60)[0] == ""  # nobody holds its output any more
