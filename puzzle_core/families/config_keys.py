"""Keys of a `config.json` that mean the same for every family, and values that change nothing.

transformers ignores a key that the family's class does not read. The key can still matter to the code that wrote it. So
a parent with a key that its family's row does not know is refused, unless the value is neutral.
"""

from typing import Any

_READ_BY_EVERY_ROW = """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters
    rope_theta rope_scaling layer_types quantization_config
"""
_TRAINING_AND_BOOKKEEPING = """
    initializer_range attention_dropout use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    dtype torch_dtype transformers_version auto_map tokenizer_class model_max_length name_or_path id2label label2id
    num_labels problem_type return_dict chunk_size_feed_forward is_encoder_decoder pretraining_tp is_llama_config
    transformers.js_config finetuning_task task_specific_params
"""
_GENERATION = """
    do_sample temperature top_k top_p typical_p min_p max_length min_length max_new_tokens num_beams num_beam_groups
    num_return_sequences length_penalty repetition_penalty diversity_penalty no_repeat_ngram_size early_stopping
    output_attentions output_hidden_states output_scores return_dict_in_generate cache_implementation
"""  # older versions of transformers wrote them into config.json
COMMON_KEYS = frozenset(f"{_READ_BY_EVERY_ROW} {_TRAINING_AND_BOOKKEEPING} {_GENERATION}".split())
HARMLESS_PREFIXES = ("_", "unsloth")


def is_neutral(key: str, value: Any) -> bool:
    """Whether a key with this value changes nothing: absent, off, empty, or a factor of 1."""
    if key.startswith(HARMLESS_PREFIXES) or value is None or value is False:
        return True
    return value in ("", [], {}, 0, 1) and value is not True
