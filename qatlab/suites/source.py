"""The two things that a row of results is about: the scored set, and the stage and logit scale it was scored at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A scored set: its name, its role and the name of its ID reference.

    The roles are id, shifted, near_ood, far_ood, common, counter and calibration. ``definition`` is a hash of
    everything that decides the numbers of the set apart from the model: images, reference, classes and evaluations. A
    stored row is used again only while the definition of its set stays the same.
    """

    name: str
    role: str
    reference: str
    definition: str = ""


@dataclass(frozen=True)
class View:
    """A stage and the logit scale s that multiplies its cosines; several views may use the cosines of the same encoder.

    ``basis`` is the definition of the data that the scale was fitted on, or the hash of an exported model, or "".
    ``before`` is the stage whose scale was refitted, "" where the scale does not come from a refit. ``logit_bias`` is added to
    the scaled cosines where probabilities are sigmoids (suite.zeroshot=sigmoid), None where they are a softmax over classes.
    """

    stage: str
    logit_scale: float
    basis: str = ""
    before: str = ""
    logit_bias: float | None = None

    @property
    def fitted(self) -> bool:
        """Return whether the logit scale comes from a refit of the temperature."""
        # The name of the stage decides, because it is stored in rows: every stage of a refit begins with "temperature".
        return self.stage.startswith("temperature")

    def definition(self, source: Source) -> str:
        """Return the definition of a set's rows under this view: the set's definition, and "+" and the ``basis`` if any."""
        # Without a basis, as for a scale that was not fitted, there is no plus.
        return "+".join(filter(None, [source.definition, self.basis]))
