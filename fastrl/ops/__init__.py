"""The public kernels.

Shape letters: B sequences, T tokens, R response tokens, M rows (flattened tokens), V vocabulary, H hidden, K in, O out,
r rank. A mask is bool and True means keep. Log-probs are float32 nats. Dropped positions return 0, get zero gradient,
and may hold anything in every input.
"""

from fastrl.ops.gae import gae
from fastrl.ops.linear_cross_entropy import linear_cross_entropy
from fastrl.ops.linear_head import LoRAHead
from fastrl.ops.linear_logprobs import linear_logprobs
from fastrl.ops.lora_linear import LoRAWeights, lora_linear, lora_linear_group
from fastrl.ops.ppo_advantages import Advantages, AdvantageStats, ppo_advantages
from fastrl.ops.ppo_loss import PPOStats, ppo_loss
from fastrl.ops.ranking_loss import RankingStats, ranking_loss
from fastrl.ops.token_logprobs import token_logprobs

__all__ = [
    "AdvantageStats",
    "Advantages",
    "LoRAHead",
    "LoRAWeights",
    "PPOStats",
    "RankingStats",
    "gae",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_linear",
    "lora_linear_group",
    "ppo_advantages",
    "ppo_loss",
    "ranking_loss",
    "token_logprobs",
]
