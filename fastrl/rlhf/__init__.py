"""What RLHF adds to PPO, on numbers and tensors alone: no models, no data, no runs."""
