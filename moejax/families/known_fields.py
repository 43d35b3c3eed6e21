"""Names of the config.json fields that are no surprise in any family."""

_READ = """
model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings num_experts_per_tok layer_types dtype torch_dtype
bos_token_id eos_token_id rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings
quantization_config per_layer_config attention_chunk_size kv_sharing_modes transformers_weights is_causal
is_encoder_decoder mlp_bias
"""

# Bookkeeping, training and output switches: none changes a forward pass.
_HARMLESS = """
architectures transformers_version _name_or_path name_or_path _commit_hash auto_map attn_implementation
_attn_implementation_autoset experts_implementation pad_token_id sep_token_id decoder_start_token_id initializer_range
attention_dropout use_cache output_router_logits router_aux_loss_coef output_hidden_states output_attentions return_dict
tie_last_hidden_states chunk_size_feed_forward id2label label2id num_labels problem_type gradient_checkpointing
torchscript use_bfloat16 pruned_heads add_cross_attention cross_attention_hidden_size is_decoder tie_encoder_decoder
tokenizer_class prefix finetuning_task task_specific_params tf_legacy_loss pretraining_tp
"""

# Generation settings that old configs carry; transformers drops them in favour of generation_config.json.
_GENERATION = """
max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
suppress_tokens begin_suppress_tokens num_beam_groups diversity_penalty
"""

SHARED_FIELDS = frozenset(f"{_READ} {_HARMLESS} {_GENERATION}".split())
