"""llama.cpp with one model and a batch of sequences: prefill and decode, timed (METHOD section 5).

The settings are the defaults of `llama-server`: flash attention where the backend has it, a float16 cache, at most 2048
tokens in one call and 512 in one pass, and a separate cache for every sequence. Sampling is not counted: a step ends
when its logits are computed. With one thread the clock is the processor time of the process, which other work on the
machine hardly disturbs; with more threads it is wall-clock time.
"""

import ctypes
import importlib.metadata
import logging
import time
from pathlib import Path
from typing import Any

from puzzle_core.errors import MeasurementError, SpecError

CALL_TOKENS = 2048
TOKEN = 1


def engine_version() -> str:
    """llama.cpp, with the version of its Python binding.

    Raises:
        SpecError: the binding is not installed.
    """
    try:
        return f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"
    except importlib.metadata.PackageNotFoundError as error:
        raise SpecError(
            "the engine is llama.cpp, and llama-cpp-python is not installed: `make engines` builds it"
        ) from error


class LlamaModel:
    """A GGUF file that is open for a number of sequences of at most `length` tokens. Close it after use."""

    def __init__(self, file: Path, sequences: int, length: int, threads: int):
        """Open the file.

        Raises:
            SpecError: llama-cpp-python is not installed.
            MeasurementError: llama.cpp cannot load the file, or has no room for the cache.
        """
        engine_version()
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # logs warnings as errors
        self._api: Any = llama_cpp
        self.file, self.sequences, self.threads = file, sequences, threads
        self._lengths = 0
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_settings)
        if not self._model:
            raise MeasurementError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = sequences * _padded(length), sequences, False
        settings.n_batch, settings.n_threads, settings.n_threads_batch = CALL_TOKENS, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            self._api.llama_model_free(self._model)
            raise MeasurementError(f"llama.cpp has no room for {sequences} sequences of {length} tokens in {file}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(CALL_TOKENS, 0, 1)

    def close(self) -> None:
        """Free the model and its cache."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._api.llama_model_size(self._model))

    def prefill_ms(self, tokens: int) -> float:
        """Milliseconds for one prompt of this many tokens per sequence, until the logits of its last token."""
        self._api.llama_memory_clear(self._memory, False)
        self._lengths = 0
        return self._extend(tokens)

    def steps_ms(self, length: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` decode steps of one token per sequence, starting at this cache length."""
        if self._lengths > length:
            for sequence in range(self.sequences):
                self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)
            self._lengths = length
        if self._lengths < length:
            self._extend(length - self._lengths)
        return [self._extend(1) for _ in range(steps)]

    def _extend(self, tokens: int) -> float:
        """Add tokens to every sequence, in as many calls as needed; returns the milliseconds in llama.cpp."""
        positions = range(self._lengths, self._lengths + tokens)
        last = self._lengths + tokens - 1
        entries = [
            (sequence, position, position == last) for sequence in range(self.sequences) for position in positions
        ]
        total = 0.0
        for first in range(0, len(entries), CALL_TOKENS):
            self._fill(entries[first : first + CALL_TOKENS])
            total += self._decode()
        self._lengths += tokens
        return total

    def _fill(self, entries: list[tuple[int, int, bool]]) -> None:
        """Fill the batch with tokens: of each its sequence, its position, and whether its logits are computed."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (sequence, position, logits) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = TOKEN, position, logits
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = ctypes.c_int32(sequence)

    def _decode(self) -> float:
        """Run the batch; returns milliseconds."""
        clock = time.process_time_ns if self.threads == 1 else time.perf_counter_ns
        started = clock()
        status = self._api.llama_decode(self._context, self._batch)
        self._api.llama_synchronize(self._context)
        if status:
            raise MeasurementError(f"llama.cpp failed with {status} on {self._batch.n_tokens} tokens of {self.file}")
        return (clock() - started) / 1e6


def _padded(length: int) -> int:
    """The length rounded up to a multiple of 256, which is what llama.cpp's caches hold."""
    return -(-length // 256) * 256
