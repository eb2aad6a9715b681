"""The DeepSpeed backend: the estimator's engine from OpenRLHF's own strategy, for an estimator on a GPU."""

import copy
import math
import os
import socket

import torch
from deepspeed.accelerator import get_accelerator


def deepspeed_strategy(args):
    """Return an OpenRLHF strategy of world size 1 with ZeRO 0 and fp32 weights, its process group initialised.

    args: OpenRLHF's arguments of the launch; they are copied, not changed.
    """
    import ray
    from openrlhf.trainer.ray.utils import ray_noset_visible_devices
    from openrlhf.utils import get_strategy

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    # As OpenRLHF's own model actors set it: with *_VISIBLE_DEVICES narrowed by Ray the one GPU is number 0.
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
    """Wraps the model in a DeepSpeed engine; same steps as TorchBackend, within floating-point tolerance."""

    def __init__(self, model, param_groups, max_norm: float, strategy):
        """Build the engine.

        model: DifficultyModel with fp32 weights; param_groups: AdamW's groups (lr and weight decay each);
        max_norm: gradient clip; strategy: from deepspeed_strategy().
        """
        import deepspeed

        config = strategy.get_ds_train_config(max_norm=max_norm)
        self.model, self.device = model, torch.device(get_accelerator().current_device_name())
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=torch.optim.AdamW(param_groups),
            config=config,
            args={"local_rank": int(os.environ.get("LOCAL_RANK", "-1"))},
            dist_init_required=False,
        )

    def step(self, loss) -> float:
        """Make one optimizer step from the loss; return the gradient's norm before clipping."""
        self.engine.backward(loss)
        # The engine clips by the same norm, but keeps it to itself for fp32 weights.
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.engine.zero_grad()
            raise RuntimeError(f"the estimator's gradient norm is {norm}: no step was made.")
        self.engine.step()
        return norm
