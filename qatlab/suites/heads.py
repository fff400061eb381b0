"""Zero-shot heads: the class embeddings of an id set, from its prompts or from a text table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qatlab.core.errors import UserError
from qatlab.data.images.classlists import ClassList
from qatlab.models.clip import Clip
from qatlab.models.prompts import Prompts, prompts
from qatlab.models.zeroshot import Classes, class_features
from qatlab.suites.set_files import SetFiles
from qatlab.suites.set_options import is_rendered


@dataclass(frozen=True)
class Head:
    """A zero-shot head and the templates it was made with; no templates for a text table, whose prompts are not known."""

    classes: Classes
    templates: tuple[str, ...]

    def encoded_by(self, clip: Clip) -> Head:
        """Return the head with the same prompts encoded by another text tower; the head of a text table stays as it is."""
        if not self.templates:
            return self
        # The features are not cached, because the cache would keep an entry for the quantized text tower of every run.
        encoded = class_features(clip, self.classes.names, self.templates, cache=False)
        return replace(self, classes=replace(encoded, prompts=self.classes.prompts))

    def described(self) -> list[Any]:
        """Return the class names and the templates of the head, for the definitions of the sets that it scores."""
        # The features are left out, because the definition of a set must be the same for every model.
        return [self.classes.names, *(self.templates or [self.classes.prompts])]


def head_for(name: str, listed: ClassList, files: SetFiles, clip: Clip, cache_text: bool, key: str = "prompts") -> Head:
    """Return the zero-shot head of an id set's classes, in the order of its class list.

    The set's option ``key`` names its templates, by default the suite's templates. Where model.text_features replaces
    the text tower, the head is made of rows of that table. Raises UserError for names that the table lacks, and for
    templates that do not exist.
    """
    table = clip.text_table
    if table is None:
        chosen = _prompts(name, key, files)
        classes = class_features(clip, listed.names, chosen.templates, cache_text)
        return Head(replace(classes, prompts=chosen.name), chosen.templates)
    if listed.of is not None and listed.of.names == table.names:
        # Features are taken by row and not by name, because a part of a list may use other names (ImageNet-10's
        # "antelope"), and two rows may have the same name.
        names = [table.names[row] for row in listed.rows]
        return Head(Classes(table.features[listed.rows], names, table.source), ())
    return Head(class_features(clip, listed.names, files.config.templates, cache_text), ())


def _prompts(name: str, key: str, files: SetFiles) -> Prompts:
    """Return the prompts that a set's option ``key`` names: the suite's, packaged ones, or those in the set's folder."""
    wanted = getattr(files.config.sets[name], key)
    if wanted is None:
        return prompts(files.config.templates)
    if wanted != "own":
        return prompts(wanted, f"suite.sets.{name}.{key}")
    if is_rendered(files.config.sets[name]) or not (beside := files.layout(name).templates):
        raise UserError(
            f"suite.sets.{name}.{key}=own, but no templates lie beside the set (zeroshot_classification_templates.txt); "
            "name a template set."
        )
    return prompts(beside)
