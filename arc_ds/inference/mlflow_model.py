"""The MLflow model of an export: texts in, vectors out. MLflow runs this file; nothing else imports it.

The vectors of a text are base64 of float32 in row order, because JSON numbers would take five times the space:
`np.frombuffer(base64.b64decode(vectors), "<f4").reshape(rows, width)`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from arc_ds.inference.arc import ArcModel
from arc_ds.system.device import select_device

NO_MARKER = "none"


class TextCompressor(PythonModel):
    """Compresses texts with the export in the artifact `export`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the export, to a GPU if there is one. Needs no decoder."""
        folder = Path(context.artifacts["export"])
        self._model = ArcModel.from_checkpoint(folder, decoders=[], device=select_device("auto"))

    # MLflow would take the signature from an annotation of `model_input`, and drop the parameters.
    def predict(  # type: ignore[no-untyped-def]
        self, context: PythonModelContext, model_input, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Compress each text.

        model_input: a list of texts, or a DataFrame whose only column holds them.
        params: `decoder`, the index of the decoder that will read the vectors, and `marker` ("cont", "rec", "none", or
            "auto" for "cont" if the model has it).

        Returns a row for each text, in order: `vectors`, `rows` and `width`. Raises ArcError like `ArcModel.compress`.
        """
        options = {"decoder": 0, "marker": "auto", **(params or {})}
        marker = options["marker"]
        if marker == "auto":
            marker = "cont" if "cont" in self._model.spec.markers else NO_MARKER
        texts = model_input.iloc[:, 0].tolist() if isinstance(model_input, pd.DataFrame) else list(model_input)
        compressed = self._model.compress(
            texts, decoder=int(options["decoder"]), marker=None if marker == NO_MARKER else marker
        )
        rows = [
            {
                "vectors": base64.b64encode(z_GD.float().cpu().numpy().astype("<f4").tobytes()).decode("ascii"),
                "rows": z_GD.shape[0],
                "width": z_GD.shape[1],
            }
            for z_GD in compressed
        ]
        return pd.DataFrame(rows, columns=["vectors", "rows", "width"])


mlflow.models.set_model(TextCompressor())
