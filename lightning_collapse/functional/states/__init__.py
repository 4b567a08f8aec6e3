"""States of recurrent and state-space models: how long they last, how they grow, and where they collapse."""

from lightning_collapse.functional.states.eigenmodes import (
    Eigenmodes,
    eigenmodes,
    transient_growth,
)
from lightning_collapse.functional.states.scan import scan_states
from lightning_collapse.functional.states.statistics import StateStatistics, head_growth, state_statistics
from lightning_collapse.functional.states.time_constants import forgetting_horizon, memory_share, time_constants
from lightning_collapse.functional.states.token_divergence import token_divergence
from lightning_collapse.functional.states.transition import cell_step, transition_matrix

__all__ = [
    "Eigenmodes",
    "StateStatistics",
    "cell_step",
    "eigenmodes",
    "forgetting_horizon",
    "head_growth",
    "memory_share",
    "scan_states",
    "state_statistics",
    "time_constants",
    "token_divergence",
    "transient_growth",
    "transition_matrix",
]
