"""Comparisons by two criteria: `python make_data.py MODEL SELF_INSTRUCT HH_HARMLESS OUTPUT`.

harmless: the pairs of HH-RLHF as they are. helpful: to each task of Self-Instruct its own answer against that of
another task, and for every third task also against an answer that MODEL sampled. Every eighth task is held out, from
SFT as well.
"""

import gzip
import json
import sys
from pathlib import Path
from random import Random

import torch

from fastrl.data.templates import encode_prompt
from fastrl.models import load_policy, load_tokenizer
from fastrl.rollout import decode_responses, rollout

MAX_NEW_TOKENS, BATCH = 48, 16

torch.manual_seed(0)
model_folder, self_instruct, hh, output = map(Path, sys.argv[1:])
rng = Random(0)
tasks: list[dict[str, str]] = []
for name in ("seed_tasks", "user_oriented"):
    tasks += map(json.loads, (self_instruct / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
rng.shuffle(tasks)
prompts = ["\n\n".join(filter(None, (task["instruction"], task["input"]))) for task in tasks]
answers = [task["output"] for task in tasks]

tokenizer, model = load_tokenizer(str(model_folder)), load_policy(str(model_folder)).eval()
asked = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts[::3]]
sampled = []
for at in range(0, len(asked), BATCH):
    ids = asked[at : at + BATCH]
    sampled += decode_responses(tokenizer, rollout(model, tokenizer, ids, max_new_tokens=MAX_NEW_TOKENS))
    print(len(sampled), "answers sampled", flush=True)

splits: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
sft: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    split = "train" if i % 8 else "eval"
    other = answers[(i + 8) % len(answers)]
    sft[split].append({"prompt": prompt, "completion": answer})
    for rejected in (other, *([] if i % 3 else [sampled[i // 3].strip()])):
        if rejected not in ("", answer):
            record = {"prompt": prompt, "chosen": answer, "rejected": rejected, "criterion": "helpful"}
            splits[split].append(record)
for split, records in splits.items():
    with gzip.open(hh / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records += [json.loads(line) | {"criterion": "harmless"} for line in lines]
    rng.shuffle(records)
    for name, kept in (("comparisons", records), ("tasks", sft[split])):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        (output / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8")
