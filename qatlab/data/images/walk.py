"""The image files below a folder, each once, and counts of the entries that were passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qatlab.core.errors import UserError

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
}  # fmt: skip
# Names of the files and folders that network disks, archivers and file managers put beside images, such as thumbnails.
SYSTEM = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
# Suffixes of pictures that neither torchvision nor Pillow reads: such files are counted as lost images, others are not.
UNREAD = {".heic", ".heif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}

NO_NAME = ("file is no image by its name", "files are no image by their name")
NO_DECODER = ("picture is of a format that is not read", "pictures are of formats that are not read")
DANGLING = ("dangling link", "dangling links")
AGAIN = ("link leads to a folder that counts already", "links lead to folders that count already")
NO_FILE = ("entry is named like an image and is no file", "entries are named like images and are no files")
LISTED_AGAIN = ("image is listed again", "images are listed again")
HIDDEN = ("hidden entry", "hidden entries")
OF_SYSTEMS = ("leftover of a system", "leftovers of systems")

Reason = tuple[str, str]
LeftOut = Counter[tuple[Reason, str]]
"""The number of entries that were passed over, by (reason, detail); the detail is a suffix, a name or ""."""
NOTHING: LeftOut = Counter()
# The reasons by which the set may have lost an image, which a user should be told.
LOSSES = (NO_DECODER, DANGLING, AGAIN, NO_FILE, LISTED_AGAIN)


def told(left_out: LeftOut, of: tuple[Reason, ...] | None = None) -> str:
    """Return "5 files are no image by their name (.txt 3, .mp4 2), 2 dangling links"; only the reasons ``of``, if given."""
    reasons = dict.fromkeys(reason for reason, _ in left_out if of is None or reason in of)
    return ", ".join(_told(reason, left_out) for reason in reasons)


def _told(reason: Reason, left_out: LeftOut) -> str:
    details = Counter({detail: count for (given, detail), count in left_out.items() if given == reason})
    count = details.total()
    named = [(detail, n) for detail, n in details.most_common() if detail]
    listed = ", ".join(f"{detail} {n}" for detail, n in named[:5]) + (" ..." if len(named) > 5 else "")
    return f"{count} {reason[count > 1]}{f' ({listed})' if listed else ''}"


def images_below(root: Path) -> tuple[list[Path], LeftOut]:
    """Return (paths of the image files below ``root``, counts of the entries that were passed over).

    Paths are relative to ``root`` and sorted folder by folder. Links are followed, but every folder counts once: a link
    to a folder inside the tree, or to a folder above the root, is passed over, and of several links to one folder the
    first in sorted order counts. Raises UserError for a folder that cannot be listed, and where there is no image.
    """
    if not root.is_dir():
        raise UserError(f"The image folder {root} does not exist; check the suite's root and the set's path.")
    walk = _Walk(root)
    if not walk.files:
        raise UserError(_no_image(root, walk.left_out))
    # The parts of the paths are sorted. Sorted as texts, "a b/x" would come before "a/x", because a space is before a
    # slash.
    return sorted(walk.files, key=lambda file: file.parts), walk.left_out


def subfolders(root: Path) -> list[str]:
    """Return the names of the folders in ``root`` that may hold images, sorted."""
    return sorted(entry.name for entry in _entries(root) if entry.is_dir() and _passed_over(entry.name) is None)


class _Walk:
    """A walk through a tree: first through its folders, then through the links to folders that it has found.

    So a folder inside the tree is always found under its own path and not under the path of a link.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[Path] = []
        self.left_out: LeftOut = Counter()
        # The folders above the root count as seen, because a link to one of them would lead through the root again.
        self._seen = {_number(folder) for folder in root.resolve().parents}
        self._links: list[Path] = []
        self._into(Path())
        while self._links:
            # Links are followed in sorted order, so that the result does not depend on the order of entries on the
            # disk.
            links, self._links = sorted(self._links, key=lambda path: path.parts), []
            for link in links:
                self._into(link)

    def _into(self, first: Path) -> None:
        folders = [first]
        while folders:
            folder = folders.pop()
            # Two paths to the same folder have the same pair of device and inode.
            number = _number(self.root / folder)
            if number in self._seen:
                self.left_out[AGAIN, folder.name] += 1
                continue
            self._seen.add(number)
            folders += self._within(folder)

    def _within(self, folder: Path) -> Iterator[Path]:
        """Yield the folders in a folder; its files are added to ``files`` and its links to folders to ``_links``."""
        for entry in _entries(self.root / folder):
            path, name = folder / entry.name, entry.name
            if (reason := _passed_over(name)) is not None:
                self.left_out[reason, name if reason is OF_SYSTEMS else ""] += 1
            elif (mode := _mode(entry)) is None:
                self.left_out[DANGLING, ""] += 1
            elif stat.S_ISDIR(mode) and entry.is_symlink():
                self._links.append(path)
            elif stat.S_ISDIR(mode):
                yield path
            elif path.suffix.lower() not in SUFFIXES:
                unread = path.suffix.lower() in UNREAD
                self.left_out[NO_DECODER if unread else NO_NAME, path.suffix.lower() or "no suffix"] += 1
            elif not stat.S_ISREG(mode):
                self.left_out[NO_FILE, ""] += 1
            else:
                self.files.append(path)


def _passed_over(name: str) -> Reason | None:
    """Return the reason if the name of an entry is enough to pass it over, else None."""
    if name.lower() in SYSTEM:
        return OF_SYSTEMS
    return HIDDEN if name.startswith(".") else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be listed ({error.strerror}), so its images would be missing: give yourself the "
            "right to read it, or move it out of the set."
        ) from error


def _mode(entry: os.DirEntry[str]) -> int | None:
    """Return the file type of an entry, or of the target of a link; None for a link without a target."""
    # scandir knows the type of an entry that is no link, so that a plain file needs no further access to the disk.
    if not entry.is_symlink():
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
        return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFSOCK
    try:
        return os.stat(entry.path).st_mode
    # The link leads nowhere, in a circle, or into a folder that the user may not read.
    except OSError:
        return None


def _number(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _no_image(root: Path, left_out: LeftOut) -> str:
    """Return the error message for a folder without images; if it looks like another layout, with advice how to read it."""
    text = f"The folder {root} holds no image ({', '.join(sorted(SUFFIXES))})"
    if left_out:
        text += f": {told(left_out)}"
    # The rest of the message guesses which other layout the folder may be.
    if arrays := sorted(file.name for file in root.glob("*.npy") if file.name != "labels.npy"):
        return f"{text}. Of CIFAR-C's arrays one is a set: path: {root.name}/{arrays[0]}, with labels.npy beside it in the folder."
    if split := next((file.parent for file in sorted(root.glob("*/nshards.txt"))), None):
        return (
            f"{text}. There is no test/nshards.txt, which a WebDataset folder is known by, but {split.name}/nshards.txt: "
            f"path: {root.name}/{split.name} reads that part."
        )
    if any(root.glob("*.tar")) or any(root.glob("test/*.tar")):
        return f"{text}. Tars are read as a WebDataset where nshards.txt beside them says how many there are."
    return f"{text}; check the set's path."
