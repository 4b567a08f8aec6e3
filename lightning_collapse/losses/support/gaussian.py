"""Gaussians as losses of latents take them: means and log-variances side by side, as a last layer makes them."""

from torch import Tensor

from lightning_collapse.losses.support.statistics import separate_views


def split_gaussians(function: str, **gaussians: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Means and log-variances, ``(N, K)`` each, of Gaussians of shape ``(N, 2 * K)``.

    Args:
        function: What to call the caller in messages.
        gaussians: Matrices by argument name.

    Raises:
        ValueError: If one is not a matrix of floating-point numbers, has an odd number of columns or none, or if their
            shapes differ.
    """
    views = separate_views(function, **gaussians)
    for name, view in zip(gaussians, views, strict=True):
        if view.shape[1] % 2 or not view.shape[1]:
            raise ValueError(
                f"`{name}` of `{function}` must hold the means of all units and then their log-variances, (N, 2 *"
                f" units), got shape {tuple(view.shape)}. Pass `torch.cat([mean, log_variance], dim=1)`; of standard"
                " deviations the log-variance is `2 * std.log()`."
            )
    return [view.tensor_split(2, dim=1) for view in views]  # type: ignore[misc]
