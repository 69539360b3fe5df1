"""Children in formats of serving engines (docs/engines.md): a DeciLM directory (hf.py), a GGUF file (gguf_file.py)."""
