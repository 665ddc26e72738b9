"""`fastrl <command>`: every command lives in a module of its own, imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

# command: (module, config class or "" if the module's main takes the arguments itself, summary)
COMMANDS = {
    "demo": ("fastrl.demo.run", "", "train and judge a small model end to end; no download, no GPU"),
    "sft": ("fastrl.train.sft", "SFTConfig", "supervised fine-tuning on instruction data"),
    "reward": ("fastrl.train.reward", "RewardConfig", "train a reward model on preferences"),
    "ppo": ("fastrl.train.ppo", "PPOConfig", "PPO against a reward model"),
    "run": ("fastrl.commands.pipeline", "", "SFT, reward model and PPO one after the other, from one file"),
    "report": ("fastrl.commands.report", "", "report.html of a run, or of several compared"),
    "bench": ("fastrl.commands.bench", "", "time the kernels on this machine"),
    "conformance": ("fastrl.commands.conformance", "", "try what is known to break in RLHF code on fastrl, TRL, ..."),
    "doctor": ("fastrl.commands.doctor", "", "what is installed, and which backend every op would use"),
    "chat": ("fastrl.commands.chat", "", "talk to a model"),
    "export": ("fastrl.commands.export", "", "merge an adapter into its base, write an ordinary folder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 after an error that the user can mend, 1 after any other,
    130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command in ("-V", "--version"):
        from fastrl import __version__

        print(f"fastrl {__version__}")
        return 0
    try:
        run(command, arguments[1:])
        if _several():
            from fastrl.run.distributed import leave

            leave()
    except KeyboardInterrupt as stop:
        if not _is_told(stop):
            print(f"fastrl: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "status", 130)
    except Exception as error:
        if os.environ.get("FASTRL_DEBUG"):
            raise
        if not _is_told(error):
            print(f"fastrl: error: {_message(command, error)}", file=sys.stderr)
        return 2 if _is_users(error) else 1
    return 0


def run(command: str, arguments: list[str]) -> None:
    """Import the command's module and call its main."""
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command '{command}'; {hint}")
    module_name, config_name, summary = COMMANDS[command]
    module = importlib.import_module(module_name)
    if not config_name:
        module.main(arguments)
        return
    from fastrl.run.config import parse

    description = module.__doc__ or summary
    module.main(parse(getattr(module, config_name), arguments, prog=f"fastrl {command}", description=description))


def usage() -> str:
    """The text of `fastrl --help`."""
    width = max(map(len, COMMANDS))
    loops = " and ".join(", ".join(name for name, (_, config, _) in COMMANDS.items() if config).rsplit(", ", 1))
    lines = [f"  {name:{width}}  {summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastrl COMMAND [options]",
            "",
            "RLHF kernels for PyTorch, and the loops that run on them.",
            "",
            "commands:",
            *lines,
            "",
            "`fastrl COMMAND --help` lists the options of a command, `fastrl --version` prints the version.",
            f"{loops} read a YAML file (--config), and any key of it from the command line.",
            "FASTRL_DEBUG=1 shows where in the code an error came from.",
        ]
    )


def _is_told(error: BaseException) -> bool:
    """Whether another of several processes says it already."""
    if not _several():
        return False
    from fastrl.run.distributed import is_told

    return is_told(error)


def _several() -> bool:
    """Whether a launcher started other processes beside this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_users(error: Exception) -> bool:
    """Whether the user can mend it: what fastrl raises on purpose, and a device that is too small."""
    ours = type(error).__module__.startswith("fastrl") or type(error).__name__ == "OutOfMemoryError"
    return ours or isinstance(error, (ValueError, OSError, ImportError))


def _message(command: str, error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"'fastrl {command}' needs a module that is not installed: {error.name}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.splitlines()[0]}; lower micro_batch_size or max_length, or set gradient_checkpointing"
    if _is_users(error):
        return text
    return (
        f"unforeseen {type(error).__name__}: {' '.join(text.split())}; this is a fault of fastrl: run again with"
        " FASTRL_DEBUG=1 for the traceback, and please report both in the project's issue tracker"
    )


if __name__ == "__main__":
    sys.exit(main())
