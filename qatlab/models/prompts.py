"""Prompt templates by name, with where each set comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qatlab.core.errors import UserError, nearest


@dataclass(frozen=True)
class Prompts:
    """Templates, each with a {} where the class name goes, and the ``name`` that stands in results for them."""

    name: str
    templates: tuple[str, ...]

    def of(self, names: Sequence[str]) -> list[list[str]]:
        """Return the prompts of every class name, a list for each."""
        return [self._of_one(name) for name in names]

    def _of_one(self, name: str) -> list[str]:
        # Not str.format: class names and templates may hold other braces.
        return [template.replace("{}", name) for template in self.templates]


def prompts(spec: str | Sequence[str], key: str = "suite.templates") -> Prompts:
    """Return the prompts that ``spec`` names: a packaged set (imagenet80, cifar18, mcm, ...), a template, or several.

    A list of one template is that template; one of several has no name but their number. Raises UserError, naming the
    option ``key``, for a name that is no packaged set, an empty list, and a template without a {}.
    """
    # A text without a {} can be no template, so it is the name of a set.
    if isinstance(spec, str) and "{}" not in spec:
        if spec not in _packaged():
            raise UserError(
                f"{key}={spec} is neither a template with a {{}} for the class name nor one of "
                f"{', '.join(_packaged())}{nearest(spec, _packaged())}."
            )
        return Prompts(spec, _packaged()[spec])
    templates = (spec,) if isinstance(spec, str) else tuple(spec)
    if not templates or not all("{}" in template for template in templates):
        raise UserError(f"{key}={list(templates)}: each needs a {{}} where the class name goes.")
    return Prompts(templates[0] if len(templates) == 1 else f"{len(templates)} templates", templates)


@cache
def _packaged() -> dict[str, tuple[str, ...]]:
    """Return {name: templates} of the packaged sets, named after a data set and a number of templates, or after a paper."""
    content = json.loads((files("qatlab") / "assets" / "templates.json").read_text("utf-8"))
    return {name: tuple(entry["templates"]) for name, entry in content.items()}
