"""How an image set lies on disk: told by what is there, or named."""

from __future__ import annotations

from pathlib import Path

from qatlab.data.arrays import CorruptionArray
from qatlab.data.cifar import Cifar, batch_file
from qatlab.data.images import Folders
from qatlab.data.imglists import ImgList
from qatlab.data.manifests import ANNOTATIONS, Manifest, TinyAnnotations
from qatlab.data.sets import Layout
from qatlab.data.webdatasets import WebDatasetFolder, split_folder
from qatlab.errors import UserError, nearest

READERS: dict[str, type[Layout]] = {
    reader.kind: reader
    for reader in (Folders, ImgList, Manifest, WebDatasetFolder, Cifar, CorruptionArray, TinyAnnotations)
}
LISTS = (ImgList, Manifest)


def probe(path: Path) -> type[Layout]:
    """Return the reader of what lies at ``path``; raises UserError for a file that none of them reads."""
    if path.is_dir():
        if split_folder(path):
            return WebDatasetFolder
        if batch_file(path):
            return Cifar
        if (path / ANNOTATIONS).is_file() and (path / "images").is_dir():
            return TinyAnnotations
        return Folders
    readers: dict[str, type[Layout]] = {".txt": ImgList, ".csv": Manifest, ".tsv": Manifest, ".npy": CorruptionArray}
    if path.suffix in readers:
        return readers[path.suffix]
    if batch_file(path):
        return Cifar
    raise UserError(
        f"{path} is a file of no layout that is read: expected an imglist (.txt), a manifest (.csv, .tsv), an array "
        "(.npy), a CIFAR batch, or a folder."
    )


def open_layout(path: Path, kind: str = "auto", folder: Path | None = None) -> Layout:
    """Return what lies at ``path``, read as ``kind`` (a key of READERS) or as it looks.

    ``folder`` is where the paths of a list start from. Raises UserError for an unknown kind, and as the readers do.
    """
    if kind != "auto" and kind not in READERS:
        raise UserError(f"layout={kind} is unknown{nearest(kind, READERS)}; there are auto, {', '.join(READERS)}.")
    reader = probe(path) if kind == "auto" else READERS[kind]
    try:
        if folder is not None and reader in LISTS:
            return reader(path, folder)  # type: ignore[call-arg]
        return reader(path)  # type: ignore[call-arg]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as layout {reader.kind}: {error}.") from error
