"""Data: sources of records -> formats -> templates -> token ids, and batches of them."""

from fastrl.data.batches import pad, shuffled_batches
from fastrl.data.load import Example, LoadReport, Preference, Prompt, load_examples, load_preferences, load_prompts
from fastrl.data.split import split_holdout

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
