"""Statistics of sets of shards, as text and as a plot.

They cover the lengths of records, the tokens of sources, and the documents that were cut or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arc_ds.shards.building.record_maker import REASONS
from arc_ds.shards.format import Manifest, SourceInfo
from arc_ds.system.files import output

_MAX_BINS = 16
_BAR = 40  # characters
_PERCENTILES = (5, 50, 95)


def length_histogram(num_tokens: NDArray[np.int32]) -> tuple[int, list[int]]:
    """Compute a histogram of record lengths with at most 16 bins of equal width, which is a power of two.

    num_tokens: int32 [records], the number of tokens of each record.

    Returns the width of a bin in tokens, and the bins; bin i counts the records of i · width + 1 to (i + 1) · width
    tokens.
    """
    width = 1
    while width * _MAX_BINS < num_tokens.max(initial=1):
        width *= 2
    return width, np.bincount(np.maximum(num_tokens - 1, 0) // width).tolist()


def describe(name: str, manifest: Manifest, num_tokens: NDArray[np.int32], *, max_sources: int) -> str:
    """All statistics of one set of shards, as lines of text.

    name: name of the set.
    manifest: its manifest.
    num_tokens: int32 [records], the number of tokens of each record.
    max_sources: maximum number of sources to list one by one.
    """
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    kind = manifest.kind.replace("_", "-")
    lines = [
        f"{name}: {len(num_tokens)} {kind} records, {int(num_tokens.sum(dtype=np.int64))} tokens, "
        f"{len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB",
        *_documents(manifest),
        *_lengths(num_tokens),
        *_sources(manifest.sources, max_sources),
    ]
    return "\n".join(lines) + "\n"


def _documents(manifest: Manifest) -> list[str]:
    """The number of documents, and how many were cut or left out."""
    documents = sum(source.documents for source in manifest.sources)
    if not documents:
        return []
    lines = [f"documents: {documents}"]
    if manifest.kind == "pretraining":
        cut = sum(source.cut for source in manifest.sources)
        lines.append(f"  cut to records of at most {manifest.max_tokens} tokens: {_share(cut, documents)}")
    lines += [f"  left out, {REASONS.get(why, why)}: {_share(n, documents)}" for why, n in manifest.skipped.items()]
    return lines


def _lengths(num_tokens: NDArray[np.int32]) -> list[str]:
    """Mean, percentiles and histogram."""
    percentiles = zip(_PERCENTILES, np.percentile(num_tokens, _PERCENTILES), strict=True)
    points = [f"{share} % {value:.0f}" for share, value in percentiles]
    lines = [f"tokens of a record: mean {num_tokens.mean():.1f}, {', '.join(points)}, longest {num_tokens.max()}"]
    width, bins = length_histogram(num_tokens)
    digits = len(str(len(bins) * width))
    for idx, count in enumerate(bins):
        bar = "█" * round(count / max(bins) * _BAR) or ("▏" if count else "")
        lengths = f"{idx * width + 1:{digits}} – {(idx + 1) * width:{digits}}"
        lines.append(f"  {lengths} {bar:{_BAR}} {_share(count, len(num_tokens))}")
    return lines


def _sources(sources: Sequence[SourceInfo], max_sources: int) -> list[str]:
    """The sources with the most tokens, and the total of all others."""
    if not sources:
        return []
    total = sum(source.tokens for source in sources)
    ordered = sorted(sources, key=lambda source: (-source.tokens, source.name))
    listed, others = ordered[:max_sources], ordered[max_sources:]
    lines = [f"sources: {len(sources)}"]
    for source in listed:
        documents = f"{source.records} records of {source.documents} documents, {source.cut} cut"
        left_out = sum(source.skipped.values())
        lines.append(f"  {source.name}: {_share(source.tokens, total)} tokens, {documents}, {left_out} left out")
    if others:
        tokens = sum(source.tokens for source in others)
        lines.append(f"  {len(others)} others: {_share(tokens, total)} tokens")
    return lines


def _share(count: int, total: int) -> str:
    return f"{count} ({count / max(total, 1):.1%})"


def draw_lengths(path: Path, lengths: dict[str, NDArray[np.int32]]) -> None:
    """Plot the distribution of record lengths of several sets, weighted by tokens, to a PNG file.

    path: file to write.
    lengths: for each set, by name, int32 [records], the number of tokens of each record.

    Raises StorageError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    longest = max(int(num_tokens.max(initial=1)) for num_tokens in lengths.values())
    edges = np.linspace(0, longest + 1, min(longest + 2, 61))
    for name, num_tokens in lengths.items():
        shares = num_tokens / num_tokens.sum(dtype=np.int64)
        axes.hist(num_tokens, bins=edges.tolist(), weights=shares.tolist(), histtype="step", label=name)
    axes.set(xlabel="tokens of a record", ylabel="share of the tokens", xlim=(0, longest + 1))
    axes.legend()
    with output(path):
        figure.savefig(path, format="png", dpi=120)
