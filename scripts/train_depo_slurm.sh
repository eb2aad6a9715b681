#!/usr/bin/env bash
#SBATCH --job-name=depo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# GRPO with DEPO on several nodes in one Slurm job: nodes of 8 GPUs with 80 GB, hybrid engine. Run this in the
# repository's folder, on a file system that all nodes share:
#   sbatch [--nodes=N --partition=...] scripts/train_depo_slurm.sh [more flags, which override those below]
# First, in the environment or image of the nodes: install openrlhf-depo (README.md, "Add it to your launch"), then
# `depo patch`. If it is read-only: `depo patch --target DIR`, and export PYTHONPATH=DIR before sbatch (docs/clusters.md).
#
# WE HAVE NOT RUN THIS ON GPUS OR UNDER SLURM. Tests put these flags through the parser and checks of every OpenRLHF
# that DEPO supports, and run this script with stand-ins for srun and ray that write down how they are called.
set -euo pipefail

SCRIPTS=${SLURM_SUBMIT_DIR:?start this with sbatch}/scripts # Slurm runs a copy of this file elsewhere

MODEL=${MODEL:-Qwen/Qwen3-4B-Base}
DATASET=${DATASET:-OpenRLHF/dapo-math-17k} # columns `prompt` (text or chat) and `label` (the answer)
EVAL_DATASET=${EVAL_DATASET:-OpenRLHF/aime-2024}
REWARD=${REWARD:-$SCRIPTS/math_reward.py} # a file with reward_func, or the URL of a server
DEPO_CONFIG=${DEPO_CONFIG:-depo}          # a YAML file, or a preset: depo, depo_wide, depo_paper
OUT=${OUT:-$SLURM_SUBMIT_DIR/runs/depo-math-$SLURM_JOB_ID} # a folder that all nodes see
NODES=$SLURM_JOB_NUM_NODES
GPUS=${GPUS:-8} # of a node
PORT=${PORT:-6379}
IMAGE=${IMAGE:-} # a container image (with the plugin pyxis); empty: what is installed on the nodes
MOUNTS=${MOUNTS:-$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR} # folders that the container sees

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RAY_ADDRESS=${HOSTS[0]}:$PORT
# Starts a command once, with all CPUs and GPUs of its node. Such commands share the node (--overlap).
SRUN=(srun --overlap --nodes=1 --ntasks=1 "--cpus-per-task=$SLURM_CPUS_ON_NODE" "--gpus-per-node=$GPUS")
if [ -n "$IMAGE" ]; then SRUN+=("--container-image=$IMAGE" "--container-mounts=$MOUNTS"); fi
RUN_ON=("${SRUN[@]}" "--nodelist=${HOSTS[0]}") # starts a command where the launch runs: on the first node

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
    --actor.num_nodes "$NODES"
    --actor.num_gpus_per_node "$GPUS"
    --vllm.num_engines "$((NODES * GPUS))"
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

# Ray on all nodes. Slurm ends it with the job. The launch itself waits until Ray has all GPUs.
"${RUN_ON[@]}" ray start --head "--port=$PORT" --block &
for ((attempt = 1; ; attempt++)); do
    if "${RUN_ON[@]}" ray status >/dev/null 2>&1; then break; fi
    if [ "$attempt" = 60 ]; then echo "Ray's head has not started on ${HOSTS[0]}" >&2 && exit 1; fi
    sleep 2
done
for host in "${HOSTS[@]:1}"; do
    "${SRUN[@]}" "--nodelist=$host" ray start "--address=$RAY_ADDRESS" --block &
done

source "$SCRIPTS/launch.sh"
launch python3 -m openrlhf.cli.train_ppo_ray \
    "${DEPO_ARGS[@]}" \
    "${CKPT_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" \
    "${ENGINE_ARGS[@]}" \
    "${OPTIMIZER_ARGS[@]}" \
    "${LOG_ARGS[@]}" \
    "$@"
