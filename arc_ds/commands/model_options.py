"""Options of the commands that use an exported encoder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from arc_ds.batch.segments import MARKERS, Marker
from arc_ds.data.tasks.chat import LayoutName
from arc_ds.export.formats import DTYPES
from arc_ds.inference.arc import ArcModel, DecoderParts
from arc_ds.system.device import REQUESTS, select_device
from arc_ds.system.user_paths import path_argument

NO_MARKER = "none"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the model and how it runs."""
    parser.add_argument(
        "--model", type=path_argument, required=True, help="an export, or a checkpoint in the ARC format"
    )
    parser.add_argument("--decoder-idx", type=int, default=0, help="index of the decoder to use (default 0)")
    parser.add_argument(
        "--encoder-backbone", type=path_argument, help="sizes and tokenizer, for the reference's checkpoints"
    )
    parser.add_argument("--pooling-factor", type=int, help="use this factor instead of the trained one")
    parser.add_argument("--memory-tokens", type=int, help="use only this many of the trained memory tokens")
    parser.add_argument("--device", default="auto", choices=REQUESTS, help="default: a GPU if there is one")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="dtype of weights (default float32)")
    parser.add_argument(
        "--marker",
        choices=(*MARKERS, NO_MARKER),
        help="marker at the end of each context (default: cont if the model has it, else none)",
    )


def add_decoders(parser: argparse.ArgumentParser, *, required: bool, note: str = "") -> None:
    """Add the options that select the decoders. `note`: more help on `--decoder`."""
    parser.add_argument(
        "--decoder",
        type=path_argument,
        action="append",
        default=[],
        required=required,
        help=f"weights of each decoder, in the export's order{note}",
    )
    parser.add_argument(
        "--force", action="store_true", help="use a decoder that is another model than the one of the training"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let decoders that run through transformers run the Python files in their folders; read them first",
    )


def add_chat_template(parser: argparse.ArgumentParser, *, unknown: str) -> None:
    """Add `--chat-template`. `unknown`: help on the template if the export records none."""
    parser.add_argument(
        "--chat-template",
        choices=("auto", *get_args(LayoutName)),
        default="auto",
        help=f"chat template of questions (default auto: that of training; {unknown} if the export does not record it)",
    )


def chosen_template(args: argparse.Namespace, model: ArcModel) -> LayoutName | None:
    """The chat template of `--chat-template`; None if it is "auto" and the one of training is unknown."""
    return model.readers[args.decoder_idx].chat_template if args.chat_template == "auto" else args.chat_template


def chosen_marker(chosen: str | None, model: ArcModel) -> Marker | None:
    """The marker of `--marker`."""
    if chosen is None:
        return "cont" if "cont" in model.spec.markers else None
    return None if chosen == NO_MARKER else chosen  # type: ignore[return-value]  # argparse has checked it


def load_model(args: argparse.Namespace, decoders: Sequence[Path], decoder_parts: DecoderParts = "all") -> ArcModel:
    """Load the model of the options. `decoder_parts`: see `ArcModel.from_checkpoint`."""
    return ArcModel.from_checkpoint(
        args.model,
        decoders=decoders,
        encoder_backbone=args.encoder_backbone,
        device=select_device(args.device),
        dtype=DTYPES[args.dtype],
        pooling_factor=args.pooling_factor,
        memory_tokens=args.memory_tokens,
        decoder_parts=decoder_parts,
        trust_remote_code=getattr(args, "trust_remote_code", False),  # `compress` loads no decoder
        force=getattr(args, "force", False),
    )
