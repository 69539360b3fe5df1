"""llama.cpp with one model and a batch of sequences: prefill and decode, timed (METHOD section 5).

As `llama-server` runs it by default: flash attention where the backend has it, a float16 cache, at most 2048 tokens in
one call and 512 in one pass, and every sequence with a cache of its own. Sampling is not counted: a step ends when its
logits are there. With one thread the clock is the processor time of the process, which other work on the machine
hardly disturbs; with more it is the wall's.
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
    """What runs, with its version.

    Raises:
        SpecError: it is not installed.
    """
    try:
        return f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"
    except importlib.metadata.PackageNotFoundError as error:
        raise SpecError(
            "llama.cpp is asked for, and llama-cpp-python is not installed: `make engines` builds it"
        ) from error


class LlamaModel:
    """A GGUF file, opened for a number of sequences of a largest length; close it after use."""

    def __init__(self, file: Path, sequences: int, length: int, threads: int):
        """Open the file.

        Raises:
            SpecError: llama-cpp-python is not installed.
            MeasurementError: llama.cpp cannot load the file, or has no room for the cache.
        """
        engine_version()
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it takes llama.cpp's warnings for errors
        self._api: Any = llama_cpp
        self.file, self.sequences, self.threads = file, sequences, threads
        self._lengths = 0
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), of_model)
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
        """Free what llama.cpp holds."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._api.llama_model_size(self._model))

    def prefill_ms(self, tokens: int) -> float:
        """Milliseconds for prompts of this many tokens, one per sequence, up to the logits of each one's last."""
        self._api.llama_memory_clear(self._memory, False)
        self._lengths = 0
        return self._extend(tokens)

    def steps_ms(self, length: int, steps: int) -> list[float]:
        """Milliseconds of so many steps, each a token for every sequence, from this length of all sequences on."""
        if self._lengths > length:
            for sequence in range(self.sequences):
                self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)
            self._lengths = length
        if self._lengths < length:
            self._extend(length - self._lengths)
        return [self._extend(1) for _ in range(steps)]

    def _extend(self, tokens: int) -> float:
        """So many more tokens in every sequence, in as many calls as it takes; milliseconds in llama.cpp."""
        places = range(self._lengths, self._lengths + tokens)
        last = self._lengths + tokens - 1
        entries = [(TOKEN, sequence, place, place == last) for sequence in range(self.sequences) for place in places]
        total = 0.0
        for first in range(0, len(entries), CALL_TOKENS):
            self._fill(entries[first : first + CALL_TOKENS])
            total += self._run()
        self._lengths += tokens
        return total

    def _fill(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Tokens with their sequence, place, and whether their logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, sequence, place, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, place, wanted
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = ctypes.c_int32(sequence)

    def _run(self) -> float:
        clock = time.process_time_ns if self.threads == 1 else time.perf_counter_ns
        started = clock()
        failed = self._api.llama_decode(self._context, self._batch)
        self._api.llama_synchronize(self._context)
        if failed:
            raise MeasurementError(f"llama.cpp failed with {failed} on {self._batch.n_tokens} tokens of {self.file}")
        return (clock() - started) / 1e6


def _padded(length: int) -> int:
    """llama.cpp's caches have whole blocks of 256 entries."""
    return -(-length // 256) * 256
