"""The DeepSpeed backend: the estimator's engine from OpenRLHF's own strategy, for an estimator on a GPU."""

import copy
import os

from deepspeed.accelerator import get_accelerator


def deepspeed_strategy(args):
    """Return an OpenRLHF strategy of world size 1 with ZeRO 0 and fp32 weights, its process group initialised.

    args: OpenRLHF's arguments of the launch; they are copied, not changed.
    """
    from openrlhf.utils import get_strategy

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
        import torch

        config = strategy.get_ds_train_config(max_norm=max_norm)
        self.model, self.device = model, torch.device(get_accelerator().current_device_name())
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=torch.optim.AdamW(param_groups),
            config=config,
            args={"local_rank": int(os.environ.get("LOCAL_RANK", "-1"))},
            dist_init_required=False,
        )
        self.forward = self.engine

    def step(self, loss) -> float:
        """Make one optimizer step from the loss; return the gradient's norm before clipping."""
        self.engine.backward(loss)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)
