"""What a solve may take: nodes of branch and bound, which are the same work on every machine, or the user's seconds."""

import math
from dataclasses import dataclass, field

NODES = 20_000


@dataclass(eq=False)
class Effort:
    """What every solve of a search may take, and whether one of them was cut by the clock.

    A solve that ends at its nodes gives the same choice everywhere. One that ends at its seconds does not, so that what
    depends on it is no truth to pass on.

    Attributes:
        nodes: of branch and bound, of one solve.
        seconds: of one solve, without its relaxation; infinite unless the user sets a limit.
        met_time_limit: whether a solve ended at its seconds.
    """

    nodes: int = NODES
    seconds: float = math.inf
    met_time_limit: bool = field(default=False, init=False)

    @property
    def text(self) -> str:
        """The limits as a phrase."""
        return f"{self.nodes:,} nodes" + (f" or {self.seconds:g} s" if self.seconds < math.inf else "")


BY_NODES = Effort()
"""The nodes of a search that asks for nothing else, and no seconds."""
