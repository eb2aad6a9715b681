#!/usr/bin/env bash
# GRPO with DEPO on math problems: one node of 8 GPUs with 80 GB; policy and vLLM share each GPU (hybrid engine).
#   bash scripts/train_depo_hybrid_engine.sh [more flags, which override those below]
# First: install openrlhf-depo (README.md, "Add it to your launch"), then `depo patch`.
# If a Ray head runs here, the launch joins it.
#
# WE HAVE NOT RUN THIS ON GPUS. Tests put these flags through the parser and checks of every OpenRLHF that DEPO
# supports, no more. The recipe follows OpenRLHF's examples; batch sizes and memory shares may need tuning.
#
# To compare with plain GRPO, add `--advantage_estimator group_norm`. To use DAPO's dynamic sampling with DEPO,
# add `--algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 1`.
set -euo pipefail

SCRIPTS=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-Qwen/Qwen3-4B-Base}
DATASET=${DATASET:-OpenRLHF/dapo-math-17k} # columns `prompt` (text or chat) and `label` (the answer)
EVAL_DATASET=${EVAL_DATASET:-OpenRLHF/aime-2024}
REWARD=${REWARD:-$SCRIPTS/math_reward.py} # a file with reward_func, or the URL of a server
DEPO_CONFIG=${DEPO_CONFIG:-depo}          # a YAML file, or a preset: depo, depo_wide, depo_paper
OUT=${OUT:-$PWD/runs/depo-math}
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
    --data.max_len 9216
    --rollout.max_new_tokens 8192

    # Each step: 128 prompts x 8 responses, two optimizer steps.
    --rollout.batch_size 128
    --rollout.n_samples_per_prompt 8
    --rollout.temperature 1.0
    --train.batch_size 512
    --train.num_episodes 2
    --train.dynamic_batch_enable
    --train.max_tokens_per_gpu 18432
    --rollout.max_tokens_per_gpu 18432
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
