"""Request bodies decode on the engines' side to the rows that went in."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch

from arc_ds.serving.engines import cache_salt, encode_tensor, sglang_generate, vllm_chat, vllm_completion
from tests.helpers.vllm_wire import decode_prompt_embeds

ROWS = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vllm_decodes_the_rows_of_a_completion(dtype: torch.dtype) -> None:
    rows = ROWS.to(dtype)
    body = json.loads(json.dumps(vllm_completion(rows, "decoder", max_tokens=5, temperature=0.0)))
    assert torch.equal(decode_prompt_embeds(body.pop("prompt_embeds"), 48, dtype), rows)
    assert len(body.pop("cache_salt")) == 64
    assert body == {"model": "decoder", "max_tokens": 5, "temperature": 0.0}


@pytest.mark.parametrize("wrong", [torch.ones(3, 47), torch.ones(48), torch.ones(3, 48, dtype=torch.int64), [1.0]])
def test_the_decoding_of_the_tests_refuses_what_vllm_refuses(wrong: object) -> None:
    buffer = io.BytesIO()
    torch.save(wrong, buffer)
    with pytest.raises(ValueError):
        decode_prompt_embeds(base64.b64encode(buffer.getvalue()).decode(), 48)


def test_a_slice_is_sent_without_the_rest_of_its_tensor() -> None:
    large = torch.zeros(10_000, 48)
    assert len(encode_tensor(large[:2])) < 4000


def test_the_salt_depends_on_every_row_and_on_their_order() -> None:
    other = ROWS.clone()
    other[6, 47] += 1e-3
    tensors = [[ROWS], [other], [ROWS.flip(0)], [ROWS[:3], ROWS[3:]], [ROWS[3:], ROWS[:3]], [ROWS.bfloat16()]]
    salts = [cache_salt(each) for each in tensors]
    assert len(set(salts)) == len(salts)
    assert cache_salt([ROWS.clone()]) == salts[0]


def test_a_chat_has_its_vectors_as_parts_between_its_texts() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["Document: ", ROWS, "\nQuestion: Which?"]},
    ]
    body = json.loads(json.dumps(vllm_chat(messages, "decoder", max_tokens=5)))
    system, user = body["messages"]
    assert system == messages[0]
    before, vectors, after = user["content"]
    assert before == {"type": "text", "text": "Document: "} and after["text"] == "\nQuestion: Which?"
    assert vectors["type"] == "prompt_embeds" and torch.equal(decode_prompt_embeds(vectors["data"], 48), ROWS)
    assert body["cache_salt"] == cache_salt([ROWS])
    assert "cache_salt" not in vllm_chat(messages[:1], "decoder")


def test_sglang_gets_nested_lists_of_numbers() -> None:
    body = json.loads(json.dumps(sglang_generate(ROWS.bfloat16(), max_new_tokens=5, temperature=0)))
    assert torch.equal(torch.tensor(body["input_embeds"]), ROWS.bfloat16().float())
    assert body["sampling_params"] == {"max_new_tokens": 5, "temperature": 0}
