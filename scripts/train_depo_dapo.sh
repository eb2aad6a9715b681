#!/usr/bin/env bash
# DEPO with DAPO's loss and without its dynamic sampling (the paper's best row): clip-higher 0.2 and 0.28, the mean
# over tokens, no KL term, and a penalty for responses that are too long. One node of 8 GPUs with 80 GB, hybrid engine.
#   bash scripts/train_depo_dapo.sh [more flags, which override those below]
# First: install openrlhf-depo (README.md, "Add it to your launch"), then `depo patch`.
# If a Ray head runs here, the launch joins it.
#
# WE HAVE NOT RUN THIS ON GPUS. Tests put these flags through the parser and checks of every OpenRLHF that DEPO
# supports, no more. The recipe follows OpenRLHF's examples; batch sizes and memory shares may need tuning.
# DAPO (arXiv 2503.14476) rolls out 512 prompts x 16 responses of up to 16384 + 4096 tokens. Here it is 128 x 8, and
# half of the length.
#
# To use DAPO's dynamic sampling, too, add `--algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 1`.
set -euo pipefail

SCRIPTS=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-Qwen/Qwen3-4B-Base}
DATASET=${DATASET:-OpenRLHF/dapo-math-17k} # columns `prompt` (text or chat) and `label` (the answer)
EVAL_DATASET=${EVAL_DATASET:-OpenRLHF/aime-2024}
REWARD=${REWARD:-$SCRIPTS/math_reward.py} # a file with reward_func, or the URL of a server
DEPO_CONFIG=${DEPO_CONFIG:-depo}          # a YAML file, or a preset: depo, depo_wide, depo_paper
OUT=${OUT:-$PWD/runs/depo-dapo}
GPUS=${GPUS:-8}

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
    --reward.remote_url "$REWARD"
    --data.prompt_dataset "$DATASET"
    --data.input_key prompt
    --data.label_key label
    --data.apply_chat_template
    --data.max_len 11264
    --rollout.max_new_tokens 10240

    # The overlong buffer: the last 2048 of the 10240 tokens cost up to 1.0 of the reward. OpenRLHF takes that off
    # `rewards`, from which the policy learns. DEPO's estimator learns from `scores`, which stay right or wrong.
    --reward.overlong_buffer_len 2048
    --reward.overlong_penalty_factor 1.0

    # Each step: 128 prompts x 8 responses, two optimizer steps.
    --rollout.batch_size 128
    --rollout.n_samples_per_prompt 8
    --rollout.temperature 1.0
    --train.batch_size 512
    --train.num_episodes 2
    --train.dynamic_batch_enable
    --train.max_tokens_per_gpu 22528
    --rollout.max_tokens_per_gpu 22528
)

ENGINE_ARGS=(
    # Policy and vLLM share the GPUs, and each sleeps while the other one works.
    --train.colocate_all
    --actor.num_nodes 1
    --actor.num_gpus_per_node "$GPUS"
    --vllm.num_engines "$GPUS"
    --vllm.tensor_parallel_size 1
    --vllm.gpu_memory_utilization 0.7
    --vllm.enable_sleep
    --ds.enable_sleep
    --vllm.sync_backend nccl

    --ds.zero_stage 3
    --actor.gradient_checkpointing_enable
    --ds.packing_samples
    --ds.param_dtype bf16
)

OPTIMIZER_ARGS=(
    # DAPO's loss. The mean over tokens is OpenRLHF's default, and in some releases its only loss, so no flag sets it.
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
