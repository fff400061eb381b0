from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from qatlab.config import recipe_files

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = 77  # as in pyproject.toml

# In one process, so that torch is loaded once: a child per layout puts it on the path and imports from it.
IMPORTER = """
import json, os, site, sys
own = sys.argv[1]
sys.path = [path for path in sys.path if path not in ("", own)]
editable = lambda finder: "__editable__" in getattr(finder, "__module__", "")
sys.meta_path = [f for f in sys.meta_path if not editable(f)]  # that of this environment
import hydra, lightning, matplotlib.pyplot, polars, scipy.optimize, torchmetrics
for name, folder in json.loads(sys.argv[2]).items():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            sys.path.insert(0, folder)
            if name == "editable":  # its finder has the name of the one of this environment, which may be loaded
                for module in [m for m in sys.modules if m.startswith("__editable__")]:
                    del sys.modules[module]
                site.addsitedir(folder)
            sys.meta_path.sort(key=lambda f: not editable(f))  # before a qatlab installed in this environment
            import qatlab.callbacks, qatlab.config, qatlab.recipes
            from qatlab.callbacks.calibration import Calibration
            from hydra.utils import get_object
            found = {
                "package": qatlab.__file__,
                "callbacks": qatlab.callbacks.__file__,
                "recipes": sorted(qatlab.config.recipe_files()),
                "once": Calibration is qatlab.callbacks.Calibration is get_object("qatlab.callbacks.Calibration"),
                "modules": [m for m, module in sys.modules.items() if hasattr(module, "Calibration") and m.endswith("calibration")],
                "strays": [m for m in ("callbacks", "recipes", "slurm", "qatlab.qatlab", "qatlab.tests") if m in sys.modules],
            }
        except BaseException as error:
            found = {"error": repr(error)}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    print(json.dumps([name, json.loads(os.fdopen(read).read())]))
    os.wait()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git would have in it, so that building leaves nothing in the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git, and this is no clone")
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folder = tmp_path_factory.mktemp("checkout")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> dict[str, str]:
    """An environment whose Python has the setuptools that pyproject.toml asks for."""
    try:
        if int(version("setuptools").split(".")[0]) >= SETUPTOOLS:
            return dict(os.environ)
    except PackageNotFoundError:
        pass
    folder = str(tmp_path_factory.mktemp("setuptools"))
    wanted = f"setuptools>={SETUPTOOLS}"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, wanted]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"{wanted}, which builds the wheel, is neither installed nor to be had")
    return {**os.environ, "PYTHONPATH": folder}


@pytest.fixture(scope="module")
def build(checkout, backend, tmp_path_factory) -> Callable[[str], Path]:
    """``build("wheel" | "editable")`` returns the folder that such an installation would leave in site-packages."""

    def unpacked(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        built = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=backend, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
        return folder / "site"

    return unpacked


@pytest.fixture(scope="module")
def wheel(build) -> Path:
    return build("wheel")


@pytest.fixture(scope="module")
def layouts(checkout, wheel, build, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each way of having qatlab on the path imports."""
    folders = {"checkout": str(checkout), "wheel": str(wheel), "editable": str(build("editable"))}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTER, str(ROOT), json.dumps(folders)],
        cwd=tmp_path_factory.mktemp("elsewhere"), env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(line) for line in ended.stdout.splitlines())


def files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def test_the_wheel_holds_exactly_the_tree(checkout, wheel):
    expected = {f"qatlab/{name}" for name in files(checkout / "qatlab", "*.py")}
    expected |= {f"qatlab/callbacks/{name}" for name in files(checkout / "callbacks", "*.py")}
    expected |= {f"qatlab/recipes/{name}" for name in files(checkout / "recipes", "*.yaml")}
    expected |= {f"qatlab/assets/{name}" for name in files(checkout / "qatlab/assets", "*")}
    expected |= {f"qatlab/slurm/{name}" for name in files(checkout / "slurm", "*.sbatch")}
    expected |= {"qatlab/callbacks.pyi", "qatlab/recipes/__init__.py", "qatlab/slurm/__init__.py"}
    found = {name for name in files(wheel, "*") if ".dist-info/" not in name}
    assert found == expected
    assert "qatlab/recipes/quant/weight/lsq.yaml" in found
    assert "qatlab/assets/tiny.safetensors" in found


def test_the_wheel_puts_nothing_but_qatlab_into_site_packages(wheel):
    top = {path.name for path in wheel.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qatlab"}


def test_the_wheel_has_its_console_scripts_and_licence(wheel):
    [info] = wheel.glob("*.dist-info")
    scripts = dict(line.split(" = ") for line in (info / "entry_points.txt").read_text().splitlines() if " = " in line)
    assert scripts["qatlab-fit"] == "qatlab.fit:main"
    assert scripts["qatlab-evaluate"] == "qatlab.evaluate:main"
    for target in scripts.values():
        module, function = target.split(":")
        assert f"def {function}(" in (wheel / f"{module.replace('.', '/')}.py").read_text()
    assert "Apache License" in (info / "licenses/LICENSE").read_text()


@pytest.mark.parametrize("layout", ["checkout", "wheel", "editable"])
def test_each_class_is_imported_once(layouts, layout, checkout, wheel):
    found = layouts[layout]
    assert "error" not in found, found
    assert found["once"]
    assert found["modules"] == ["qatlab.callbacks.calibration"]
    assert found["strays"] == []
    assert found["recipes"] == sorted(recipe_files())
    package = wheel / "qatlab" if layout == "wheel" else checkout / "qatlab"
    callbacks = wheel / "qatlab/callbacks" if layout == "wheel" else checkout / "callbacks"
    assert Path(found["package"]) == package / "__init__.py"
    assert Path(found["callbacks"]) == callbacks / "__init__.py"


def test_no_file_imports_a_second_copy_of_the_package():
    # In a checkout the repository's root is on qatlab's path, so these names are importable, as other modules
    wrong = re.compile(
        r"^\s*(?:import|from)\s+(?:callbacks|recipes)\b|\bqatlab\.(?:qatlab|tests|benchmarks)\b", re.MULTILINE
    )
    paths = [
        path
        for folder in ("qatlab", "callbacks", "recipes", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(paths) > 50
    assert [str(path) for path in paths if path != Path(__file__) and wrong.search(path.read_text())] == []
    assert wrong.search("from callbacks import Calibration")
    assert wrong.search("import qatlab.qatlab.quant")
