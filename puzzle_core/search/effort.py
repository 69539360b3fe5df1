"""What a solve may take: nodes of branch and bound, which are the same work on every machine, or the user's seconds."""

import math
from dataclasses import dataclass, field

NODES = 20_000


@dataclass(eq=False)
class Effort:
    """What every solve of a search may take, what they took together, and whether one of them was cut by the clock.

    A solve that ends at its nodes gives the same choice everywhere. One that ends at its seconds does not, so that what
    depends on it is no truth to pass on.

    Attributes:
        nodes: of branch and bound, of one solve.
        seconds: of one solve, without its relaxation; infinite unless the user sets a limit.
        whole: the effort that this one is a part of.
        met_time_limit: whether a solve ended at its seconds.
        spent: nodes of all solves so far.
    """

    nodes: int = NODES
    seconds: float = math.inf
    whole: "Effort | None" = None
    met_time_limit: bool = field(default=False, init=False)
    spent: int = field(default=0, init=False)

    def part(self, nodes: int) -> "Effort":
        """An effort of at most so many nodes for each solve, at least one; what it takes counts here, too."""
        return Effort(max(1, min(self.nodes, nodes)), self.seconds, whole=self)

    def count(self, nodes: int, met_time_limit: bool) -> None:
        """Note what a solve took."""
        self.spent += nodes
        self.met_time_limit |= met_time_limit
        if self.whole:
            self.whole.count(nodes, met_time_limit)

    @property
    def text(self) -> str:
        """The limits as a phrase."""
        return f"{self.nodes:,} nodes" + (f" or {self.seconds:g} s" if self.seconds < math.inf else "")


BY_NODES = Effort()
"""The nodes of a search that asks for nothing else, and no seconds."""
