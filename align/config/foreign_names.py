"""Option names of TRL, transformers, peft and Axolotl, answered with ours.

Whoever comes from there types them, and no nearest name would be found. An entry is our option, with a note where it
does not count the same; or the reason why there is none. `{stage}` and `{adapter}` stand for where it was typed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from align.config.registries import adapters, stages
from align.config.schema import ModelOptions
from data_prep.core.errors import UserError, unknown
from data_prep.core.options import option_types
from data_prep.options import DataOptions, SourceOptions

OURS: dict[str, str] = {
    # training, as transformers, TRL and Axolotl call it
    "learning_rate": "{stage}.lr",
    "num_train_epochs": "{stage}.epochs",
    "num_epochs": "{stage}.epochs",
    "per_device_train_batch_size": "{stage}.micro_batch_size (rows per forward pass; batch_size are those of a step)",
    "micro_batch_size": "{stage}.micro_batch_size",
    "train_batch_size": "{stage}.batch_size (rows per optimiser step, over all processes)",
    "global_batch_size": "{stage}.batch_size",
    "gradient_accumulation_steps": "{stage}.batch_size (rows per optimiser step; micro_batch_size at a time)",
    "warmup_ratio": "{stage}.warmup (a share of the steps)",
    "warmup_steps": "{stage}.warmup (a share of the steps: 0.05)",
    "lr_scheduler_type": "{stage}.schedule (constant, linear or cosine)",
    "lr_scheduler": "{stage}.schedule (constant, linear or cosine)",
    "optim": "{stage}.optimizer",
    "adam_beta2": "{stage}.beta2",
    "adam_epsilon": "{stage}.eps",
    "gradient_clipping": "{stage}.max_grad_norm",
    "neftune_noise_alpha": "{stage}.neftune",
    "bf16": "{stage}.autocast=bf16 (matrix products; model.load=bf16 also holds the base so)",
    "mixed_precision": "{stage}.autocast=bf16",
    "precision": "{stage}.autocast (auto, bf16 or off) and model.load (fp32, bf16 or nf4)",
    "torch_dtype": "model.load (fp32, bf16 or nf4)",
    "dtype": "model.load (fp32, bf16 or nf4)",
    "max_seq_length": "{stage}.max_length",
    "max_seq_len": "{stage}.max_length",
    "sequence_len": "{stage}.max_length",
    "cutoff_len": "{stage}.max_length",
    "max_prompt_length": "{stage}.max_length (of prompt and reply together; on_long=truncate cuts the prompt)",
    "truncation": "{stage}.on_long=truncate",
    "eval_steps": "{stage}.eval_every",
    "eval_strategy": "{stage}.eval_every (optimiser steps between evaluations)",
    "evaluation_strategy": "{stage}.eval_every (optimiser steps between evaluations)",
    "early_stopping_patience": "{stage}.patience",
    "load_best_model_at_end": "{stage}.patience (with it, the best weights are kept)",
    "save_steps": "{stage}.save_minutes (minutes between kept states; a stopped run goes on from the last)",
    "save_strategy": "{stage}.save_minutes (minutes between kept states)",
    # where things are
    "output_dir": "out (the folder of runs; name=NAME is the run's own)",
    "run_name": "name",
    "report_to": "tracking.to=[wandb]",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "model_name_or_path": "model=hf model.path",
    "model_name": "model=hf model.path",
    "base_model": "model=hf model.path",
    "base_model_name_or_path": "model=hf model.path",
    "model_revision": "model.revision",
    "chat_template": "model.template",
    "load_in_4bit": "model.load=nf4",
    "quantization": "model.load=nf4",
    "quantization_bit": "model.load=nf4",
    "dataset": "data=files data.path",
    "datasets": "data=files data.path (several: data.mix)",
    "dataset_name": "data=files data.path",
    "train_file": "data=files data.path",
    "unpaired": "data.preferences.path (labelled replies stand where pairs do)",
    "val_set_size": "data.conversations.eval_share",
    "test_size": "data.conversations.eval_share",
    "max_samples": "data.conversations.limit",
    "max_train_samples": "data.conversations.limit",
    "train_on_inputs": "data.train_on",
    "assistant_only_loss": "data.train_on (assistant turns alone are trained by default)",
    "completion_only_loss": "data.train_on (replies alone are trained by default)",
    "dataset_num_proc": "data.workers",
    "reward_model_path": "stages.ppo.reward",
    "sft_model_path": "stages.ppo.init",
    "resume_from_checkpoint": "name (the same command goes on where the run was stopped)",
    # peft
    "peft_type": "adapter",
    "use_peft": "adapter (adapter=full trains all weights)",
    "r": "{adapter}.rank",
    "lora_r": "{adapter}.rank",
    "lora_rank": "{adapter}.rank",
    "lora_alpha": "{adapter}.alpha",
    "lora_dropout": "{adapter}.dropout",
    "use_dora": "{adapter}.dora",
    "use_rslora": "{adapter}.rslora",
    "init_lora_weights": "{adapter}.init",
    "lora_target_modules": "{adapter}.target_modules",
    "lora_target": "{adapter}.target_modules",
    "lora_target_linear": "{adapter}.target_modules=all-linear",
    "layers_to_transform": "{adapter}.layers",
    # several processes
    "fsdp": "distributed.shard (FSDP2: base cuts the frozen base, full the weights of full tuning too)",
    "fsdp_version": "distributed.shard (FSDP2: base cuts the frozen base, full the weights of full tuning too)",
    "ds3_gather_for_generation": "distributed.decode (whole or layers, with a model in parts)",
    # PPO
    "num_ppo_epochs": "stages.ppo.ppo_epochs",
    "num_mini_batches": "stages.ppo.minibatches",
    "total_episodes": "stages.ppo.updates (each of batch_size prompts)",
    "response_length": "stages.ppo.max_new_tokens",
    "max_completion_length": "stages.ppo.max_new_tokens",
    "num_generations": "stages.ppo.group_size",
    "init_kl_coef": "stages.ppo.kl_coef",
    "beta": "stages.ppo.kl_coef",
    "target": "stages.ppo.kl_target",
    "horizon": "stages.ppo.kl_horizon",
    "target_kl": "stages.ppo.max_approx_kl",
    "cliprange": "stages.ppo.clip",
    "cliprange_value": "stages.ppo.value_clip",
    "vf_coef": "stages.ppo.value_coef",
    "center_rewards_coefficient": "stages.reward_model.centering",
}
"""Their name -> our option, with what to know about it in brackets."""

NOT_NEEDED: dict[str, str] = {
    "packing": "rows are always packed, and never attend to each other",
    "sample_packing": "rows are always packed, and never attend to each other",
    "eval_packing": "rows are always packed, and never attend to each other",
    "eval_sample_packing": "rows are always packed, and never attend to each other",
    "pad_to_sequence_len": "rows are packed, so none is padded",
    "group_by_length": "rows are packed; micro_tokens fills forward passes by length",
    "dataset_split": "data.conversations.split (the split that trains, where there are several)",
    "remove_unused_columns": "columns that no format reads are named by align check",
    "dataset_text_field": "the format is found from the keys; data.conversations.columns names them where it is not",
    "streaming": "files are read in chunks and rows mapped from the disk; docs/scale.md has what to do beyond it",
    "dataloader_num_workers": "rows are ready before training starts; data.workers prepares them",
    "dataloader_drop_last": "batches of an epoch differ by a row at most, so none is dropped",
    "ddp_find_unused_parameters": "every trained parameter takes part in every step",
    "deepspeed": "DeepSpeed is not used: distributed.shard=base cuts the base over the processes of torchrun",
    "zero_stage": "DeepSpeed is not used: distributed.shard cuts the base, or full the weights of full tuning too",
    "fsdp_config": "there is nothing to configure: distributed.shard=base cuts every layer of the base (FSDP2)",
    "tensor_parallel_size": "products are not divided: distributed.shard=base cuts the base over processes",
    "tp_size": "products are not divided: distributed.shard=base cuts the base over processes",
    "pipeline_parallel_size": "layers are not divided: distributed.shard=base cuts each of them over processes",
    "context_parallel_size": "rows are not divided: {stage}.micro_tokens bounds the tokens of a pass",
    "megatron": "Megatron is not used: distributed.shard=base cuts the base over the processes of torchrun",
    "fp16": "only bf16 needs no loss scaling: {stage}.autocast=bf16",
    "tf32": "set it in PyTorch: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
    "flash_attention": "packed attention is built in",
    "attn_implementation": "packed attention is built in",
    "load_in_8bit": "8-bit bases are not trained here; model.load=nf4 takes less memory still",
    "logging_steps": "every step is logged to metrics.jsonl",
    "logging_strategy": "every step is logged to metrics.jsonl",
    "logging_dir": "metrics.jsonl lies in the run folder; tracking.to=[tensorboard] writes its own",
    "save_total_limit": "only the newest state is kept, and none once a stage is done",
    "save_safetensors": "weights are always safetensors",
    "overwrite_output_dir": "a run never overwrites another: equal commands go on, others get a folder of their own",
    "push_to_hub": "a run uploads nothing; align ship RUN/STAGE to=hub push=true does",
    "hub_model_id": "a run uploads nothing; align ship RUN/STAGE to=hub push=true does",
    "do_train": "a stage trains and evaluates; pipeline=NAME chooses the stages",
    "do_eval": "a stage trains and evaluates; data.conversations.eval_share=0 holds nothing out",
    "adam_beta1": "it is 0.9; {stage}.beta2 is the one worth changing",
    "bias": "biases stay frozen with adapters; adapter=full trains them",
    "task_type": "the stage decides it",
    "inference_mode": "the stage decides it",
    "fan_in_fan_out": "it follows from the layer",
    "whiten_rewards": "advantages are whitened over all processes",
    "kl_estimator": "the penalty is k1, the reported KL has its mean",
    "num_sample_generations": "every update keeps replies in samples.jsonl",
    "data_seed": "seed is that of every random choice",
    "full_determinism": "deterministic=true",
    "use_cache": "it follows from what is done",
    "bnb_4bit_compute_dtype": "model.load=nf4 computes in the base's own type; nf4_bf16 in bf16",
    "bnb_4bit_quant_type": "model.load=nf4 says it",
    "bnb_4bit_use_double_quant": "model.load=nf4 and its variants say it",
}
"""Their name -> why there is no such option here."""

CHOICES: dict[tuple[str, str], str] = {
    ("adapter", "dora"): "adapter=lora adapter.dora=true",
    ("adapter", "qdora"): "adapter=qlora adapter.dora=true",
    ("adapter", "rslora"): "adapter=lora adapter.rslora=true",
    ("adapter", "pissa"): "adapter=lora adapter.init=pissa",
    ("adapter", "none"): "adapter=full",
    ("adapter", "prompt_tuning"): "adapter=prompt",
    ("adapter", "prefix_tuning"): "adapter=prefix",
    ("adapter", "loraplus"): "adapter=lora_plus",
    ("pipeline", "rm"): "pipeline=reward_model",
    ("pipeline", "reward"): "pipeline=reward_model",
    ("pipeline", "reward_modeling"): "pipeline=reward_model",
    ("pipeline", "pt"): "pipeline=pretrain",
    ("pipeline", "grpo"): "pipeline=sft_grpo",
    ("pipeline", "rloo"): "pipeline=sft_grpo stages.ppo.advantage=rloo",
}
"""(group, their choice) -> what to type here."""


def unknown_choice(group: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a choice that a group does not have; one that is known elsewhere is answered with ours."""
    error = unknown(group, name, choices)
    ours = CHOICES.get((group, name.lower()))
    if ours is None:
        return error
    return UserError(f"unknown {group} '{name}'", hint=f"here it is {ours}", code=error.code)


@contextmanager
def answered(chosen: Mapping[str, type]) -> Iterator[None]:
    """An unknown option that another tool has is told what it is here.

    Args:
        chosen: the pipeline's stages by name, with their dataclasses; may be filled inside.
    """
    try:
        yield
    except UserError as problem:
        said = None
        if problem.code == "unknown_key" and problem.field:
            said = answer(problem.field, chosen) or _placed(problem.field, chosen)
        if said is not None:
            problem.message, problem.hint = "unknown option", said
        raise


def answer(field: str, chosen: Mapping[str, type]) -> str | None:
    """What to say to an option at a dotted path, if it is one of another tool."""
    parts = field.split(".")
    name, at = parts[-1].lower(), parts[1] if parts[0] == "stages" and len(parts) > 2 else None
    text = OURS.get(name) or NOT_NEEDED.get(name)
    if text is None or any(name in option_types(kind) for kind in chosen.values()):
        return None  # an option of a stage of this run, typed at another place
    if "{stage}" in text:
        wanted = text.partition("{stage}.")[2].partition(" ")[0].partition("=")[0]
        text = text.replace("{stage}", f"stages.{_owner(wanted, at, chosen)}")
    text = text.replace("{adapter}", f"stages.{at}.adapter" if at else "adapter")
    return f"here it is {text}" if name in OURS else f"not needed: {text}"


def _placed(field: str, chosen: Mapping[str, type]) -> str | None:
    """Where an option of data, model or adapter stands that was typed without its place, as messages name it."""
    *above, name = field.split(".")
    if any(name in option_types(kind) for kind in chosen.values()):
        return None
    kinds = dict.fromkeys(kind for stage in chosen.values() for kind in getattr(stage, "needs_data", ()))
    owners = (
        [f"data.{kind}" for kind in kinds if name in option_types(SourceOptions)] if above in ([], ["data"]) else []
    )
    if not above:
        groups = [("data", DataOptions), ("model", ModelOptions), *(("adapter", kind) for _, kind in adapters.items())]
        owners = [group for group, kind in groups if name in option_types(kind)][:1] or owners
    more = f" (also in: {', '.join(owners[1:])})" if owners[1:] else ""
    return f"did you mean '{owners[0]}.{name}'?{more}" if owners else None


def _owner(option: str, at: str | None, chosen: Mapping[str, type]) -> str:
    """The stage whose option is meant: that where it was typed, else the first of the run that has it."""
    known = {**dict(stages.items()), **chosen}
    every = {**({at: known[at]} if at in known else {}), **chosen, **known}
    return next((name for name, kind in every.items() if option in option_types(kind)), "NAME")
