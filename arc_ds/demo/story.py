"""The steps of the demo, one function per chapter. It runs the same commands that a user would type."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.demo import inputs, picture
from arc_ds.demo.passage import score_passage
from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch.exit_codes import EXIT_PREEMPTED
from arc_ds.system.device import num_local_devices
from arc_ds.system.files import output
from arc_ds.system.locks import LOCK_FILE, writing
from arc_ds.tokenizers import Tokenizer
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics

RECIPE = Path("ds_configs") / "recipes" / "demo.yaml"
DEEPSPEED = Path("ds_configs") / "cpu.json"
EVALUATION = Path("ds_configs") / "eval" / "demo.yaml"
QUESTIONS = Path("ds_configs") / "eval" / "demo_questions.jsonl"
INTERRUPT_AT = 0.4  # share of the steps
PASSAGE_TOKENS = range(12, 25)
_ARC_DS = (sys.executable, "-m", "arc_ds.cli")


def tell(out: Path, *, config: Path | None, num_procs: int | None, fresh: bool, overrides: Sequence[str]) -> int:
    """Run the demo and return 0. Raises ArcError with the failed command if a chapter fails.

    A second call with the same folder continues the demo. It does not rebuild shards or repeat finished training.

    out: folder to write.
    config: another recipe than the demo's; None for the demo's.
    num_procs: number of processes; None for one per GPU, or one on the CPU.
    fresh: delete an earlier demo in `out` first.
    overrides: config overrides, as key.path=value.
    """
    with ExitStack() as lock:
        with output(out):  # not around the whole demo, which also prints
            lock.enter_context(writing(out, "demo", ConfigError, "Wait until it has ended, or choose another --out."))
        return _tell(out, config=config, num_procs=num_procs, fresh=fresh, overrides=overrides)


def _tell(out: Path, *, config: Path | None, num_procs: int | None, fresh: bool, overrides: Sequence[str]) -> int:
    started = time.monotonic()
    recipe = config or _beside_package(RECIPE)
    if fresh:
        _empty(out)
    # The configs refer to these variables. Commands inherit them.
    os.environ |= {"MODELS": str(inputs.model_file().parent), "SHARDS": str(out / "shards"), "DEMO": str(out)}
    _say(f"1. Shards: State of the Union speeches; those since {inputs.FIRST_HELD_OUT_YEAR} are held out")
    _build_shards(out)
    _say("2. Training with the deepspeed launcher, interrupted once on purpose")
    run_dir = out / "run"
    overrides = [f"run_dir={run_dir}", f"deepspeed={_beside_package(DEEPSPEED)}", *overrides]
    run_config = load_config(recipe, overrides)
    command = ["train", str(recipe), *overrides, f"--num-procs={num_procs or _num_procs(run_config)}"]
    interrupted_at = _train(run_dir, command, interrupt_step=max(1, int(INTERRUPT_AT * run_config.steps)))
    _say("3. Export")
    export = out / "export"
    if not export.exists():
        _run(["export", str(run_dir), str(export)])
    _say("4. A held-out passage, compressed and read by the decoder")
    _use(export)
    image = out / "demo.png"
    with output(image):
        picture.draw(run_dir / METRICS_NAME, image, title="ARC-Encoder for SmolLM2-135M", interrupted_at=interrupted_at)
    _say("5. Questions on passages that it has never seen, against other ways to give the passage to the decoder")
    _evaluate(run_dir, out)
    _close(run_dir, image, export, minutes=(time.monotonic() - started) / 60)
    return 0


def _build_shards(out: Path) -> None:
    training, held_out = inputs.speeches()
    for name, files in (("train", training), ("validation", held_out)):
        target = out / "shards" / name
        if (target / "manifest.json").is_file():
            print(f"   {target} already exists")
            continue
        options = ["--out", str(target), "--tokenizer", str(inputs.model_file()), "--max-tokens", "192"]
        _run(["shards", "build", *map(str, files), *options])


def _train(run_dir: Path, command: list[str], *, interrupt_step: int) -> int | None:
    """Train to the end; return the step of the interruption (None if the run was not interrupted)."""
    note = run_dir / "interrupted_at"
    metrics = run_dir / METRICS_NAME
    if not metrics.exists():
        process = subprocess.Popen([*_ARC_DS, *command])
        step = _wait_for_step(metrics, process, interrupt_step)
        if step is not None:
            print(f"   step {step}: sending SIGTERM, as a cluster's scheduler would", flush=True)
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code == EXIT_PREEMPTED:
            with output(note):
                note.write_text(f"{_last_step(metrics)}\n", encoding="utf-8")
            print("   saved and stopped; running the same command again:", flush=True)
        elif code != 0:
            raise ArcError(f"training ended with code {code}: arc-ds {' '.join(command)}")
    _run(command)
    return int(note.read_text(encoding="utf-8")) if note.exists() else None


def _wait_for_step(metrics: Path, process: subprocess.Popen[bytes], step: int) -> int | None:
    """Wait until the run reaches `step` and return its current step; None if it ended before."""
    while process.poll() is None:
        reached = _last_step(metrics)
        if reached >= step:
            return reached
        time.sleep(0.5)
    return None


def _last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    steps = [entry.step for entry in read_metrics(metrics) if "train/loss" in entry.metrics]
    return max(steps, default=0)


def _use(export: Path) -> None:
    """Show a short passage of the newest speech: its NLL with its vectors, and the decoder's repetition of it."""
    from arc_ds.inference.arc import ArcModel, Context

    model = ArcModel.from_checkpoint(export, decoders=[inputs.model_file()])
    assert model.encoder_tokenizer is not None, "an export carries its tokenizer"
    passage, other = _short_passages(model.encoder_tokenizer)
    scored = score_passage(model, passage, other)
    (vectors,) = model.compress([passage], marker="rec")
    (repeated,) = model.generate([[Context(passage, "rec")]], max_new_tokens=len(scored.tokens))
    print(f"   The passage, {len(scored.tokens)} tokens, as {vectors.shape[0]} vectors (one is the marker):")
    print(f"      {passage}")
    print("   NLL of the passage in nats per token, if the decoder is given")
    for name, nll in scored.nll.items():
        print(f"      {name:18}{float(nll.mean()):6.2f}")
    learned, shown = sum(scored.learned), scored.line(colour=sys.stdout.isatty())
    print(f"   {learned} of its tokens are likely only with the vectors (marked):")
    print(f"      {shown}")
    print("   Greedy repetition from the vectors alone (after few steps, words and names but no whole sentences):")
    print(f"      {' '.join(repeated.split()) or '(nothing but line breaks)'}")


def _evaluate(run_dir: Path, out: Path) -> None:
    """Evaluate the export, and write the reports of the evaluation and of the run."""
    questions = f"tasks.0.path={_beside_package(QUESTIONS)}"
    _run(["eval", "run", str(_beside_package(EVALUATION)), questions])
    _run(["eval", "report", str(out / "eval"), "--out", str(out / "report"), "--metric", "f1"])
    _run(["compare", str(run_dir), "--out", str(out / "comparison")])


def _short_passages(tokenizer: Tokenizer) -> list[str]:
    """Two sentences from the second half of the newest speech, no longer than the recipe's training contexts."""
    text = inputs.speeches()[1][-1].read_text(encoding="utf-8")
    sentences = [" ".join(sentence.split()) + "." for sentence in text[len(text) // 2 :].split(". ")[1:]]
    fitting = [sentence for sentence in sentences if len(tokenizer.encode(sentence)) in PASSAGE_TOKENS]
    return fitting[:2]


def _close(run_dir: Path, image: Path, export: Path, *, minutes: float) -> None:
    rows = [entry.metrics for entry in read_metrics(run_dir / METRICS_NAME)]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    speed = [row["speed/encoder_tokens_per_s"] for row in rows if "speed/encoder_tokens_per_s" in row]
    memory = max(row["memory/peak_gib"] for row in rows if "memory/peak_gib" in row)
    last = [row for row in rows if any(name.endswith("gap_closed") for name in row)][-1]
    _say("Results")
    print(
        f"   {len(losses)} steps: the loss went from {losses[0]:.2f} to {losses[-1]:.2f} nats per token, at "
        f"{sum(speed) / len(speed):,.0f} encoder tokens/s with a peak memory of {memory:.1f} GiB."
    )
    print("   Held-out speeches: NLL of the text in nats per token, if the decoder is given")
    print(f"   {'':32}{'nothing':>9}{'another':>9}{'compressed':>12}{'full text':>11}{'gap closed':>12}")
    for name in sorted(name for name in last if name.endswith("/gap_closed")):
        prefix = name.rsplit("/", 1)[0]
        values = [last[f"{prefix}/nll_{kind}"] for kind in ("closed", "mismatched", "compressed", "open")]
        label = "/".join(prefix.split("/")[1:])
        print(f"   {label:32}{values[0]:>9.3f}{values[1]:>9.3f}{values[2]:>12.3f}{values[3]:>11.3f}{last[name]:>12.3f}")
    print("   Gap closed: 0 if the compressed text is useless, 1 if it is as good as the full text.")
    print(f"   Picture: {image}   Weights: {export}   Minutes: {minutes:.1f}")
    pages = " and ".join(str(run_dir.parent / page) for page in ("report/report.html", "comparison/comparison.html"))
    print(f"   Pages for a browser: {pages}")
    print(f"   The run in MLflow: arc-ds ui {shlex.quote(str(run_dir.parent))}")


def _run(command: list[str]) -> None:
    code = subprocess.run([*_ARC_DS, *command], check=False).returncode
    if code != 0:
        raise ArcError(f"a command of the demo ended with code {code}: arc-ds {' '.join(command[:3])} ...")


def _beside_package(name: Path) -> Path:
    """Path of a file in the repository that contains this package."""
    path = Path(__file__).resolve().parents[2] / name
    if not path.is_file():
        raise ConfigError(f"{name} not found next to the package: run the demo from a clone of the repository")
    return path


def _num_procs(config: RunConfig) -> int:
    """The largest number of processes that divides the recipe's batch, at most one per GPU; one on the CPU."""
    batch = config.data.batch_size // config.micro_batches
    return max(n for n in range(1, num_local_devices(config.device) + 1) if batch % n == 0)


def _empty(out: Path) -> None:
    """Delete an earlier demo. Raises ConfigError if the folder does not look like one."""
    content = [path for path in out.iterdir() if path.name != LOCK_FILE]
    if content and not (out / "shards").is_dir():
        raise ConfigError(f"{out} does not look like a demo folder, so it is not deleted: choose another --out")
    for path in content:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)
