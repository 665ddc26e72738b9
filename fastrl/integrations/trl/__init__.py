"""TRL: its trainers' log-probs and entropies by fastrl's kernels; its PPO settings as fastrl's.

import fastrl.integrations.trl

fastrl.integrations.trl.patch()
"""

from fastrl.integrations.trl.patching import patch, unpatch
from fastrl.integrations.trl.ppo import Migration, ppo_config

__all__ = ["Migration", "patch", "ppo_config", "unpatch"]
