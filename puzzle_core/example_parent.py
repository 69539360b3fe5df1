"""The quickstart's parent: a small Llama pretrained on the Python standard library's sources.

The project ships a parent, so that the quickstart needs no model hub. This module reproduces that parent: it trains
a byte-level BPE tokenizer and then the model on every standard-library module that is not held out.
`puzzle pretrain-example` runs it; the result is in `deployments/parents/stdlib-2m`.
"""

import json
import logging
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle_core.data import Split, batch_rows, pack
from puzzle_core.distill.launch import loopback_interface
from puzzle_core.records import Record, canonical_json, make_directory, write_text_atomic
from puzzle_core.text_sources import digest_documents, stdlib_documents

log = logging.getLogger(__name__)

CONTEXT_TOKENS = 256
VOCABULARY = 1024
START_OF_TEXT = "<s>"


class PretrainSpec(Record):
    """Training settings of the example parent, saved with its weights."""

    steps: int = 6000
    batch_tokens: int = 4096
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0


def pretrain(out_dir: Path, spec: PretrainSpec, processes: int) -> dict[str, Any]:
    """Train the example parent with one single-threaded process per core and write it to `out_dir`.

    Returns:
        The training record: corpus, wall time in seconds, and quality on held-out modules.
    """
    make_directory(out_dir)
    _train_tokenizer(out_dir)
    with tempfile.TemporaryDirectory() as directory:
        arguments = (processes, Path(directory) / "store", out_dir, spec)
        torch.multiprocessing.spawn(_train_process, arguments, processes)  # type: ignore[attr-defined, no-untyped-call]
    record: dict[str, Any] = json.loads((out_dir / "training_record.json").read_text())
    return record


def _train_tokenizer(out_dir: Path) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in stdlib_documents(held_out=False)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_OF_TEXT,
        eos_token=START_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out_dir)


def _new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _train_process(rank: int, processes: int, store: Path, out_dir: Path, spec: PretrainSpec) -> None:
    """Train as one of the processes, which meet over a file: a TCP store would listen on every interface."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = loopback_interface()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    tokenizer = AutoTokenizer.from_pretrained(out_dir)
    documents = list(stdlib_documents(held_out=False, include_tests=True))
    all_tokens = sum(
        len(ids) + 1
        for ids in tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    )
    split = Split("train", all_tokens - CONTEXT_TOKENS, CONTEXT_TOKENS)
    windows = next(pack([split], documents, tokenizer, spec.seed)).windows

    torch.manual_seed(spec.seed)
    model = _new_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=spec.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    local_windows = spec.batch_tokens // CONTEXT_TOKENS // processes
    started, curve, running = time.monotonic(), [], 0.0
    for step in range(spec.steps):
        share = min(1.0, (step + 1) / spec.warmup_steps)
        rate = spec.learning_rate * share * 0.5 * (1 + math.cos(math.pi * step / spec.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch_rows(step * processes + rank, local_windows, len(windows), spec.seed)
        loss = _next_token_loss(model, windows[rows].long())
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        dist.all_reduce(gradient)
        gradient /= processes
        gradient *= min(1.0, spec.gradient_clip / (float(gradient.norm()) + 1e-6))
        offset = 0
        for parameter in model.parameters():
            parameter.grad = gradient[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if rank == 0 and (step + 1) % 100 == 0:
            seen = (step + 1) * spec.batch_tokens
            seconds = time.monotonic() - started
            curve.append([step + 1, round(running / 100, 4)])
            log.info("step %d/%d loss %.4f, %.0f tokens/s", step + 1, spec.steps, running / 100, seen / seconds)
            running = 0.0
    if rank == 0:
        model.bfloat16().save_pretrained(out_dir)
        record = {
            "spec": spec.model_dump(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_tokens": spec.steps * spec.batch_tokens,
            "corpus": {
                "what": f"Python {platform.python_version()} standard library, seven eighths of it, tests included",
                "documents": len(documents),
                "tokens": all_tokens,
                "digest": digest_documents(documents),
            },
            "seconds": round(time.monotonic() - started),
            "processes": processes,
            "held_out": _evaluate(model.float(), tokenizer),
            "loss_curve": curve,
        }
        write_text_atomic(out_dir / "training_record.json", canonical_json(record) + "\n")
    dist.destroy_process_group()


def _next_token_loss(model: LlamaForCausalLM, ids_NT: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids_NT).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten())


@torch.no_grad()
def _evaluate(model: LlamaForCausalLM, tokenizer: Any, tokens: int = 65_536) -> dict[str, float]:
    documents = list(stdlib_documents(held_out=True))
    split = Split("held-out", tokens, CONTEXT_TOKENS)
    windows = next(pack([split], documents, tokenizer, seed=0)).windows.long()
    loss, right = 0.0, 0
    for batch in torch.split(windows, 16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        right += int((logits.argmax(-1) == batch[:, 1:]).sum())
    predictions = windows.numel() - len(windows)
    return {
        "tokens": windows.numel(),
        "perplexity": round(math.exp(loss / predictions), 4),
        "top1_accuracy": round(right / predictions, 4),
    }
