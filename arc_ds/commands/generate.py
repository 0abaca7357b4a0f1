"""`arc-ds compress` and `arc-ds generate`: use an exported encoder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from arc_ds.batch.segments import MARKERS, Marker
from arc_ds.errors import DataError
from arc_ds.export.formats import DTYPES
from arc_ds.inference.arc import ArcModel
from arc_ds.inference.generate import MAX_NEW_TOKENS, Sampling, whole_number
from arc_ds.inference.tags import parse_prompt
from arc_ds.system.device import REQUESTS, select_device
from arc_ds.system.files import output, write_whole
from arc_ds.system.user_files import check_encodable, read_user_stdin, read_user_text
from arc_ds.system.user_paths import path_argument

NO_MARKER = "none"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds compress` and `arc-ds generate`."""
    compress = subparsers.add_parser(
        "compress",
        description="Writes each text's vectors as safetensors (context_0, context_1, ...). No decoder is loaded.",
    )
    _add_model(compress)
    compress.add_argument(
        "texts", type=path_argument, nargs="+", help="text files, one context each; - reads standard input"
    )
    compress.add_argument("--out", type=path_argument, required=True, help="safetensors file to write; must not exist")
    compress.set_defaults(run=run_compress)
    generate = subparsers.add_parser(
        "generate",
        description="Compresses the <context>...</context> parts of the prompt; the decoder reads the rest as text.",
    )
    _add_model(generate)
    generate.add_argument(
        "--decoder",
        type=path_argument,
        action="append",
        required=True,
        help="weights of each decoder, in the export's order",
    )
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="maximum number of new tokens (default 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--top-p", type=float, default=1.0, help="total probability of the tokens to sample from")
    generate.add_argument("--seed", type=int, default=0, help="seed for sampling (default 0)")
    generate.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="text or special token that ends the continuation, besides the ends that the decoder's files name; may be "
        "repeated",
    )
    generate.add_argument("--stop-id", type=int, action="append", default=[], help="the same for a token id")
    generate.set_defaults(run=run_generate)


def run_compress(args: argparse.Namespace) -> int:
    """Run `arc-ds compress`; return 0 on success."""
    from safetensors.torch import save

    if args.out.exists():
        raise DataError(f"{args.out} already exists: choose another file")
    texts = [_read(path) for path in args.texts]
    model = _load(args, [])
    vectors = model.compress(texts, decoder=args.decoder_idx, marker=_marker(args.marker, model))
    with output(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, save({f"context_{i}": v.clone() for i, v in enumerate(vectors)}))
    assert model.encoder_tokenizer is not None, "compress() of texts raises without one"
    tokens = model.encoder_tokenizer.encode_batch(texts)
    for path, ids, v in zip(args.texts, tokens, vectors, strict=True):
        limit = model.max_context_tokens
        note = f" (trained on at most {limit} tokens)" if limit is not None and len(ids) > limit else ""
        print(f"{path}: {len(ids)} tokens -> {v.shape[0]} vectors of {v.shape[1]}{note}")
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """Run `arc-ds generate`; return 0 on success."""
    prompt = _read_stdin() if args.prompt == "-" else _argument(args.prompt, "the prompt")
    # Report mistakes before loading models.
    parse_prompt(prompt)
    Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    whole_number("max_new_tokens", args.max_new_tokens, at_least=0, at_most=MAX_NEW_TOKENS)
    model = _load(args, args.decoder)
    (text,) = model.generate(
        [parse_prompt(prompt, _marker(args.marker, model))],
        decoder=args.decoder_idx,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=[_argument(text, "--stop") for text in args.stop],
        stop_ids=args.stop_id,
    )
    print(text)
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=path_argument, required=True, help="an export, or a checkpoint in the ARC format"
    )
    parser.add_argument("--decoder-idx", type=int, default=0, help="index of the decoder to use (default 0)")
    parser.add_argument(
        "--encoder-backbone", type=path_argument, help="sizes and tokenizer, for the reference's checkpoints"
    )
    parser.add_argument("--pooling-factor", type=int, help="use this factor instead of the trained one")
    parser.add_argument("--device", default="auto", choices=REQUESTS, help="default: a GPU if there is one")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="dtype of weights (default float32)")
    parser.add_argument(
        "--marker",
        choices=(*MARKERS, NO_MARKER),
        help="marker at the end of each context (default: cont if the model has it, else none)",
    )


def _marker(chosen: str | None, model: ArcModel) -> Marker | None:
    if chosen is None:
        return "cont" if "cont" in model.spec.markers else None
    return None if chosen == NO_MARKER else chosen  # type: ignore[return-value]  # argparse has checked it


def _load(args: argparse.Namespace, decoders: Sequence[Path]) -> ArcModel:
    return ArcModel.from_checkpoint(
        args.model,
        decoders=decoders,
        encoder_backbone=args.encoder_backbone,
        device=select_device(args.device),
        dtype=DTYPES[args.dtype],
        pooling_factor=args.pooling_factor,
    )


def _read(path: Path) -> str:
    if str(path) == "-":
        return _read_stdin()
    return _with_line_feeds(read_user_text(path, DataError, remedy="Give the path of a text file in UTF-8."))


def _argument(text: str, what: str) -> str:
    """An argument of the command line. In a locale without UTF-8, Python keeps its bytes as lone surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return check_encodable(text, what)


def _read_stdin() -> str:
    return _with_line_feeds(read_user_stdin(DataError))


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
