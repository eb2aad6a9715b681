"""Learns the same groups with both backends of the estimator and prints losses and weights' distance, as JSON.

`python compare_backends.py FLAGS`: what test_backends.py runs in a process of its own, since DeepSpeed's process group
stays with a process.
"""

import json
import sys

from replay_step import parsed_args

from depo_plugin.estimator.backends import deepspeed_strategy
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.messages import Label
from depo_plugin.settings import config


def main() -> None:
    """Take four updates on both backends; after two, the DeepSpeed one goes on from the torch one's state."""
    args = parsed_args(sys.argv[1:])
    cfg = config.from_namespace(args.depo)
    torch_side = DifficultyEstimator(cfg, 8, 42)
    deepspeed_side = DifficultyEstimator(cfg, 8, 42, strategy=deepspeed_strategy(args))
    steps = [[Label(f"{a} + {b} =", "x", (a % 5) / 4, 0.5, 8, 0 < a % 5 < 4) for a in range(12)] for b in range(4)]
    rows = []
    for number, groups in enumerate(steps):
        if number == 2:
            deepspeed_side.load_state_dict(torch_side.state_dict())
        rows.append([])
        for side in (torch_side, deepspeed_side):
            judged = side.judge(groups).metrics
            side.learn(groups)
            rows[-1].append(judged | side.state_dict()["losses"])
    weights = [side.state_dict()["text"]["model"] for side in (torch_side, deepspeed_side)]
    distance = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    scores = [side.score(["7 + 8 ="], ["x"]) for side in (torch_side, deepspeed_side)]
    print(json.dumps({"rows": rows, "distance": distance, "p": [float(s.a[0] / (s.a[0] + s.b[0])) for s in scores]}))


if __name__ == "__main__":
    main()
