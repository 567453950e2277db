"""Fields of Hugging Face's config.json that this engine knows beside those that it reads.

Owns the lists. Invariant: a field that stands in none of them, and that nobody read, is refused by its name, since it
may change the mathematics.
"""

# Fields that change the mathematics, with the values under which they do not; an absent one counts as the first.
REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
}

# What is left to whoever trains, saves or runs a model, and of generating what requests say.
_TRAINING = (
    "attention_dropout embd_pdrop hidden_dropout initializer_range resid_pdrop unsloth_fixed unsloth_version use_cache"
)
_SAVING = (
    "auto_map dtype file_name is_llama_config model_name original_model_name torch_dtype transformers_version"
    " transformers.js_config use_bfloat16 _commit_hash"
)
_RUNNING = (
    "attn_implementation chunk_size_feed_forward gradient_checkpointing max_window_layers pretraining_tp tf_legacy_loss"
    " torchscript use_flash_attn _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled"
)
_OUTPUTS = (
    "finetuning_task id2label is_decoder label2id output_attentions output_hidden_states output_scores problem_type"
    " return_dict return_dict_in_generate task_specific_params tie_encoder_decoder tokenizer_class"
    " cross_attention_hidden_size"
)
_GENERATING = (
    "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping"
    " encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id"
    " length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams"
    " num_return_sequences pad_token_id prefix remove_invalid_values repetition_penalty sep_token_id suppress_tokens"
    " temperature top_k top_p typical_p unk_token_id"
)
# Read as they stand.
_ELSEWHERE = "eos_token_id quantization_config rope_parameters rope_scaling rope_theta _name_or_path"
SILENT = frozenset(" ".join((_TRAINING, _SAVING, _RUNNING, _OUTPUTS, _GENERATING, _ELSEWHERE)).split())

# A mixture's that only its training reads.
MIXTURE_SILENT = frozenset(["aux_loss_alpha", "ep_size", "output_router_logits", "router_aux_loss_coef", "seq_aux"])

# DeepSeek's where attention is latent, and where experts are not chosen by groups, or no layer has any.
DEEPSEEK_SILENT = MIXTURE_SILENT | {
    "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
    "num_key_value_heads", "routed_scaling_factor", "topk_group",
}  # fmt: skip
