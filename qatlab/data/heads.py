"""Zero-shot heads: the classes of an id set, in its own prompts or as rows of a text table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qatlab.clip import Clip
from qatlab.data.classlists import ClassList
from qatlab.data.entries import is_rendered
from qatlab.data.opening import SetFiles
from qatlab.data.prompts import Prompts, prompts
from qatlab.errors import UserError
from qatlab.zeroshot import Classes, class_features


@dataclass(frozen=True)
class Head:
    """A zero-shot head and the templates it was made with; none for a text table, whose prompts are its own."""

    classes: Classes
    templates: tuple[str, ...]

    def encoded_by(self, clip: Clip) -> Head:
        """Return the head with the same prompts encoded by another text tower, uncached; a text table's stays as it is."""
        if not self.templates:
            return self
        encoded = class_features(clip, self.classes.names, self.templates, cache=False)
        return replace(self, classes=replace(encoded, prompts=self.classes.prompts))

    def described(self) -> list[Any]:
        """Return what the head rests on, for the definitions of the sets that it scores."""
        return [self.classes.names, *(self.templates or [self.classes.prompts])]


def head_for(name: str, listed: ClassList, files: SetFiles, clip: Clip, cache_text: bool, key: str = "prompts") -> Head:
    """Return the zero-shot head of an id set's classes, in the order of its class list.

    ``key`` of the set names its template set, by default the suite's templates. Without a text tower the head is made of
    the rows of the text table. Raises UserError for names that it lacks, and for templates that are not there.
    """
    table = clip.text_table
    if table is None:
        chosen = _prompts(name, key, files)
        classes = class_features(clip, listed.names, chosen.templates, cache_text)
        return Head(replace(classes, prompts=chosen.name), chosen.templates)
    if listed.of is not None and listed.of.names == table.names:
        # By row, because a subset may be called otherwise (ImageNet-10's "antelope"), or by a name that two rows have.
        names = [table.names[row] for row in listed.rows]
        return Head(Classes(table.features[listed.rows], names, table.source), ())
    return Head(class_features(clip, listed.names, files.config.templates, cache_text), ())


def _prompts(name: str, key: str, files: SetFiles) -> Prompts:
    wanted = getattr(files.config.sets[name], key)
    if wanted is None:
        return prompts(files.config.templates)
    if wanted != "own":
        return prompts(wanted, f"suite.sets.{name}.{key}")
    if is_rendered(files.config.sets[name]) or not (own := files.layout(name).templates):
        raise UserError(
            f"suite.sets.{name}.{key}=own, but no templates lie beside the set (zeroshot_classification_templates.txt); "
            "name a template set."
        )
    return prompts(own)
