"""Every end of a text or a turn that a decoder's files name is found, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arc_ds.errors import WeightsError
from arc_ds.inference.decoder_files import find_max_positions, find_stop_ids
from arc_ds.tokenizers import load_tokenizer
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_data import write_json_tokenizer, write_tiktoken
from tests.helpers.written import write_chat_tokenizer

CONFIG = tiny.tiny_config(vocab_size=350)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder whose tokenizer ends texts with the id 1."""
    tiny.write_hf(tmp_path, CONFIG, tiny.random_tensors(CONFIG), max_position_embeddings=77)
    return write_json_tokenizer(tmp_path)


def set_eos(file: Path, value: object) -> None:
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**fields, "eos_token_id": value}))


def test_ids_of_the_json_files_are_added_to_the_tokenizers(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert find_stop_ids(folder, tokenizer) == (1,) and find_stop_ids(folder, None) == ()
    set_eos(folder / "config.json", [0, 7, -1])
    set_eos(folder / "generation_config.json", 9)
    assert find_stop_ids(folder, tokenizer) == (0, 1, 7, 9) and find_stop_ids(folder, None) == (0, 7, 9)


@pytest.mark.parametrize("value", ["</s>", [1, "2"], [[1]], 1.5, True])
def test_an_eos_token_id_that_is_no_id_is_refused(folder: Path, value: object) -> None:
    set_eos(folder / "generation_config.json", value)
    with pytest.raises(WeightsError, match="generation_config.json: expected `eos_token_id` to be a token id"):
        find_stop_ids(folder, None)


def test_the_end_of_a_turn_of_the_chat_template_is_a_stop(folder: Path) -> None:
    tokenizer = load_tokenizer(write_chat_tokenizer(folder, template=TEMPLATE))
    assert tokenizer.eos_id is not None
    end = tokenizer.special_ids["<|im_end|>"]
    assert find_stop_ids(folder, tokenizer) == tuple(sorted({tokenizer.eos_id, end})) and end != tokenizer.eos_id


def test_a_template_that_cannot_be_rendered_prevents_no_loading(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ nothing")
    assert find_stop_ids(folder, load_tokenizer(folder)) == (1,)


def test_llama_3_ends_its_turns_though_no_file_of_meta_says_so(folder: Path) -> None:
    tokenizer = load_tokenizer(write_tiktoken(folder / "llama" / "tokenizer.model"))
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    assert find_stop_ids(folder, tokenizer) == tuple(tokenizer.special_ids[name] for name in names)


def test_gguf_names_several_ends(tmp_path: Path) -> None:
    keys = {f"tokenizer.ggml.{end}_token_id": idx for idx, end in enumerate(("bos", "eos", "eot", "eom"), start=3)}
    metadata = {**keys, "llama.context_length": 77}
    file = tiny.write_gguf(tmp_path / "a.gguf", CONFIG, tiny.random_tensors(CONFIG), metadata=metadata)
    assert find_stop_ids(file, None) == find_stop_ids(tmp_path, None) == (4, 5, 6)
    assert find_max_positions(file) == find_max_positions(tmp_path) == 77


def test_the_language_model_of_a_model_of_images_is_read(folder: Path) -> None:
    outer = {"model_type": "mistral3", "eos_token_id": 5}
    inner = {"max_position_embeddings": 99, "eos_token_id": [6, 7]}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": inner}))
    assert find_max_positions(folder) == 99 and find_stop_ids(folder, None) == (5, 6, 7)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"max_position_embeddings": 262144}, 262144),
        ({"max_seq_len": 128000}, 128000),
        ({"_sliding_window": [131072, 32768, 32768, 32768]}, 131072),
        ({"sliding_window": [None, 32768]}, None),
        ({"sliding_window": 4096}, None),
        ({}, None),
    ],
    ids=str,
)
def test_mistral_states_the_longest_sequence_in_several_ways(
    tmp_path: Path, params: dict, expected: int | None
) -> None:
    tiny.write_mistral(tmp_path, CONFIG, tiny.random_tensors(CONFIG), **params)
    assert find_max_positions(tmp_path) == expected


def test_every_part_of_a_split_gguf_model_has_the_metadata_of_the_first(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eos_token_id": 4, "llama.context_length": 77}
    tiny.write_gguf(tmp_path / "a.gguf", CONFIG, tiny.random_tensors(CONFIG), metadata=metadata, max_tensors=8)
    for path in (tmp_path, *tmp_path.iterdir()):
        assert find_stop_ids(path, None) == (4,) and find_max_positions(path) == 77


def test_the_longest_sequence_is_read_if_it_is_stated(folder: Path) -> None:
    assert find_max_positions(folder) == 77
    tiny.write_hf(folder, CONFIG, tiny.random_tensors(CONFIG))
    assert find_max_positions(folder) is None


def test_a_list_of_windows_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_mistral(tmp_path, CONFIG, tiny.random_tensors(CONFIG), sliding_window=[["x"], 8])
    with pytest.raises(WeightsError, match=r"expected `sliding_window` to be a whole number .* it is \['x'\]"):
        find_max_positions(folder)
