"""`arc-ds compress` and `arc-ds generate`: an exported encoder at work."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from arc_ds.errors import DataError
from arc_ds.model.arc import ArcModel, Context

CONTEXT_TAG = re.compile(r"<context>(.*?)</context>", re.DOTALL)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to the command line's parser."""
    compress = subparsers.add_parser(
        "compress", help="compress texts into vectors", description="Writes each text's vectors as safetensors."
    )
    _add_model(compress)
    compress.add_argument("texts", type=Path, nargs="+", help="text files, one context each; - reads standard input")
    compress.add_argument("--out", type=Path, required=True, help="safetensors file to write; must not exist")
    compress.set_defaults(run=run_compress)
    generate = subparsers.add_parser(
        "generate",
        help="let a decoder continue a prompt with compressed contexts",
        description="The prompt's <context>...</context> parts are read compressed, the rest as text.",
    )
    _add_model(generate)
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=run_generate)


def parse_prompt(text: str) -> list[str | Context]:
    """A prompt's parts: `<context>…</context>` becomes a `Context`, all else stays text; empty text is left out."""
    parts = CONTEXT_TAG.split(text)  # text, context, text, context, …, text
    return [Context(part) if idx % 2 else part for idx, part in enumerate(parts) if part]


def run_compress(args: argparse.Namespace) -> int:
    """Runs `arc-ds compress`; 0 on success."""
    from safetensors.torch import save_file

    if args.out.exists():
        raise DataError(f"{args.out} exists already: choose another file")
    model = _load(args)
    texts = [_read(path) for path in args.texts]
    vectors = model.compress(texts, decoder=args.decoder_idx)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"context_{i}": v.contiguous() for i, v in enumerate(vectors)}, args.out)
    for path, text, v in zip(args.texts, texts, vectors, strict=True):
        tokens = len(model.encoder_tokenizer.encode(text)) if model.encoder_tokenizer else 0
        print(f"{path}: {tokens} tokens -> {v.shape[0]} vectors of {v.shape[1]}")
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """Runs `arc-ds generate`; 0 on success."""
    model = _load(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    (text,) = model.generate(
        [parse_prompt(prompt)],
        decoder=args.decoder_idx,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    print(text)
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="an export, or a checkpoint in the ARC format")
    parser.add_argument(
        "--decoder", type=Path, action="append", required=True, help="weights of each decoder, in the export's order"
    )
    parser.add_argument("--decoder-idx", type=int, default=0, help="which of them to use (default 0)")
    parser.add_argument("--encoder-backbone", type=Path, help="sizes and tokenizer, for the reference's checkpoints")
    parser.add_argument("--pooling-factor", type=int, help="another factor than the trained one")


def _load(args: argparse.Namespace) -> ArcModel:
    return ArcModel.from_checkpoint(
        args.model,
        decoders=args.decoder,
        encoder_backbone=args.encoder_backbone,
        pooling_factor=args.pooling_factor,
    )


def _read(path: Path) -> str:
    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
