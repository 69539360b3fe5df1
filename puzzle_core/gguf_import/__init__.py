"""Makes a Hugging Face parent of a GGUF file: config, weights, tokenizer, chat templates, generation config."""
