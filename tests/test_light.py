"""What answers at once: none of the libraries that take seconds to import is loaded for it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from qatlab.models import architecture as architectures
from qatlab.models.preprocessing import DEFAULT

STEPS = """
import io, os, sys
from contextlib import redirect_stdout, suppress

def told(what, do):
    with redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
        do()
    loaded = [name for name in ("torch", "lightning", "open_clip", "torchvision", "torchmetrics") if name in sys.modules]
    print(repr((what, out.getvalue()[-3000:], loaded)), file=sys.__stdout__)

def qatlab_itself():
    import qatlab

def results():
    import qatlab.results
    print(qatlab.results.read(sys.argv[1]).shape)

def command(module, *arguments):
    def run():
        sys.argv = [f"{module}.py", *arguments]
        __import__(f"qatlab.{module}", fromlist=["main"]).main()
    return run

runs = sys.argv[1]
told("import", qatlab_itself)
told("results", results)
for module in ("fit", "evaluate", "export", "bench", "sweep"):
    told(f"{module} --help", command(module, "--help"))
told("--cfg", command("fit", "recipe=light_qat_lsq", "--cfg", "job"))
os.environ.update(COMP_LINE="qatlab-fit recipe=light_", COMP_POINT="24")
told("completion", command("fit", "-sc", "query=bash"))
"""


def test_importing_reading_help_options_and_completion_load_no_torch(
    tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    row = dict.fromkeys(("run_id", "stage", "dataset", "definition", "score", "prompts"), "x")
    (tmp_path / "results.jsonl").write_text(json.dumps({**row, "step": 0, "metrics": {"top1": 0.5}}) + "\n")
    command = [sys.executable, "-c", STEPS, str(tmp_path)]
    done = subprocess.run(command, env=subprocess_environment, capture_output=True, text=True, check=True)
    steps = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert {what: loaded for what, _, loaded in steps if loaded} == {}
    said = {what: out for what, out, _ in steps}
    assert said["results"] == "(1, 8)\n"
    assert all("options" in said[f"{module} --help"] for module in ("fit", "evaluate", "export", "bench"))
    assert "sweep=paper" in said["sweep --help"]
    assert "qatlab.quant.LSQ" in said["--cfg"]
    assert said["completion"].split() == [f"recipe=light_qat{name}" for name in ("", "_distill", "_lsq", "_lsq_pc")]


def test_architectures_are_read_from_open_clips_files_as_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = architectures.architectures()
    assert {*stored} <= {*open_clip.list_models()}  # other tests may have added some
    assert len(stored) > 100
    for name in stored:
        assert architectures._stored(name) == open_clip.get_model_config(name)
    assert architectures._stored("ViT-B-31") is None is open_clip.get_model_config("ViT-B-31")
    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.setattr(architectures, "import_module", lambda name: pytest.fail(f"{name} is imported"))
    assert architectures.has_linear_head("convnext_base")
    assert not any(map(architectures.has_linear_head, ("ViT-B-16", "ViT-B-16-SigLIP", "tiny")))


def test_an_architecture_that_was_added_to_open_clip_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {"timm_model_name": "test_convnext", "timm_proj": "linear"}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mine-of-this-test", model)
    assert architectures.architecture("mine-of-this-test") == model
    assert architectures.has_linear_head("mine-of-this-test")


def test_the_preprocessing_of_random_weights_is_open_clips_default() -> None:
    assert (tuple(DEFAULT["mean"]), tuple(DEFAULT["std"])) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
