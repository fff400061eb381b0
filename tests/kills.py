"""A machine that fails at any moment, on purpose: ``python tests/kills.py KILLED FULL DAMAGED [SEED]``, numbers of cases.

Everything is imported once; each case is a child forked from here, in which a command is killed, or finds the disk full, at a
random write, sync or rename, or a file that it reads is damaged. The same command afterwards must end with the rows of one
that nothing happened to. What this process itself must not do is compute: threads do not live on in children.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pictures
import torch
from conftest import SMALL

# What a command imports when it runs is imported here, once for all children.
from qatlab.config import compose
from qatlab.config.explain import explain
from qatlab.evaluate import evaluate
from qatlab.export import export
from qatlab.fit import fit
from qatlab.results.rows import read_rows

torch.set_num_threads(1)
RECIPE = "light_qat_lsq_pc"
# Two sets, two steps, no intervals: the least that has every stage. Weights of 7 bits can be exported on every CPU.
LEAST = [
    *(option for option in SMALL if not option.startswith(("suite.resamples", "suite.images", "suite.probe"))),
    *("suite.images=16", "suite.resamples=0", "suite.probe_images=8", "suite.probe_sets=[id]", "~suite.sets.near_ood"),
    *(
        "fit.steps=2",
        "fit.batch_size=8",
        "fit.unique_samples=16",
        "fit.checkpoint_every=1",
        "fit.eval_every=1",
        "quant.weight.bits=7",
    ),
]
SCORING = [
    option
    for option in LEAST
    if not option.startswith(("quant.", "data.", "fit.eval", "fit.steps", "fit.batch", "fit.u"))
]


# -- the commands ----------------------------------------------------------------------------------------------------


def _fit(folder: Path) -> None:
    fit(compose(f"recipe={RECIPE}", *LEAST, f"output={folder}"), RECIPE)


def _run_in(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith(RECIPE) and path.is_dir())


def _evaluate(folder: Path) -> None:
    evaluate(compose(*SCORING, "suite.seed=1", f"checkpoint={_run_in(folder)}"), "evaluate")


def _export(folder: Path) -> None:
    export(compose(*SCORING, "format=onnx", f"checkpoint={_run_in(folder)}"), "evaluate")


def _sweep(folder: Path) -> None:
    """The cells that are left, one after the other in this process."""
    from qatlab.results.run import Run
    from qatlab.sweeps.grid import Cell
    from qatlab.sweeps.state import state_of

    for bits in (8, 4):
        options = [option for option in LEAST if not option.startswith(("fit.", "quant.weight"))]
        config = compose("recipe=ptq", *options, "fit.workers=0", f"quant.weight.bits={bits}", f"output={folder}")
        if state_of(Cell((), "ptq", Run(config, "ptq"))).kind != "finished":
            fit(config, "ptq")


COMMANDS: dict[str, Callable[[Path], None]] = {"fit": _fit, "evaluate": _evaluate, "export": _export, "sweep": _sweep}
AFTER_FIT = ("evaluate", "export")


# -- what happens to them --------------------------------------------------------------------------------------------


class Moments:
    """Counts writes, syncs and renames, and has ``strike`` happen at the ``at``-th: in the middle of it, where it is a write."""

    def __init__(self, at: int, strike: Callable[[], None]) -> None:
        self.at, self.strike, self.count = at, strike, 0

    def next(self, half: Callable[[], Any] = lambda: None) -> None:
        self.count += 1
        if self.at and self.count >= self.at:
            half()
            self.strike()

    def install(self) -> None:
        """Put this between Python and the system."""
        moments = self

        class Counted(io.BufferedWriter):
            writes = 0

            def write(self, data: Any) -> int:
                self.writes += 1
                if self.writes & (self.writes - 1):  # the 1st, 2nd, 4th, ...: else a shard would outweigh all the rest
                    return super().write(data)

                def half() -> None:
                    whole = bytes(data)
                    io.BufferedWriter.write(self, whole[: len(whole) // 2])
                    with contextlib.suppress(OSError):
                        self.flush()

                moments.next(half)
                return super().write(data)

        opened = builtins.open

        def counting(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            written = isinstance(file, (str, Path)) and set(mode) & set("wax") and "+" not in mode
            if not written or str(file).startswith(("/dev", "/proc")):
                return opened(file, mode, buffering, *more, **named)
            moments.next()
            if buffering == 0:
                return opened(file, mode, buffering, *more, **named)
            plain = Counted(io.FileIO(file, mode.replace("b", "").replace("t", "")))
            if "b" in mode:
                return plain
            return io.TextIOWrapper(
                plain, *more[:3], **{k: v for k, v in named.items() if k in ("encoding", "errors", "newline")}
            )

        builtins.open = io.open = counting  # type: ignore[assignment]
        for name in ("write", "pwrite", "fsync", "rename", "replace", "ftruncate"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.next()
            return call(*arguments, **named)

        return counted


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- a case ----------------------------------------------------------------------------------------------------------


def child(work: Callable[[], Any], log: Path) -> int:
    """Return how a forked child ended that did ``work``: 0, 2 with a sentence, 3 with a traceback, or minus a signal."""
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        code = 0
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
            try:
                work()
            except BaseException as error:
                sentence = explain(error)
                print(f"qatlab: {sentence}" if sentence else traceback.format_exc(), flush=True)
                code = 2 if sentence else 3
            sys.stdout.flush()
        os._exit(code)
    status = os.waitpid(process, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def rows_of(folder: Path) -> list[str]:
    """What the rows in ``folder`` say, without what every run has of its own."""
    found = [row for file in sorted(folder.glob("*/results.jsonl")) for row in read_rows(file)]
    kept = (
        "run_id",
        "stage",
        "step",
        "dataset",
        "definition",
        "score",
        "prompts",
        "n",
        "metrics",
        "logit_scale",
        "paired",
    )
    return sorted(json.dumps({name: row[name] for name in kept}) for row in found)


class Programme:
    """The commands in ``root``, done once without a fault, which the cases start from and are compared with."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.folder = root, root / "log", root / "case"
        self.rows: dict[str, list[str]] = {}
        self.moments: dict[tuple[str, bool], int] = {}  # by command, and whether nothing was cached
        for name, cold in (("fit", True), *((name, False) for name in COMMANDS)):
            folder = root / ("fit" if cold else f"{name}-again")
            self.start(name, folder, cold)
            self.moments[name, cold] = self._counted(name, folder)
            self.rows[name] = rows_of(folder)

    def start(self, name: str, folder: Path, cold: bool = False) -> None:
        """Make ``folder``, as it is before a command; the cache in it holds what the last command left, or nothing."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / "fit", folder) if name in AFTER_FIT else folder.mkdir()
        if not cold and not (folder / "cache").exists():
            shutil.copytree(self.root / "fit" / "cache", folder / "cache")

    def do(self, name: str, folder: Path, moments: Moments | None = None) -> int:
        """Return how the command ended in a child."""

        def work() -> None:
            os.environ["QATLAB_CACHE"] = str(folder / "cache")
            if moments is not None:
                moments.install()
            COMMANDS[name](folder)

        return child(work, self.log)

    def _counted(self, name: str, folder: Path) -> int:
        told = folder / "moments"

        def tell() -> None:
            os.environ["QATLAB_CACHE"] = str(folder / "cache")
            moments = Moments(0, _kill)
            moments.install()
            COMMANDS[name](folder)
            told.write_text(str(moments.count))

        if code := child(tell, self.log):
            raise SystemExit(f"{name} without a fault ended with {code}:\n{self.log.read_text()[-3000:]}")
        return int(told.read_text())

    def judge(self, name: str, what: str, struck: int, allowed: tuple[int, ...]) -> list[str]:
        """Return what is wrong after the same command was given again."""
        said = self.log.read_text()[-3000:]
        wrong = [] if struck in allowed else [f"{what}: ended with {struck}"]
        if code := self.do(name, self.folder):
            wrong.append(f"{what}: the same command then ended with {code}")
        else:
            wrong += self._differences(name, what)
        # What is wrong comes last: of a long output the end is kept.
        return [self.log.read_text()[-1500:], "what the struck command said:", said, *wrong] if wrong else []

    def _differences(self, name: str, what: str) -> list[str]:
        """Return a line where there are other rows than without the fault; a probe's may be lost, if that was said."""
        found, right = rows_of(self.folder), self.rows[name]
        lost = [row for row in right if row not in found]
        other = [row for row in found if row not in right]
        told = "what they said of a probe" in " ".join(self.log.read_text().split())
        if not other and (told or not lost) and all(json.loads(row)["stage"] == "probe" for row in lost):
            return []
        return [f"{what}: {len(lost)} rows of {len(right)} are lost, {len(other)} are others; loss told: {told}"]


Case = Callable[[Programme], list[str]]


def struck(programme: Programme, kind: str, number: int, chance: random.Random) -> Case:
    """Return the case of a command that is killed, or finds the disk full, at some moment."""
    name = list(COMMANDS)[number % len(COMMANDS)]
    cold = (name, True) in programme.moments and chance.random() < 0.5
    at = chance.randint(1, most := programme.moments[name, cold])
    what = f"{kind} {number}: {name} at {at} of {most}{', nothing cached' if cold else ''}"

    def case(programme: Programme) -> list[str]:
        print(what, flush=True)
        programme.start(name, programme.folder, cold)
        ended = programme.do(name, programme.folder, Moments(at, _kill if kind == "killed" else _full))
        # What only saves time or is only looked at is done without: a command may end well on a full disk.
        return programme.judge(name, what, ended, (0, -signal.SIGKILL) if kind == "killed" else (0, 2))

    return case


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, chance: content[: chance.randrange(len(content))],
    "empty": lambda content, chance: b"",
    "flipped": lambda content, chance: _flipped(content, chance.randrange(8 * len(content))),
}


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged(programme: Programme, number: int, chance: random.Random) -> Case:
    """Return the case of a file of a finished run, or of the cache, that is damaged."""
    finished = programme.root / "fit"
    files = [
        path.relative_to(finished) for path in sorted(finished.rglob("*")) if path.is_file() and path.stat().st_size
    ]
    files = [path for path in files if path.name not in ("moments", ".lock") and "locks" not in path.parts]
    path, kind = chance.choice(files), chance.choice(list(DAMAGES))
    # Another suite needs more of the model and of the cache than the run itself does.
    name = ("fit", "evaluate")[number % 2]
    content = DAMAGES[kind]((finished / path).read_bytes(), chance)
    what = f"damaged {number}: {path} {kind}, {name}"

    def case(programme: Programme) -> list[str]:
        print(what, flush=True)
        programme.start("evaluate", programme.folder)
        (programme.folder / path).write_bytes(content)
        ended = programme.do(name, programme.folder)
        if ended == 2:
            if path.name not in (said := programme.log.read_text()):
                return [said[-3000:], f"{what}: ended with a sentence that does not name the file"]
            (programme.folder / path).unlink(missing_ok=True)
        elif ended:
            return programme.judge(name, what, ended, (0,))
        # What the run itself left, its own command makes again.
        return programme.judge(name, what, programme.do("fit", programme.folder), (0,))

    return case


def apart(cases: list[Case], programme: Programme) -> list[str]:
    """Return what is wrong in the cases, which as many processes as there are cores do in turn."""
    workers = []
    for worker in range(min(len(cases), os.cpu_count() or 1)):
        place = programme.root / f"worker-{worker}"
        place.mkdir()
        sys.stdout.flush()
        if (process := os.fork()) == 0:
            programme.log, programme.folder = place / "log", place / "case"
            wrong: list[str] = []
            for case in cases[worker :: os.cpu_count() or 1]:
                programme.log.write_text("")
                wrong += case(programme)
            (place / "wrong").write_text("\n".join(wrong))
            os._exit(0)
        workers.append((process, place))
    for process, _ in workers:
        os.waitpid(process, 0)
    return [text for _, place in workers if (text := (place / "wrong").read_text())]


def main(killed: str, full: str, harmed: str, seed: str = "") -> None:
    """Run the cases, and exit with 1 and what went wrong where something did."""
    number = int(seed) if seed else random.SystemRandom().randrange(10**6)
    print(f"seed {number}", flush=True)
    chance = random.Random(number)
    pictures.leave_blank()
    with tempfile.TemporaryDirectory() as temporary:
        programme = Programme(Path(temporary))
        print(f"moments {programme.moments}", flush=True)
        cases = [struck(programme, "killed", i, chance) for i in range(int(killed))]
        cases += [struck(programme, "full", i, chance) for i in range(int(full))]
        cases += [damaged(programme, i, chance) for i in range(int(harmed))]
        wrong = apart(cases, programme)
    print("\n".join(wrong))
    if wrong:
        sys.exit(f"seed {number}: went wrong as above")


if __name__ == "__main__":
    main(*sys.argv[1:])
