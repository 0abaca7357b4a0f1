"""The facts about a training that a run's folder records, for the model card. Nothing here is computed or guessed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arc_ds.checkpoints.checkpoint import TrainerState
from arc_ds.config.load import config_hash, load_config
from arc_ds.config.schema import RunConfig
from arc_ds.errors import ArcError
from arc_ds.system.user_files import read_user_text
from arc_ds.tokenizers.gguf_header import read_gguf_header
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics

logger = logging.getLogger(__name__)

_CONFIG_NAME = "config.yaml"
_VALIDATION = re.compile(r"validation/(?P<decoder>[^/]+)/(?P<task>[^/]+)/(?P<figure>[^/]+)")
_FRONT_MATTER = re.compile(r"\A---\n(?P<fields>.*?)\n---\n", re.DOTALL)
_LICENSE_FIELD = re.compile(r"^license(?:_name)?:\s*(?P<name>\S.*?)\s*$", re.MULTILINE)
_LICENSE_FILES = ("LICENSE*", "LICENCE*", "license*", "USE_POLICY*")
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The facts about a training up to a step.

    data: fingerprint of shards, weights of sources and order.
    versions: versions of the programs that wrote the checkpoint.
    config: the run's config; None if its folder holds none, or that of another run.
    losses: the logged training losses by step, up to the checkpoint's step.
    validated_at: step of the last validation up to the checkpoint's step; None if there is none.
    validation: the figures of that validation by (decoder, task), then by name.
    """

    data: str
    versions: Mapping[str, str]
    config: RunConfig | None = None
    losses: Mapping[int, float] = field(default_factory=dict)
    validated_at: int | None = None
    validation: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)

    def backbone(self, decoder: str | None = None) -> str | None:
        """Path of a decoder's backbone, or of the encoder's; None if the config is unknown.

        A relative path starts at the folder in which the run was started. If it leads to nothing from here, it is
        returned as written.
        """
        if self.config is None:
            return None
        written = {each.name: each.backbone for each in self.config.decoders} | {None: self.config.encoder.backbone}
        path = written.get(decoder)
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def read_training_record(run: Path, state: TrainerState) -> TrainingRecord:
    """Read the facts about a training from its folder. A missing or damaged file leaves its facts out.

    run: folder of the run.
    state: of the checkpoint.
    """
    losses: dict[int, float] = {}
    validated_at: int | None = None
    validation: dict[tuple[str, str], dict[str, float]] = {}
    metrics = run / METRICS_NAME
    for entry in read_metrics(metrics) if metrics.is_file() else ():
        if entry.step > state.step:
            break
        if "train/loss" in entry.metrics:
            losses[entry.step] = entry.metrics["train/loss"]
        figures = [(match, value) for key, value in entry.metrics.items() if (match := _VALIDATION.fullmatch(key))]
        if figures:
            validated_at, validation = entry.step, {}
        for match, value in figures:
            validation.setdefault((match["decoder"], match["task"]), {})[match["figure"]] = value
    return TrainingRecord(
        data=state.data_fingerprint,
        versions=state.versions,
        config=_read_config(run, state),
        losses=losses,
        validated_at=validated_at,
        validation=validation,
    )


def _read_config(run: Path, state: TrainerState) -> RunConfig | None:
    path = run / _CONFIG_NAME
    if not path.is_file():
        return None
    try:
        config = load_config(path)
    except ArcError as error:
        logger.warning("the model card leaves out the run's config: %s", error)
        return None
    return config if config_hash(config) == state.config_hash else None


def read_license(backbone: str | None) -> str:
    """The licence that a backbone's files name: in a README's front matter, in a GGUF file's metadata, or as a file.

    backbone: a folder or a .gguf file; None if it is not known. Returns "unknown" if nothing names a licence.
    """
    path = Path(backbone or "")
    if path.suffix == ".gguf" and path.is_file():
        try:
            found = read_gguf_header(path).metadata.get("general.license")
        except (OSError, ValueError):
            found = None
        return str(found) if found else UNKNOWN
    if backbone is None or not path.is_dir():
        return UNKNOWN
    readme = path / "README.md"
    try:
        text = read_user_text(readme, ArcError, remedy="") if readme.is_file() else ""
    except ArcError:
        text = ""
    front_matter = _FRONT_MATTER.match(text)
    named = _LICENSE_FIELD.search(front_matter["fields"]) if front_matter else None
    files = sorted({file.name for pattern in _LICENSE_FILES for file in path.glob(pattern) if file.is_file()})
    notes = [*([named["name"].strip("\"'")] if named else []), *([f"see its {', '.join(files)}"] if files else [])]
    return "; ".join(notes) or UNKNOWN
