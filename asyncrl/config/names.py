"""Common settings of verl and TRL beside asyncrl's: what unknown overrides are answered with, and docs/comparison.md lists."""

VERL, TRL = "verl", "TRL"
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."

# Names in verl, in TRL, and here; several with a space between. Behind a name of ours may stand what is different about it.
NAMES: tuple[tuple[str, str, str], ...] = (
    ("data.train_files", "train_dataset", "data.files"),
    ("data.val_files", "eval_dataset", "evaluation.files"),
    ("data.max_prompt_length", "max_prompt_length", "data.max_prompt_length (longer prompts are left out)"),
    ("data.reward_fn_key", "", "data.source_key"),
    ("data.max_response_length", "max_completion_length", "sampling.max_response_length"),
    ("data.train_batch_size", "generation_batch_size", "learner.batch_groups (prompts, not rollouts)"),
    ("actor_rollout_ref.model.path", "model_name_or_path", "model.path"),
    ("actor_rollout_ref.model.trust_remote_code", "trust_remote_code", "model.trust_remote_code"),
    (_ROLLOUT + "n", "num_generations", "sampling.n"),
    (_ROLLOUT + "temperature", "temperature", "sampling.temperature"),
    (f"{_ROLLOUT}top_p {_ROLLOUT}top_k", "top_p top_k", "sampling.top_p sampling.top_k"),
    (_ROLLOUT + "val_kwargs.n", "num_generations_eval", "evaluation.n"),
    (_ROLLOUT + "val_kwargs.temperature", "", "evaluation.temperature"),
    (_ROLLOUT + "name", "use_vllm", "deploy.generators.engine.kind"),
    (
        _ROLLOUT + "gpu_memory_utilization",
        "vllm_gpu_memory_utilization",
        "deploy.generators.engine.sglang.mem_fraction",
    ),
    (
        _ROLLOUT + "tensor_model_parallel_size",
        "vllm_tensor_parallel_size",
        "deploy.generators.engine.sglang.tp_size",
    ),
    (_ACTOR + "optim.lr", "learning_rate", "learner.lr"),
    (_ACTOR + "optim.lr_warmup_steps", "warmup_steps", "learner.warmup_steps"),
    (_ACTOR + "optim.lr_scheduler_type", "lr_scheduler_type", "learner.lr_schedule"),
    (_ACTOR + "optim.weight_decay", "weight_decay", "learner.weight_decay"),
    (_ACTOR + "grad_clip", "max_grad_norm", "learner.max_grad_norm"),
    (_ACTOR + "ppo_mini_batch_size", "", "learner.mini_batch_groups"),
    (_ACTOR + "ppo_epochs", "num_iterations", "learner.ppo_epochs"),
    (
        f"{_ACTOR}ppo_max_token_len_per_gpu {_ACTOR}ppo_micro_batch_size_per_gpu",
        "per_device_train_batch_size",
        "learner.max_tokens_per_pack (tokens, not rollouts)",
    ),
    (
        f"{_ACTOR}clip_ratio {_ACTOR}clip_ratio_low {_ACTOR}clip_ratio_high",
        "epsilon epsilon_high",
        "algorithm.clip_ratio algorithm.clip_ratio_high",
    ),
    (_ACTOR + "clip_ratio_c", "delta", "algorithm.clip_ratio_c"),
    (_ACTOR + "policy_loss.loss_mode", "importance_sampling_level", "algorithm.policy_loss"),
    (_ACTOR + "loss_agg_mode", "loss_type", "algorithm.loss_agg"),
    (_ACTOR + "entropy_coeff", "", "algorithm.entropy_coef"),
    (f"{_ACTOR}use_kl_loss {_ACTOR}kl_loss_coef", "beta", "algorithm.kl_coef (0 turns it off)"),
    (_ACTOR + "kl_loss_type", "", "algorithm.kl_estimator"),
    ("algorithm.use_kl_in_reward", "", "algorithm.kl_in=reward"),
    ("algorithm.kl_ctrl.kl_coef", "", "algorithm.kl_coef"),
    ("algorithm.kl_ctrl.type", "", "algorithm.kl_control"),
    ("algorithm.norm_adv_by_std_in_grpo", "scale_rewards", "algorithm.adv_estimator (off: grpo_no_std)"),
    ("algorithm.filter_groups.enable", "", "sampling.keep=varied"),
    ("critic.optim.lr", "", "critic.lr"),
    ("critic.cliprange_value", "", "critic.value_clip"),
    (
        "custom_reward_function.path custom_reward_function.name",
        "reward_funcs reward_weights",
        "reward.function, or reward.functions with weights",
    ),
    ("trainer.total_training_steps", "max_steps", "total_steps"),
    ("trainer.total_epochs", "num_train_epochs", "data.epochs (total_steps is needed too)"),
    ("trainer.save_freq", "save_steps", "checkpoint.save_freq"),
    ("trainer.max_actor_ckpt_to_keep", "save_total_limit", "checkpoint.keep_last_n"),
    ("trainer.test_freq", "eval_steps", "evaluation.freq"),
    ("trainer.experiment_name", "run_name", "--name"),
    ("trainer.default_local_dir", "output_dir", "--runs-dir"),
    ("trainer.resume_mode", "resume_from_checkpoint", "--resume"),
)


def elsewhere(path: str) -> str:
    """`; verl calls it that: here it is …` for a name of another project's, empty for any other. path: as on a command line."""
    wanted = path.lstrip("+")  # which adds a key, in verl's overrides
    for verl, trl, ours in NAMES:
        for project, names in ((VERL, verl), (TRL, trl)):
            if wanted in names.split():
                return f"; {project} calls it that: here it is {ours}"
    return ""
