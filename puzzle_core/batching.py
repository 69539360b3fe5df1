"""What a sequence holds and waits for while others are served: shared by roofline predictions and limits. No torch."""

from puzzle_core.target import Reservation


def reserved_tokens(reservation: Reservation, prompt_tokens: int, generated_tokens: int) -> float:
    """Tokens of cache that a sequence holds: its whole context, or optimistically the mean over its time."""
    return prompt_tokens + (generated_tokens if reservation == "guaranteed" else generated_tokens / 2)


def waiting_prompts(prefill_ms: float, runtime_ms: float) -> float:
    """Prefills that a new prompt waits for on average: a queue with one server and equal jobs (M/D/1).

    Args:
        prefill_ms, runtime_ms: of a batch; their ratio is the share of the time that the device prefills.
    """
    busy = prefill_ms / runtime_ms if runtime_ms else 0.0
    return busy / (2 * (1 - busy)) if busy < 1 else 0.0
