"""The three loops: supervised fine-tuning, reward model, PPO. Each is one file with one ``main``."""
