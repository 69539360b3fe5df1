"""Children as serving engines read them: a DeciLM directory (hf.py) and a GGUF file (gguf_file.py). docs/engines.md."""
