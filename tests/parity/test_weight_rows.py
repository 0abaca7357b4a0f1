"""A rank of ZeRO-3 reads the right rows of a tensor, for all orders and stacks of tensors in files.

Phi-3 stacks queries, keys and values, and only a part of each head rotates. transformers writes the file.
"""

from __future__ import annotations

import pytest
import torch

from arc_ds.model.weights import BackboneSource, open_backbone
from arc_ds.model.weights.names import spread_rotary

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BackboneSource:
    folder = tmp_path_factory.mktemp("phi3")
    config = transformers.Phi3Config(
        vocab_size=30,
        hidden_size=36,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        partial_rotary_factor=0.5,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    return open_backbone(folder)


def test_every_slice_of_every_tensor_is_that_of_the_whole(source: BackboneSource) -> None:
    assert source.config.rotary_dim == 6 and source.config.head_dim == 12
    for name, shape in source.shapes.items():
        whole = source.tensor(name)
        for first in range(shape[0]):
            for last in range(first + 1, shape[0] + 1):
                assert torch.equal(source.tensor(name, slice(first, last)), whole[first:last]), (name, first, last)


def test_a_slice_in_the_files_order_would_be_seen(source: BackboneSource) -> None:
    name, rows = "layers.0.attention.wq.weight", slice(2, 9)
    (in_file, _), whole = source.tensor_names.find(name), source.tensor(name)
    assert torch.equal(spread_rotary(source.store.tensor(in_file, slice(0, 36)), 3, 6), whole)
    assert not torch.equal(source.store.tensor(in_file, rows), whole[rows])
