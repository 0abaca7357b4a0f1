"""The steps of the demo, one function per chapter. It runs the same commands that a user would type."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.demo import inputs, picture
from arc_ds.demo.passage import read_passage
from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch.exit_codes import EXIT_PREEMPTED
from arc_ds.system.device import num_local_devices
from arc_ds.tokenizers import Tokenizer
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics

RECIPE = Path("ds_configs") / "recipes" / "demo.yaml"
DEEPSPEED = Path("ds_configs") / "cpu.json"
INTERRUPT_AT = 0.4  # share of the steps
PASSAGE_TOKENS = range(12, 25)


def tell(out: Path, *, config: Path | None, num_procs: int | None, fresh: bool, overrides: Sequence[str]) -> int:
    """Run the demo and return 0. Raises ArcError with the failed command if a chapter fails.

    A second call with the same folder continues the demo. It does not rebuild shards or repeat finished training.

    out: folder to write.
    config: another recipe than the demo's; None for the demo's.
    num_procs: number of processes; None for one per GPU, or one on the CPU.
    fresh: delete an earlier demo in `out` first.
    overrides: config overrides, as key.path=value.
    """
    started = time.monotonic()
    recipe = config or _beside_package(RECIPE)
    if fresh and out.exists():
        _delete(out)
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MODELS": str(inputs.model_file().parent), "SHARDS": str(out / "shards")}
    _say(f"1. Shards: State of the Union speeches; those since {inputs.FIRST_HELD_OUT_YEAR} are held out")
    _build_shards(out, environment)
    _say("2. Training with the deepspeed launcher, interrupted once on purpose")
    run_dir = out / "run"
    options = [str(recipe), f"run_dir={run_dir}", f"deepspeed={_beside_package(DEEPSPEED)}", *overrides]
    options.append(f"--num-procs={num_procs or _num_procs(options, environment)}")
    interrupted_at = _train(run_dir, options, environment)
    _say("3. Export")
    export = out / "export"
    if not export.exists():
        _command(["export", str(run_dir), str(export)], environment)
    _say("4. A held-out passage, compressed and read by the decoder")
    _use(export)
    image = out / "demo.png"
    picture.draw(run_dir / METRICS_NAME, image, title="ARC-Encoder for SmolLM2-135M", interrupted_at=interrupted_at)
    _close(run_dir, image, export, minutes=(time.monotonic() - started) / 60)
    return 0


def _build_shards(out: Path, environment: dict[str, str]) -> None:
    training, held_out = inputs.speeches()
    for name, files in (("train", training), ("validation", held_out)):
        target = out / "shards" / name
        if (target / "manifest.json").is_file():
            print(f"   {target} already exists")
            continue
        texts = [str(path) for path in files]
        _command(
            ["shards", "build", *texts, "--out", str(target), "--tokenizer", str(inputs.model_file())]
            + ["--max-tokens", "192"],
            environment,
        )


def _train(run_dir: Path, options: list[str], environment: dict[str, str]) -> int | None:
    """Train to the end; return the step of the interruption (None if the run was not interrupted)."""
    note = run_dir / "interrupted_at"
    metrics = run_dir / METRICS_NAME
    command = [sys.executable, "-m", "arc_ds.cli", "train", *options]
    if not metrics.exists():
        process = subprocess.Popen(command, env=environment)
        step = _wait_for_step(metrics, process, _interrupt_step(options, environment))
        if step is not None:
            print(f"   step {step}: sending SIGTERM, as a cluster's scheduler would", flush=True)
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code == EXIT_PREEMPTED:
            note.write_text(f"{_last_step(metrics)}\n", encoding="utf-8")
            print("   saved and stopped; running the same command again:", flush=True)
        elif code != 0:
            raise ArcError(f"training ended with code {code}: {' '.join(command)}")
    _run(command, environment)
    return int(note.read_text(encoding="utf-8")) if note.exists() else None


def _interrupt_step(options: list[str], environment: dict[str, str]) -> int:
    return max(1, int(INTERRUPT_AT * _config(options, environment).steps))


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


def _rows(metrics: Path) -> list[dict[str, float]]:
    return [{"step": entry.step, **entry.metrics} for entry in read_metrics(metrics)]


def _use(export: Path) -> None:
    """Show a short passage of the newest speech: its NLL with its vectors, and the decoder's repetition of it."""
    from arc_ds.inference.arc import ArcModel, Context

    model = ArcModel.from_checkpoint(export, decoders=[inputs.model_file()])
    assert model.encoder_tokenizer is not None, "an export carries its tokenizer"
    passage, other = _short_passages(model.encoder_tokenizer)
    reading = read_passage(model, passage, other)
    (vectors,) = model.compress([passage], marker="rec")
    (repeated,) = model.generate([[Context(passage, "rec")]], max_new_tokens=len(reading.tokens))
    print(f"   The passage, {len(reading.tokens)} tokens, as {vectors.shape[0]} vectors (one is the marker):")
    print(f"      {passage}")
    print("   NLL of the passage in nats per token, if the decoder is given")
    for name, nll in reading.nll.items():
        print(f"      {name:18}{float(nll.mean()):6.2f}")
    learned, shown = sum(reading.learned), reading.line(colour=sys.stdout.isatty())
    print(f"   {learned} of its tokens are likely only with the vectors (marked):")
    print(f"      {shown}")
    print("   Greedy repetition from the vectors alone (after few steps, words and names but no whole sentences):")
    print(f"      {_line(repeated)}")


def _short_passages(tokenizer: Tokenizer) -> list[str]:
    """Two sentences from the second half of the newest speech, no longer than the recipe's training contexts."""
    text = inputs.speeches()[1][-1].read_text(encoding="utf-8")
    sentences = [" ".join(sentence.split()) + "." for sentence in text[len(text) // 2 :].split(". ")[1:]]
    fitting = [sentence for sentence in sentences if len(tokenizer.encode(sentence)) in PASSAGE_TOKENS]
    return fitting[:2]


def _line(text: str) -> str:
    """Join generated text into one line."""
    return " ".join(text.split()) or "(nothing but line breaks)"


def _close(run_dir: Path, image: Path, export: Path, *, minutes: float) -> None:
    rows = _rows(run_dir / METRICS_NAME)
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
    print(f"   The run in MLflow: mlflow ui --backend-store-uri sqlite:///{(run_dir / 'mlflow.db').resolve()}")


def _command(arguments: list[str], environment: dict[str, str]) -> None:
    _run([sys.executable, "-m", "arc_ds.cli", *arguments], environment)


def _run(command: list[str], environment: dict[str, str]) -> None:
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise ArcError(f"a command of the demo ended with code {code}: {' '.join(command[:6])} ...")


def _beside_package(name: Path) -> Path:
    """Path of a file in the repository that contains this package."""
    path = Path(__file__).resolve().parents[2] / name
    if not path.is_file():
        raise ConfigError(f"{name} not found next to the package: run the demo from a clone of the repository")
    return path


def _num_procs(options: list[str], environment: dict[str, str]) -> int:
    """The largest number of processes that divides the recipe's batch, at most one per GPU; one on the CPU."""
    config = _config(options, environment)
    batch = config.data.batch_size // config.micro_batches
    return max(n for n in range(1, num_local_devices(config.device) + 1) if batch % n == 0)


def _config(options: list[str], environment: dict[str, str]) -> RunConfig:
    """Load the run's config with the environment variables that its recipe refers to."""
    os.environ.update({name: environment[name] for name in ("MODELS", "SHARDS")})
    return load_config(options[0], [option for option in options[1:] if not option.startswith("--")])


def _delete(out: Path) -> None:
    """Delete an earlier demo. Raises ConfigError if the folder does not look like one."""
    if not (out / "shards").is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} does not look like a demo folder, so it is not deleted: choose another --out")
    shutil.rmtree(out)


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)
