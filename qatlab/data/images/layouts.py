"""The choice of the layout that reads an image set: by the files that are found, or by the option ``layout``."""

from __future__ import annotations

from pathlib import Path

from qatlab.core.errors import UserError, nearest
from qatlab.data.images.arrays import CorruptionArray
from qatlab.data.images.cifar import Cifar, batch_file
from qatlab.data.images.folders import Folders
from qatlab.data.images.imageset import Layout
from qatlab.data.images.imglists import ImgList
from qatlab.data.images.manifests import ANNOTATIONS, Manifest, TinyAnnotations
from qatlab.data.images.webdatasets import WebDatasetFolder, split_folder

READERS: dict[str, type[Layout]] = {
    reader.kind: reader
    for reader in (Folders, ImgList, Manifest, WebDatasetFolder, Cifar, CorruptionArray, TinyAnnotations)
}
# Only these two layouts take ``folder`` and ``outside``, because their files name images anywhere below a folder.
LISTS = (ImgList, Manifest)


def probe(path: Path) -> type[Layout]:
    """Return the layout class for the file or folder ``path``; raises UserError for a file that no layout reads."""
    if path.is_dir():
        # Special files are looked for first, because any of these folders could also be read as a tree of class
        # folders.
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


def open_layout(
    path: Path, kind: str | type[Layout] = "auto", folder: Path | None = None, outside: bool = False
) -> Layout:
    """Return the opened layout at ``path``.

    ``kind`` is a key of READERS, a user's own layout class, or "auto", which chooses by ``probe``. The paths in a list
    file start from ``folder``, and with ``outside`` they may lead out of it. Raises UserError for an unknown kind, and
    where the layout class raises it.
    """
    if isinstance(kind, str) and kind not in ("auto", *READERS):
        raise UserError(
            f"layout={kind} is unknown{nearest(kind, READERS)}; there are auto, {', '.join(READERS)}, and the full name of a "
            "class of your own (my.layouts.Mine)."
        )
    named = READERS.get(kind) if isinstance(kind, str) else kind
    reader = probe(path) if named is None else named
    try:
        if reader in LISTS:
            return reader(path, folder, outside)  # type: ignore[call-arg]
        return reader(path)  # type: ignore[call-arg]
    # Some errors are not explained by the layout class, such as a missing nshards.txt with layout=webdataset.
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as layout {reader.kind}: {error}.") from error
