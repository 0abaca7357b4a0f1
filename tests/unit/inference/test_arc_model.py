"""ArcModel: load folders, compute vectors, logits and text; each misuse raises one clear error."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from arc_ds import ArcModel, Context, Segment
from arc_ds.batch.groups import GroupRule
from arc_ds.errors import ConfigError, DataError, TokenizerError, WeightsError
from arc_ds.export.consolidate import with_decoders
from arc_ds.export.formats import write_export
from arc_ds.inference.decoders import open_decoder
from arc_ds.inference.rows import pack_rows
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderLora
from arc_ds.model.weights import open_backbone
from arc_ds.model.weights.lazy_tensor import as_lazy
from arc_ds.tokenizers import Tokenizer
from tests.helpers.tiny_data import write_tiktoken
from tests.helpers.tiny_export import DECODER, tiny_trained, write_decoder

TEXT = "The wind came from the sea."
OTHER = "A lamp of stone."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for two decoders, and the decoders."""
    folder = tmp_path_factory.mktemp("arc")
    write_export(tiny_trained(folder / "run", decoder_sizes=(48, 48)), folder / "export")
    write_decoder(folder / "a")
    write_decoder(folder / "b", seed=2, bos=False)
    return folder


@pytest.fixture(scope="module")
def model(folders: Path) -> ArcModel:
    return ArcModel.from_checkpoint(folders / "export", decoders=[str(folders / "a"), folders / "b"])


def test_texts_and_their_ids_give_the_same_vectors(model: ArcModel) -> None:
    ids = [tokenizer_of(model).encode(text) for text in (TEXT, OTHER)]
    for ours, expected in zip(model.compress([TEXT, OTHER]), model.compress(ids), strict=True):
        assert torch.equal(ours, expected)
    assert [v.shape for v in model.compress(ids)] == [(-(-len(line) // 4) + 1, 48) for line in ids]
    assert model.compress([]) == []


def tokenizer_of(model: ArcModel) -> Tokenizer:
    assert model.encoder_tokenizer is not None
    return model.encoder_tokenizer


def test_only_the_last_vector_depends_on_the_marker_and_all_on_the_decoder(model: ArcModel) -> None:
    (cont,), (rec,), (bare,) = (model.compress([TEXT], marker=marker) for marker in ("cont", "rec", None))
    assert torch.equal(cont[:-1], rec[:-1]) and torch.equal(cont[:-1], bare)
    assert (cont[-1] - rec[-1]).abs().max() > 0.01
    assert (cont - model.compress([TEXT], 1)[0]).abs().amax(dim=1).min() > 0.01


def test_another_pooling_factor_gives_more_or_fewer_vectors(folders: Path) -> None:
    for factor, num_vectors in ((2, 10), (21, 1), (2**31 - 1, 1)):
        model = ArcModel.from_checkpoint(folders / "export", decoders=[], pooling_factor=factor)
        assert model.compress([list(range(20))], marker=None)[0].shape == (num_vectors, 48)
    for factor in (0, -1, 2.5, True, 2**31):
        with pytest.raises(ConfigError, match=f"pooling_factor is {factor}; expected a whole number from 1 to"):
            ArcModel.from_checkpoint(folders / "export", decoders=[], pooling_factor=factor)


def test_another_factor_keeps_the_rule_of_merging(tmp_path: Path) -> None:
    changes = {"strategy": "similarity", "rules": (GroupRule("floor_factor", 4),)}
    write_export(tiny_trained(tmp_path / "run", **changes), tmp_path / "export")
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[], pooling_factor=3)
    assert model.spec.rules == (GroupRule("floor_factor", 3),)


def test_logits_are_float32_at_text_tokens_and_see_the_context(model: ArcModel) -> None:
    context, other = Segment.context([4, 8, 15, 16, 23]), Segment.context([42, 1, 2, 3, 4])
    text = [Segment.text([7, 8]), Segment.text([9])]
    found = model.logits([[text[0], context, text[1]], [text[0], other, text[1]], [context, text[1]]])
    assert [tuple(logits.shape) for logits in found] == [(3, 350), (3, 350), (1, 350)]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=1e-5)
    assert (found[0][2] - found[1][2]).abs().max() > 1e-3
    assert model.logits([]) == []


def test_text_alone_is_the_decoder_as_it_is(model: ArcModel) -> None:
    (alone,) = model.logits([[Segment.text([7, 8, 9])]])
    beside, _ = model.logits([[Segment.text([7, 8, 9])], [Segment.context([1, 2]), Segment.text([3])]])
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


def test_adapters_of_an_export_are_in_the_decoders_weights_and_other_engines_are_refused(tmp_path: Path) -> None:
    lora = DecoderLora.of(DECODER, rank=2, scale=0.5)
    trained = tiny_trained(tmp_path / "run", decoder_sizes=(48, 48), adapters=(lora, None))
    write_export(trained, tmp_path / "export")
    paths = [write_decoder(tmp_path / "a"), write_decoder(tmp_path / "b", seed=2)]
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=paths)
    sequence = [Segment.text([7, 8]), Segment.context([4, 8, 15]), Segment.text([9])]
    base, other = (open_decoder(path, "checkpoint").load(model.device, torch.float32) for path in paths)
    assert isinstance(base, Decoder)
    batch, z_ZD = pack_rows(model._rows([sequence], 0), model.device, torch.float32)
    frozen = base.logits(batch, z_ZD, batch.text_rows)
    given = [trained.tensors[f"ports.0.adapters.{leaf}_{part}"] for leaf, *_ in lora.linears for part in "ab"]
    base.use_adapters(lora, [as_lazy(tensor).whole() for tensor in given])
    wanted, (found,) = base.logits(batch, z_ZD, batch.text_rows), model.logits([sequence])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - frozen).abs().max() > 1e-2
    for name, parameter in model.decoders[1].named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    embedding = ArcModel.from_checkpoint(tmp_path / "export", decoders=paths, decoder_parts="embedding")
    for each in (model, embedding):
        with pytest.raises(ConfigError, match="decoder 0 has adapters.*use `generate`"):
            each.prompt_embeds([["text"]])
        assert len(each.prompt_embeds([["text"]], decoder=1)) == 1
    deeper = write_decoder(tmp_path / "deeper", num_layers=3)
    with pytest.raises(WeightsError, match="adapters in .* do not fit the layers of decoder .*/deeper"):
        ArcModel.from_checkpoint(tmp_path / "export", decoders=[deeper])
    with pytest.raises(WeightsError, match="no adapters of decoders"):
        write_export(trained, tmp_path / "arc", export_format="arc")
    assert with_decoders(trained, ["decoder0"]).spec.adapters == (lora,)
    assert with_decoders(trained, ["decoder1"]).spec.adapters == ()


def test_a_decoder_trained_without_begin_of_text_is_prompted_without_it(folders: Path, model: ArcModel) -> None:
    config = folders / "export" / "config.json"
    described = json.loads(config.read_text())
    described["decoders"][0]["bos"] = False
    without = shutil.copytree(folders / "export", folders / "without_bos", dirs_exist_ok=True)
    (without / "config.json").write_text(json.dumps(described))
    other = ArcModel.from_checkpoint(without, decoders=[folders / "a"])
    (tokenizer,) = other.decoder_tokenizers
    assert tokenizer is not None and tokenizer.bos_id == 0
    (ids,) = other.generate_ids([[Segment.text(tokenizer.encode("Text: "))]], max_new_tokens=9)
    assert other.generate(["Text: "], max_new_tokens=9) == [tokenizer.decode(ids)]
    assert other.generate(["Text: "], max_new_tokens=9) != model.generate(["Text: "], max_new_tokens=9)


@pytest.mark.parametrize(("decoder", "bos"), [(0, [0]), (1, [])])
def test_generated_text_is_that_of_the_ids_with_begin_of_text_if_there_is_one(
    model: ArcModel, decoder: int, bos: list[int]
) -> None:
    tokenizer = model.decoder_tokenizers[decoder]
    assert tokenizer is not None and tokenizer.bos_id == (0 if bos else None)
    prompt = [Segment.text([*bos, *tokenizer.encode("Text: ")]), Segment.context(tokenizer_of(model).encode(OTHER))]
    (ids,) = model.generate_ids([prompt], decoder, max_new_tokens=9, stop_ids=model.decoder_stop_ids[decoder])
    assert model.generate([["Text: ", Context(OTHER)]], decoder, max_new_tokens=9) == [tokenizer.decode(ids)]
    assert model.generate([prompt], decoder, max_new_tokens=9) == [tokenizer.decode(ids)]


def test_prompts_of_every_kind_share_a_batch(model: ArcModel) -> None:
    prompts = ["Text: ", Context(OTHER), ["The ", Context(TEXT, "rec"), " sea"], [Segment.text([5, 6])]]
    together = model.generate(prompts, max_new_tokens=6)
    assert together == [model.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(together)) == 4
    assert model.generate([]) == [] and model.generate_ids([]) == []


def test_ids_of_every_kind_are_the_same_context(model: ArcModel) -> None:
    ids = [3, 11, 19, 27]
    (expected,) = model.compress([ids])
    for kind in (tuple(ids), range(3, 28, 8), np.array(ids), np.array(ids, dtype=np.uint16), torch.tensor(ids)):
        assert torch.equal(model.compress([kind])[0], expected)
    for both in (np.array([ids, ids]), torch.tensor([ids, ids])):
        for vectors in model.compress(both):
            torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)


NO_IDS = [b"abc", bytearray(b"abc"), [1.0, 2.5], [True, False], np.array([1.5]), torch.tensor([1.5]), torch.tensor(3)]
NO_IDS += [np.array([[1, 2]]), [[1, 2], [3]], [2**70], ["a"], None, 5, {1, 2}, Path("a.txt"), Context("a")]


@pytest.mark.parametrize("context", NO_IDS, ids=repr)
def test_what_are_no_token_ids_is_not_read_as_such(model: ArcModel, context) -> None:
    with pytest.raises(DataError, match=r"context 1: token ids are a .*; expected a flat sequence of whole numbers"):
        model.compress([[1], context])
    for segment in (Segment.text, Segment.context):
        with pytest.raises(DataError, match="token ids are a"):
            segment(context)


def test_every_stop_ends_a_continuation_and_is_left_out(model: ArcModel) -> None:
    tokenizer = model.decoder_tokenizers[0]
    assert tokenizer is not None and model.decoder_stop_ids == [(1,), (1,)]
    ids = model.generate_ids([model.segments("Text: ", 0)], max_new_tokens=12)[0]
    text, token = tokenizer.decode(ids), ids[5]
    assert len(text) > 8 and ids.index(token) > 0
    (by_id,) = model.generate(["Text: "], max_new_tokens=12, stop_ids=[token])
    assert by_id == tokenizer.decode(ids[: ids.index(token)])
    for stop in (text[3], text[2:6], text[-2:]):  # the parts do not begin or end with tokens
        assert model.generate(["Text: "], max_new_tokens=12, stop=["nowhere", stop]) == [text[: text.index(stop)]]
    assert model.generate(["Text: "], max_new_tokens=12, stop=["nowhere"]) == [text]


def test_a_stop_text_ends_each_line_for_itself(model: ArcModel) -> None:
    prompts = ["Text: ", Context(OTHER)]
    free = model.generate(prompts, max_new_tokens=12)
    stop = next(letter for letter in free[0] if letter not in free[1])
    cut = model.generate(prompts, max_new_tokens=12, stop=[stop])
    assert cut == [free[0][: free[0].index(stop)], free[1]] and cut != free


def test_a_special_token_stops_by_its_name(folders: Path, model: ArcModel) -> None:
    ids = model.generate_ids([model.segments("Text: ", 0)], max_new_tokens=4)[0]
    renamed = ArcModel.from_checkpoint(folders / "export", decoders=[folders / "a"])
    tokenizer = renamed.decoder_tokenizers[0]
    assert tokenizer is not None
    tokenizer.special_ids = {"<|turn|>": ids[2]}
    first = ids.index(ids[2])
    assert renamed.generate(["Text: "], max_new_tokens=4, stop=["<|turn|>"]) == [tokenizer.decode(ids[:first])]


def test_ends_that_the_decoders_files_name_stop_generate(folders: Path, model: ArcModel, tmp_path: Path) -> None:
    first = model.generate_ids([model.segments("Text: ", 0)], max_new_tokens=1)[0][0]
    decoder = shutil.copytree(folders / "a", tmp_path / "a")
    (decoder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first, 9999]}))
    ended = ArcModel.from_checkpoint(folders / "export", decoders=[decoder])
    assert ended.generate(["Text: "], max_new_tokens=4) == [""] != model.generate(["Text: "], max_new_tokens=4)
    assert ended.decoder_stop_ids == [tuple(sorted((1, first)))]


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
def test_a_context_beyond_those_of_training_is_one_warning(tmp_path: Path, caplog, export_format: str) -> None:
    trained = dataclasses.replace(tiny_trained(tmp_path / "run"), max_context_tokens=20)
    write_export(trained, tmp_path / "export", export_format=export_format)
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[])
    with caplog.at_level(logging.WARNING):
        model.compress([[1] * 20])
        assert not caplog.messages
        model.compress([[1], [2] * 1500])
        model.compress([[1] * 1500])
    (message,) = caplog.messages
    assert "a context has 1,500 tokens; the encoder was trained on contexts of up to 20" in message
    assert "Cut it into contexts of at most 20 tokens" in message


def test_without_a_record_of_training_only_unusual_lengths_are_named(model: ArcModel, caplog) -> None:
    assert model.max_context_tokens is None
    with caplog.at_level(logging.WARNING):
        model.compress([[1] * 2048])
        assert not caplog.messages
        model.compress([[1] * 2049])
    assert "a context has 2,049 tokens; its training is not recorded" in caplog.text


def test_a_sequence_beyond_the_decoders_positions_is_one_warning(folders: Path, tmp_path: Path, caplog) -> None:
    decoder = shutil.copytree(folders / "a", tmp_path / "a")
    config = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    model = ArcModel.from_checkpoint(folders / "export", decoders=[decoder])
    text = [Segment.text([5] * 30)]
    with caplog.at_level(logging.WARNING):
        model.logits([text])
        assert not caplog.messages
        for _ in range(2):
            model.generate_ids([text], max_new_tokens=1)
    (message,) = caplog.messages
    assert "30 tokens and vectors, and up to 1 new tokens; decoder 0 was trained on at most 30 positions" in message


def test_bfloat16_is_close_and_gives_float32_logits(folders: Path, model: ArcModel) -> None:
    half = ArcModel.from_checkpoint(folders / "export", decoders=[folders / "a"], dtype=torch.bfloat16)
    (ours,), (expected,) = half.compress([TEXT]), model.compress([TEXT])
    assert ours.dtype == torch.bfloat16
    assert 0 < (ours.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert half.logits([[Segment.text([7, 8])]])[0].dtype == torch.float32


def test_loading_changes_nothing_and_trains_nothing(folders: Path, model: ArcModel) -> None:
    source = open_backbone(folders / "a")
    for name, parameter in model.decoders[0].named_parameters():
        assert torch.equal(parameter, source.tensor(name)) and not parameter.requires_grad, name
    assert not any(p.requires_grad for p in model.compressor.parameters())
    assert not model.compress([TEXT])[0].requires_grad


WRONG_CALLS = [
    (lambda m: m.compress("one text"), DataError, r"contexts is one str; expected a list"),
    (lambda m: m.compress(b"bytes"), DataError, r"contexts is one bytes; expected a list"),
    (lambda m: m.compress(None), DataError, r"contexts is one NoneType; expected a list"),
    (lambda m: m.compress([TEXT, ""]), DataError, "context 1 is empty"),
    (lambda m: m.compress([[]]), DataError, "context 0 is empty"),
    (lambda m: m.compress([TEXT, "a\ud83d"]), DataError, r"context 1 holds characters that UTF-8 .* at character 1"),
    (lambda m: m.generate([[Context("\udc80")]]), DataError, "a context of prompt 0 holds characters that UTF-8"),
    (lambda m: m.generate(["a", ["b\udc80"]]), DataError, "prompt 1 holds characters that UTF-8"),
    (lambda m: m.generate(["a"], stop=["\udc80"]), DataError, "a stop holds characters that UTF-8"),
    (lambda m: m.generate([None]), DataError, "prompt 0 is a NoneType; expected a str"),
    (lambda m: m.generate([b"a"]), DataError, "got a int"),
    (lambda m: m.compress([[600]]), DataError, "token ids 600 to 600 for the encoder; expected 0 to 599"),
    (lambda m: m.compress([[-1, 5]]), DataError, "token ids -1 to 5 for the encoder"),
    (lambda m: m.compress([TEXT], decoder=2), ConfigError, "decoder 2 was requested; the compressor serves 2"),
    (lambda m: m.compress([TEXT], decoder=-1), ConfigError, "decoder -1 was requested"),
    (lambda m: m.compress([TEXT], marker="mid"), ConfigError, "marker is 'mid'; this compressor has cont and rec"),
    (lambda m: m.logits([[]]), DataError, "sequence 0 is empty"),
    (lambda m: m.logits([[Segment.text([350])]]), DataError, "for the decoder; expected 0 to 349"),
    (lambda m: m.logits([[Segment.text([1])]], decoder=2), ConfigError, "loaded with 2 of its 2"),
    (lambda m: m.logits([[Segment.text([1])]], decoder=-1), ConfigError, "decoder -1 was requested"),
    (lambda m: m.generate(["a"], decoder=-1), ConfigError, "decoder -1 was requested"),
    (lambda m: m.generate_ids([[Segment.text([1])]], decoder=-1), ConfigError, "decoder -1 was requested"),
    (lambda m: m.generate(["a"], decoder="0"), ConfigError, "decoder '0' was requested"),
    (lambda m: m.generate("one prompt"), DataError, "prompts is one str"),
    (lambda m: m.generate_ids("ab"), DataError, "prompts is one str"),
    (lambda m: m.generate_ids(["ab"]), DataError, r"prompts\[0\] holds a str; expected Segment"),
    (lambda m: m.generate_ids([Segment.text([1])]), DataError, r"prompts\[0\] is one Segment; expected a list"),
    (lambda m: m.generate_ids([[Context("a")]]), DataError, r"prompts\[0\] holds a Context; expected Segment"),
    (lambda m: m.logits([["ab"]]), DataError, r"sequences\[0\] holds a str; expected Segment"),
    (lambda m: m.logits([3]), DataError, r"sequences\[0\] is one int; expected a list of Segment"),
    (lambda m: m.logits(Segment.text([1])), DataError, "sequences is one Segment; expected a list"),
    (lambda m: m.generate([""], decoder=1), DataError, "sequence 0 is empty"),
    (lambda m: m.generate([["a", Segment.text([1])]]), DataError, "of Segment only; got a Segment"),
    (lambda m: m.generate(["a"], temperature=-1.0), ConfigError, "temperature is -1.0"),
    (lambda m: m.generate(["a"], seed=2**64), ConfigError, "seed is 18446744073709551616; expected a whole number"),
    (lambda m: m.generate(["a"], max_new_tokens=-1), ConfigError, "max_new_tokens is -1"),
    (lambda m: m.generate([], max_new_tokens=2**40), ConfigError, "max_new_tokens is 1099511627776"),
    (lambda m: m.generate(["a"], max_new_tokens=2**31 - 1), ConfigError, "GiB can be used. Lower max_new_tokens"),
    (lambda m: m.generate(["a"], stop_ids=[350]), ConfigError, "a stop id is 350; expected .* from 0 to 349"),
    (lambda m: m.generate_ids([[Segment.text([1])]], stop_ids=[1.5]), ConfigError, "a stop id is 1.5"),
    (lambda m: m.generate(["a"], stop="end"), ConfigError, "stop is 'end'; expected a list of texts"),
    (lambda m: m.generate(["a"], stop=5), ConfigError, "stop is 5; expected a list of texts"),
    (lambda m: m.generate(["a"], stop_ids=5), ConfigError, "stop_ids is 5; expected a list of token ids"),
    (lambda m: m.generate(["a"], stop=[""]), ConfigError, r"stop is \[''\]; expected a list of texts"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG_CALLS)
def test_a_wrong_call_is_one_clear_error(model: ArcModel, call, kind, message: str) -> None:
    with pytest.raises(kind, match=message):
        call(model)


def test_decoders_that_are_not_its_own_are_refused(folders: Path, tmp_path: Path) -> None:
    wide = write_decoder(tmp_path / "wide", hidden_size=32, head_dim=8)
    with pytest.raises(WeightsError, match=r"wide has width 32; the bridge in .* maps to width 48"):
        ArcModel.from_checkpoint(folders / "export", decoders=[wide])
    with pytest.raises(WeightsError, match="serves 2 decoders; 3 were given"):
        ArcModel.from_checkpoint(folders / "export", decoders=[folders / "a"] * 3)
    with pytest.raises(WeightsError, match="does not exist"):
        ArcModel.from_checkpoint(folders / "export", decoders=[tmp_path / "gone"])
    small = write_decoder(tmp_path / "small", vocab_size=300)
    with pytest.raises(TokenizerError, match="do not belong together"):
        ArcModel.from_checkpoint(folders / "export", decoders=[small])


def test_an_encoders_tokenizer_that_does_not_fit_is_refused(folders: Path, tmp_path: Path) -> None:
    export = shutil.copytree(folders / "export", tmp_path / "export")
    larger = [b"%d" % number for number in range(100, 999)]
    write_tiktoken(export / "tokenizer.model", more=larger)
    with pytest.raises(TokenizerError, match=r"the encoder in .*export: .* texts have ids up to \d+.*only 600 rows"):
        ArcModel.from_checkpoint(export, decoders=[])


def test_memory_tokens_have_no_pooling_factor(tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run", rules=(), memory_tokens=3), tmp_path / "export")
    with pytest.raises(ConfigError, match="this one has 3 memory tokens"):
        ArcModel.from_checkpoint(tmp_path / "export", decoders=[], pooling_factor=4)
    assert ArcModel.from_checkpoint(tmp_path / "export", decoders=[]).compress([TEXT])[0].shape == (4, 48)


def test_without_tokenizers_ids_still_work(folders: Path, tmp_path: Path) -> None:
    decoder = write_decoder(tmp_path / "decoder")
    (decoder / "tokenizer.json").unlink()
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "export")
    (tmp_path / "export" / "tokenizer.model").unlink()
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[decoder])
    assert len(model.generate_ids([[Segment.context([1, 2, 3])]], max_new_tokens=3)[0]) == 3
    with pytest.raises(TokenizerError, match="the encoder has no tokenizer"):
        model.compress([TEXT])
    with pytest.raises(TokenizerError, match="decoder 0 was loaded without a tokenizer"):
        model.generate([TEXT])


def test_only_the_decoders_that_are_wanted_need_be_given(folders: Path) -> None:
    model = ArcModel.from_checkpoint(folders / "export", decoders=[folders / "a"])
    assert model.compress([TEXT], decoder=1)[0].shape[1] == DECODER.hidden_size
    with pytest.raises(ConfigError, match="loaded with 1 of its 2"):
        model.logits([[Segment.text([1])]], decoder=1)


def test_the_references_checkpoint_wants_the_encoders_sizes(golden: Path) -> None:
    folder = golden / "arc_checkpoints" / "arc_mlp" / "checkpoints" / "checkpoint_000010"
    with pytest.raises(WeightsError, match="encoder_backbone"):
        ArcModel.from_checkpoint(folder, decoders=[])
    model = ArcModel.from_checkpoint(folder, decoders=[], encoder_backbone=golden / "models" / "enc")
    assert model.compress([[1, 2, 3, 4, 5]])[0].shape == (3, 96)
    with pytest.raises(WeightsError):
        ArcModel.from_checkpoint(folder, decoders=[], encoder_backbone=golden / "models" / "decM")
