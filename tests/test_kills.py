"""Commands that are killed, find the disk full or meet a damaged file, at random: the same command mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.kills
def test_faults_a1_the_same_command_mends_what_a_kill_a_full_disk_or_damage_left(
    subprocess_environment: dict[str, str],
) -> None:
    """Its output, shown where it fails, ends with the seed: ``python tests/kills.py 15 5 5 SEED`` repeats it."""
    cases = ["15", "5", "5"]  # killed, full disks, damaged files
    line = [sys.executable, str(Path(__file__).with_name("kills.py")), *cases]
    ended = subprocess.run(line, env=subprocess_environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-20000:] + ended.stderr[-5000:]
