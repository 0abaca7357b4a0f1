"""The longest sequences of a config, by task."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.batch.packing import PoolingSpec
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.data.loading.micro_batches import sample_sizes
from arc_ds.data.tasks import make_example
from arc_ds.data.tasks.chat import Fixed, LayoutName, read_layout
from arc_ds.data.tasks.script import Special
from arc_ds.data.tasks.task import NO_CHAT, ChatRows
from arc_ds.planning.sizes import TEXT_WORDS, largest_sample, longest_context, longest_sequence, task_limits
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.written import write_chat_tokenizer

CONFIG = """\
run_dir: runs/x
steps: 2000
encoder: {backbone: models/enc}
decoders: [{name: a, backbone: models/dec}]
pooling: {factors: [4, 2]}
data:
  sources: [{path: a}]
  max_question_tokens: 30
  max_answer_tokens: 20
"""
ASKED = 30 + 20 + 32  # question, answer and surrounding words


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return load_config(path, overrides)


FEW_SHOT = "data.sources=[{path: a, task: few_shot, in_context_examples: 3}]"
MEMORY = ["pooling.factors=[]", "pooling.memory_tokens=10"]
LONG_HELD_OUT = "data.validation=[{path: v, task: long_context}]"
LONG = "data.sources=[{path: a}, {path: b, task: long_context, chunk_tokens: 512}]"


@pytest.mark.parametrize(
    ("overrides", "context", "rows", "largest"),
    [
        ([], 256, 1 + 512 + 32 + 2, (256, 1 + 512 + 32 + 2)),
        (["data.validation=v"], 256, 1 + 512 + 256, (256, 1 + 512 + 32 + 2)),
        (["data.max_context_tokens=900"], 900, 1 + 900 + 113 + 2, (900, 1 + 900 + 113 + 2)),
        ([FEW_SHOT], 2048, 1 + 4 * ASKED + 256 + 4 * 2, (2048, 1 + 4 * ASKED + 256 + 4 * 2)),
        ([LONG], 512, 1 + 256 + 32 * 512 // 8 + 32 * 2, (32 * 512, 1 + 256 + 32 * 512 // 8 + 32 * 2)),
        ([LONG, LONG_HELD_OUT], 1024, 1 + 256 + 32 * 1024, (32 * 512, 1 + 256 + 32 * 512 // 8 + 32 * 2)),
        (MEMORY, 256, 1 + 512 + 10 + 1, (256 + 10, 1 + 512 + 10 + 1)),
        ([FEW_SHOT, *MEMORY], 2048, 1 + 4 * ASKED + 4 * 11, (2048 + 40, 1 + 4 * ASKED + 4 * 11)),
    ],
    ids=["pretraining", "held out", "reconstruction", "few-shot", "long", "long held out", "memory", "few-shot memory"],
)
def test_the_longest_sequence_and_the_largest_sample_are_those_of_the_longest_task(
    tmp_path: Path, overrides: list[str], context: int, rows: int, largest: tuple[int, int]
) -> None:
    config = load(tmp_path, *overrides)
    assert longest_context(config) == context
    assert longest_sequence(config, NO_CHAT) == rows
    assert largest_sample(config, config.data.sources[-1]) == largest


X = "xyz" * 500  # each letter is one token
ASKED_ABOUT = {"passage": X[:200], "question": X[:30], "answer": X[:20]}
PROMPT = {"instruction": f"{X[:10]}||{X[:10]}||{X[:10]}"}
OWN_TEMPLATE = """{{ bos_token }}{{ "<|im_start|>system\\nYou read what was compressed, and answer.<|im_end|>\\n" }}
{%- for message in messages %}
{{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" }}{% endfor %}"""


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "json", template=OWN_TEMPLATE)


@pytest.mark.parametrize("template", ["none", "llama2", "chatml", "tokenizer"])
@pytest.mark.parametrize(
    ("source", "task", "records"),
    [
        ("{path: a}", "reconstruction", [{"text": X}]),
        ("{path: a}", "continuation", [{"text": X}]),
        ("{path: a, task: few_shot, in_context_examples: 2}", "few_shot", [ASKED_ABOUT] * 3),
        ("{path: a, task: few_shot, in_context_examples: 2}", "few_shot", [ASKED_ABOUT | PROMPT] * 3),
        ("{path: a, task: long_context, chunk_tokens: 16}", "long_context", [{"text": X}]),
        ("{path: a, task: long_context, chunk_tokens: 16}", "long_context", [ASKED_ABOUT]),
    ],
    ids=["reconstruction", "continuation", "few-shot", "own prompt", "long text", "long passages"],
)
def test_no_sample_has_more_rows_than_its_lengths_allow(
    tmp_path: Path, chat_tokenizer: Path, source: str, task: str, records: list[dict], template: LayoutName
) -> None:
    sizes = ["data.max_continuation_tokens=300", "data.max_context_tokens=560", "data.max_documents_tokens=600"]
    decoder = f"decoders=[{{name: a, backbone: b, chat_template: {template}}}]"
    config = load(tmp_path, f"data.sources=[{source}]", *sizes, decoder, "data.max_chunks=30")
    tokenizer = load_tokenizer(chat_tokenizer)
    layout = read_layout(template, tokenizer, chat_tokenizer)
    example = make_example(
        records,
        task=task,
        seed=0,
        encoder=tokenizer,
        decoder=tokenizer,
        limits=task_limits(config, config.data.sources[0]),
        layout=layout,
    )
    assert not example.counts
    (size,) = sample_sizes([example.sample], PoolingSpec())

    def rows(parts: Fixed) -> int:
        return sum(len(part.ids if isinstance(part, Special) else tokenizer.encode(part.text)) for part in parts)

    first, further = rows(layout.head + layout.last_middle + layout.end), rows(layout.middle + layout.between)
    chat = ChatRows(first, further, TEXT_WORDS) if layout.is_chat else NO_CHAT
    bound = longest_sequence(config, chat)
    assert size.decoder_rows <= bound <= largest_sample(config, config.data.sources[0])[1]
