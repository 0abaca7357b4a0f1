"""The server as a process: many clients at once, and a stop in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from arc_ds import ArcModel, Context
from arc_ds.export.formats import write_export
from tests.helpers.served import ask
from tests.helpers.tiny_data import TEXT
from tests.helpers.tiny_export import tiny_trained, write_decoder
from tests.helpers.waiting import LIMIT_S, wait_for

NUM_CLIENTS = 200
DOCUMENTS = ["".join(random.Random(n).choices(TEXT, k=40 + n)) for n in range(20)]
TOKENS = 16
# `arc-ds serve` whose answers wait after 20 tokens while a file exists.
HELD = """
import sys, time
from pathlib import Path
from arc_ds import cli
from arc_ds.serving.generation import AnswerText

update = AnswerText.update

def update_held(text, ids):
    while len(ids) > 20 and Path(sys.argv[1]).exists():
        time.sleep(0.01)
    return update(text, ids)

AnswerText.update = update_held
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_export(tiny_trained(folder / "run"), folder / "export")
    write_decoder(folder / "decoder")
    return folder


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:  # type: ignore[type-arg]
    """A running `arc-ds serve`, and its address without /v1. The last test stops it."""
    command = [sys.executable, "-c", HELD, str(folder / "hold"), "serve"]
    command += ["--model", str(folder / "export"), "--port", "0"]
    started = subprocess.Popen(
        [*command, "--decoder", str(folder / "decoder")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = started.stdout.readline()
        found = re.search(r"at (http://\S+)/v1", line)
        assert found, line
        yield started, found.group(1)
    finally:
        started.kill()
        started.wait()


def test_200_clients_at_once_get_the_tokens_of_generate(process, folder: Path) -> None:
    _, url = process
    model = ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"])
    prompts = [["Document: ", Context(text), "\nQuestion: Which?\nAnswer:"] for text in DOCUMENTS]
    texts = [text.removeprefix(" ") for text in model.generate(prompts, max_new_tokens=TOKENS, stop=["\n\n"])]
    assert len(set(texts)) > 5

    async def one(client: openai.AsyncOpenAI, n: int) -> str:
        found = await client.chat.completions.create(
            model="export",
            messages=[{"role": "user", "content": "Which?"}],
            max_tokens=TOKENS,
            extra_body={"documents": [DOCUMENTS[n % len(DOCUMENTS)]]},
        )
        return found.choices[0].message.content or ""

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, n) for n in range(NUM_CLIENTS)))

    assert asyncio.run(everyone()) == [texts[n % len(texts)] for n in range(NUM_CLIENTS)]
    metrics = ask(url, "/metrics").raw.decode()
    lookups = {place: int(float(n)) for place, n in re.findall(r'cache_lookups_total{found="(\w+)"} (\S+)', metrics)}
    assert lookups["nowhere"] == len(DOCUMENTS) and sum(lookups.values()) == NUM_CLIENTS, "the others were hits"


def test_sigterm_finishes_the_answers_that_run_and_exits_with_0(process, folder: Path) -> None:
    started, url = process
    (folder / "hold").touch()
    events: list[str] = []
    begun = threading.Event()

    def read() -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="export", prompt="<context>A lamp.</context> So", max_tokens=30, stream=True
        )
        for chunk in stream:
            events.append(chunk.choices[0].finish_reason or "")
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(LIMIT_S)
    started.send_signal(signal.SIGTERM)
    wait_for(lambda: ask(url, "/health").status == 503)
    reply = ask(url, "/v1/completions", {"prompt": "x"})
    assert reply.status == 503 and reply.error["code"] == "stopping" and json.loads(reply.raw)
    assert started.poll() is None and reader.is_alive(), "the answer runs on"
    (folder / "hold").unlink()
    reader.join(LIMIT_S)
    assert events[-1] in ("length", "stop") and len(events) > 20
    assert started.wait(LIMIT_S) == 0
