"""Time, bytes and memory of loading a backbone into ZeRO-3 partitions, on CPU ranks of this machine.

    python tools/bench_load.py --folder SCRATCH [--gb 1.5] [--ranks 2] [--repeats 3] [--cold] [--out ROWS.csv]

The benchmark writes a random checkpoint in bfloat16 with Llama's names to SCRATCH and loads it in two ways:

- "own rows": as a run does. Each rank reads the rows of its own partitions.
- "broadcast": rank 0 reads each tensor and sends it to all ranks, which keep their partitions. DeepSpeed's
  `zero.Init` also sends the parameters' initial values.

`bench_load.csv` holds rows of this program.

Each repeat has new processes. Times are those of the slowest rank, and of the fastest repeat. Memory is the highest
resident set size of a rank above that before loading. It includes pages of memory-mapped files. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_rows import append, memory_bytes, origin, reset_peak_memory
from safetensors.torch import save_file
from torch import Tensor

METHODS = ("own rows", "broadcast")
_VERSIONS = ("torch", "deepspeed", "safetensors")
_DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement.

    cache: "cold" if the file was dropped from the page cache before each repeat.
    build_s: seconds to build the partitioned module.
    load_s: seconds to fill it.
    read_gb: bytes of tensors that one rank read, at most.
    above_base_mib: peak memory of a rank minus its memory before building.
    largest_mib: size of the largest tensor.
    load: load average of the machine at the end.
    """

    method: str
    ranks: int
    checkpoint_gb: float
    cache: str
    build_s: float
    load_s: float
    mb_per_s: float
    read_gb: float
    above_base_mib: float
    largest_mib: float
    repeats: int
    load: float
    machine: str
    date: str
    commit: str
    versions: str
    command: str


class Outcome(NamedTuple):
    """Measurement of one rank."""

    build_s: float
    load_s: float
    read_bytes: int
    above_base_bytes: int


class Counting:
    """Forwards reads to another source and counts their bytes."""

    def __init__(self, source: Any) -> None:
        self.source, self.path, self.shapes, self.num_bytes = source, source.path, source.shapes, 0

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        tensor: Tensor = self.source.tensor(name, rows)
        self.num_bytes += tensor.nbytes
        return tensor


def main() -> int:
    """Run the benchmark; return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--gb", type=float, default=1.5, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each repeat")
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    args = parser.parse_args()
    file = write_checkpoint(args.folder, args.gb, args.hidden)
    rows = []
    for method in METHODS:
        rows.append(measure(method, file, args))
        print(shown(rows[-1]), flush=True)
    if args.out:
        append(args.out, rows)
    return 0


def write_checkpoint(folder: Path, gb: float, hidden: int) -> Path:
    """Write a random backbone of about `gb` gigabytes with heads of 64; returns its tensor file."""
    ffn, vocab = 4 * hidden, 16 * hidden
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    bytes_per_layer = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    num_layers = max(1, round((gb * 1e9 - 2 * vocab * hidden) / bytes_per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for idx in range(num_layers):
        shapes |= {f"model.layers.{idx}.{name}": shape for name, shape in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{n}.weight": torch.empty(s, dtype=torch.bfloat16) for n, s in shapes.items()}
    for tensor in tensors.values():
        tensor.view(torch.int16).random_(0, 1 << 14, generator=generator)  # finite in bfloat16
    save_file(tensors, file)
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return file


def measure(method: str, file: Path, args: argparse.Namespace) -> Row:
    """Measure one row: the fastest of several repeats."""
    repeats = []
    for _ in range(args.repeats):
        if args.cold:
            with file.open("rb") as held:
                os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        repeats.append(run(method, file.parent, args.ranks))
    best = min(repeats, key=lambda ranks: max(each.build_s + each.load_s for each in ranks))
    num_bytes = file.stat().st_size
    load_s = max(each.load_s for each in best)
    hidden, cold = args.hidden, " --cold" if args.cold else ""
    return Row(
        method=method,
        ranks=args.ranks,
        checkpoint_gb=round(num_bytes / 1e9, 3),
        cache="cold" if args.cold else "warm",
        build_s=round(max(each.build_s for each in best), 2),
        load_s=round(load_s, 2),
        mb_per_s=round(num_bytes / load_s / 1e6),
        read_gb=round(max(each.read_bytes for each in best) / 1e9, 3),
        above_base_mib=round(max(each.above_base_bytes for ranks in repeats for each in ranks) / _MIB),
        largest_mib=round(16 * hidden * hidden * 2 / _MIB, 1),
        repeats=args.repeats,
        load=round(os.getloadavg()[0], 2),
        **origin(_VERSIONS),
        command=f"python tools/bench_load.py --folder SCRATCH --gb {args.gb} --hidden {hidden} --ranks {args.ranks} "
        f"--repeats {args.repeats}{cold}",
    )


def run(method: str, folder: Path, num_ranks: int) -> list[Outcome]:
    """Load once in new processes; the outcome of each rank."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    places = [(rank, num_ranks, port, method, folder, queue) for rank in range(num_ranks)]
    processes = [context.Process(target=load, args=place, daemon=True) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()  # an outcome is small enough for the queue's pipe
    if any(process.exitcode for process in processes):
        raise RuntimeError("a rank failed; its error is above")
    return [Outcome(*queue.get()) for _ in processes]


def load(rank: int, num_ranks: int, port: int, method: str, folder: Path, queue: Any) -> None:
    """One rank: join the others, build a partitioned decoder, fill it, and report."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    from arc_ds.model.decoder import Decoder
    from arc_ds.model.weights import load_backbone, open_backbone, set_parameter
    from arc_ds.system import dist
    from arc_ds.training.engine import partitioned

    dist.init_distributed(torch.device("cpu"))
    import deepspeed

    source = Counting(open_backbone(folder))
    dist.barrier()
    reset_peak_memory()
    base, begin = memory_bytes("VmHWM"), time.monotonic()
    within = partitioned if method == "own rows" else deepspeed.zero.Init
    with within(_DS_CONFIG) if method == "own rows" else within(config_dict_or_path=_DS_CONFIG):
        decoder = Decoder(source.source.config)
    dist.barrier()
    built = time.monotonic()
    if method == "own rows":
        load_backbone(decoder, source)
    else:
        for name, parameter in decoder.named_parameters():
            tensor = (
                source.tensor(name) if rank == 0 else torch.empty(1, dtype=torch.bfloat16).expand(parameter.ds_shape)
            )
            set_parameter(decoder, name, tensor)
    dist.barrier()
    outcome = Outcome(built - begin, time.monotonic() - built, source.num_bytes, memory_bytes("VmHWM") - base)
    queue.put(tuple(outcome))
    dist.close_distributed()


def shown(row: Row) -> str:
    """A row as readable text."""
    return (
        f"{row.method}, {row.ranks} ranks, {row.checkpoint_gb} GB, {row.cache}: built in {row.build_s} s, loaded in "
        f"{row.load_s} s ({row.mb_per_s} MB/s), {row.read_gb} GB read per rank, peak memory "
        f"{row.above_base_mib} MiB above base"
    )


if __name__ == "__main__":
    sys.exit(main())
