"""The public kernels.

Shape letters: B sequences, T tokens, R response tokens, M rows (flattened tokens), V vocabulary, H hidden, K in, O out,
r rank. A mask is bool and True means keep. Log-probs are float32 nats. Dropped positions return 0, get zero gradient,
and may hold anything in every input.
"""

from fastrl.ops.linear_cross_entropy import linear_cross_entropy
from fastrl.ops.linear_logprobs import linear_logprobs
from fastrl.ops.token_logprobs import token_logprobs

__all__ = ["linear_cross_entropy", "linear_logprobs", "token_logprobs"]
