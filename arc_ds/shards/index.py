"""Indexing third-party tars: writes an index for each and a manifest, and leaves the tars unchanged."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.shards.format import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SourceInfo,
    read_manifest,
    sha256_of_file,
    write_index,
)
from arc_ds.shards.parallel import map_in_order
from arc_ds.shards.storage.remote import Retries, download
from arc_ds.shards.tar_index import RecordForm, TarContents, index_tar
from arc_ds.system.files import output, sync
from arc_ds.system.locks import writing
from arc_ds.system.urls import is_url, local_path, name_in_url, shown_url
from arc_ds.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

_PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_UNSAFE = re.compile(r"[/\\\0]")


class _TarSource(NamedTuple):
    """A tar to index.

    place: path or URL of the tar.
    name: name of its shard.
    location: its location in the manifest, None if the tar is next to the manifest.
    """

    place: str
    name: str
    location: str | None


class _TarIndex(NamedTuple):
    """The result of indexing one tar.

    shard: its entry in the manifest.
    source: its counts in the manifest.
    bounds: tokens of its shortest and of its longest record; empty if it has no records.
    contents: its other contents.
    """

    shard: ShardInfo
    source: SourceInfo
    bounds: tuple[int, ...]
    contents: TarContents


def index_shards(
    tars: Sequence[str | Path],
    tokenizer: str | Path,
    *,
    out_dir: str | Path | None = None,
    form: RecordForm | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write an index for each tar and a manifest for all of them. Returns the manifest.

    The output is identical for any number of workers. Unusable members are counted by reason in the manifest, and the
    first ones of each reason are logged.

    tars: folders of tars, paths and URLs of tars. A pattern such as {000..127} expands to many names.
    tokenizer: path of the encoder's tokenizer.
    out_dir: folder for indexes and manifest; the manifest then records the location of each tar. None writes them next
        to the tars, which must all be in one local folder.
    form: how the tars store their records.
    workers: number of processes.
    overwrite: whether to replace an existing manifest.
    progress: whether to show a progress bar.
    Raises DataError if a tar is damaged or no record is found, and StorageError if a URL cannot be fetched, a tar
    cannot be read or the output cannot be written.
    """
    sources = _sources(tars, out_dir)
    folder = Path(out_dir) if out_dir is not None else Path(sources[0].place).parent
    form = form or RecordForm()
    fingerprint = load_tokenizer(Path(tokenizer)).fingerprint
    cure = "If the folder of the tars cannot be written, give another one for index and manifest: --out FOLDER."
    with output(folder, cure), writing(folder, "index"), TemporaryDirectory(dir=folder, prefix=".indexing-") as name:
        scratch = Path(name)
        if (folder / MANIFEST).exists() and not overwrite:
            raise DataError(f"{folder} has a {MANIFEST} already. Give another folder, or overwrite=True (--overwrite).")
        index_one = partial(_index_one, scratch, Path(tokenizer), form)
        results = map_in_order(index_one, sources, workers)
        indexed = [tar for _, tar in tqdm(results, total=len(sources), unit="tar", disable=not progress)]
        manifest = scratch / MANIFEST
        manifest.write_text(_manifest(indexed, form, fingerprint).to_json(), encoding="utf-8")
        sync(manifest)
        for tar in indexed:
            (scratch / tar.shard.index_name).replace(folder / tar.shard.index_name)
        sync(folder)
        manifest.replace(folder / MANIFEST)  # last: it completes the set
        sync(folder)
    for what in [what for tar in indexed for what in tar.contents.named]:
        logger.warning("left out: %s", what)
    return read_manifest(folder)


def _sources(tars: Sequence[str | Path], out_dir: str | Path | None) -> list[_TarSource]:
    """The tars in order, each with a unique name. Folders are replaced by the tars in them."""
    places = [place for given in tars for place in _expand(str(given))]
    if not places:
        raise DataError("no tars were given. Name a folder of them, tars, or URLs of tars.")
    names = [_name_of(place) for place in places]
    if len(set(names)) < len(names) or any(name.startswith(".") for name in names):
        names = [f"{idx:06d}-{name.lstrip('.')}" for idx, name in enumerate(names)]
    folders = {Path(place).parent.absolute() for place in places}
    is_beside = not any(map(is_url, places)) and len(folders) == 1 and names[0] == _name_of(places[0])
    if out_dir is None and not is_beside:
        raise DataError("the tars are not all in one local folder. Give a folder for index and manifest: --out FOLDER.")
    stems: dict[str, str] = {}
    for place, name in zip(places, names, strict=True):
        if (other := stems.setdefault(Path(name).stem, place)) != place:
            both = f"{shown_url(other)} and {shown_url(place)}"
            raise DataError(f"{both} would share one index, {Path(name).stem}.idx. Rename one of them.")
    if is_beside and (out_dir is None or Path(out_dir).absolute() in folders):
        locations: list[str | None] = [None] * len(places)
    else:
        locations = [place if is_url(place) else str(Path(place).absolute()) for place in places]
    return list(map(_TarSource, places, names, locations))


def _expand(given: str) -> list[str]:
    """Paths or URLs of the tars that one argument denotes."""
    from webdataset.shardlists import expand_urls

    if given.startswith("pipe:"):
        raise DataError(
            f"{given}: a manifest names no commands, since it may come from anyone. Give http(s), s3 or gs URLs, or "
            "local tars."
        )
    if not is_url(given) and local_path(given).is_dir():
        paths = sorted(local_path(given).iterdir())
        found = [str(path) for path in paths if path.name.lower().endswith(".tar")]
        packed = [path.name for path in paths if _PACKED.search(path.name)]
        if not found:
            raise DataError(
                f"{given}: expected files ending in .tar, found {', '.join(packed[:5]) or 'none'}. "
                + ("Decompress them." if packed else "Check the path.")
            )
        if packed:
            logger.warning(
                "left out: %d compressed tars (%s). Decompress them first.", len(packed), ", ".join(packed[:5])
            )
        return found
    if is_url(given):
        return expand_urls(given)
    places = [given] if local_path(given).exists() else expand_urls(given)
    for place in places:
        if not local_path(place).is_file():
            raise DataError(f"{place}: expected a tar or a folder of tars, found nothing there. Check the path.")
    return [str(local_path(place)) for place in places]


def _name_of(place: str) -> str:
    return _UNSAFE.sub("_", name_in_url(place))


def _index_one(scratch: Path, tokenizer: Path, form: RecordForm, source: _TarSource) -> _TarIndex:
    """Write the index of a tar to `scratch`, and return its manifest entries and counts.

    The tar of a URL is downloaded to `scratch` and deleted afterwards.
    """
    path = Path(source.place)
    if is_url(source.place):
        path = scratch / source.name
        with path.open("w+b") as file:
            download(source.place, file, retries=Retries())
    rows, contents = index_tar(path, load_tokenizer(tokenizer), form)
    index_sha256 = write_index(scratch / (Path(source.name).stem + ".idx"), rows)
    size, digest, tokens = path.stat().st_size, sha256_of_file(path), rows["tokens"]
    if is_url(source.place):
        path.unlink()
    shard = ShardInfo(
        name=source.name,
        samples=len(rows),
        tokens=int(tokens.sum()),
        bytes=size,
        sha256=digest,
        index_sha256=index_sha256,
        member=form.member,
        location=source.location,
        passage_tokens=dict(contents.passage_tokens),
    )
    info = SourceInfo(
        name=source.name,
        bytes=size,
        sha256=digest,
        documents=contents.num_keys,
        records=len(rows),
        tokens=shard.tokens,
        cut=0,
        skipped=dict(sorted(contents.skipped.items())),
    )
    bounds = (int(tokens.min()), int(tokens.max())) if len(rows) else ()
    return _TarIndex(shard, info, bounds, contents)


def _manifest(indexed: Sequence[_TarIndex], form: RecordForm, fingerprint: str) -> Manifest:
    bounds = [bound for tar in indexed for bound in tar.bounds]
    if not bounds:
        ends = sum((tar.contents.ends for tar in indexed), Counter[str]())
        found = ", ".join(f".{end} ({count})" for end, count in ends.most_common(8)) or "none"
        reasons = [what for tar in indexed for what in tar.contents.named]
        raise DataError(
            f"{indexed[0].source.name} and {len(indexed) - 1} more hold no record in members ending in .{form.member}. "
            f"Members found: {found}. {'For example ' + reasons[0].rstrip('.') + '. ' if reasons else ''}"
            "Name the right ones (--member), their field (--text-field) or their kind (--kind)."
        )
    return Manifest(
        samples=sum(tar.shard.samples for tar in indexed),
        tokens=sum(tar.shard.tokens for tar in indexed),
        max_tokens=max(bounds),
        min_tokens=min(bounds),
        tokenizer_fingerprint=fingerprint,
        shards=tuple(tar.shard for tar in indexed),
        sources=tuple(tar.source for tar in indexed),
        kind=form.kind,
        text_field=form.text_field,
    )
