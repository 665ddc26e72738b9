"""Data: sources of records -> formats -> templates -> token ids, and batches of them."""

from fastrl.data.batches import pad, shuffled_batches, split_holdout
from fastrl.data.load import Example, LoadReport, Preference, Prompt, load_examples, load_preferences, load_prompts

__all__ = [
    "Example",
    "LoadReport",
    "Preference",
    "Prompt",
    "load_examples",
    "load_preferences",
    "load_prompts",
    "pad",
    "shuffled_batches",
    "split_holdout",
]
