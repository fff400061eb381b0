"""The processor of this machine, and which of the instructions that matter to integer models it has."""

from __future__ import annotations

import platform
from pathlib import Path

# The x86 instructions that decide how fast and how exact int8 products are: vectors of 256 or 512 bits, VNNI, which
# adds products in 32 bits, and AMX, which multiplies matrices. avx512_bf16 is for OpenVINO's bfloat16.
_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def cpu() -> str:
    """Return the name of the processor and its instructions, as in "AMD EPYC (avx2, avx512f, avx512_vnni)"."""
    path = Path("/proc/cpuinfo")
    # Every core has a paragraph of the same keys: the last one stands for all. Only Linux has this file.
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line) if path.exists() else {}
    known = {key.strip(): value.strip() for key, value in facts.items()}
    has = [name for name in _INSTRUCTIONS if name in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(has)})"


def lacks_vnni() -> bool:
    """Return whether this is an x86 CPU that adds products of bytes in sixteen bits."""
    return platform.machine().lower() in ("x86_64", "amd64") and "vnni" not in cpu()
