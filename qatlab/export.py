"""Export a finished run as an integer model, checked against its simulation.

python -m qatlab.export checkpoint=runs/<id>                                       # OpenVINO
python -m qatlab.export checkpoint=runs/<id> format=onnx suite=paper suite.root=/data
python -m qatlab.export checkpoint=runs/<id> threshold.score=energy threshold.tpr=0.9 threshold.set=imagenet
python -m qatlab.evaluate checkpoint=runs/<id>/export/onnx suite=paper suite.root=/data
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from qatlab import cli
from qatlab.config import Config
from qatlab.core.errors import UserError


def export(config: Config, recipe: str) -> Path:
    """Return the folder runs/<id>/export/<format> that holds the integer model of ``checkpoint=``, which passed its checks."""
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    from qatlab.core.signals import StopSignals
    from qatlab.deploy.runtimes import require_format
    from qatlab.reports.terminal import show_path
    from qatlab.stages import export as exporting
    from qatlab.stages.opening import open_experiment, together
    from qatlab.stages.reopen import reopen
    from qatlab.stages.requested import one_run
    from qatlab.stages.summary import conclude

    form = config.format or "openvino"
    require_format(form)
    if config.file is not None:
        raise UserError(f"file={config.file} is where fit and evaluate write results: an export lies in its run.")
    config.format = None  # elsewhere the option asks for a file of the results, which an export does not write
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        asked = one_run(config, recipe, "an export")
        stack.enter_context(asked.run)
        asked.run.require_writable("an export is written into it")
        experiment = open_experiment(asked.config, asked.run, asked.recipe, stop)
        with together([experiment]):
            # The run must be finished: an export copies a model whose numbers are known, and trains or quantizes
            # nothing.
            reopen(experiment, finished=True)
            folder = exporting.export(experiment, form)
            conclude([experiment])
            show_path("integer model", folder)
    return folder


def main() -> None:
    """Run ``export`` with the options of the command line."""
    cli.main(export)


if __name__ == "__main__":
    main()
