"""An exported folder is data: nothing outside of it is opened, nothing unlisted is read, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from folders import exported_folder, written

from qatlab import deploy
from qatlab.core.errors import UserError
from qatlab.deploy.tower import DeployedTower


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {form: exported_folder(folder / form, form, bits=7) for form in ("onnx", "openvino")}


@pytest.fixture
def folder(whole: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole["onnx"], tmp_path / "export"))


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def outside(folder: Path) -> str:
    """A good model beside the folder."""
    shutil.copy(folder / "model.onnx", folder.parent / "model.onnx")
    return str(folder.parent / "model.onnx")


Change = Callable[[dict[str, Any], Path], Any]
CHANGES: list[tuple[Change, str]] = [
    (lambda a, _: a.update(sha256={}), r"has no checksum of model\.onnx, which would be read"),
    (lambda a, _: a["sha256"].pop("check.npz"), r"has no checksum of check\.npz"),
    (lambda a, _: a["sha256"].pop("check.onnx"), r"has no checksum of check\.onnx"),
    (lambda a, f: a.update(file=outside(f)), r"names file='/.*', where a model for onnx is model\.onnx"),
    (lambda a, f: (outside(f), a.update(file="../model.onnx")), r"names file='\.\./model\.onnx'"),
    (lambda a, f: a["sha256"].update({outside(f): "0" * 64}), r"lists '/.*model\.onnx': files are named as they lie"),
    (lambda a, _: a["sha256"].update({"../export.json": "0" * 64}), r"lists '\.\./export\.json'"),
    (lambda a, _: a["sha256"].update({"..": "0" * 64}), r"lists '\.\.'"),
    (lambda a, _: a["sha256"].update({"a\0b": "0" * 64}), "files are named as they lie"),
    (lambda a, _: a.update(format="pickle"), r"says format='pickle', where one of onnx, openvino, torch is expected"),
    (lambda a, _: a.update(format=["onnx"]), r"says format=\"\['onnx'\]\", where one of"),
    (lambda a, _: a.update(format="openvino"), r"names file='model\.onnx', where a model for openvino is model\.xml"),
    (lambda a, _: a.pop("file"), "says file='None', where a file's name is expected"),
    (lambda a, _: a.update(sha256=["model.onnx"]), "where the sha256 of every file by its name is expected"),
    (lambda a, _: a["sha256"].update({"model.onnx": 5}), "where the sha256 of every file by its name is expected"),
    (lambda a, _: a.update(logit_scale=float("nan")), "says logit_scale='nan', where a positive number is expected"),
    (lambda a, _: a.update(logit_scale=10**400), "where a positive number is expected"),
    (lambda a, _: a.update(check={"limit": 1}), "where what the stored input is held to is expected"),
    (lambda a, _: a["check"].update(limit=float("inf")), "where what the stored input is held to is expected"),
    (lambda a, _: a.update(check=[1]), "where what the stored input is held to is expected"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_faults_s3_what_a_folder_says_is_held_to_what_an_export_writes(folder: Path, number: int) -> None:
    change, told = CHANGES[number]
    known = about(folder)
    change(known, folder)
    (folder / "export.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=told):
        deploy.load(folder)
    with pytest.raises(UserError, match=told):  # and so does an evaluation
        DeployedTower(folder, trust=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is damaged"),
        (b"\xff\xfe{}", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[1]", "holds a list, where names with values are expected"),
        (b" " * (2**24 + 1), "has 16777217 bytes"),
    ],
)
def test_faults_s3_an_export_json_that_is_none_is_named(folder: Path, content: bytes, told: str) -> None:
    (folder / "export.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"export\.json {told}"):
        deploy.load(folder)


def test_faults_s3_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    moved = shutil.move(folder / "model.onnx", folder.parent / "model.onnx")
    (folder / "model.onnx").symlink_to(moved)
    with pytest.raises(UserError, match=r"model\.onnx is a link that leaves the folder"):
        deploy.load(folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("/dev/zero")  # would be read for ever
    with pytest.raises(UserError, match="is a link that leaves the folder"):
        deploy.load(folder)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")  # nobody writes to it
    with pytest.raises(UserError, match=r"model\.onnx is missing"):
        deploy.load(folder)


def test_faults_s3_a_folder_that_is_reached_by_a_link_is_one(folder: Path) -> None:
    (folder.parent / "latest").symlink_to(folder)
    deploy.load(folder.parent / "latest")


@pytest.mark.parametrize("location", ["../weights.bin", "weights.bin"])
def test_faults_s3_weights_in_other_files_are_refused(folder: Path, location: str) -> None:
    """Those beside the model too: they would be read without a checksum."""
    graph = onnx.load(folder / "model.onnx")
    onnx.external_data_helper.convert_model_to_external_data(graph, location="weights.bin", size_threshold=0)
    onnx.save(graph, folder / "model.onnx")
    data = (folder / "model.onnx").read_bytes()
    if location != "weights.bin":
        shutil.move(folder / "weights.bin", folder.parent / "weights.bin")
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        data = graph.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    written(folder, about(folder))
    with pytest.raises(UserError, match=r"model\.onnx keeps weights in other files"):
        deploy.load(folder)


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


def test_faults_s3_a_model_for_torch_is_not_even_opened_without_trust(folder: Path) -> None:
    ran = folder.parent / "ran"
    for name in ("model.onnx", "check.onnx"):
        (folder / name).unlink()
    for name in ("model.pt2", "check.pt2"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("model/archive_format", "pt2")
            archive.writestr("model/archive_version", "0")
            archive.writestr("model/data/weights/model.pt", pickle.dumps(Bomb(ran)))
    known = about(folder) | {"format": "torch", "file": "model.pt2"}
    written(folder, known)
    for opened in (deploy.load, DeployedTower):
        with pytest.raises(UserError, match=r"model\.pt2 is a program .* can run code .* trust=true"):
            opened(folder)
    with pytest.raises(UserError, match=r"model\.pt2 is a program"):
        deploy.load(folder, allow_inexact=True)  # which says something else
    assert not ran.exists()


def test_faults_s3_the_stored_input_is_no_pickle_and_no_bomb(folder: Path) -> None:
    ran = folder.parent / "ran"
    objects = np.array([Bomb(ran)], dtype=object)
    np.savez(folder / "check.npz", images=objects, features=objects, layer_input=objects, layer_output=objects)
    written(folder, about(folder))
    with pytest.raises(UserError, match=r"check\.npz is damaged"):
        deploy.load(folder)
    assert not ran.exists()
    np.savez_compressed(folder / "check.npz", images=np.zeros((1000, 3, 64, 64), np.float32))
    written(folder, about(folder))
    with pytest.raises(UserError, match=r"check\.npz is damaged \(it is compressed"):
        deploy.load(folder)


def test_faults_s3_the_weights_that_openvino_reads_by_itself_are_listed(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["openvino"], tmp_path / "export"))
    deploy.load(folder)
    known = about(folder)
    del known["sha256"]["model.bin"]
    (folder / "export.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"has no checksum of model\.bin"):
        deploy.load(folder)
