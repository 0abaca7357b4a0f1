"""`arc-ds import`: turns a released encoder into the ARC exchange format, and writes a recipe to fine-tune it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from arc_ds.config.validate import DECODER_NAME
from arc_ds.errors import WeightsError
from arc_ds.inference.load import ARC_DECODERS
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights import read_backbone_config
from arc_ds.model.weights.release import LLAMA_32_3B, open_release, write_release
from arc_ds.system.files import whole_folder
from arc_ds.system.user_paths import path_argument
from arc_ds.tokenizers import find_tokenizer, load_tokenizer

RECIPE = "finetune.yaml"
# Decoders of the public encoders, by a word in the name of the downloaded folder, in the order of the ports.
_KNOWN = {"multi": ("llama31_8b", "mistral_7b"), "llama": ("llama31_8b",), "mistral": ("mistral_7b",)}
_RECIPE_HEAD = """\
# Fine-tunes an imported encoder on questions about compressed documents, with the paper's settings.
# ENCODER: folder with params.json and tokenizer.model of the encoder's backbone (its weights are not needed);
# MODELS: folder of the decoders; SHARDS: folder of shards (arc-ds shards build --kind fine_tuning); RUNS: folder for
# runs. Pooling: the paper fine-tunes to pooling.factors=[4] or [8]. To train one decoder only, set train: false for the
# others. 64 sequences per step: 8 per GPU on 8 GPUs.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds import`."""
    parser = subparsers.add_parser(
        "import",
        description="Turns the downloaded folder of a public ARC-Encoder (one model.safetensors) into an ARC "
        "checkpoint that ArcModel and encoder.init_from read. Checks every name and shape first. Needs no GPU.",
    )
    parser.add_argument("source", type=path_argument, help="the downloaded folder, or the model.safetensors in it")
    parser.add_argument("out", type=path_argument, help="folder to write; must not exist")
    parser.add_argument(
        "--encoder-backbone",
        type=path_argument,
        help="folder with config.json or params.json of the encoder's backbone, and its tokenizer (default: the sizes "
        "of Llama 3.2 3B, and no tokenizer)",
    )
    parser.add_argument(
        "--decoder",
        action="append",
        default=[],
        help="name of a decoder; once for each, in the order of the bridges (default: from the folder's name)",
    )
    parser.add_argument("--pooling-factor", type=int, default=8, help="factor of its training (default: 8)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 on success."""
    if args.out.exists():
        raise WeightsError(f"{args.out} exists already. Choose another folder.")
    backbone = LLAMA_32_3B
    if args.encoder_backbone is not None:
        backbone = read_backbone_config(args.encoder_backbone, "none")
    if args.pooling_factor < 1:
        raise WeightsError(f"--pooling-factor is {args.pooling_factor}; expected 1 or more, such as 8")
    release = open_release(args.source, backbone, pooling_factor=args.pooling_factor)
    names = decoder_names(release.store.path.parent, len(release.spec.decoder_sizes), args.decoder)
    tokenizers = [find_tokenizer(path) for path in (release.store.path.parent, args.encoder_backbone) if path]
    tokenizer = next((found for found in tokenizers if found is not None), None)
    with whole_folder(args.out.absolute()) as folder:
        write_release(release, folder)
        (folder / ARC_DECODERS).write_text(json.dumps(_decoders(release.spec, names), indent=2) + "\n")
        (folder / RECIPE).write_text(recipe(release.spec, names, args.out.absolute()), encoding="utf-8")
        if tokenizer is not None:
            load_tokenizer(tokenizer).save(folder)
    tokenizer_note = "" if tokenizer else " It has no tokenizer: pass the backbone's folder as encoder_backbone."
    print(
        f"{args.source} -> {args.out}: {release.spec.num_layers} layers, for {', '.join(names)}. Recipe: "
        f"{args.out / RECIPE}.{tokenizer_note}"
    )
    return 0


def decoder_names(folder: Path, num: int, given: Sequence[str]) -> list[str]:
    """Names of a release's decoders: as given, or from the folder's name, or numbered.

    Raises WeightsError if another number of names is given, or if a config refuses one of them.
    """
    if given:
        if len(given) != num or len(set(given)) != num:
            raise WeightsError(
                f"--decoder was given {len(given)} times ({', '.join(given)}); {folder} serves {num} decoders. Give a "
                "different name for each, in the order of the bridges."
            )
        if wrong := [name for name in given if not DECODER_NAME.fullmatch(name)]:
            raise WeightsError(f"--decoder {wrong[0]!r}: expected letters, digits, '_', '-' and '.', as in configs")
        return list(given)
    name = folder.absolute().name.lower()
    known = next((names for word, names in _KNOWN.items() if word in name and len(names) == num), None)
    return list(known) if known else [f"decoder{n}" for n in range(num)]


def recipe(spec: CompressorSpec, names: Sequence[str], folder: Path) -> str:
    """A config that fine-tunes an imported encoder. Paths of models, data and runs are placeholders.

    names: of the decoders.
    folder: the imported encoder.
    """
    several = len(names) > 1
    pooling: dict[str, Any] = {
        "strategy": spec.strategy,
        "pooled_queries": spec.pooled_queries,
        "where": spec.where,
        "factors": [rule.value for rule in spec.rules if rule.kind in ("factor", "floor_factor")],
    }
    if spec.memory_tokens:
        pooling["memory_tokens"] = spec.memory_tokens
    elif not pooling["factors"]:
        pooling["num_groups"] = spec.rules[-1].value
    bridge = {"kind": spec.bridge, "hidden_size": spec.bridge_hidden_size, "shared": spec.bridge_shared}
    tree: dict[str, Any] = {
        "run_dir": "${RUNS:-runs}/finetune_" + re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name),
        "steps": 8000 if several else 4000,
        "precision": "bf16",
        "deepspeed": "ds_configs/zero3.json",
        "encoder": {
            "backbone": "${ENCODER}",
            "num_layers": spec.num_layers,
            "rope_scaling": "none",
            "causal": spec.causal,
            "init_from": str(folder),
        },
        "pooling": pooling,
        "markers": {marker: marker in spec.markers for marker in ("rec", "cont")},
        "bridge": bridge,
        "decoders": [{"name": n, "backbone": "${MODELS}/" + n, "rope_scaling": "none"} for n in names],
        "data": {
            "sources": [{"path": "${SHARDS}/train", "task": "few_shot", "in_context_examples": 5, "max_passages": 4}],
            "validation": [
                {"path": "${SHARDS}/validation", "task": "few_shot", "in_context_examples": 5, "max_passages": 4}
            ],
            "batch_size": 64,
            "max_documents_tokens": 2048,
        },
        "optimizer": {
            "encoder_lr": 2e-6,
            "markers_lr": 3e-5 if several else 2e-6,
            "bridge_lr": 3e-5,
            "warmup_steps": 50,
            "final_lr": 1e-8,
            "weight_decay": 0.05,
        },
        "validation": {"every": 500, "num_samples": 256},
        "tracking": {"experiment": "arc-finetune"},
    }
    return _RECIPE_HEAD + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _decoders(spec: CompressorSpec, names: Sequence[str]) -> dict[str, Any]:
    """The settings of training that the ARC format omits. The reference ignores rotary scaling."""
    sizes = zip(names, spec.decoder_sizes, strict=True)
    return {
        "decoders": [{"name": n, "rope_scaling": "none", "bos": True, "hidden_size": size} for n, size in sizes],
        "texts_apart": True,
    }
