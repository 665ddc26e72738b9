"""Chat templates, tokenizers and messages that the tests of the data layer share."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2: no generation prompt, a space before the answer, bos in the text, eos at the end of a turn.
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<bos>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} <eos>{% endif %}{% endfor %}"
)
# Rewrites earlier answers once the conversation goes on.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' and not loop.last %}(gone){% else %}{{ m['content'] }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
USER_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(template=None, eos="<eos>", bos=None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    text = ["What is the capital of France? It is Paris.", "### Instruction: ### Response: user assistant"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    names = {"pad_token": "<pad>", "eos_token": eos, "bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in names.items() if v})
    tokenizer.chat_template = template
    return tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def supervised(example):
    return [token for token, keep in zip(example.input_ids, example.loss_mask, strict=True) if keep]


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
