"""Loads a child for MLflow's `pyfunc`: token ids in, logits out. The file lies beside the child's in MLflow.

It is read where this project need not be installed, and so imports only torch and transformers.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

INPUT = "input_ids"


class ChildLogits:
    """A child whose `predict` gives logits."""

    def __init__(self, model: Any) -> None:  # a class of transformers, whose calls have no types
        self._model = model.eval()

    def predict(self, model_input: dict[str, Any], params: dict[str, Any] | None = None) -> "np.ndarray[Any, Any]":
        """Logits (N, T, V) in float32 of the token ids (N, T) under `input_ids`."""
        ids_NT = torch.as_tensor(np.asarray(model_input[INPUT]), dtype=torch.long, device=self._model.device)
        with torch.no_grad():
            logits: np.ndarray[Any, Any] = self._model(input_ids=ids_NT).logits.float().cpu().numpy()
        return logits


def _load_pyfunc(path: str) -> ChildLogits:
    """MLflow calls this with the directory of the model."""
    return ChildLogits(AutoModelForCausalLM.from_pretrained(Path(path), trust_remote_code=True))
