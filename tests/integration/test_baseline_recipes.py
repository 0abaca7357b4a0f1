"""The recipes of trained baselines on tiny models: pretraining, export, fine-tuning from it, and the vectors of a text.

The guard on frozen decoders ends a run with an error if a decoder's weight differs from the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arc_ds import ArcModel
from arc_ds.config.load import dump_yaml, load_config
from arc_ds.config.schema import RunConfig
from arc_ds.export.consolidate import consolidate, find_checkpoint
from arc_ds.export.formats import write_export
from arc_ds.model.weights.lazy_tensor import as_lazy
from arc_ds.shards.building.writer import build_shards
from arc_ds.training.build_model import compressor_spec, open_starting_weights, starting_compressor
from tests.helpers.tiny_data import numbered_texts, write_json_tokenizer, write_lines, write_shards
from tests.helpers.tiny_models import random_tensors, tiny_config, write_hf
from tests.helpers.tiny_run import ROOT, losses, train_on_ranks

pytestmark = pytest.mark.distributed

BASELINES = ROOT / "ds_configs" / "recipes" / "baselines"
SHORT = (
    "steps=3",
    "precision=fp32",
    "device=cpu",
    f"deepspeed={ROOT / 'ds_configs' / 'cpu.json'}",
    "micro_batches=1",
    "log_every=1",
    "data.batch_size=8",
    "optimizer.warmup_steps=1",
    "checkpoint.every=0",
    "validation.every=0",
    "validation.num_samples=4",
)
FEW_SHOT = ("data.max_documents_tokens=96", "data.max_question_tokens=32", "data.max_answer_tokens=16")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and shards under the names of the recipes. All sources of fine-tuning are the same."""
    folder = tmp_path_factory.mktemp("baselines")
    retriever = {"family": "mistral", "hidden_size": 48, "head_dim": 12}
    for seed, (name, changes) in enumerate((("Llama-3.1-8B", {}), ("GritLM-7B", retriever))):
        sizes = tiny_config(vocab_size=352, **changes)
        write_json_tokenizer(write_hf(folder / "models" / name, sizes, random_tensors(sizes, seed)))
    tokenizer, shards = folder / "models" / "Llama-3.1-8B", folder / "shards"
    shards.mkdir()
    texts = numbered_texts(48)
    write_shards(shards / "pretrain", tokenizer, texts[:32])
    write_shards(shards / "validation", tokenizer, texts[32:])
    asked = [
        {"passages": [text], "question": "Which tower is it?", "answer": f"Tower {number}"}
        for number, text in enumerate(texts)
    ]
    build_shards([write_lines(folder / "asked.jsonl", asked)], folder / "asked", tokenizer, kind="fine_tuning")
    recipe = load_config(BASELINES / "xrag_finetune_llama31_8b.yaml", (), lambda name, _: f"/{name}")
    for source in (*recipe.data.sources, *recipe.data.held_out):
        (shards / Path(source.path).name).symlink_to(folder / "asked")
    return folder


@pytest.mark.parametrize("baseline", ["icae", "xrag"])
def test_a_baseline_is_pretrained_and_fine_tuned(baseline: str, inputs: Path, tmp_path: Path) -> None:
    decoder = inputs / "models" / "Llama-3.1-8B"
    for stage, more in ((f"{baseline}_llama31_8b", ()), (f"{baseline}_finetune_llama31_8b", FEW_SHOT)):
        values = {
            "MODELS": inputs / "models",
            "SHARDS": inputs / "shards",
            "RUNS": tmp_path,
            "START": tmp_path / "export",
        }
        config = load_config(BASELINES / f"{stage}.yaml", [*SHORT, *more], {k: str(v) for k, v in values.items()}.get)
        file = tmp_path / f"{stage}.yaml"
        file.write_text(dump_yaml(config), encoding="utf-8")
        start = _starting_values(config)
        code, console = train_on_ranks(file)
        assert code == 0, console
        assert len(set(losses(tmp_path / stage))) == 3
        trained = consolidate(find_checkpoint(tmp_path / stage))
        moved = {
            name for name, tensor in trained.tensors.items() if not torch.equal(as_lazy(tensor).whole(), start[name])
        }
        bridge = {name for name in trained.tensors if ".bridge." in name}
        assert moved == (bridge if baseline == "xrag" else set(trained.tensors) - _frozen_names(trained.tensors)), stage
        write_export(trained, tmp_path / "export", overwrite=True)
    model = ArcModel.from_checkpoint(tmp_path / "export", [decoder])
    found = model.compress(["Tower 7 of the sea", "has block 3."], marker="cont" if baseline == "icae" else None)
    assert [tuple(vectors.shape) for vectors in found] == [(33 if baseline == "icae" else 1, 32)] * 2


def _starting_values(config: RunConfig) -> dict[str, Tensor]:
    spec = compressor_spec(config)
    compressor = starting_compressor(config, spec, open_starting_weights(config, spec))
    return {name: parameter.detach() for name, parameter in compressor.named_parameters()}


def _frozen_names(names: Iterable[str]) -> set[str]:
    """Parameters that adapters and memory tokens do not change."""
    return {name for name in names if name.endswith("norm.weight") or name == "encoder.tok_embeddings.weight"}
