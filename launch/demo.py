"""`make demo`: the user's four commands one after the other with preset tiny, then runs/demo/report.json.

Fewer steps and texts than the preset's own, smaller clips and four blocks instead of six, so that all of it takes minutes on 2 CPU
cores; docs/tiny.md has the trials. Each command is a process of its own, exactly as typed by hand; its time includes start-up and
compilation.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rise_jax.workdir import set_aside

OUT = Path("runs/demo")


def decayed(steps: int) -> list[str]:
    """Flags of a run of `steps` whose learning rate falls from the middle on: a short run needs its end at a low rate."""
    return [
        f"--config.{name}"
        for name in (f"run.steps={steps}", f"optim.decay_from={steps // 2}", f"optim.decay_until={steps}")
    ]


PROMPTS = "||".join(
    (
        "a red circle moving left",
        "the digit 3 in blue going up",
        "un cuadrado verde hacia la derecha",
        "un triangle jaune va vers le bas",
        "ein violetter Kreis bewegt sich nach oben",
        "a small yellow square moving right and a small blue triangle moving left, white background",
    )
)
# Clips of few pixels stop being readable at less noise than the preset's own: a smaller shift, and fewer samples at its ends.
MODEL = [
    "--config.model.dit.depth=4",
    "--config.model.dit.text_len=36",  # what rephrasings need; encode would need more
    "--config.model.shift=4",
    "--config.optim.time_mean=0.3",
    "--config.optim.time_std=1.3",
]
SIZE = ["--config.data.height=16", "--config.data.width=16"]
STAGE1 = MODEL + SIZE + decayed(300) + ["--config.data.texts=96"]
STAGE2 = (
    MODEL
    + SIZE
    + decayed(1100)
    + [
        "--config.data.frames=5",
        "--config.optim.learning_rate=1.3e-3",
        "--config.data.texts=300",
        f"--config.run.init_from={OUT / 'stage1'}",
    ]
)
GENERATE = ["--mode=generate", f"--config.sample.prompts={PROMPTS}"]
EVALUATE = ["--mode=evaluate", "--config.sample.steps=10", "--config.sample.count=64"]
SCORED = ("colour", "direction", "shape", "all")


def main() -> None:
    set_aside(OUT)
    seconds = {
        "stage1": run("stage1", "stage1", STAGE1),
        "stage2": run("stage2", "stage2", STAGE2),
        "generate": run("stage2", "stage2", GENERATE),
        "evaluate": run("stage2", "stage2", EVALUATE),
    }
    evaluation = json.loads((OUT / "stage2" / "evaluation.json").read_text())
    summary = json.loads((OUT / "stage2" / "summary.json").read_text())
    report = {
        "attribute_accuracy": {name: evaluation["attribute_accuracy"][name] for name in SCORED},
        "shuffled": {name: evaluation["shuffled"][name] for name in SCORED},
        "prompts": evaluation["prompts"],
        "seconds": seconds,
        "params_sha256": summary["params_sha256"],
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


def run(config: str, workdir: str, extra: list[str]) -> float:
    """Runs one command of main.py and returns its seconds; stops the demo when it fails."""
    command = ["main.py", f"--config=configs/{config}.py", f"--workdir={OUT / workdir}", *extra]
    print(f"\n$ python {' '.join(word if ' ' not in word else repr(word) for word in command)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(f"the command above failed with exit code {code}; {OUT} keeps what it wrote")
    return round(time.perf_counter() - began, 1)


def print_report(report: dict) -> None:
    shares = ", ".join(
        f"{name} {share:.2f} (shuffled {report['shuffled'][name]:.2f})"
        for name, share in report["attribute_accuracy"].items()
    )
    print(f"\nVideos: {OUT / 'stage2' / 'samples'} (contact_sheet.png shows them all)")
    print(f"Measured on {report['prompts']} held-out prompts: {shares}")
    print(f"Seconds: {sum(report['seconds'].values()):.0f} in all. Report: {OUT / 'report.json'}")


if __name__ == "__main__":
    main()
