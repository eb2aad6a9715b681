"""The plain torch backend of the estimator: AdamW on one device, and AdamW's state by parameter name."""

import torch
from torch import nn


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Return copies on the CPU of what the optimizer holds, by parameter name; {} before the first step.

    Learning rates and the like are settings, not state: a resumed run takes the ones it is launched with.
    """
    return {
        name: {field: value.detach().to("cpu", copy=True) for field, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take up optimizer_state(); ValueError naming parameters that the model does not have."""
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(state) - set(parameters)):
        raise ValueError(f"optimizer: the model has no parameters {unknown}.")
    optimizer.state.clear()
    for name, fields in state.items():
        # `step` stays on the CPU unless the optimizer is fused there, as torch's own loading does it.
        optimizer.state[parameters[name]] = {
            field: value.detach().clone() if field == "step" else value.to(parameters[name].device, copy=True)
            for field, value in fields.items()
        }


class TorchBackend:
    """Holds the model and steps it: backward, clip, AdamW."""

    def __init__(self, model: nn.Module, param_groups: list[dict], max_norm: float):
        """Take a model with fp32 weights. param_groups: AdamW's, lr and weight decay each; max_norm: gradient clip."""
        self.model = model
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(param_groups, fused=True)
        self._max_norm = max_norm

    def step(self, loss: torch.Tensor) -> float:
        """Make one optimizer step from the loss; return the gradient's norm before clipping.

        Raises RuntimeError, with the weights untouched, where the gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm, error_if_nonfinite=True)
        self.optimizer.step()
        return norm.item()
