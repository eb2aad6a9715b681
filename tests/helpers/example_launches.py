"""The flags of the RL launches in OpenRLHF's examples and README, in the names that 0.11.2 takes.

Only flags and values: every path, model and data set is a short stand-in, and what several launches share is written
once. Entries are named after their script. One from before 0.11 has its flags translated.
"""


def _gpus(count: int, *roles: str) -> str:
    return " ".join(f"--{role}.num_nodes 1 --{role}.num_gpus_per_node {count}" for role in roles)


_FOUR_ROLES = ("actor", "critic", "ref", "reward")
_NO_CRITIC = ("actor", "ref", "reward")
_NO_REWARD_MODEL = ("actor", "critic", "ref")
_NEITHER = ("actor", "ref")

_REWARD_MODEL = "--reward.model_name_or_path reward --reward.normalize_enable"

# Chat prompts for an 8B model
_CHAT = """
    --actor.model_name_or_path policy --actor.adam.lr 5e-7 --actor.gradient_checkpointing_enable
    --data.prompt_dataset prompts.jsonl --data.input_key context_messages --data.apply_chat_template
    --data.max_len 2048 --train.batch_size 128 --train.max_epochs 1 --ds.param_dtype bf16 --ckpt.output_dir out
"""
_MICRO_8_16 = "--train.micro_batch_size 8 --rollout.micro_batch_size 16"
_PACKED = "--ds.zero_stage 3 --ds.packing_samples"
_PPO = "--critic.adam.lr 9e-6 --algo.kl.init_coef 0.01 --rollout.batch_size 1024 --data.max_samples 100000"
_ONE_GPU_SET = """
    --train.colocate_all --vllm.enable_sleep --ds.enable_sleep --vllm.sync_backend nccl --vllm.enforce_eager
    --ckpt.path out/ckpt --ckpt.save_hf
"""
_FOUR_ENGINES = "--vllm.num_engines 4 --vllm.tensor_parallel_size 2"
_TWO_ENGINES = "--vllm.num_engines 2 --vllm.tensor_parallel_size 2"

# PPO on two GPUs a role, in pairs
_PAIRS = f"""
    {_CHAT} {_REWARD_MODEL} {_PPO} {_gpus(2, *_FOUR_ROLES)} {_TWO_ENGINES} --ds.zero_stage 3 --ds.adam_offload
    --train.colocate_actor_ref --train.colocate_critic_reward
"""
# Critic-free on six GPUs, nothing shared
_APART = f"""
    {_CHAT} {_REWARD_MODEL} {_PACKED} {_gpus(4, "actor")} {_gpus(1, "ref", "reward")}
    --vllm.num_engines 2 --vllm.tensor_parallel_size 1 --ckpt.path out/ckpt --ckpt.save_steps -1
"""
# GRPO on eight GPUs
_EIGHT_SAMPLES = "--rollout.batch_size 128 --rollout.n_samples_per_prompt 8"
_GRPO = f"""
    {_CHAT} {_PACKED} {_MICRO_8_16} {_ONE_GPU_SET} {_FOUR_ENGINES} {_EIGHT_SAMPLES}
    --vllm.gpu_memory_utilization 0.6 --algo.advantage.estimator group_norm --algo.advantage.gamma 1.0
"""
_KL_LOSS_K3 = "--algo.kl.init_coef 1e-3 --algo.kl.use_loss --algo.kl.estimator k3"

_TOKEN_CLIP = "--algo.advantage.is_correction_level token --algo.advantage.is_correction_mode clip"
_TOKEN_MASK = "--algo.advantage.is_correction_level token --algo.advantage.is_correction_mode mask"

# REINFORCE++-baseline on mathematics, rewarded by an agent
_MATH_AGENT = f"""
    {_gpus(4, *_NEITHER)} {_TWO_ENGINES} {_PACKED} {_EIGHT_SAMPLES}
    --actor.model_name_or_path policy --actor.adam.lr 5e-7 --actor.gradient_checkpointing_enable
    --actor.entropy_coef 0.0
    --train.agent_func_path agent.py --train.batch_size 1024 --train.micro_batch_size 1 --train.max_epochs 1
    --train.num_episodes 1 --train.dynamic_batch_enable --train.max_tokens_per_gpu 16192 --train.colocate_all
    --rollout.micro_batch_size 8 --rollout.max_tokens_per_gpu 32768 --rollout.max_new_tokens 64000
    --data.prompt_dataset prompts.jsonl --data.input_key prompt --data.label_key label --data.apply_chat_template
    --data.max_len 74240 --data.max_samples 128000
    --algo.advantage.estimator reinforce_baseline --algo.kl.init_coef 1e-5 --algo.kl.use_loss --algo.kl.estimator k2
    --algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0.0 1.0
    --vllm.sync_backend nccl --vllm.enforce_eager --ds.enable_sleep --ds.ring_attn_head_stride 2 --ds.param_dtype bf16
    --ckpt.output_dir out --ckpt.path out/ckpt --ckpt.save_hf --ckpt.save_steps 10 --ckpt.max_num 3 --ckpt.load_enable
    --logger.tensorboard_dir out/runs --logger.logging_steps 1 --eval.steps -1
"""
# REINFORCE++-baseline in an environment
_ENVIRONMENT = f"""
    {_gpus(8, *_NEITHER)} {_PACKED} {_MICRO_8_16} {_TOKEN_CLIP}
    --vllm.num_engines 8 --vllm.tensor_parallel_size 1 --vllm.enable_sleep --vllm.enforce_eager
    --actor.model_name_or_path policy --actor.adam.lr 5e-7 --actor.adam.weight_decay 0.01
    --actor.gradient_checkpointing_enable --actor.eps_clip_low_high 0.2 0.28
    --train.agent_func_path agent.py --train.batch_size 256 --train.max_epochs 1 --train.dynamic_batch_enable
    --train.colocate_all --rollout.batch_size 128 --rollout.n_samples_per_prompt 16 --rollout.top_p 0.98
    --data.prompt_dataset prompts.jsonl --ds.param_dtype bf16 --ds.enable_sleep --reward.normalize_enable
    --algo.advantage.estimator reinforce_baseline --algo.kl.init_coef 0 --algo.kl.estimator k2
    --ckpt.output_dir out --ckpt.save_steps -1
"""

_README = f"""
    {_CHAT} {_REWARD_MODEL} {_PPO} {_PACKED} {_ONE_GPU_SET} {_gpus(8, *_FOUR_ROLES)} {_FOUR_ENGINES}
    --vllm.gpu_memory_utilization 0.5 --train.dynamic_batch_enable --logger.wandb.key token
"""

_TEXTS = {
    # Scripts of 0.11
    "train_ppo_ray_hybrid_engine": f"""
        {_CHAT} {_REWARD_MODEL} {_PPO} {_PACKED} {_ONE_GPU_SET} {_gpus(8, *_FOUR_ROLES)} {_FOUR_ENGINES} {_TOKEN_CLIP}
        --vllm.gpu_memory_utilization 0.5 --rollout.n_samples_per_prompt 1
        --train.dynamic_batch_enable --train.max_tokens_per_gpu 16384
    """,
    "train_ppo_ray_slurm": f"""
        {_CHAT} {_REWARD_MODEL} {_PPO} {_PACKED} {_MICRO_8_16} {_gpus(4, *_FOUR_ROLES)} {_FOUR_ENGINES}
        --vllm.sync_backend nccl --train.colocate_actor_ref --train.colocate_critic_reward --ds.adam_offload
        --logger.wandb.key token
    """,
    "train_ppo_with_reward_fn": f"""
        {_CHAT} {_PPO} {_PACKED} {_MICRO_8_16} {_gpus(2, *_NO_REWARD_MODEL)} {_TWO_ENGINES}
        --reward.remote_url reward.py --reward.normalize_enable --train.colocate_actor_ref
        --ds.adam_offload --ds.attn_implementation flash_attention_2 --logger.wandb.key token
    """,
    "train_dapo_ray_hybrid_engine": f"""
        {_GRPO} {_KL_LOSS_K3} {_TOKEN_CLIP} {_gpus(8, *_NEITHER)} --reward.remote_url reward.py
        --algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 1 --actor.eps_clip_low_high 0.2 0.27
        --data.max_samples 20000 --ckpt.save_steps 20
    """,
    "train_prorlv2_math_hybrid_engine": f"""
        {_gpus(8, *_NEITHER)} {_PACKED} {_ONE_GPU_SET} {_TOKEN_MASK}
        --algo.advantage.is_correction_threshold 0.5 5.0
        --actor.model_name_or_path policy --actor.adam.lr 1e-6 --actor.gradient_checkpointing_enable
        --actor.eps_clip_low_high 0.2 0.27 --reward.remote_url reward.py --reward.stop_properly_penalty_coef 0.0
        --vllm.num_engines 8 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.75 --ds.param_dtype bf16
        --algo.advantage.estimator reinforce_baseline --algo.advantage.gamma 1.0
        --algo.kl.init_coef 1e-4 --algo.kl.use_loss --algo.kl.estimator k2
        --algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 1
        --rollout.batch_size 512 --rollout.n_samples_per_prompt 16 --rollout.max_new_tokens 8192
        --train.batch_size 1024 --train.num_episodes 100 --train.dynamic_batch_enable
        --train.max_tokens_per_gpu 32768
        --data.prompt_dataset prompts.jsonl --data.input_key prompt --data.label_key label
        --data.apply_chat_template --data.max_len 9216
        --eval.dataset eval.jsonl --eval.steps 5 --eval.temperature 1.0 --eval.n_samples_per_prompt 4
        --ckpt.output_dir out --ckpt.save_steps 5
    """,
    "train_reinforce_baseline_hybrid_engine": f"""
        {_MATH_AGENT} {_TOKEN_MASK} --vllm.gpu_memory_utilization 0.7 --ds.ring_attn_size 2
    """,
    "train_reinforce_baseline_ray_agent_async": f"""
        {_MATH_AGENT} {_TOKEN_MASK} --vllm.gpu_memory_utilization 0.95 --ds.ring_attn_size 2
        --train.async_enable --train.partial_rollout_enable
    """,
    "train_flash_reinforce_ray_agent_async": f"""
        {_gpus(1, "actor")} --vllm.num_engines 7 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.9
        --vllm.sync_backend nccl --train.async_enable --train.async_queue_size 8
        --actor.model_name_or_path policy --actor.adam.lr 1e-6 --actor.adam.weight_decay 0.1
        --actor.gradient_checkpointing_enable --actor.loss_agg_mode seq-mean-token-mean
        --reward.remote_url reward.py --algo.advantage.estimator flash_reinforce --algo.kl.init_coef 0
        --algo.advantage.is_correction_level seq --algo.advantage.is_correction_gating binary_kl
        --algo.advantage.is_correction_threshold 5e-3
        --rollout.batch_size 128 --rollout.vllm_generate_batch_size 512 --rollout.n_samples_per_prompt 1
        --rollout.micro_batch_size 1 --rollout.max_new_tokens 8192 --rollout.temperature 1.0 --rollout.top_p 1.0
        --train.batch_size 128 --train.micro_batch_size 1 --train.max_epochs 1 --train.num_episodes 1000
        --data.prompt_dataset prompts.jsonl --data.input_key prompt --data.label_key label
        --data.apply_chat_template --data.max_len 9216 --data.max_samples 128000
        --ds.zero_stage 2 --ds.param_dtype bf16 --ds.packing_samples
        --ckpt.output_dir out --ckpt.path out/ckpt --ckpt.save_hf --ckpt.save_steps 50 --ckpt.max_num 3
        --ckpt.load_enable --logger.tensorboard_dir out/runs --logger.logging_steps 1 --eval.steps -1
    """,
    "train_vlm_math_hybrid_engine": f"""
        {_gpus(4, *_NEITHER)} {_ONE_GPU_SET} {_EIGHT_SAMPLES}
        --vllm.num_engines 4 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.7
        --actor.model_name_or_path policy --actor.adam.lr 2e-6 --actor.gradient_checkpointing_enable
        --actor.freeze_visual_encoder --reward.remote_url reward.py
        --algo.advantage.estimator reinforce_baseline --algo.advantage.gamma 1.0
        --algo.kl.init_coef 0 --algo.kl.use_loss --algo.kl.estimator k2
        --train.batch_size 1024 --train.micro_batch_size 1 --train.num_episodes 100
        --rollout.micro_batch_size 1 --rollout.max_new_tokens 2048
        --data.prompt_dataset prompts.jsonl --data.input_key prompt --data.label_key label --data.image_key images
        --data.max_images_per_prompt 1 --data.apply_chat_template --data.max_len 4096
        --ds.zero_stage 3 --ds.param_dtype bf16 --ds.attn_implementation eager
        --ckpt.output_dir out --ckpt.save_steps 5 --eval.steps -1
    """,
    # Scripts of earlier releases
    "train_gspo_ray_hybrid_engine": f"""
        {_GRPO} {_REWARD_MODEL} {_gpus(8, *_NO_CRITIC)} --actor.policy_loss_type gspo --critic.adam.lr 9e-6
        --algo.kl.init_coef 0 --data.max_samples 100000
    """,
    "train_grpo_ray_hybrid_engine": f"""
        {_GRPO} {_KL_LOSS_K3} {_REWARD_MODEL} {_gpus(8, *_NO_CRITIC)} --critic.adam.lr 9e-6
        --data.max_samples 100000
    """,
    "train_grpo_ray_hybrid_engine_agent": f"""
        {_GRPO} {_KL_LOSS_K3} {_gpus(8, *_NEITHER)} --train.agent_func_path agent.py --reward.normalize_enable
        --critic.adam.lr 9e-6 --data.max_samples 100000
    """,
    "train_ppo_ray_streaming": f"""
        {_MATH_AGENT} --vllm.gpu_memory_utilization 0.9 --ds.ring_attn_size 4 --train.async_enable
    """,
    "train_reinforce_baseline_ray_agent_multiturn": f"""
        {_ENVIRONMENT} --vllm.gpu_memory_utilization 0.8 --data.input_key query --data.label_key label
        --data.max_len 11264 --rollout.max_new_tokens 10240 --data.max_samples 1000000 --train.num_episodes 1000000
    """,
    "train_reinforce_nemogym": f"""
        {_ENVIRONMENT} --vllm.gpu_memory_utilization 0.7 --vllm.enable_prefix_caching
        --data.input_key question --data.label_key expected_answer --data.max_len 5120
        --rollout.max_new_tokens 4096 --data.max_samples 8192 --train.num_episodes 10
    """,
    "train_reinforce_ray_hybrid_engine": f"""
        {_CHAT} {_REWARD_MODEL} {_PACKED} {_MICRO_8_16} {_ONE_GPU_SET} {_gpus(8, *_NO_CRITIC)} {_FOUR_ENGINES}
        --vllm.gpu_memory_utilization 0.6 --algo.advantage.estimator reinforce --algo.kl.init_coef 1e-4
        --rollout.batch_size 1024 --rollout.n_samples_per_prompt 1 --critic.adam.lr 9e-6 --data.max_samples 100000
    """,
    "train_reinforce_llama_ray": f"""
        {_APART} {_PPO} --algo.advantage.estimator reinforce --rollout.n_samples_per_prompt 1
        --train.micro_batch_size 8 --rollout.micro_batch_size 32 --ds.adam_offload
    """,
    "train_reinforce_llama_ray_async": f"""
        {_APART} --algo.advantage.estimator reinforce --algo.kl.init_coef 1e-4 --train.async_enable
        --train.micro_batch_size 16 --rollout.micro_batch_size 32 --rollout.batch_size 1024
        --rollout.n_samples_per_prompt 1 --data.max_samples 100000 --ds.adam_offload
    """,
    "train_reinforce_baseline_llama_ray_async": f"""
        {_APART} {_MICRO_8_16} {_EIGHT_SAMPLES} --algo.advantage.estimator reinforce_baseline --train.async_enable
        --algo.kl.init_coef 1e-2 --algo.kl.use_loss --algo.kl.estimator k2 --data.max_samples 12500
    """,
    "train_ppo_llama_ray": f"""
        {_PAIRS} --ds.packing_samples --ds.attn_implementation flash_attention_2 --algo.kl.estimator k3
        --train.micro_batch_size 8 --rollout.micro_batch_size 32 --ckpt.load_enable --logger.wandb.key token
    """,
    "train_ppo_llama_ray_ring": f"""
        {_PAIRS} --ds.packing_samples --ds.attn_implementation flash_attention_2
        --ds.ring_attn_size 2 --ds.ring_attn_head_stride 2
        --train.micro_batch_size 16 --rollout.micro_batch_size 32 --ckpt.load_enable --logger.wandb.key token
    """,
    "train_ppo_llama3_ray_colocate": f"""
        {_PAIRS} {_MICRO_8_16} --ref.offload --reward.offload --logger.wandb.key token
    """,
    "train_ppo_llama_ray_tensor_parallelism": f"""
        {_CHAT} {_REWARD_MODEL} {_PPO} {_MICRO_8_16} {_gpus(8, *_FOUR_ROLES)} {_FOUR_ENGINES}
        --train.colocate_all --vllm.gpu_memory_utilization 0.5 --vllm.enable_sleep --vllm.sync_backend nccl
        --vllm.enforce_eager --rollout.n_samples_per_prompt 1 --ds.zero_stage 2 --ds.tensor_parallel_size 2
        --ds.adam_offload --ds.packing_samples --ckpt.path out/ckpt --ckpt.save_hf
    """,
    "train_ppo_llama_ray_70b": f"""
        {_REWARD_MODEL} {_gpus(4, "actor", "critic")} {_gpus(2, "ref", "reward")} {_TWO_ENGINES}
        --actor.model_name_or_path policy --actor.adam.lr 5e-7 --actor.gradient_checkpointing_enable
        --critic.adam.lr 9e-6 --algo.kl.init_coef 0.01
        --data.prompt_dataset prompts.jsonl,more.jsonl,others.jsonl --data.prompt_probs 0.4,0.5,0.1
        --data.max_len 2048 --data.max_samples 80000
        --train.batch_size 128 --train.micro_batch_size 1 --train.max_epochs 1
        --rollout.batch_size 1024 --rollout.micro_batch_size 2
        --ds.zero_stage 3 --ds.param_dtype bf16 --ds.adam_offload --ds.attn_implementation flash_attention_2
        --ckpt.output_dir out
    """,
    "train_ppo_llama_with_remote_rm": f"""
        {_CHAT} {_PPO} {_PACKED} {_MICRO_8_16} {_gpus(2, *_NO_REWARD_MODEL)} {_TWO_ENGINES}
        --reward.remote_url http://localhost:5000/get_reward --reward.normalize_enable --train.colocate_actor_ref
        --ds.adam_offload --ds.attn_implementation flash_attention_2 --logger.wandb.key token
    """,
    "train_ppo_llama_ray_remote_rm": f"""
        {_REWARD_MODEL} {_gpus(4, "actor")} {_gpus(2, "critic")} {_gpus(1, "ref", "reward")}
        --vllm.num_engines 0 --vllm.tensor_parallel_size 2
        --actor.model_name_or_path policy --actor.adam.lr 5e-7 --actor.gradient_checkpointing_enable
        --critic.model_name_or_path critic --critic.adam.lr 9e-6 --algo.kl.init_coef 0.01
        --reward.remote_url http://localhost:5000/get_reward
        --data.prompt_dataset prompts.jsonl,more.jsonl,others.jsonl --data.prompt_probs 0.3,0.6,0.1
        --data.max_len 2048 --data.max_samples 80000
        --train.batch_size 128 --train.micro_batch_size 1 --train.max_epochs 1
        --rollout.batch_size 16 --rollout.micro_batch_size 2
        --ds.zero_stage 2 --ds.param_dtype bf16 --ds.adam_offload --ds.attn_implementation flash_attention_2
        --ckpt.output_dir out --logger.logging_steps 1
    """,
    # The README's launch, and its variants: one response per prompt, or four where the estimator compares them
    "readme": f"{_README} --rollout.n_samples_per_prompt 1",
    **{
        f"readme_{name}": f"{_README} --rollout.n_samples_per_prompt 1 --algo.advantage.estimator {name}"
        for name in ("gae", "reinforce", "flash_reinforce")
    },
    **{
        f"readme_{name}": f"{_README} --rollout.n_samples_per_prompt 4 --algo.advantage.estimator {name}"
        for name in ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
    },
}

LAUNCHES: dict[str, list[str]] = {name: text.split() for name, text in _TEXTS.items()}
