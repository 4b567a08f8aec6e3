"""Distillation: answer as a frozen copy does that has learned the tasks before."""

from torch import Tensor

from lightning_collapse.losses.support.rows import mean_of_rows, unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive


@full_precision
def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Divergence of softened class probabilities from those of a teacher: learning without forgetting [1].

    .. math:: \tfrac{1}{N} \sum_i \operatorname{KL}\big(\operatorname{softmax}(t_i / T) \,\|\,
        \operatorname{softmax}(z_i / T)\big)

    where :math:`z_i` are the logits of the classes that the teacher knows, the first ones if the student has more. The
    paper has the cross-entropy of the same probabilities: it differs by the entropy of the teacher's, a constant, so
    that gradients are the same and this one reads 0 where both agree. As in the paper there is no factor
    :math:`T^2`, by which [2] makes up for gradients that shrink with the temperature: for that multiply by it.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        logits: Of the student, shape ``(N, C)``; ``N`` may differ between processes.
        teacher_logits: Shape ``(N, K)`` with ``K <= C``, constants; they get no gradient.
        temperature: :math:`T`; 2 in the paper.

    Returns:
        Scalar, at least ``float32``, 0 or more, the value on the global batch.

    Raises:
        ValueError: If one is not a matrix, the rows differ in number, the teacher knows more classes, or
            ``temperature`` is not positive; if there is no row over all processes.

    References:
        [1] Li & Hoiem, *Learning without Forgetting*, ECCV 2016. https://arxiv.org/abs/1606.09282
        [2] Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015. https://arxiv.org/abs/1503.02531

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(torch.tensor([[5.0, 3.0, 9.0]]), teacher), distillation_loss(torch.zeros(1, 2), teacher)
        (tensor(0.), tensor(0.1109))
    """
    require_positive(temperature=temperature)
    if logits.ndim == 2 and teacher_logits.ndim == 2 and logits.shape[1] > teacher_logits.shape[1]:
        logits = logits[:, : teacher_logits.shape[1]]
    student, teacher = separate_views("distillation_loss", logits=logits, teacher_logits=teacher_logits.detach())
    log_q, log_p = (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)
    # not p * (log p - log q): 0 * inf where a class is masked by -inf
    divergence = (log_p.exp() * (log_p - log_q)).where(log_p > -float("inf"), 0.0).sum(dim=1, keepdim=True)
    return mean_of_rows("distillation_loss", divergence).squeeze(0)


@full_precision
def feature_distillation_loss(features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Cosine distance of features from those of a teacher: the less-forget constraint [1].

    .. math:: \tfrac{1}{N} \sum_i \big(1 - \cos(f_i, t_i)\big)

    Directions are kept and lengths are free: the squared distance of [2], between the same features, holds both.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        features: Of the student, shape ``(N, D)``; ``N`` may differ between processes.
        teacher_features: The same shape, constants; they get no gradient.

    Returns:
        Scalar, at least ``float32``, between 0 (the same directions) and 2, the value on the global batch. A row of
        zeros has no direction and reads 1.

    Raises:
        ValueError: If one is not a matrix or their shapes differ; if there is no row over all processes.

    References:
        [1] Hou et al., *Learning a Unified Classifier Incrementally via Rebalancing*, CVPR 2019.
        [2] Jung et al., *Less-forgetting Learning in Deep Neural Networks*, 2016. https://arxiv.org/abs/1607.00122

    Example:
        >>> import torch
        >>> feature_distillation_loss(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    pair = {"features": features, "teacher_features": teacher_features.detach()}
    student, teacher = separate_views("feature_distillation_loss", **pair)
    distance = 1 - (unit_rows(student) * unit_rows(teacher)).sum(dim=1, keepdim=True)
    return mean_of_rows("feature_distillation_loss", distance).squeeze(0)


@full_precision
def squared_distillation_loss(outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
    r"""Half the squared distance of outputs from those of a teacher: generative distillation of diffusion models [1].

    .. math:: \tfrac{1}{N} \sum_i \tfrac12 \| f_i - t_i \|^2

    a sum over the numbers of a row: with outputs that are predicted noise, :math:`\epsilon_\theta(x)`, on what the
    teacher has generated, it is the loss that [1] adds to a penalty of rank one, with a weight of 1.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        outputs: Of the student, shape ``(N, D)``; ``N`` may differ between processes.
        teacher_outputs: The same shape, constants; they get no gradient.

    Returns:
        Scalar, at least ``float32``, 0 or more, the value on the global batch.

    Raises:
        ValueError: If one is not a matrix or their shapes differ; if there is no row over all processes.

    References:
        [1] Wang et al., *Rank-1 elastic weight consolidation*, ICLR 2026. https://arxiv.org/abs/2509.23593

    Example:
        >>> import torch
        >>> squared_distillation_loss(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor(6.2500)
    """
    pair = {"outputs": outputs, "teacher_outputs": teacher_outputs.detach()}
    student, teacher = separate_views("squared_distillation_loss", **pair)
    values = (student - teacher).square().sum(dim=1, keepdim=True) / 2
    return mean_of_rows("squared_distillation_loss", values).squeeze(0)
