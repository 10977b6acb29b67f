"""Keys and files of other tools' folders: which change the SAE's function and are read, which only describe, and the refusal of all others.

A tool's loader takes what it knows and drops the rest, which is how an SAE quietly becomes another function here. So every key, tensor and file
is in one of these lists, or the folder is refused by that name. Collected from the classes that write them: sae-lens 3.23 to 6.54, eai-sparsify
1.3, dictionary-learning 0.1. How what is read changes the weights: `formats.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from interp_assets.errors import InputError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAELENS: Final = _words(
    # the function (formats.py)
    "architecture d_in d_sae d_out dtype apply_b_dec_to_input normalize_activations reshape_activations k rescale_acts_by_decoder_norm "
    "activation_fn activation_fn_str activation_fn_kwargs finetuning_scaling_factor metadata "
    # the place; what is not harmless in them is refused below
    "hook_name hook_point hook_point_layer hook_layer hook_eval hook_head_index hook_point_head_index model_from_pretrained_kwargs model_kwargs "
    # the data
    "model_name model_class_name dataset_path dataset_trust_remote_code streaming is_dataset_tokenized use_chat_formatting context_size "
    "use_cached_activations cached_activations_path prepend_bos seqpos_slice exclude_special_tokens disable_concat_sequences "
    "sequence_separator_token activations_mixing_fraction store_batch_size_prompts n_batches_in_buffer n_batches_for_norm_estimate "
    # the training
    "l1_coefficient lp_norm l1_warm_up_steps l0_coefficient l0_warm_up_steps pre_act_loss_coefficient decoder_init_norm aux_loss_coefficient "
    "use_sparse_activations topk_threshold_lr jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale "
    "jumprelu_ste_to_input target_l0 b_dec_init_method expansion_factor normalize_sae_decoder noise_scale from_pretrained_path "
    "decoder_orthogonal_init decoder_heuristic_init decoder_heuristic_init_norm init_encoder_as_decoder_transpose training_tokens "
    "finetuning_tokens finetuning_method train_batch_size_tokens train_batch_size adam_beta1 adam_beta2 mse_loss_normalization "
    "scale_sparsity_penalty_by_decoder_norm lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles use_ghost_grads "
    "feature_sampling_window dead_feature_window dead_feature_threshold n_eval_batches eval_batch_size_prompts seed total_training_tokens "
    "total_training_steps tokens_per_buffer "
    # the machine and the log
    "device llm_device act_store_device prefetch_llm_batches autocast autocast_lm compile_llm llm_compilation_mode compile_sae "
    "sae_compilation_mode log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb log_weights_to_wandb wandb_project wandb_id "
    "run_name wandb_entity wandb_log_frequency eval_every_n_wandb_logs logger resume resume_from_checkpoint n_checkpoints checkpoint_path "
    "save_final_checkpoint output_path verbose sae_lens_version sae_lens_training_version neuronpedia_id use_error_term"
)
_SAELENS_METADATA: Final = _words(
    "model_name hook_name hook_name_out hf_hook_name hf_hook_name_out hook_layer hook_layer_out hook_head_index "
    "hook_head_index_out model_class_name model_from_pretrained_kwargs prepend_bos exclude_special_tokens "
    "sequence_separator_token disable_concat_sequences context_size seqpos_slice dataset_path dataset_trust_remote_code "
    "neuronpedia_id sae_lens_version sae_lens_training_version l0 num_dead_features training_architecture "
    "training_architecture_details hook_point hook_points target_hook_point"
)
_HEADS: Final = ("hook_head_index", "hook_point_head_index", "hook_head_index_out")
_MODEL_OPTIONS: Final = _words(
    # of TransformerLens: they change weights inside attention and the unembedding, not what a block adds to the residual stream
    "fold_ln fold_value_biases center_unembed refactor_factored_attn_matrices "
    # where and how exactly it computes
    "device n_devices move_to_device device_map dtype torch_dtype attn_implementation low_cpu_mem_usage load_in_4bit load_in_8bit "
    "cache_dir local_files_only token use_auth_token trust_remote_code use_safetensors default_prepend_bos default_padding_side"
)
_SPARSIFY: Final = _words("activation expansion_factor normalize_decoder num_latents k multi_topk skip_connection transcode d_in signed")
_DICTIONARY: Final = frozenset({"trainer", "buffer"})
_TRAINER: Final = _words(
    "dict_class k layer lm_name submodule_name hook_point activation_dim dict_size "
    # `norm_factor` is in the saved biases already (training.py of that tool)
    "norm_factor trainer_class lr steps warmup_steps decay_start sparsity_warmup_steps resample_steps seed device wandb_name l1_penalty "
    "sparsity_penalty sparsity_function initial_sparsity_penalty sparsity_queue_length n_sparsity_updates p_start p_end anneal_start anneal_end "
    "bandwidth target_l0 auxk_alpha threshold_beta threshold_start_step top_k_aux group_fractions group_weights group_sizes "
    "k_anneal_steps"
)
_BUFFER: Final = _words(
    "d_submodule io n_ctxs ctx_len refresh_batch_size out_batch_size device remove_bos add_special_tokens max_activation_norm_multiple"
)
_DESCRIBING: Final = (".md", ".txt", ".html", ".png", ".svg", ".jpg", ".pdf", ".csv", ".log", ".gitattributes", ".gitignore", ".ds_store")
_FILES: Final[dict[str, frozenset[str]]] = {
    "saelens": frozenset({"runner_cfg.json", "trainer_state.pt", "activations_store_state.safetensors"}),
    "sparsify": frozenset({"optimizer_state.pt"}),
    "dictionary_learning": frozenset({"eval_results.json"}),
    "gemma_scope": frozenset(),
}
"""Files beside those that are read which say nothing of the function, besides what people read."""


def check_files(tool: str, found: Collection[str], read: Collection[str]) -> None:
    """Raise `InputError` that names a file of a folder that is neither read nor known to describe; folders in it are other things."""
    known = {*read, *_FILES[tool]}
    unknown = sorted(name for name in found if "/" not in name and name not in known and not name.lower().endswith(_DESCRIBING) and name != "LICENSE")
    if unknown:
        raise InputError(
            f"beside {', '.join(sorted(read))} lies {', '.join(unknown[:8])}, which is not known here and may change what the SAE computes. If it "
            "does not, move it out of the folder; if it does, fold it into the weights first."
        )


def check_saelens(config: Mapping[str, Any]) -> None:
    """Raise `InputError` that names a key of `cfg.json` which is not known, or changes the rows in a way that has no equal here."""
    metadata = config.get("metadata") or {}
    _check_keys(config, _SAELENS, "cfg.json", "SAELens")
    _check_keys(metadata, _SAELENS_METADATA, "metadata in cfg.json", "SAELens")
    _check_keys(config.get("activation_fn_kwargs") or {}, frozenset({"k"}), "activation_fn_kwargs in cfg.json", "SAELens")
    for content in (config, metadata):
        for key in _HEADS:
            if content.get(key) is not None:
                raise InputError(f"{key} in cfg.json is {content[key]!r}: this SAE reads a single attention head, which is no hook point here.")
        if content.get("model_kwargs"):
            raise InputError(
                f"model_kwargs in cfg.json are {content['model_kwargs']!r}: its rows come from a forward with these arguments. If they do not change "
                "the rows, delete the key and import again."
            )
        _check_model_options(content.get("model_from_pretrained_kwargs") or {})


def _check_model_options(options: Mapping[str, Any]) -> None:
    """Raise `InputError` where the model of the training was changed after loading, in a way that changes the residual stream."""
    if options.get("center_writing_weights"):
        raise InputError(
            "model_from_pretrained_kwargs in cfg.json has center_writing_weights true: it was trained on a residual stream from which each row's own "
            "mean was taken, and rows here are the model's own. In a model with RMSNorm TransformerLens ignores that: set the key to false. In one "
            "with LayerNorm, subtract its mean from each column of W_enc, [d_in, d_sae] (then its latents are the same on the model's own rows, and "
            "its reconstruction lacks their means, which LayerNorm does not see), set the key to false, and import again."
        )
    unknown = sorted(key for key, value in options.items() if value and key not in _MODEL_OPTIONS and key != "center_writing_weights")
    if unknown:
        raise InputError(
            f"model_from_pretrained_kwargs in cfg.json has {', '.join(f'{key} {options[key]!r}' for key in unknown)}: it may have been trained on "
            "another model than `model.name` and `model.revision` say. If these rows are the same, delete the key and import again."
        )


def check_sparsify(config: Mapping[str, Any]) -> None:
    """Raise `InputError` that names a key of `cfg.json` which is not known."""
    _check_keys(config, _SPARSIFY, "cfg.json", "sparsify")
    if config.get("signed"):
        raise InputError("signed in cfg.json is true: negative latents, which no SAE here has.")


def check_dictionary(config: Mapping[str, Any]) -> None:
    """Raise `InputError` that names a key of `config.json` which is not known."""
    _check_keys(config, _DICTIONARY, "config.json", "dictionary_learning")
    _check_keys(config.get("trainer") or {}, _TRAINER, "trainer in config.json", "dictionary_learning")
    buffer = config.get("buffer") or {}
    _check_keys(buffer, _BUFFER, "buffer in config.json", "dictionary_learning")
    if buffer.get("io", "out") not in ("in", "out"):
        raise InputError(
            f"io of buffer in config.json is {buffer['io']!r}: this dictionary maps a module's input to its output; 'in' and 'out' are read."
        )


def check_tensors(tool: str, found: Collection[str], read: Collection[str]) -> None:
    """Raise `InputError` that names a tensor which the architecture does not have: ignored, it might be what makes the function."""
    unknown = sorted({*found} - {*read})
    if unknown:
        raise InputError(
            f"the weights of this {tool} SAE hold {', '.join(unknown[:8])}, which its architecture does not have ({', '.join(sorted(read))}). Take "
            "the file that the tool itself saved."
        )


def _check_keys(content: Any, known: frozenset[str], where: str, tool: str) -> None:
    if not isinstance(content, Mapping):
        raise InputError(f"{where} of this {tool} SAE holds a {type(content).__name__}, expected keys and values.")
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise InputError(
            f"{where} of this {tool} SAE has {', '.join(unknown[:8])}, which is not known here and may change what the SAE computes. If it only "
            "describes, delete it from the file and import again; if it changes the function, fold it into the weights first."
        )
