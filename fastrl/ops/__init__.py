"""The public kernels.

Shape letters: B sequences, T tokens, R response tokens, M rows (flattened tokens), V vocabulary, H hidden, K in, O out,
r rank. A mask is bool and True means keep. Log-probs are float32 nats. Dropped positions return 0, get zero gradient,
and may hold anything in every input.
"""

from fastrl.ops.token_logprobs import token_logprobs

__all__ = ["token_logprobs"]
