"""Rehearsal: rows of earlier tasks in bounded memory, and which rows are worth it."""

from lightning_collapse.replay.replay_buffer import ReplayBuffer
from lightning_collapse.replay.selection import beyond_quota, herding_order

__all__ = ["ReplayBuffer", "beyond_quota", "herding_order"]
