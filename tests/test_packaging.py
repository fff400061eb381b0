"""qatlab built and installed: what is in it, and that it runs from every folder one may stand in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from brief import BRIEF, with_options
from conftest import SMALL, TRAINING

import qatlab

ROOT = Path(__file__).resolve().parents[1]
HATCHLING = "1.27"  # as in pyproject.toml
FIT = ["recipe=light_qat", *with_options([*SMALL, *TRAINING], *BRIEF, "fit.eval_every=0")]

# Python imports it in every process: one that is told so writes down at its end which file each module is of.
SITECUSTOMIZE = """
import atexit, json, os, sys

def report():
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    with open(os.environ["QATLAB_TEST_MODULES"], "w") as file:
        json.dump({name: path for name, path in files.items() if path}, file)

if "QATLAB_TEST_MODULES" in os.environ:
    atexit.register(report)
"""

# Loads what a run needs of other packages once, and forks a process for each start: in a folder, by `python -m qatlab.fit`
# with arguments or by the lines of a notebook, both of which look for modules in that folder first; `instead` says what
# stands in the place of which folders of this environment's path.
STARTS = """
import json, os, runpy, sys, traceback
import hydra, lightning, matplotlib.pyplot, open_clip, polars, scipy.optimize, scipy.stats, torch, torchmetrics, torchvision, wandb
import sitecustomize
assert not [name for name in sys.modules if name.partition(".")[0] == "qatlab"]
for name, (folder, arguments, lines, instead) in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        code = 1
        try:
            os.chdir(folder)
            sys.path = ["" if lines else folder, *filter(None, (instead.get(path, path) for path in sys.path[1:]))]
            os.environ["QATLAB_TEST_MODULES"] = name
            if lines:
                exec(lines, {"__name__": "__main__"})
            else:
                sys.argv[1:] = arguments
                runpy.run_module("qatlab.fit", run_name="__main__", alter_sys=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        sitecustomize.report()
        os._exit(code)
    assert os.wait()[1] == 0, name
"""


class Installed(NamedTuple):
    """An environment that qatlab is installed in."""

    python: Path
    site: Path
    package: Path
    """The folder of the copy of qatlab that it shall find."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what git would have in it, named as a clone is, with what is left by using it: git ignores that."""
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git, and this is no clone")
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folder = tmp_path_factory.mktemp("beside") / "qatlab"
    left = [
        "qatlab/__pycache__/fit.cpython.pyc",
        "recipes/__pycache__/a.pyc",
        "runs/ptq-0/results.jsonl",
        "build/lib/a.py",
    ]
    for name in [*names, *left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in left:
            (folder / name).touch()
        elif (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> dict[str, str]:
    """What a process needs to import the hatchling that pyproject.toml asks for, and no qatlab."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        if tuple(map(int, version("hatchling").split(".")[:2])) >= tuple(map(int, HATCHLING.split("."))):
            return environment
    except PackageNotFoundError:
        pass
    folder = str(tmp_path_factory.mktemp("hatchling"))
    wanted = f"hatchling>={HATCHLING}"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, wanted]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"{wanted}, which builds the wheel, is neither installed nor to be had")
    return {**environment, "PYTHONPATH": folder}


def build(source: Path, folder: Path, environment: dict[str, str], *targets: str) -> list[Path]:
    """Return the files that ``targets``, "sdist" and "wheel", are built as."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    for target in targets:
        command += ["-t", target]
    built = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def distributions(clone, backend, tmp_path_factory) -> tuple[Path, Path]:
    """The sdist and the wheel."""
    wheel, sdist = build(clone, tmp_path_factory.mktemp("dist"), backend, "sdist", "wheel")
    assert (wheel.suffix, sdist.suffix) == (".whl", ".gz")
    return sdist, wheel


def install(what: list[str], folder: Path, environment: dict[str, str]) -> tuple[Path, Path]:
    """Return Python and site-packages of a new environment that holds ``what``, and falls back on this one for the rest.

    This one is a mere folder there: its .pth files, such as that of a qatlab of its own, are not read.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    names = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", names))
    (site / "zz_this_environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    installed = subprocess.run(
        [*command, "--no-build-isolation", *what], env=environment, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    return python, site


@pytest.fixture(scope="module")
def editable(clone, backend, tmp_path_factory) -> Installed:
    return Installed(*install(["-e", str(clone)], tmp_path_factory.mktemp("editable"), backend), clone / "qatlab")


@pytest.fixture(scope="module")
def wheel(distributions, backend, tmp_path_factory) -> Installed:
    python, site = install([str(distributions[1])], tmp_path_factory.mktemp("wheel"), backend)
    return Installed(python, site, site / "qatlab")


@pytest.fixture(scope="module")
def places(clone, tmp_path_factory) -> dict[str, Path]:
    """The folders to stand in."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return {"beside": clone.parent, "clone": clone, "package": clone / "qatlab", "elsewhere": elsewhere}


def start(command: list[str | Path], folder: Path, modules: Path | None = None) -> str:
    """Return what a process prints that is started in ``folder``; which file each module is of goes to ``modules``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if modules:
        environment["QATLAB_TEST_MODULES"] = str(modules)
    ended = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def check_modules(report: Path, installed: Installed, clone: Path) -> None:
    """Assert that qatlab is the installed copy, each file of it one module, and that nothing in the clone hides others."""
    modules = {name: Path(path) for name, path in json.loads(report.read_text()).items()}
    modules = {name: path for name, path in modules.items() if name not in ("__main__", "__mp_main__")}
    assert modules.get("qatlab") == installed.package / "__init__.py"
    own = {name: path for name, path in modules.items() if path.is_relative_to(clone) or name.startswith("qatlab.")}
    assert [name for name in own if name.partition(".")[0] != "qatlab"] == []
    root = clone if installed.package.is_relative_to(clone) else installed.package
    assert [name for name, path in own.items() if not path.is_relative_to(root)] == []
    assert len(set(own.values())) == len(own)
    # Its name is not qatlab.qatlab.x or qatlab.tests.x, either
    assert not [name for name in own if name.split(".")[1:2] in (["qatlab"], ["tests"], ["benchmarks"])]


# -- what is built -------------------------------------------------------------------------------------------------------


def files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def contents(wheel: Path) -> dict[str, int]:
    """Return {file: checksum} of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def test_the_wheel_holds_exactly_the_tree(clone, distributions):
    expected = {f"qatlab/{name}" for name in files(clone / "qatlab", "*.py")}
    expected |= {f"qatlab/callbacks/{name}" for name in files(clone / "callbacks", "*.py")}
    expected |= {f"qatlab/recipes/{name}" for name in files(clone / "recipes", "*.yaml")}
    expected |= {f"qatlab/assets/{name}" for name in files(clone / "qatlab/assets", "*")}
    expected |= {f"qatlab/slurm/{name}" for name in files(clone / "slurm", "*.sbatch")}
    expected |= {"qatlab/callbacks.pyi", "qatlab/recipes/__init__.py", "qatlab/slurm/__init__.py"}
    found = {name for name in contents(distributions[1]) if ".dist-info/" not in name}
    assert found == expected
    assert {
        "qatlab/recipes/quant/weight/lsq.yaml",
        "qatlab/assets/tiny.safetensors",
        "qatlab/config/options.py",
    } <= found


def test_a_wheel_from_the_sdist_is_the_same(distributions, backend, tmp_path):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    assert {"README.md", "LICENSE", "CITATION.cff", "pyproject.toml", "PKG-INFO"} <= {p.name for p in source.iterdir()}
    assert not files(source, "*.pyc") | files(source / "runs", "*") | files(source / "build", "*")
    [again] = build(source, tmp_path / "dist", backend, "wheel")
    assert contents(again) == contents(wheel)


def test_the_wheel_has_its_command_and_licence(wheel):
    [info] = wheel.site.glob("qatlab-*.dist-info")
    scripts = [line for line in (info / "entry_points.txt").read_text().splitlines() if " = " in line]
    assert scripts == ["qatlab = qatlab.__main__:main"]
    assert "Apache License" in (info / "licenses/LICENSE").read_text()


def test_an_editable_install_leaves_a_line_in_site_packages(editable, clone):
    left = {path.name for path in editable.site.iterdir()} - {
        "zz_this_environment.pth",
        "sitecustomize.py",
        "__pycache__",
    }
    assert left == {"_qatlab.pth", f"qatlab-{qatlab.__version__}.dist-info"}
    assert (editable.site / "_qatlab.pth").read_text().split() == [str(clone)]


def test_the_version_is_the_same_wherever_it_stands(wheel):
    [info] = wheel.site.glob("qatlab-*.dist-info")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert qatlab.__version__ == citation["version"]
    assert info.name == f"qatlab-{qatlab.__version__}.dist-info"


# -- from anywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["beside", "clone", "package", "elsewhere"])
def test_options_are_composed_from_anywhere(editable, clone, places, place, tmp_path):
    report = tmp_path / "modules.json"
    printed = start([editable.python, "-m", "qatlab.fit", *FIT, "--cfg", "job"], places[place], report)
    assert yaml.safe_load(printed)["fit"]["steps"] == 2
    check_modules(report, editable, clone)


@pytest.fixture(scope="module")
def started(editable, wheel, clone, places, tmp_path_factory) -> Path:
    """A folder with the runs of several starts, and for each a file of what it imported."""
    folder = tmp_path_factory.mktemp("started")
    starts: dict[str, tuple[str, list[str], str, dict[str, str]]] = {}
    for name in ("beside", "clone", "elsewhere"):
        starts[name] = str(places[name]), [*FIT, f"output={folder / name}"], "", {}
    of_wheel = {str(editable.site): str(wheel.site), str(clone): ""}
    starts["wheel"] = str(places["beside"]), [*FIT, f"output={folder / 'wheel'}"], "", of_wheel
    imports = "import qatlab.callbacks\nfrom qatlab.config import compose\nfrom qatlab.fit import fit\n"
    starts["notebook in the clone"] = str(places["clone"]), [], imports, {}
    fitted = f"fit(compose(*{[*FIT, f'output={folder}/notebook']!r}), 'light_qat')\n"
    starts["notebook"] = str(places["beside"]), [], imports + fitted, {}
    reported = {str(folder / f"{name}.json"): value for name, value in starts.items()}
    start([editable.python, "-c", STARTS, json.dumps(reported)], places["elsewhere"])
    return folder


def stages(folder: Path) -> set[str]:
    """Return the stages that the rows of the one run in ``folder`` are of."""
    [file] = folder.glob("*/results.jsonl")
    return {json.loads(line).get("stage") for line in file.read_text().splitlines()}


@pytest.mark.parametrize("name", ["beside", "clone", "elsewhere", "notebook", "wheel"])
def test_a_fit_from_anywhere(started, editable, wheel, clone, name):
    check_modules(started / f"{name}.json", wheel if name == "wheel" else editable, clone)
    assert {"fp32", "quantized", "adapted"} <= stages(started / name)


def test_a_notebook_in_the_clone(started, editable, clone):
    check_modules(started / "notebook in the clone.json", editable, clone)


@pytest.mark.slow
def test_a_fit_inside_the_package_takes_other_packages_for_what_they_are(editable, clone, places, tmp_path):
    # A process of its own: Python looks first where it stands, and for `import config` it would find qatlab/config.
    report = tmp_path / "modules.json"
    start([editable.python, "-m", "qatlab.fit", *FIT, f"output={tmp_path}"], places["package"], report)
    check_modules(report, editable, clone)
    assert {"fp32", "quantized", "adapted"} <= stages(tmp_path)


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_the_command_does_what_the_module_does(request, kind, clone, places, tmp_path):
    installed = request.getfixturevalue(kind)
    report = tmp_path / "modules.json"
    options = [*FIT, "--cfg", "job"]
    printed = start([installed.python.with_name("qatlab"), "fit", *options], places["beside"], report)
    check_modules(report, installed, clone)
    assert printed == start([installed.python, "-m", "qatlab.fit", *options], places["elsewhere"])


def test_no_file_imports_a_second_copy_of_the_package():
    # In a clone the repository's root is on qatlab's path, so these names are importable, as other modules
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
