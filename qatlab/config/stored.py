"""config.yaml: the options of a run, as data."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qatlab.config.options import Config
from qatlab.config.recipes import as_config, typed_options
from qatlab.config.renamed import with_earlier_names
from qatlab.core.errors import UserError
from qatlab.core.files import atomic
from qatlab.core.hashing import digest
from qatlab.core.secrets import concealed, public

RUN_ID = "run_id"
CONTENTS = "contents"
_ID = re.compile(r"[0-9a-f]{8}")
_SEAL = "\n# checksum of the lines above, to be removed where they are edited: "
# Options that belong to one call and not to the run: a later command on the same run must not inherit them.
OF_CALL = ("defaults", "hydra", "force", "trust", "table", "file", "threshold")


def save(config: Config, recipe: str, run_id: str, path: Path, contents: dict[str, str] | None = None) -> None:
    """Write the options, the recipe's name, the run's id and the ``contents`` of the files that options name as YAML.

    The file is replaced atomically. Secrets in addresses are left out.
    """
    options = {key: value for key, value in told_options(config).items() if key not in (*OF_CALL, "checkpoint")}
    _write({"recipe": recipe, RUN_ID: run_id, CONTENTS: contents or {}, **options}, path)


def told_options(config: Config) -> dict[str, Any]:
    """Return the options as plain values that may be stored and shown: without secrets."""
    # Loggers of the user's own may take keys and passwords, which no pattern of an address finds.
    options = public(asdict(config))
    return {**options, "quant": with_earlier_names(options["quant"]), "logger": concealed(config.logger)}


def load_contents(path: Path) -> dict[str, str] | None:
    """Return the contents of the files that a run's options named; None where its config.yaml lacks them or is damaged."""
    try:
        stored = OmegaConf.to_container(read_options(path))
    except (OSError, ValueError):  # whoever needs the options calls ``load``, which raises with a sentence
        return None
    assert isinstance(stored, dict)
    return stored.get(CONTENTS)


def add_contents(path: Path, contents: dict[str, str]) -> None:
    """Write ``contents`` into the config.yaml of an earlier release, which stored none."""
    stored = read_options(path)
    stored[CONTENTS] = contents
    _write(stored, path)


def _write(options: Any, path: Path) -> None:
    # The checksum finds damage by disks and transfers, and unnoticed edits by hand. It does not protect against an
    # attacker, who can compute it too: qatlab.config.trust decides what may be built from the file.
    text = OmegaConf.to_yaml(OmegaConf.create(options)).rstrip("\n")
    with atomic(path) as temporary:
        temporary.write_text(f"{text}{_SEAL}{digest(text)[:32]}\n", encoding="utf-8")


def load(path: Path) -> tuple[Config, str, str | None]:
    """Return the options, the recipe's name and the run's id that ``save`` wrote; the id is None in a file without one.

    The file is data: nothing in it is looked up or built. Raises UserError when it is not there, and for one that is
    damaged or that ``save`` did not write.
    """
    if not path.exists():
        raise UserError(
            f"{path} is not there: checkpoint= wants the folder of a run, as `python -m qatlab.fit` prints it."
        )
    try:
        stored = read_options(path)
        recipe, known = str(stored.pop("recipe")), stored.pop(RUN_ID, None)
        # These two entries are no options: the hashes of named files, and Hydra's own section, which some files have.
        for name in (CONTENTS, "hydra"):
            stored.pop(name, None)
        config = as_config(OmegaConf.merge(typed_options(), stored))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path} is damaged, or was made by another version of qatlab ({str(error).splitlines()[0]}): give the run's own "
            "command again, `python -m qatlab.fit recipe=...`."
        ) from error
    # Recipe and id form the name of the run folder, so a path in them could lead out of the folder of runs.
    if Path(recipe).is_absolute() or ".." in Path(recipe).parts or not _ID.fullmatch(str(known or "00000000")):
        raise UserError(f"{path} names the recipe '{recipe}' and the run '{known}': no run of qatlab is called so.")
    config.trust = False  # trust is given on the command line by the person who looked at the file, never by the file
    return config, recipe, None if known is None else str(known)


def read_options(path: Path) -> DictConfig:
    """Return the stored options as they stand in the file; raises ValueError for a file that was cut off or changed."""
    text, sealed, mark = path.read_text(encoding="utf-8").partition(_SEAL)
    # A file without the line is accepted: its text asks whoever edits it to take the line away.
    if sealed and mark.strip() != digest(text)[:32]:
        raise ValueError("its checksum is wrong; after an edit, remove its last line")
    try:
        _refuse_live(text)
        stored = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException, AssertionError, RecursionError) as error:  # an assertion: a number alone
        raise ValueError(f"it is no YAML of options ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(stored, DictConfig) or "recipe" not in stored:
        raise ValueError("it holds no options of a run")
    return stored


def _refuse_live(text: str) -> None:
    """Raise ValueError for YAML whose values are not all written out: interpolations and aliases.

    An interpolation may read the environment (${oc.env:...}). A few lines of aliases of aliases can stand for gigabytes.
    """
    if "${" in text:
        raise ValueError("it holds an interpolation, ${...}, which stored options never do")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it holds an alias, *..., which stored options never do")
