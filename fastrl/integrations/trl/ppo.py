"""From the arguments of TRL's PPO (trl.experimental.ppo.PPOConfig of 1.12, the last with it) to those of fastrl's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fastrl.integrations.trl.ppo_fields import CHANGED, COMPUTED, DEFAULTS, DROPPED, SAME
from fastrl.run.config import checked, nearest
from fastrl.run.optim import SCHEDULES
from fastrl.run.trackers import TRACKERS
from fastrl.train.ppo import PPOConfig

NO_STOP_TOKEN = (
    "without one TRL scores all response_length tokens, whatever follows the end of the answer; fastrl stops at eos and"
    " at the end of a turn"
)


class Migration(NamedTuple):
    """`config`, ready for `fastrl.train.ppo.main`, and what of TRL's arguments it does not carry over as it is: field
    -> how its meaning `changed`, field -> why it was `dropped` and what to use in its place."""

    config: PPOConfig
    changed: dict[str, str]
    dropped: dict[str, str]

    def __str__(self) -> str:
        """The report, a line a field."""
        lines = []
        for title, part in (("with another meaning", self.changed), ("without a counterpart", self.dropped)):
            lines += [f"{title}:", *(f"  {name}: {what}" for name, what in part.items())] if part else []
        return "\n".join(lines)


def ppo_config(arguments: Any, **settings: Any) -> Migration:
    """fastrl's PPO configuration for arguments of TRL's PPO; `docs/from_trl_ppo.md` has the table, field by field.

        migration = ppo_config(trl_arguments, data="prompts.jsonl")
        print(migration)
        fastrl.train.ppo.main(migration.config)

    Args:
        arguments: TRL's `PPOConfig`, or a mapping of arguments as its example scripts take them (those of PPOConfig,
            ScriptArguments and ModelConfig). What is not given has TRL's default, so that without `use_peft` all
            weights are trained.
        settings: fastrl's own settings, which come before what follows from the arguments; `data`, the prompts, unless
            `dataset_name` is among the arguments.
    Raises:
        ValueError: an argument is none of TRL's, `data` is missing, or a value is out of fastrl's bounds.
    """
    given = _given(arguments)
    args = DEFAULTS | given
    changed = {name: CHANGED[name] for name, value in given.items() if name in CHANGED and not _is_off(value)}
    carried = DEFAULTS.keys() - DROPPED.keys() | COMPUTED
    dropped = {name: _reason(name) for name, value in given.items() if name not in carried and not _is_off(value)}
    found: dict[str, Any] = {ours: args[theirs] for theirs, ours in SAME.items()}
    found |= _batches(args, changed) | _length(args, dropped)
    found |= _schedule(args, found.get("iterations"), changed, dropped)
    found |= _tuner(args, changed, dropped) | _precision(args, changed, dropped) | _run(args, given, dropped)
    if args["stop_token"] is None and args["stop_token_id"] is None:
        changed["stop_token"] = NO_STOP_TOKEN
    found |= settings
    if "data" not in found:
        raise ValueError("ppo_config: data: expected dataset_name among the arguments, or data=..., got neither")
    return Migration(checked(PPOConfig(**found)), changed, dropped)


def _given(arguments: Any) -> dict[str, Any]:
    """{name: value} of a mapping, of a configuration what differs from its defaults."""
    if isinstance(arguments, Mapping):
        known = {field.name for field in fields(TrainingArguments)} | DEFAULTS.keys() | COMPUTED | DROPPED.keys()
        for name in arguments:
            if name not in known:
                raise ValueError(f"ppo_config: {name!r} is no argument of TRL's PPO{nearest(name, sorted(known))}")
        return dict(arguments)
    if not (is_dataclass(arguments) and hasattr(arguments, "num_ppo_epochs")):
        raise ValueError(f"ppo_config: expected TRL's PPOConfig or a mapping, got {type(arguments).__name__}")
    values = {field.name: (getattr(arguments, field.name), _default(field)) for field in fields(arguments)}
    return {name: value for name, (value, default) in values.items() if value != default and (value or default)}


def _default(field: Any) -> Any:
    """What TRL's documentation calls the default; some are filled in when a configuration is made."""
    made = {
        "bf16": True,
        "report_to": [],
        "disable_tqdm": False,
        "output_dir": "trainer_output",
        "activation_checkpointing": True,
        "accelerator_config": AcceleratorConfig(),
    }
    if field.name in made:
        return made[field.name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def _reason(name: str) -> str:
    return DROPPED.get(name, "nothing of the kind in fastrl's PPO")


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", "no", [])


def _batches(args: Mapping[str, Any], changed: dict[str, str]) -> dict[str, Any]:
    """Sizes in responses, over all processes. TRL's optimizer steps after `gradient_accumulation_steps` passes, whether
    or not a minibatch ends there."""
    size, steps, parts = (
        args[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    )
    batch = size * steps * (args.get("world_size") or 1)
    passes = parts * math.ceil(steps / parts)  # over a batch
    minibatch = batch * steps // passes
    if minibatch != batch // parts:
        changed["num_mini_batches"] = (
            f"with gradient_accumulation_steps {steps} TRL's {parts} of them are {passes / steps:g} optimizer steps an"
            f" epoch, as minibatch_size {minibatch} gives; for {parts} steps set minibatch_size={batch // parts}"
        )
    return {"batch_size": batch, "minibatch_size": minibatch, "micro_batch_size": min(size, minibatch)}


def _length(args: Mapping[str, Any], dropped: dict[str, str]) -> dict[str, Any]:
    batch = _batches(args, {})["batch_size"]
    samples = args["num_sample_generations"]
    if args["total_episodes"] is None:
        epochs = f"ceil({args['num_train_epochs']} * prompts / {batch})"
        dropped["num_train_epochs"] = f"how many prompts there are is not known here; set iterations={epochs}"
        return {} if samples else {"eval_every": 0}
    iterations = math.ceil(args["total_episodes"] / batch)
    return {"iterations": iterations, "eval_every": max(1, iterations // samples) if samples else 0}


def _schedule(
    args: Mapping[str, Any], iterations: int | None, changed: dict[str, str], dropped: dict[str, str]
) -> dict[str, Any]:
    changed["max_grad_norm"] = CHANGED["max_grad_norm"]
    found = {"critic_learning_rate": args["learning_rate"], "max_grad_norm": 0.0}
    schedule = getattr(args["lr_scheduler_type"], "value", args["lr_scheduler_type"])
    if schedule in SCHEDULES:
        found["schedule"] = schedule
    else:
        dropped["lr_scheduler_type"] = f"{schedule}: expected one of {', '.join(SCHEDULES)}; linear is used"
    warmup = args["warmup_steps"] or 0
    if 0 < warmup < 1 and iterations is None:
        dropped["warmup_steps"] = f"set it to {warmup} of the iterations, which are not known here"
        warmup = 0
    return found | {"warmup_steps": math.ceil(warmup * (iterations or 0)) if warmup < 1 else int(warmup)}


def _tuner(args: Mapping[str, Any], changed: dict[str, str], dropped: dict[str, str]) -> dict[str, Any]:
    if not args["use_peft"]:
        return {"tuner": "full"}
    changed["use_peft"] = "TRL trains its critic in full beside a policy with adapters; fastrl's has adapters, too"
    if args["lora_dropout"]:
        dropped["lora_dropout"] = "PPO's passes run without dropout, so that ratios start at 1"
    targets = args["lora_target_modules"]
    if targets is None:
        changed["lora_target_modules"] = "PEFT's default are some layers of the family; fastrl's are all linear ones"
    found = {"tuner": "lora", "lora_rank": args["lora_r"], "lora_alpha": args["lora_alpha"]}
    return found | (
        {} if targets is None else {"lora_targets": targets if isinstance(targets, str) else ",".join(targets)}
    )


def _precision(args: Mapping[str, Any], changed: dict[str, str], dropped: dict[str, str]) -> dict[str, Any]:
    """TRL's bf16 is autocast on float32 weights."""
    if args["dtype"] in ("auto", "float16"):
        dropped["dtype"] = f"{args['dtype']}: expected float32 or bfloat16"
    half = args["dtype"] == "bfloat16" or (args["bf16"] is not False and not args["fp16"])
    if half:
        changed["bf16"] = CHANGED["bf16"]
    return {"dtype": "bfloat16" if half else "float32"}


def _run(args: Mapping[str, Any], given: Mapping[str, Any], dropped: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"device": "cpu"} if args["use_cpu"] else {}
    report_to = [args["report_to"]] if isinstance(args["report_to"], str) else args["report_to"] or []
    trackers = [name for name in report_to if name in TRACKERS]
    if trackers:
        found["tracker"] = ",".join(trackers)
    if others := [name for name in report_to if name not in (*TRACKERS, "none")]:
        dropped["report_to"] = f"{', '.join(others)}: expected some of {', '.join(TRACKERS)}"
    resume = args["resume_from_checkpoint"]
    if resume in (True, "True", "true"):
        found["resume"] = True
    elif resume:
        dropped["resume_from_checkpoint"] = "checkpoints are another format; resume goes on from fastrl's own"
    if args["dataset_name"]:
        found["data"] = f"{args['dataset_name']}:{args['dataset_train_split']}"
        if "dataset_test_split" in given:
            found["eval_data"] = f"{args['dataset_name']}:{args['dataset_test_split']}"
    return found
