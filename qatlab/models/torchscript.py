"""The tensors of a TorchScript archive, read without running the program in it: OpenAI's CLIP files are such archives."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}


def is_archive(path: Path) -> bool:
    """Return whether a file is a TorchScript archive: a zip file with its constants beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def archive_state(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor of any shape and dtype} of the parameters and buffers of the module in a TorchScript archive.

    ``torch.jit.load`` would build the module and so run code of the file. Here no code of the file is run: its classes
    are replaced by an empty class. Raises ValueError for an archive that is damaged or names anything but tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix(
            "constants.pkl"
        )
        with archive.open(f"{root}data.pkl") as data:
            try:
                module = _Unpickler(data, lambda key: archive.read(f"{root}data/{key}")).load()
            except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise ValueError(str(error)) from error
    return dict(_tensors(module, ""))


class _Module:
    """The replacement of a module's class: it holds the attributes and no code."""


class _Unpickler(pickle.Unpickler):
    """Reads modules, tensors, numbers, texts and containers of these; every other name in the pickle is refused."""

    def __init__(self, file: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
            ("torch.jit._pickle", "restore_type_tag"): _untagged,
            **{("torch", storage): dtype for storage, dtype in _DTYPES.items()},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it asks for a {kind}")
        # Several tensors may be parts of one storage.
        if key not in self._storages:
            content = bytearray(self._read(str(key)))
            # torch.frombuffer takes no empty buffer.
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    # as_strided raises for a tensor that would reach beyond its storage.
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _untagged(value: Any, _: str) -> Any:
    return value


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a module and of those in it, named as in a state dict."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
