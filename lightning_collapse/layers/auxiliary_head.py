"""Auxiliary head: a second head for a loss that would fight the first one's, taken away after training."""

from torch import nn

from lightning_collapse.utilities.arguments import require_whole


class AuxiliaryHead(nn.Sequential):
    """A head of its own for the logit-level loss of dual-head distillation; the features before it get both gradients.

    One linear layer cannot serve two losses: cross-entropy and a match of logits pull it in opposite directions. Assign
    it to an attribute of the model, give its logits to
    :func:`~lightning_collapse.losses.logit_distillation_loss`, and call :meth:`drop_` in the end.

    Args:
        dim: Width of the features.
        num_classes: Number of classes.
        hidden: Width of a hidden layer with dropout, batch norm and ReLU, as published for CIFAR; 0 for one linear
            layer, as for ImageNet.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Yang et al., *Dual-Head Knowledge Distillation*, 2024. https://arxiv.org/abs/2411.08937, code at
        https://github.com/penghui-yang/DHKD.

    Example:
        >>> model = nn.ModuleDict({"head": nn.Linear(8, 3), "auxiliary": AuxiliaryHead(8, 3)})
        >>> AuxiliaryHead.drop_(model), list(model.state_dict())
        (['auxiliary'], ['head.weight', 'head.bias'])
    """

    def __init__(self, dim: int, num_classes: int, hidden: int = 200) -> None:
        require_whole(1, dim=dim, num_classes=num_classes)
        require_whole(0, hidden=hidden)
        last = nn.Linear(hidden or dim, num_classes)
        before = (nn.Linear(dim, hidden), nn.Dropout(0.1), nn.BatchNorm1d(hidden), nn.ReLU()) if hidden else ()
        super().__init__(*before, last)

    @classmethod
    def drop_(cls, model: nn.Module) -> list[str]:
        """Set every attribute of a model that holds such a head to ``None``, and return their names."""
        found = [name for name, module in model.named_modules() if isinstance(module, cls)]
        for name in found:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, None)
        return found
