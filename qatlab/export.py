"""Export a finished run as an integer model, checked against its simulation.

python -m qatlab.export checkpoint=runs/<id>                                       # OpenVINO
python -m qatlab.export checkpoint=runs/<id> format=onnx suite=paper suite.root=/data
python -m qatlab.evaluate checkpoint=runs/<id>/export/onnx suite=paper suite.root=/data
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from qatlab import cli
from qatlab.config import Config


def export(config: Config, recipe: str) -> Path:
    """Return the folder runs/<id>/export/<format> that holds the integer model of ``checkpoint=``, which passed its checks."""
    from qatlab.deploy.package import package
    from qatlab.deploy.runtimes import check
    from qatlab.evaluate import read_back
    from qatlab.finished import one_run
    from qatlab.report import conclude
    from qatlab.stopping import StopSignals
    from qatlab.study import Study

    form = config.format or "openvino"
    check(form)
    config.format = None  # of the results there is no file
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        asked = one_run(config, recipe, "an export")
        stack.enter_context(asked.run)
        study = Study(asked.config, asked.run, asked.recipe, stop)
        with study.together():
            read_back(study, stored=True)
            folder = package(study, form)
            conclude([study])
            print(f"{'integer model':22} {folder}")
    return folder


def main() -> None:
    """Run ``export`` with the options of the command line."""
    cli.main(export, needs_recipe=False)


if __name__ == "__main__":
    main()
