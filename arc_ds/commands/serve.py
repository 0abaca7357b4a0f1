"""`arc-ds serve`: an OpenAI-compatible server that reads documents in compressed form."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from pathlib import Path

from arc_ds.commands.model_options import (
    add_chat_template,
    add_decoders,
    add_model,
    chosen_marker,
    chosen_template,
    load_model,
)
from arc_ds.data.tasks.chat import PLAIN, Layout, read_layout
from arc_ds.errors import ConfigError, TokenizerError
from arc_ds.inference.arc import ArcModel
from arc_ds.serving.settings import GIB, MIB, Settings, UpstreamSettings
from arc_ds.system.user_paths import path_argument
from arc_ds.tokenizers import check_fits

_KEY, _UPSTREAM_KEY = "ARC_API_KEY", "ARC_UPSTREAM_API_KEY"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds serve`."""
    parser = subparsers.add_parser(
        "serve",
        description="Serves OpenAI's API. Documents of a request are compressed, and the decoder reads their vectors: "
        "a decoder in this process (--decoder), or one that vLLM runs (--upstream).",
    )
    add = parser.add_argument
    add_model(parser)
    add_decoders(parser, required=False, note="; with --upstream only the embedding table is read")
    add("--upstream", metavar="URL", help="a vLLM server that runs the decoder (--enable-prompt-embeds)")
    add("--upstream-model", metavar="NAME", help="the decoder's name there")
    add("--upstream-timeout", type=_number(0.001), default=60.0, help="seconds without a word from it (default 60)")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this host only)")
    add("--port", type=_number(0), default=8000, help="port to listen on (default 8000; 0 takes a free one)")
    add("--api-key", help=f"key that requests must carry (default: the variable {_KEY}, if it is set)")
    add("--name", help="name of the model in requests (default: the name of the folder of --model)")
    add_chat_template(parser, unknown="the decoder's own, if it has one,")
    add("--cache-gib", type=_number(0.0), default=1.0, help="memory for vectors of documents (default 1)")
    add("--cache-dir", type=path_argument, help="folder for vectors of documents (default: memory only)")
    add("--cache-dir-gib", type=_number(0.0), default=10.0, help="size of that folder (default 10)")
    add("--max-documents", type=_number(1), default=64, help="documents in a request (default 64)")
    add("--max-document-tokens", type=_number(1), default=8192, help="tokens of a document (default 8192)")
    add("--max-request-tokens", type=_number(1), default=65536, help="tokens of all its documents (default 65536)")
    add("--max-prompt-rows", type=_number(1), default=32768, help="tokens and vectors of prompt and answer (32768)")
    add("--max-tokens", type=_number(1), default=4096, help="new tokens of an answer (default 4096)")
    add("--max-body-mib", type=_number(0.001), default=16.0, help="size of a request (default 16)")
    add("--prompt-embeds", action="store_true", help="take the decoder's rows as prompt_embeds, as vLLM does")
    add("--timeout", type=_number(0.001), default=300.0, help="seconds for a request (default 300)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 after a signal has stopped it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from arc_ds.serving.server import Server, listen
    from arc_ds.serving.service import Service

    settings, upstream = _settings(args), _upstream(args)
    with listen(args.host, args.port) as opened:  # first: loading takes minutes
        model = load_model(args, args.decoder, "all" if upstream is None else "embedding")
        layout = _check(model, args)
        service = Service(model, args.decoder_idx, layout, chosen_marker(args.marker, model), settings, upstream)
        host, port = opened.getsockname()[:2]
        logging.info(f"chats are written {'in the template of the decoder' if layout.is_chat else 'as plain text'}")
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        Server(service, lambda: print(f"serving {settings.name} at {url}", flush=True)).run(sockets=[opened])
    return 0


def _number(at_least: float):  # type: ignore[no-untyped-def]
    """A parser of numbers of the type of `at_least`, and at least as large."""

    def parse(text: str) -> float:
        number = type(at_least)(text)
        if not at_least <= number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {at_least}")
        return number

    parse.__name__ = "number"  # argparse names it in its errors
    return parse


def _settings(args: argparse.Namespace) -> Settings:
    key = _key(args.api_key or os.environ.get(_KEY), f"--api-key or {_KEY}")
    if key is None and not _is_loopback(args.host):
        logging.warning(f"{args.host} is open to other hosts, and no key is required. Set --api-key or {_KEY}.")
    return Settings(
        name=args.name or args.model.resolve().name,
        api_key=key,
        body_bytes=int(args.max_body_mib * MIB),
        documents=args.max_documents,
        document_tokens=args.max_document_tokens,
        request_tokens=args.max_request_tokens,
        prompt_rows=args.max_prompt_rows,
        max_tokens=args.max_tokens,
        default_tokens=min(Settings.default_tokens, args.max_tokens),
        timeout_s=args.timeout,
        cache_bytes=int(args.cache_gib * GIB),
        cache_dir=args.cache_dir,
        disk_bytes=int(args.cache_dir_gib * GIB),
        prompt_embeds=args.prompt_embeds,
    )


def _key(text: str | None, name: str) -> str | None:
    """A key. Raises ConfigError if no HTTP header can carry it: a line end at its end is easily overlooked."""
    if text and (text != text.strip() or not text.isprintable()):
        raise ConfigError(f"the key of {name} begins or ends with white space or has a control character: remove it")
    return text or None


def _upstream(args: argparse.Namespace) -> UpstreamSettings | None:
    if args.upstream is None:
        if not args.decoder:
            raise ConfigError(
                "the server has no decoder: give --decoder FOLDER (it runs here), or --upstream URL and "
                "--upstream-model NAME (vLLM runs it)"
            )
        return None
    if args.upstream_model is None:
        raise ConfigError(f"--upstream needs --upstream-model; {args.upstream.rstrip('/')}/v1/models lists the names")
    if not args.upstream.startswith(("http://", "https://")):
        raise ConfigError(f"--upstream is {args.upstream!r}; expected an address such as http://127.0.0.1:8001")
    return UpstreamSettings(
        url=args.upstream,
        model=args.upstream_model,
        api_key=_key(os.environ.get(_UPSTREAM_KEY), _UPSTREAM_KEY),
        silence_s=args.upstream_timeout,
    )


def _check(model: ArcModel, args: argparse.Namespace) -> Layout:
    """The layout of the served decoder. Raises an error if something that requests need is missing."""
    num_decoders, num_ports = len(model.decoders), len(model.spec.decoder_sizes)
    allowed = num_ports if args.upstream is not None and not args.decoder else num_decoders
    if args.decoder_idx not in range(allowed):
        raise ConfigError(
            f"--decoder-idx is {args.decoder_idx}, but there are {allowed} decoders (indices start at 0). Give "
            "--decoder once for each of them, in the export's order."
        )
    marker = chosen_marker(args.marker, model)
    if marker is not None and marker not in model.spec.markers:
        have = " and ".join(model.spec.markers) or "no marker"
        raise ConfigError(f"--marker is {marker}; this compressor has {have}: use one that it has, or none")
    if model.encoder_tokenizer is None:
        raise TokenizerError(f"{args.model} has no tokenizer: give --encoder-backbone a folder that has it")
    if num_decoders == 0:
        return PLAIN
    path: Path = args.decoder[args.decoder_idx]
    tokenizer = model.decoder_tokenizers[args.decoder_idx]
    if tokenizer is None:
        raise TokenizerError(f"decoder {path} has no tokenizer: copy the model's own tokenizer into the folder")
    name = chosen_template(args, model)
    try:
        layout = read_layout(name or "tokenizer", tokenizer, path)
        check_fits(tokenizer, model.decoders[args.decoder_idx].vocab_size, f"decoder {path}", layout.special_ids)
        return layout
    except TokenizerError:
        if name is not None:
            raise
        return PLAIN  # base models have no template


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
