"""Names and numbers that the ops, their references and the kernels of all backends share. Imports nothing."""

OPS = (
    "token_logprobs", "linear_logprobs", "linear_cross_entropy", "lora_linear", "lora_linear_group", "gae",
    "ppo_advantages", "ppo_loss", "ranking_loss",
)  # fmt: skip

WHITEN_EPS = 1e-8  # added to the variance that whitening divides by

# e^20 = 4.9e8: past it k3 and the ratio say nothing more, and float32 would overflow at 88.
MAX_LOG_RATIO = 20.0


def dropout_threshold(dropout: float) -> int:
    """Words of 32 random bits below this one drop their element."""
    return int(dropout * 2.0**32)
