"""Specimens of agents: values, policies and latent models of gridworlds."""

from . import dqn, healthy, policy_gradient, self_predictive

SPECIMENS = (
    *dqn.SPECIMENS,
    *policy_gradient.SPECIMENS,
    *self_predictive.SPECIMENS,
    *healthy.SPECIMENS,
)
