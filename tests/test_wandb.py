"""Weights & Biases as it is: what an offline run holds, and what becomes of a run whose server goes away."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from brief import BRIEF, with_options
from wandb.proto import wandb_internal_pb2

from qatlab.results.rows import read_rows
from qatlab.results.run import Run
from qatlab.results.stages import TITLES

STEPS, PATIENCE = 4, 3


def stored_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    position, pieces = 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # too little of the block left for a head
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)  # checksum, length; 1 whole, 2 first, 4 last
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def records_of(folder: Path, kind: str) -> Iterator[Any]:
    """The records of one kind in the folder of one W&B run: run, history, summary."""
    (file,) = folder.glob("*.wandb")
    for data in stored_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == kind:
            yield getattr(record, kind)


def plain(items: Any) -> dict[str, Any]:
    """The items of a record, by name; those of a table or a picture are one mapping."""
    found: dict[str, Any] = {}
    for item in items:
        name, *below = item.nested_key or [item.key]
        if below:
            found.setdefault(name, {})["/".join(below)] = json.loads(item.value_json)
        else:
            found[name] = json.loads(item.value_json)
    return found


def stored_history(folder: Path) -> dict[int, dict[str, Any]]:
    """What the folder of one W&B run holds, by trainer/global_step, tables and pictures apart."""
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for history in records_of(folder, "history"):
        row = plain(history.item)
        step = int(row.pop("trainer/global_step"))
        shown = {name: value for name, value in row.items() if name != "epoch" and not name.startswith("_")}
        found[step] |= {name: value for name, value in shown.items() if not isinstance(value, dict)}
    return found


def stored_media(folder: Path) -> dict[str, Any]:
    """The tables and pictures of one W&B run, by name."""
    found = {}
    for history in records_of(folder, "history"):
        found |= {name: value for name, value in plain(history.item).items() if isinstance(value, dict)}
    return found


def stored_summary(folder: Path) -> dict[str, Any]:
    """The summary that a run was given by name."""
    found = {}
    for summary in records_of(folder, "summary"):
        found |= plain(summary.update)
    return found


def stored_run(folder: Path) -> Any:
    """What the folder of one W&B run says of it."""
    return next(records_of(folder, "run"))


def csv_history(path: Path) -> dict[int, dict[str, float]]:
    """What metrics.csv holds, by step."""
    rows = pl.read_csv(path, infer_schema_length=None).drop("epoch").iter_rows(named=True)
    return {row.pop("step"): {name: value for name, value in row.items() if value is not None} for row in rows}


def test_an_offline_run_holds_the_same_curves_as_the_csv(
    small_fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    named = ["wandb.group=bits", "wandb.name=mine", "wandb.notes=a trial", "wandb.tags=[first,tiny]"]
    done = small_fit("light_qat_lsq", tmp_path, "wandb.mode=offline", *named, "objective.feature_mse=0.5")
    (folder,) = (done.folder / "wandb").glob("offline-run-*")
    run = stored_run(folder)
    assert (run.run_group, run.job_type, run.display_name, run.notes) == ("bits", "light_qat_lsq", "mine", "a trial")
    assert list(run.tags) == ["tiny", "W8A8", "seed 0", "first"]
    assert run.run_id == done.id
    history, curves = stored_history(folder), csv_history(done.folder / "metrics.csv")
    expected = {
        *("train/loss", "train/contrastive", "train/feature_mse", "grad_norm/total", "grad_norm/scales"),
        *("scale/c_fc/act/log_ratio", "scale/in_proj/weight/abs_log_ratio"),
        *("layers/out_proj/act_clipped", "layers/c_proj/output_sqnr_db", "layers/in_proj/weight_sqnr_db"),
        *("probe/id@16/zero_shot/top1", "probe/id@16/zero_shot/ece", "probe/near_ood@16/msp/auroc"),
    }
    assert expected <= {name for values in history.values() for name in values}
    assert set(history) == set(curves) == {0, 1, 2}
    for step, values in curves.items():
        assert history[step] == pytest.approx(values, rel=1e-6)
    assert {step for step, values in curves.items() if "probe/id@16/zero_shot/top1" in values} == {0, 1, 2}
    require_results(done, folder, ["FP32", "quantized", "adapted", "after temperature"])


def require_results(done: Run, folder: Path, stages: list[str]) -> None:
    """W&B has the options of the run, the numbers of its table as the summary, the table and the pictures."""
    config = {item.key: json.loads(item.value_json) for item in stored_run(folder).config.update}
    assert (config["quant.weight.bits"], config["suite.images"], config["run_id"]) == (8, 32, done.id)
    assert config["versions.torch"]
    summary = stored_summary(folder)
    stored = {(row["stage"], row["dataset"], row["score"]): row["metrics"] for row in done.rows()}
    for stage, title in TITLES.items():
        if title in stages:
            assert summary[f"id/top-1 %/{title}"] == 100 * stored[stage, "id", "zero_shot"]["top1"]
            assert summary[f"id/NLL/{title}"] == stored[stage, "id", "zero_shot"]["nll"]
            assert summary[f"near_ood/OOD, MSP auroc/{title}"] == 100 * stored[stage, "near_ood", "msp"]["auroc"]
    assert {name.rpartition("/")[2] for name in summary if name.startswith("id/top-1 %/")} == set(stages)
    media = stored_media(folder)
    assert set(media) == {"results", *(path.stem for path in done.folder.glob("*.png"))}
    page = (folder / "files" / media["results"]["path"]).read_text()
    found = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    lines = [re.findall(r"<t[hd][^>]*>\s*(.*?)\s*</t[hd]>", line) for line in found]
    bits = ["tiny", *["tiny W8A8"] * (len(stages) - 1)]
    assert lines[0] == ["set", "metric", *(f"{of} {stage}" for of, stage in zip(bits, stages, strict=True))]
    assert ["id", "top-1 %"] in [line[:2] for line in lines]
    assert (folder / "files" / media["reliability"]["path"]).read_bytes().startswith(b"\x89PNG")


def test_using_a3_a_run_without_training_is_a_run_at_wandb_too(
    small_fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    done = small_fit("ptq", tmp_path, "wandb.mode=offline", "wandb.group=bits")
    (folder,) = (done.folder / "wandb").glob("offline-run-*")
    run = stored_run(folder)
    assert (run.run_group, run.job_type, run.display_name) == ("bits", "ptq", f"ptq-{done.id}")
    require_results(done, folder, ["FP32", "quantized", "after temperature"])
    # Shown once more, the run computes nothing and leaves W&B as it is.
    small_fit("ptq", tmp_path, "wandb.mode=offline", "wandb.group=bits")
    assert list((done.folder / "wandb").glob("offline-run-*")) == [folder]


def test_faults_s4_the_folder_of_wandb_holds_no_secret(
    small_fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    secret = "hunter2hunter2"
    own = (
        f"{{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: {tmp_path}, prefix: 'https://h/?token={secret}'}}"
    )
    options = ["wandb.mode=offline", f"logger=[wandb,{own}]", f"wandb.notes='see https://me:{secret}@h'"]
    options += [f"wandb.tags=['https://h/?sig={secret}']", "fit.steps=0"]
    monkeypatch.setattr("sys.argv", ["fit.py", *options])
    done = small_fit("ptq", tmp_path, *options)
    (folder,) = (done.folder / "wandb").glob("offline-run-*")
    assert stored_run(folder).notes == "see https://...@h"
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert secret.encode() not in path.read_bytes(), path


# -- a server that goes away -----------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers what wandb asks to log in, to open a run and to take its curves; ``fault`` says how and when it stops."""

    daemon_threads = True

    def __init__(self, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.asked = fault, list[str]()
        self.gone = False
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: connections break here on purpose."""

    def vanish(self) -> None:
        """Take no more connections, nor answer on those there are."""
        self.gone = True
        threading.Thread(target=lambda: (self.shutdown(), self.server_close())).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        question = json.loads(body) if self.path == "/graphql" else {"operationName": self.path.rpartition("/")[2]}
        asked = question["operationName"]
        self.server.asked.append(asked)
        if asked == {"unopened": "UpsertBucket"}.get(self.server.fault, "file_stream"):
            if self.server.fault == "refuses":
                return self.answer({"error": "no"}, 403)
            if self.server.fault == "silent":
                time.sleep(120)
            if self.server.fault != "none":
                self.server.vanish()
        if self.server.gone:
            raise ConnectionResetError
        return self.answer(self.facts(question.get("variables") or {}) if self.path == "/graphql" else {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({})

    def answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def facts(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Enough for every question that wandb 0.31 puts."""
        project = {"id": "p", "name": "qatlab", "entity": {"id": "e", "name": "me"}}
        run = {
            "id": "r",
            "name": variables.get("name"),
            "displayName": "r",
            "config": "{}",
            "project": project,
            "tags": [],
        }
        viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        address = f"http://127.0.0.1:{self.server.server_port}/upload"
        names = ["wandb-metadata.json", "requirements.txt", "config.yaml", "wandb-summary.json", "output.log"]
        uploads = [{"name": name, "uploadUrl": f"{address}/{name}"} for name in names]
        return {
            "data": {
                "viewer": viewer,
                "serverInfo": {"features": []},
                "model": {"bucket": None},
                "upsertBucket": {"bucket": run, "inserted": True},
                "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": uploads},
            }
        }


class Online:
    """A small online run on a server with a fault: its folder, what it said, the seconds it took."""

    def __init__(self, python: str, fault: str, folder: Path, environment: dict[str, str], options: list[str]) -> None:
        self.server = Server(fault)
        online = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server.server_port}", "WANDB_API_KEY": "0" * 40}
        settings = {"WANDB_MODE": "online", "WANDB_DIR": "", "WANDB_ERROR_REPORTING": "false"}
        # not the wandb process that an earlier test of this process may have started
        own = {name: value for name, value in environment.items() if name != "WANDB_SERVICE"}
        # wandb makes a folder for its media when it is imported, which the first process that is forked of that one removes.
        program = "import os; from wandb.sdk.data_types import _private\n"
        program += "os.makedirs(_private.MEDIA_TMP.name, exist_ok=True)\n"
        program += f"import qatlab.stages.loggers; qatlab.stages.loggers.PATIENCE = {PATIENCE}\n"
        program += "import qatlab.fit; qatlab.fit.main()"
        training = [
            "wandb.mode=online",
            f"fit.steps={STEPS}",
            "fit.batch_size=8",
            "fit.unique_samples=16",
            "fit.eval_every=2",
        ]
        line = ["recipe=light_qat_lsq", f"output={folder}", *with_options(options, *training, *BRIEF)]
        start = time.monotonic()
        done = subprocess.run(
            [python, "-c", program, *line],
            env={**own, **online, **settings},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=180,
        )
        self.seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr[-4000:]
        (self.folder,) = folder.glob("light_qat_lsq-*")
        self.said = done.stdout
        if not self.server.gone:
            self.server.vanish()

    @property
    def told(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("W&B")]


@pytest.fixture
def online(
    python: str, tmp_path: Path, subprocess_environment: dict[str, str], small_options: list[str]
) -> Callable[[str], Online]:
    def run(fault: str) -> Online:
        done = Online(python, fault, tmp_path, subprocess_environment, small_options)
        curves = csv_history(done.folder / "metrics.csv")
        assert set(curves) == set(range(STEPS + 1))
        assert {"temperature"} <= {row["stage"] for row in read_rows(done.folder / "results.jsonl")}
        assert (done.folder / "curves.png").exists()
        return done

    return run


def test_a_server_that_answers_gets_everything(online: Callable[[str], Online]) -> None:
    done = online("none")
    assert done.told == []
    assert {"UpsertBucket", "file_stream"} <= set(done.server.asked)


@pytest.mark.parametrize("fault", ["vanishes", "silent"])
def test_a_server_that_stops_answering_leaves_everything_on_disk(fault: str, online: Callable[[str], Online]) -> None:
    done = online(fault)
    (folder,) = (path for path in (done.folder / "wandb").glob("run-*") if path.is_dir())
    first, second = done.told
    assert first == f"W&B: no answer for {PATIENCE} s; the curves are kept in {folder}."
    assert second.split() == f"W&B (not uploaded) {folder} (upload: wandb sync {folder})".split()
    history = stored_history(folder)
    for step, values in csv_history(done.folder / "metrics.csv").items():
        assert history[step] == pytest.approx(values, rel=1e-6)
    assert done.seconds < 60


def test_a_server_that_does_not_open_the_run_leaves_it_offline(online: Callable[[str], Online]) -> None:
    done = online("unopened")
    (folder,) = (done.folder / "wandb").glob("offline-run-*")
    first, second = done.told
    assert first.startswith("W&B: ")
    assert first.endswith("; the curves are kept offline.")
    assert second.split() == f"W&B (offline) {folder} (upload: wandb sync {folder})".split()
    assert set(stored_history(folder)) == set(range(STEPS + 1))


def test_a_server_that_refuses_the_curves_does_not_end_the_run(online: Callable[[str], Online]) -> None:
    done = online("refuses")
    (folder,) = (path for path in (done.folder / "wandb").glob("run-*") if path.is_dir())
    assert set(stored_history(folder)) == set(range(STEPS + 1))
