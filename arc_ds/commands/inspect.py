"""`arc-ds inspect`: says what a folder or file of weights is and what it serves as."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from arc_ds.data.tasks.chat_template import find_template
from arc_ds.errors import ArcError, WeightsError
from arc_ds.inference.decoder_files import find_max_positions
from arc_ds.inference.load import EXPORT_CONFIG, EXPORT_FORMAT, ArcFolder, check_compressor, open_arc_folder
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.frozen_decoder import TransformersSizes
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.transformers_files import open_with_transformers
from arc_ds.model.weights import BackboneSource, beyond_layers, open_backbone, read_backbone_config
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.locate import WeightFiles, locate
from arc_ds.model.weights.names import backbone_shapes
from arc_ds.model.weights.release import LLAMA_32_3B, is_release, open_release, release_file
from arc_ds.model.weights.stores import SafetensorsStore
from arc_ds.system.user_paths import path_argument
from arc_ds.tokenizers import check_fits, find_tokenizer, load_tokenizer

EXIT_SERVES, EXIT_SERVES_NOTHING = 0, 2
_KINDS = {
    "hugging_face": "Hugging Face folder",
    "native": "folder of Meta, Mistral or OLMo with params.json",
    "gguf": "GGUF model",
}
_TOKENIZERS = {
    "JsonTokenizer": "Hugging Face tokenizers",
    "SentencePieceTokenizer": "sentencepiece",
    "RankTokenizer": "tiktoken or Tekken",
}
_ENCODER, _DECODER, _THROUGH_TRANSFORMERS = "encoder backbone", "decoder", "decoder through transformers"
_RELEASE = "release to import with arc-ds import"

Facts = dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        description="Says what weights are and whether they serve as encoder backbone, as decoder or as compressor. "
        "Reads headers and small files only. The exit code is 0 if they serve as one of these, and 2 otherwise.",
    )
    parser.add_argument("path", type=path_argument, help="a folder of weights, an export, or a file")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--encoder-backbone",
        type=path_argument,
        help="sizes and tokenizer of the reference's checkpoints and releases",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    facts = inspect_path(args.path, args.encoder_backbone)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else describe(facts))
    return EXIT_SERVES if any(reason is None for reason in facts["serves_as"].values()) else EXIT_SERVES_NOTHING


def inspect_path(path: Path, encoder_backbone: Path | None = None) -> Facts:
    """The facts about weights, as plain values for JSON. It reads headers and small files only.

    Key `serves_as` maps each use to None, or to the reason against it. Other keys are absent if they are unknown.

    path: a folder or file.
    encoder_backbone: see `open_arc_folder`.
    """
    if _is_export(path) or (path / "embedder").is_dir():
        return _facts_of_compressor(path, encoder_backbone)
    if (path / "trainer.json").is_file() or (path / "checkpoints").is_dir():
        reason = f"It holds the state of a training. Export it: arc-ds export {path} OUT"
        return {"path": str(path), "kind": "run of ARC-DS", "serves_as": {"compressor": reason}}
    damage = None
    try:
        if is_release(path):
            return _facts_of_release(path, encoder_backbone)
    except WeightsError as error:
        damage = str(error)
    facts = _facts_of_backbone(path)
    if damage is not None and facts["kind"] is None:  # it may have been a release
        facts["serves_as"] = dict.fromkeys(facts["serves_as"], damage)
    return facts


def describe(facts: Facts) -> str:
    """The facts as lines of text."""
    return "\n".join(_lines(facts))


def _facts_of_backbone(path: Path) -> Facts:
    facts: Facts = {"path": str(path), "kind": None}
    try:
        found = locate(path)
    except WeightsError as error:
        return {**facts, "serves_as": dict.fromkeys((_ENCODER, _DECODER, _THROUGH_TRANSFORMERS), str(error))}
    facts |= {"kind": _KINDS[found.kind], **_facts_of_files(found.files, path)}
    source, reasons = _open_both(found)
    config = source.config if source is not None else _try(read_backbone_config, path)
    sizes, reasons[_THROUGH_TRANSFORMERS] = _open_with_transformers(found)
    if source is not None:
        names = {source.tensor_names.find(name)[0] for name in source.shapes}
        facts["formats"] = dict(Counter(source.store.formats[name] for name in names if name in source.store.formats))
    if config is not None:
        facts |= {
            "family": config.family,
            "config": dataclasses.asdict(config),
            "parameters": sum(map(math.prod, backbone_shapes(config).values())),
        }
    elif sizes is not None:
        facts |= {"family": sizes.model_type, "parameters": sizes.num_parameters}
    rows = config or sizes
    facts |= _facts_of_tokenizer(path, None if rows is None else rows.vocab_size)
    facts["max_positions"] = _try(find_max_positions, path)
    problem = facts["tokenizer"].get("problem")
    return {**facts, "serves_as": {use: reason or problem for use, reason in reasons.items()}}


def _open_both(found: WeightFiles) -> tuple[BackboneSource | None, dict[str, str | None]]:
    """The opened weights, and the reason against each native use. A decoder needs a head, an encoder does not."""
    try:
        return open_backbone(found.path), {_ENCODER: None, _DECODER: None}
    except WeightsError as error:
        reason = str(error)
    try:
        num_layers = read_backbone_config(found.path).num_layers
        source = open_backbone(found.path, is_unused=beyond_layers(num_layers))
        return source, {_ENCODER: None, _DECODER: reason}
    except WeightsError as error:
        return None, {_ENCODER: str(error), _DECODER: reason}


def _open_with_transformers(found: WeightFiles) -> tuple[TransformersSizes | None, str | None]:
    """The sizes of a decoder that transformers can read, and the reason if it cannot."""
    try:
        opened = open_with_transformers(found.path)
        for file in found.files if found.kind == "hugging_face" else ():
            SafetensorsStore(file)  # raises if the file is cut short or quantised
        return opened.sizes, None
    except WeightsError as error:
        return None, str(error)


def _facts_of_files(files: tuple[Path, ...], path: Path) -> Facts:
    """Names and sizes of files in or at a path. A link to a deleted file has no bytes: its reader reports it."""
    folder = path if path.is_dir() else path.parent
    sizes = [
        {"name": str(file.relative_to(folder)), "bytes": file.stat().st_size if file.is_file() else 0} for file in files
    ]
    return {"files": sizes, "bytes": sum(file["bytes"] for file in sizes)}


def _facts_of_tokenizer(path: Path, vocab_size: int | None) -> Facts:
    """Facts about the tokenizer next to weights, and its chat template.

    vocab_size: number of rows of the embedding, None if it is unknown.
    """
    facts: Facts = {"path": None}
    try:
        found = find_tokenizer(path)
        if found is not None:
            tokenizer = load_tokenizer(found)
            facts = {
                "path": str(found),
                "kind": _TOKENIZERS[type(tokenizer).__name__],
                "vocab_size": tokenizer.vocab_size,
            }
            if vocab_size is not None:
                check_fits(tokenizer, vocab_size, str(path))
    except ArcError as error:
        facts["problem"] = str(error)
    return {"tokenizer": facts, "chat_template": _try(find_template, path) is not None}


def _is_export(path: Path) -> bool:
    config = path / EXPORT_CONFIG
    return config.is_file() and (_try(Fields.read, config) or Fields({}, "")).get("format") == EXPORT_FORMAT


def _facts_of_compressor(path: Path, encoder_backbone: Path | None) -> Facts:
    facts: Facts = {
        "path": str(path),
        "kind": "export of ARC-DS" if _is_export(path) else "ARC checkpoint",
        **_facts_of_files(tuple(sorted(path.rglob("*.safetensors"))), path),
    }
    try:
        folder = open_arc_folder(path, encoder_backbone)
        check_compressor(folder.spec, folder.tensors)
    except ArcError as error:
        return {**facts, "serves_as": {"compressor": str(error)}}
    facts["parameters"] = sum(map(math.prod, folder.tensors.shapes.values()))
    facts |= {**_facts_of_spec(folder.spec), **_facts_of_training(path, folder)}
    facts |= _facts_of_tokenizer(folder.tokenizer or path, folder.spec.backbone.vocab_size)
    return {**facts, "serves_as": {"compressor": facts["tokenizer"].get("problem")}}


def _facts_of_training(path: Path, folder: ArcFolder) -> Facts:
    """The facts that the folder of a compressor records about its training."""
    decoders = [
        {
            "name": settings.name,
            "hidden_size": size,
            "rope_scaling": settings.rope_scaling,
            "bos": settings.bos,
            "chat_template": settings.chat_template,
        }
        for size, settings in zip(folder.spec.decoder_sizes, folder.decoders, strict=True)
    ]
    step = Fields.read(path / EXPORT_CONFIG).get("step") if _is_export(path) else None
    return {"decoders": decoders, "step": step, "max_context_tokens": folder.max_context_tokens}


def _facts_of_spec(spec: CompressorSpec) -> Facts:
    return {
        "encoder": {
            "family": spec.backbone.family,
            "num_layers": spec.num_layers,
            "hidden_size": spec.backbone.hidden_size,
            "causal": spec.causal,
        },
        "pooling": {
            "strategy": spec.strategy,
            "rules": [f"{rule.kind} {rule.value}" for rule in spec.rules],
            "memory_tokens": spec.memory_tokens,
            "where": spec.where,
            "pooled_queries": spec.pooled_queries,
        },
        "markers": list(spec.markers),
        "bridge": {"kind": spec.bridge, "hidden_size": spec.bridge_hidden_size},
    }


def _facts_of_release(path: Path, encoder_backbone: Path | None) -> Facts:
    """Facts about a released encoder of the reference. Its tensors do not say how it pools."""
    store = SafetensorsStore(release_file(path))
    facts: Facts = {
        "path": str(path),
        "kind": "released ARC-Encoder of the reference",
        **_facts_of_files((store.path,), path),
        "formats": dict(Counter(store.formats.values())),
        "parameters": sum(map(math.prod, store.shapes.values())),
    }
    try:
        backbone = LLAMA_32_3B if encoder_backbone is None else read_backbone_config(encoder_backbone, "none")
        spec = open_release(path, backbone).spec
    except WeightsError as error:
        return {**facts, "serves_as": {_RELEASE: str(error)}}
    facts |= {**_facts_of_spec(spec), "decoders": [{"hidden_size": size} for size in spec.decoder_sizes]}
    del facts["pooling"]
    return {**facts, "serves_as": {_RELEASE: None}}


def _try(read: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a reader; None if it raises an ArcError."""
    try:
        return read(*arguments)
    except ArcError:
        return None


def _lines(facts: Facts) -> Iterator[str]:
    """The lines of `describe`."""
    yield f"{facts['path']}: {facts['kind'] or 'no weights'}"
    for name, write in _WRITERS.items():
        if facts.get(name) is not None:
            yield f"  {name.replace('_', ' '):<20}{write(facts[name])}"
    uses_by_reason: dict[str, list[str]] = {}
    for use, reason in facts["serves_as"].items():
        if reason is not None:
            uses_by_reason.setdefault(reason, []).append(use)
        else:  # loading tests a model of transformers: whether it is causal, for example
            yield f"  {use}: yes{', if it passes the tests of loading' if use == _THROUGH_TRANSFORMERS else ''}"
    for reason, uses in uses_by_reason.items():
        yield f"  {', '.join(uses)}: no. {reason}"


def _write_files(files: list[Facts]) -> str:
    names = ", ".join(file["name"] for file in files[:3])
    return f"{len(files)} ({names}{', ...' if len(files) > 3 else ''})" if files else "none"


def _write_config(config: Facts) -> str:
    """Sizes, and the constants that differ from Llama's."""
    sizes = (
        f"{config['num_layers']} layers, width {config['hidden_size']}, {config['num_heads']} heads "
        f"({config['num_kv_heads']} of keys) of {config['head_dim']}, feed-forward {config['ffn_size']}, "
        f"vocabulary {config['vocab_size']}"
    )
    defaults = {f.name: f.default for f in dataclasses.fields(BackboneConfig) if f.default is not dataclasses.MISSING}
    others = {
        key: value
        for key, value in config.items()
        if key in defaults and value != defaults[key] and key not in ("rope_scaling", "window", "windowed_layers")
    }
    lines = [sizes, *(f"{key.replace('_', ' ')} {value}" for key, value in others.items())]
    scaling = config["rope_scaling"]
    rope = f"rotary base {config['rope_theta']:g}, " + (
        "no scaling" if scaling is None else f"{scaling['kind']} scaling by {scaling['factor']:g}"
    )
    window = config["window"]
    windows = "no window" if window is None else f"window {window} in {len(config['windowed_layers'])} layers"
    return "; ".join([*lines, rope, windows])


def _write_tokenizer(tokenizer: Facts) -> str:
    if tokenizer["path"] is None:
        return tokenizer.get("problem", "none; name one with the key or option `tokenizer`")
    words = f"{tokenizer['kind']}, {tokenizer['vocab_size']} ids, {Path(tokenizer['path']).name}"
    return f"{words}; {tokenizer['problem']}" if "problem" in tokenizer else f"{words}; fits"


def _write_values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items() if value is not None)


# Facts in the order of the output, with the function that writes each.
_WRITERS: Mapping[str, Callable[[Any], str]] = {
    "files": _write_files,
    "bytes": lambda num_bytes: f"{num_bytes / 1e6:,.1f} MB",
    "formats": lambda formats: ", ".join(f"{name} ({count} tensors)" for name, count in formats.items()),
    "family": str,
    "parameters": lambda number: f"{number:,}",
    "config": _write_config,
    "encoder": _write_values,
    "pooling": _write_values,
    "markers": ", ".join,
    "bridge": _write_values,
    "decoders": lambda decoders: "; ".join(map(_write_values, decoders)),
    "step": str,
    "max_context_tokens": str,
    "tokenizer": _write_tokenizer,
    "chat_template": lambda has_one: "yes" if has_one else "no",
    "max_positions": str,
}
