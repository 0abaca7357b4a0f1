"""The kinds of systems by name. To add a kind, write a module with a `SystemKind` and add it here."""

from __future__ import annotations

from arc_ds.evaluation.systems.ceped import CEPED_KIND
from arc_ds.evaluation.systems.decoder_system import DECODER_KINDS
from arc_ds.evaluation.systems.kind import SystemKind
from arc_ds.evaluation.systems.llmlingua2 import LLMLINGUA2_KIND

KINDS: dict[str, SystemKind] = {**DECODER_KINDS, "llmlingua2": LLMLINGUA2_KIND, "ceped": CEPED_KIND}
