"""Record of one decision of a schedule, which checkpoints keep."""

from __future__ import annotations

from pydantic import Field

from loraover.common.strict_json import StrictModel


class Round(StrictModel):
    """Decision of a schedule, with the scores that it is based on."""

    step: int = Field(ge=0, description="Number of optimizer steps taken before the decision.")
    scores: dict[str, float] = Field(
        description="Score of every candidate that had no cores before the decision, by name; empty if the schedule "
        "takes all candidates."
    )
    chosen: list[str] = Field(description="Names of the matrices that get cores.")
    added: int = Field(description="Number of parameters that these cores have beyond those of their matrices.")
    forwards: int = Field(description="Number of batches on which the model was run to compute the scores.")

    @property
    def ranked(self) -> dict[str, float]:
        """Chosen sites with their scores, the best first; empty if the schedule takes all candidates."""
        return dict(sorted(((n, self.scores[n]) for n in self.chosen if n in self.scores), key=lambda item: -item[1]))
