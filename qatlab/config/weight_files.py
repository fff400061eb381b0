"""The files of a model's weights, also where an option names a folder."""

from __future__ import annotations

import json
from pathlib import Path

from qatlab.config.options import ModelConfig
from qatlab.core.errors import UserError
from qatlab.core.files import user_path

LOCAL = "local-dir:"
"""The prefix of open_clip's names for models in a local folder, with their architecture and weights."""
# The usual names of weights in open_clip and transformers. The first existing file is read, so safetensors go before
# pickles. A file that ends in .index.json lists shards.
_NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
    *(
        "model.safetensors.index.json",
        "open_clip_pytorch_model.bin",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def named_weights(model: ModelConfig) -> str | None:
    """Return the file or folder of a model's weights that the options name; None for weights of a tag or of the hub."""
    if model.checkpoint:
        return model.checkpoint
    return model.name.removeprefix(LOCAL) if model.name.startswith(LOCAL) else None


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights at ``path``: the file itself, or those of a folder, its shards in order.

    The folder may be one of open_clip or transformers, a snapshot of the hub, the hub's own cache of a repository, or a
    folder with a single file of weights. Raises UserError for a folder without weights, and for one with several files
    of which none has a usual name.
    """
    if not path.is_dir():
        return [path]
    folder = snapshot(path)
    found = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if len(files) != 1:
            there = ", ".join(sorted(file.name for file in files or folder.iterdir())[:8]) or "nothing"
            raise UserError(
                f"the folder {folder} holds {'several files' if files else 'no file'} of weights ({there}): name the file itself, "
                "such as open_clip_model.safetensors."
            )
        found = files[0]
    return _shards(found) if found.name.endswith(".index.json") else [found]


def files_of_model(model: ModelConfig) -> list[str]:
    """Return the files that hold a model's weights as they are written in its options, those of a folder behind its name."""
    named = named_weights(model)
    if named is None or not (folder := user_path(named)).is_dir():
        return [named] if named else []
    return [str(file) for file in weight_files(folder)]


def snapshot(folder: Path) -> Path:
    """Return the snapshot that the hub's cache of a repository points to; any other folder as it is."""
    if not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs" / "main"
    snapshots = sorted((folder / "snapshots").iterdir())
    if main.is_file():
        return folder / "snapshots" / main.read_text("utf-8").strip()
    if len(snapshots) == 1:
        return snapshots[0]
    raise UserError(
        f"the folder {folder} holds {len(snapshots)} snapshots: name one of them, {folder / 'snapshots' / '<commit>'}."
    )


def _shards(index: Path) -> list[Path]:
    """Return the shards that an index lists, each once."""
    try:
        names = sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} lists no shards of weights ({error}): fetch it again.") from error
    if lost := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        raise UserError(f"{index} lists {len(names)} files of weights, and {lost[0]} is not beside it: fetch it too.")
    return [index.parent / name for name in names]
