"""Every path that a user writes may begin with the home, ~."""

from __future__ import annotations

from pathlib import Path

import pytest

import qatlab
from qatlab.config import compose
from qatlab.core.errors import UserError
from qatlab.core.files import cache_root, user_path
from qatlab.models import clip as clips
from qatlab.results.finished import FinishedRun
from qatlab.results.run import Run


def test_training_f7_a_home_is_expanded_in_one_place() -> None:
    root = Path(qatlab.__file__).parent
    expanding = [path.relative_to(root) for path in root.rglob("*.py") if "expanduser(" in path.read_text()]
    assert expanding == [Path("core/files.py")]


def test_training_f7_every_path_may_begin_with_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QATLAB_CACHE", "~/kept")
    assert cache_root() == tmp_path / "kept"
    config = compose("recipe=ptq", "output='~/my runs'", "model.checkpoint='~/w.safetensors'")
    assert Run(config, "ptq").folder.parent == tmp_path / "my runs"
    with pytest.raises(UserError, match=rf"model\.checkpoint={tmp_path}/w\.safetensors does not exist"):
        clips.load(config.model)
    with pytest.raises(UserError, match=rf"{tmp_path}/runs/a"):
        FinishedRun("~/runs/a")
    assert user_path("a/~/b") == Path("a/~/b")


def test_a_home_that_nobody_has_is_told() -> None:
    with pytest.raises(UserError, match=r"^~nobody_at_all/x: ~nobody_at_all is nobody's home here; write the path out"):
        user_path("~nobody_at_all/x")
