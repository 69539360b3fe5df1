"""The state dict of a layer or a part of one: tensors by their names within it."""

import torch

State = dict[str, torch.Tensor]
