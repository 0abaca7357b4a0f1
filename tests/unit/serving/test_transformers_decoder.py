"""A decoder that runs through `transformers` is served like a native one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds import ArcModel, Context
from arc_ds.export.formats import write_export
from tests.helpers.served import served
from tests.helpers.tiny_data import write_json_tokenizer
from tests.helpers.tiny_export import tiny_trained

transformers = pytest.importorskip("transformers")

TEXTS = ["The wind came from the sea.", "A lamp.", "Each block was marked, so that the tower stood.", "of the"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArcModel]:
    """A folder with a tiny GPT-NeoX, which has no native implementation, and a model with it."""
    folder = tmp_path_factory.mktemp("neox")
    trained = tiny_trained(folder / "run")
    decoders = tuple(replace(decoder, implementation="transformers") for decoder in trained.decoders)
    write_export(replace(trained, decoders=decoders), folder / "export")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(vocab_size=350, initializer_range=0.2, eos_token_id=1, bos_token_id=0, **sizes)
    transformers.set_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "decoder")
    write_json_tokenizer(folder / "decoder")
    return folder, ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"])


def test_clients_at_once_get_the_tokens_of_generate(found: tuple[Path, ArcModel]) -> None:
    _, model = found
    assert model.decoders[0].implementation == "transformers"
    expected = [model.generate([["So ", Context(text), " is"]], max_new_tokens=12)[0] for text in TEXTS]
    assert len(set(expected)) == len(TEXTS)
    # Sampled answers run alone, so two of them would run at the same time.
    options = [{"temperature": 0}, {"temperature": 1.0, "top_p": 1e-9, "seed": 1}]
    bodies = [
        {"prompt": f"So <context>{text}</context> is", "max_tokens": 12, **option}
        for option in options
        for text in TEXTS
    ]
    with served(model) as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: server.ask("/v1/completions", body), bodies * 3))
    assert [reply.text for reply in replies] == expected * 6


def test_its_rows_need_the_embedding_module_only(found: tuple[Path, ArcModel]) -> None:
    folder, model = found
    alone = ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"], decoder_parts="embedding")
    prompt = ["So ", Context(TEXTS[0]), " is"]
    assert alone.prompt_embeds([prompt])[0].equal(model.prompt_embeds([prompt])[0])
