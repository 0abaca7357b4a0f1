"""`arc-ds generate`: a decoder continues a prompt, or the prompts and questions of a JSONL file."""

from __future__ import annotations

import argparse
from typing import Any

from arc_ds.commands.generate_lines import generate_lines
from arc_ds.commands.model_options import add_chat_template, add_decoders, add_model, chosen_marker, load_model
from arc_ds.commands.text_inputs import STDIN, add_on_error, read_text
from arc_ds.errors import ConfigError
from arc_ds.inference.generate import MAX_NEW_TOKENS, Sampling, whole_number
from arc_ds.inference.tags import parse_prompt
from arc_ds.system.user_files import check_encodable
from arc_ds.system.user_paths import path_argument


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds generate`."""
    generate = subparsers.add_parser(
        "generate",
        description="Compresses the <context>...</context> parts of the prompt; the decoder reads the rest as text. "
        "With --input and --output it reads JSONL: {'id'?, 'prompt'}, or {'id'?, 'question', 'documents', "
        "'instruction'?} in the format of training. The same command continues after a stop.",
    )
    add_model(generate)
    add_decoders(generate, required=True)
    generate.add_argument("prompt", nargs="?", help="the prompt; - reads it from standard input")
    generate.add_argument(
        "--input", type=path_argument, help="JSONL file of prompts or questions, in place of a prompt"
    )
    generate.add_argument(
        "--output", type=path_argument, help="JSONL file to append {'id', 'text', 'input_digest'} to, in their order"
    )
    generate.add_argument("--batch-size", type=int, default=8, help="prompts of a file at once (default %(default)s)")
    add_chat_template(generate, unknown="none")
    add_on_error(generate)
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


def run_generate(args: argparse.Namespace) -> int:
    """Run `arc-ds generate`; return 0 on success."""
    if (args.prompt is None) == (args.input is None):
        raise ConfigError("give either a prompt, or --input and --output. See arc-ds generate --help.")
    if (args.input is None) != (args.output is None):
        raise ConfigError("--input and --output belong together: give both, or a prompt.")
    # Report mistakes before loading models.
    Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    whole_number("max_new_tokens", args.max_new_tokens, at_least=0, at_most=MAX_NEW_TOKENS)
    options: dict[str, Any] = {
        "decoder": args.decoder_idx,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": [_argument(text, "--stop") for text in args.stop],
        "stop_ids": args.stop_id,
    }
    if args.input is not None:
        return generate_lines(args, options)
    prompt = read_text(STDIN) if args.prompt == "-" else _argument(args.prompt, "the prompt")
    parse_prompt(prompt)
    model = load_model(args, args.decoder)
    (text,) = model.generate([parse_prompt(prompt, chosen_marker(args.marker, model))], **options)
    print(text)
    return 0


def _argument(text: str, what: str) -> str:
    """An argument of the command line. In a locale without UTF-8, Python keeps its bytes as lone surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return check_encodable(text, what)
