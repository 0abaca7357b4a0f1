"""FLORES: the same sentences in many languages.

`flores` is English to Spanish, French, German and Danish, as in the paper. `flores:SOURCE-TARGET` is any other pair. A
direction is a group, and a sentence is a cluster: it is the same one in all directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.datasets.languages import LANGUAGES
from arc_ds.evaluation.datasets.reading import Entry, Layout, first_of, make_samples, read_entries
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask
from arc_ds.system.user_files import read_user_text

_LINES = (".dev", ".devtest", ".txt")  # endings of files with one sentence a line
_PAPER = tuple(("eng_Latn", target) for target in ("spa_Latn", "fra_Latn", "deu_Latn", "dan_Latn"))


def read_flores(path: Path, protocol: Protocol, *, name: str, pairs: Sequence[tuple[str, str]]) -> list[EvalSample]:
    """The sentences of all pairs, one pair after the other. See `EvalTask.read`.

    path: a folder with one file a language (lines in `eng_Latn.dev`, `.devtest` or `.txt`; JSON lines or Parquet with a
        field `text`), or files of rows with a field `sentence_CODE` for each language.
    name: name of the task.
    pairs: codes of source and target language.

    Raises DataError if a language is missing, occurs twice, or has another number of sentences.
    """
    codes = tuple(dict.fromkeys(chain.from_iterable(pairs)))
    files = {code: _files(path, code) for code in codes} if path.is_dir() else {}
    if any(files.values()):
        sentences = {code: _sentences(path, code, found) for code, found in files.items()}
    else:
        sentences = _columns(path, codes)
    lengths = {code: len(texts) for code, texts in sentences.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{path}: the languages have different numbers of sentences: {lengths}. Their files must be parallel: "
            "pass those of one split."
        )
    return make_samples(name, _entries(path, sentences, pairs))


def flores_task(pair: str) -> EvalTask:
    """The task of a pair such as "eng-fra", "eng_Latn-zho_Hans". Raises ConfigError for an unknown language."""
    source, dash, target = pair.partition("-")
    if not dash:
        raise ConfigError(f"flores:{pair}: expected flores:SOURCE-TARGET, such as flores:eng-fra.")
    name = f"flores:{pair}"
    return _task(name, ((_code(source, name), _code(target, name)),))


def _code(language: str, name: str) -> str:
    """The whole code of a language. The script may be left out if there is one only, or if one is Latin."""
    found = [code for code in LANGUAGES if code == language or code.partition("_")[0] == language]
    latin = [code for code in found if code.endswith("_Latn")]
    if len(found) != 1 and len(latin) != 1:
        known = f"one of {', '.join(found)}" if found else "a code of FLORES-200, such as fra_Latn"
        raise ConfigError(f"{name}: {language!r} is no language of FLORES; expected {known}.")
    return found[0] if len(found) == 1 else latin[0]


def _task(name: str, pairs: Sequence[tuple[str, str]]) -> EvalTask:
    return EvalTask(name=name, read=partial(read_flores, name=name, pairs=pairs))


def _files(folder: Path, code: str) -> list[Path]:
    return sorted(path for path in folder.rglob(f"{code}.*") if path.is_file())


def _sentences(folder: Path, code: str, files: Sequence[Path]) -> list[str]:
    """The sentences of the only file of a language."""
    if len(files) != 1:
        found = f"the files {', '.join(str(path.relative_to(folder)) for path in files)}" if files else "none"
        raise DataError(f"{folder}: expected one file {code}.*, found {found}. Pass the folder of one split.")
    if files[0].suffix in _LINES:
        text = read_user_text(files[0], DataError, remedy="Download it again.")
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")  # other line ends stand within sentences
    layout = Layout(
        name="sentences of one language",
        fields=("text|sentence",),
        read=lambda fields: [Entry(passages=(), answers=(first_of(fields, ("text", "sentence")),))],
    )
    return [entry.answers[0] for _, entry in read_entries((layout,), files[0])]


def _columns(path: Path, codes: Sequence[str]) -> dict[str, list[str]]:
    """The sentences of files of rows, by language."""
    names = [f"sentence_{code}" for code in codes]
    layout = Layout(
        name="one row a sentence",
        fields=tuple(names),
        read=lambda fields: [Entry(passages=(), answers=tuple(fields[name] for name in names))],
    )
    rows = [entry.answers for _, entry in read_entries((layout,), path)]
    return {code: [row[idx] for row in rows] for idx, code in enumerate(codes)}


def _entries(
    path: Path, sentences: dict[str, list[str]], pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, Entry]]:
    for source, target in pairs:
        group = f"{_short(source)}-{_short(target)}"
        for idx, (text, translation) in enumerate(zip(sentences[source], sentences[target], strict=True)):
            yield (
                f"{path}, sentence {idx + 1}",
                Entry(
                    id=f"{group}-{idx:05d}",
                    question=f"Translate the previous document into {LANGUAGES[target]}.",
                    passages=(text,),
                    answers=(translation,),
                    cluster=f"sentence-{idx:05d}",
                    group=group,
                ),
            )


def _short(code: str) -> str:
    """The code without the script if the language has one script only."""
    language = code.partition("_")[0]
    return language if sum(other.startswith(f"{language}_") for other in LANGUAGES) == 1 else code


TASKS = (_task("flores", _PAPER),)
