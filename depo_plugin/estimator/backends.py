"""The optimizer steps of the estimator's model: with plain torch on one device, or with a DeepSpeed engine.

Both backends take the model and AdamW's parameter groups, and offer `model`, `device`, `optimizer` and step(loss).
"""

import copy
import math
import os
import socket

import torch
from torch import nn

WEIGHT_DECAY = 0.01  # of AdamW (paper: the same)
MAX_NORM = 1.0  # a larger gradient norm is scaled down to this (paper: the same)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Return CPU copies of the optimizer's state, by parameter name; {} before the first step.

    Learning rates and the like are settings, not state: a resumed run uses those it is launched with.
    """
    return {
        name: {field: value.detach().to("cpu", copy=True) for field, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore an optimizer_state(). Raise ValueError if it has parameters that the model does not have."""
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(state) - set(parameters)):
        raise ValueError(f"optimizer: the model has no parameters {unknown}.")
    optimizer.state.clear()
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, fields in state.items():
        device = parameters[name].device
        optimizer.state[
            parameters[name]
        ] = {  # `step` is a CPU tensor unless the optimizer is fused, as torch wants it
            field: value.to(device if fused or field != "step" else "cpu", copy=True)
            for field, value in fields.items()
        }


class TorchBackend:
    """Holds the model and makes its optimizer steps: backward, clip, AdamW."""

    def __init__(self, model: nn.Module, param_groups: list[dict]):
        """Take a model with fp32 weights. param_groups: AdamW's, each with lr and weight_decay."""
        self.model = model
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(param_groups, fused=True)

    def step(self, loss: torch.Tensor) -> float:
        """Make one optimizer step from the loss; return the gradient's norm before clipping.

        Raise RuntimeError, with the weights unchanged, if the gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM, error_if_nonfinite=True)
        self.optimizer.step()
        return norm.item()


def deepspeed_strategy(args):
    """Return an OpenRLHF strategy with world size 1, ZeRO 0, fp32 weights and an initialised process group.

    args: OpenRLHF's arguments of the launch; they are copied, not changed.
    """
    import ray
    from openrlhf.trainer.ray.utils import ray_noset_visible_devices
    from openrlhf.utils import get_strategy

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    # As OpenRLHF's own model actors set it: if Ray sets *_VISIBLE_DEVICES, the only visible GPU is number 0.
    local_rank = str(ray.get_gpu_ids()[0]) if ray_noset_visible_devices() else "0"
    os.environ.update(address, WORLD_SIZE="1", RANK="0", LOCAL_RANK=local_rank)
    args = copy.deepcopy(args)
    args.ds.zero_stage, args.ds.param_dtype, args.ds.adam_offload, args.ds.grad_accum_dtype = 0, "fp32", False, None
    args.ds.ring_attn_size = args.ds.tensor_parallel_size = 1
    args.ds.use_universal_ckpt = args.train.full_determinism_enable = args.train.dynamic_batch_enable = False
    args.train.batch_size = args.train.micro_batch_size = 1
    args.local_rank = -1
    strategy = get_strategy(args)
    strategy.setup_distributed()
    return strategy


class DeepSpeedBackend:
    """Wraps the model in a DeepSpeed engine. Its steps equal TorchBackend's within floating-point tolerance."""

    def __init__(self, model: nn.Module, param_groups: list[dict], strategy):
        """Build the engine. model, param_groups: as in TorchBackend; strategy: from deepspeed_strategy()."""
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        config = strategy.get_ds_train_config(max_norm=MAX_NORM)
        self.model, self.device = model, torch.device(get_accelerator().current_device_name())
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=torch.optim.AdamW(param_groups),
            config=config,
            args={"local_rank": int(os.environ.get("LOCAL_RANK", "-1"))},
            dist_init_required=False,
        )

    def step(self, loss) -> float:
        """Make one optimizer step from the loss; return the gradient's norm before clipping.

        Raise RuntimeError, with the weights unchanged, if the gradient is not finite.
        """
        self.engine.backward(loss)
        # The engine clips by the same norm, but does not report it for fp32 weights.
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.engine.zero_grad()
            raise RuntimeError(f"the estimator's gradient norm is {norm}: no step was made.")
        self.engine.step()
        return norm
