"""What the demo shows at its end: a table in the terminal and `report.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.demo.answers import CRITERIA, Verdict
from fastrl.demo.world import Task
from fastrl.run.report import Html, bar_chart, line_chart, marked, page, paragraph, preformatted, save_page, table
from fastrl.run.runfiles import metric_curves, phases, read_run

if TYPE_CHECKING:
    from fastrl.demo.stages import Judged

SHARES = (*CRITERIA, "good")
SAMPLES_PER_KIND = 2
BACKENDS = (
    "The backend that each op runs on, as fastrl doctor tells. The demo trains whole models, so it calls all but the "
    "LoRA ops."
)


def text(results: dict[str, Any]) -> str:
    """The final table, for the terminal."""
    lines = [f"\n{'answers to held-out prompts':30}{'SFT':>8}{'PPO':>8}{'change':>10}"]
    for name in SHARES:
        before, after = results["SFT"][name], results["PPO"][name]
        label = "good (all three)" if name == "good" else name
        lines.append(f"  {label:28}{before:>8.1%}{after:>8.1%}{100 * (after - before):>+8.1f} pt")
    lines += [
        f"\nreward model, held-out pairs in the right order   {results['reward_accuracy']:.1%}",
        *(f"  those ranked by {name:32}{share:.1%}" for name, share in results["reward_accuracies"].items()),
        f"KL of PPO to SFT, nats per answer                 {results['kl']:.2f}",
        f"time                                              {sum(results['seconds'].values()):.0f} s",
    ]
    if results["quick"]:
        lines.append("\n--quick trains far too little to learn anything: these figures say nothing about quality.")
    return "\n".join(lines)


def save(
    output: Path, results: dict[str, Any], held_out: Sequence[Task], judged: dict[str, Judged], backends: str
) -> Path:
    """Write `report.html` from the results and the loops' metrics.jsonl files; returns its path."""
    gain = 100 * (results["PPO"]["good"] - results["SFT"]["good"])
    lead = (
        f"{results['SFT']['good']:.0%} of the SFT model's answers to held-out prompts are good, "
        f"{results['PPO']['good']:.0%} after PPO ({gain:+.0f} points), at a KL of {results['kl']:.2f} nats per answer. "
        f"Seed {results['seed']}, {sum(results['seconds'].values()):.0f} s on this machine."
    )
    if results["quick"]:
        lead = "Quick run: far too short to learn anything, the figures say nothing about quality. " + lead
    sections = [
        ("Good answers", _shares(results, held_out, judged)),
        ("Before and after", _samples(held_out, judged)),
        ("Learning curves", _curves(output)),
        ("Time", _times(output, results)),
        ("Backends", [paragraph(BACKENDS), preformatted(backends)]),
    ]
    return save_page(output / "report.html", page("fastrl demo", lead, sections))


def _shares(results: dict[str, Any], held_out: Sequence[Task], judged: dict[str, Judged]) -> list[Html]:
    chart = bar_chart(
        f"Share of {len(held_out)} sampled answers",
        SHARES,
        {name: [results[name][share] for share in SHARES] for name in judged},
        percent=True,
    )
    by_criterion = ", ".join(f"{name} {share:.1%}" for name, share in results["reward_accuracies"].items())
    kinds = sorted({_kind(task) for task in held_out})
    rows = []
    for kind in kinds:
        chosen = [index for index, task in enumerate(held_out) if _kind(task) == kind]
        shares = [sum(one.verdicts[i].good for i in chosen) / len(chosen) for one in judged.values()]
        rows.append([kind, len(chosen), *(f"{share:.0%}" for share in shares)])
    return [
        paragraph(
            "A program checked every answer: helpful (does what was asked, in the style asked for), honest (what it "
            "states is true, or it says that it does not know), harmless (declines an unsafe request and only that, "
            "and is not rude). Good is all three. The checker was not the reward: PPO saw only the reward model, and "
            "the reward model saw only rankings, some by all criteria, some by one. It has a score for each."
        ),
        chart,
        table(["kind of prompt", "prompts", *judged], rows, numbers=(1, 2, 3)),
        paragraph(
            f"The reward model puts {results['reward_accuracy']:.1%} of the pairs of held-out rankings in the "
            f"labeller's order ({by_criterion}). KL of PPO to SFT, the mean of log p_PPO - log p_SFT over "
            f"sampled answers: {results['kl']:.2f} nats per answer."
        ),
    ]


def _samples(held_out: Sequence[Task], judged: dict[str, Judged]) -> list[Html]:
    rows: list[list[object]] = []
    for kind in sorted({_kind(task) for task in held_out}):
        chosen = [index for index, task in enumerate(held_out) if _kind(task) == kind]
        for index in chosen[:SAMPLES_PER_KIND]:
            answers = [marked(one.answers[index], one.verdicts[index].good) for one in judged.values()]
            faults = [_faults(one.verdicts[index]) for one in judged.values()]
            cells = [Html(answer + fault) for answer, fault in zip(answers, faults, strict=True)]
            rows.append([held_out[index].prompt, *cells])
    return [
        paragraph(f"Sampled, not chosen: the first {SAMPLES_PER_KIND} held-out prompts of each kind."),
        table(["prompt", *judged], rows),
    ]


def _curves(output: Path) -> list[Html]:
    pretrain, sft, reward, ppo = (
        metric_curves(read_run(output / name).of_kind("train")) for name in ("pretrained", "sft", "reward", "ppo")
    )
    by_criterion = {name: ppo[f"score/{name}"] for name in CRITERIA if f"score/{name}" in ppo}
    return [
        line_chart("Pre-training: loss", "step", {"loss": pretrain["loss"]}),
        line_chart("SFT: loss", "step", {"loss": sft["loss"]}),
        line_chart("Reward model: pairs in order", "step", {"accuracy": reward["accuracy"]}, percent=True),
        line_chart("PPO: scores, and their weighted sum", "iteration", {"sum": ppo["score"], **by_criterion}),
        line_chart("PPO: KL to SFT, nats per answer", "iteration", {"KL": ppo["kl_k1"]}),
        line_chart(
            "PPO: entropy and critic",
            "iteration",
            {"entropy, nats per token": ppo["entropy"], "explained variance": ppo["explained_variance"]},
        ),
        line_chart("PPO: tokens per answer", "iteration", {"tokens": ppo["response_tokens"]}),
    ]


def _times(output: Path, results: dict[str, Any]) -> list[Html]:
    stages = results["seconds"]
    total = sum(stages.values())
    seconds = phases(read_run(output / "ppo"))
    rows = [[stage, f"{time:.1f}", f"{time / total:.0%}"] for stage, time in [*stages.items(), ("all", total)]]
    return [
        table(["stage", "seconds", "share"], rows, numbers=(1, 2)),
        bar_chart("PPO: seconds per phase", list(seconds), {"seconds": list(seconds.values())}),
    ]


def _kind(task: Task) -> str:
    if task.question.unsafe:
        return f"{task.kind}, unsafe"
    return task.kind if task.question.truth is not None else f"{task.kind}, not known"


def _faults(verdict: Verdict) -> Html:
    names = ", ".join(f"not {name}" for name in CRITERIA if not getattr(verdict, name))
    return Html(f"<br><small>{names}</small>" if names else "")
