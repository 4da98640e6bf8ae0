"""The page on which one watches sampling: its questions over HTTP, and itself in a real browser."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_gpt import cli
from lit_gpt.checkpoints.export import export_weights
from lit_gpt.checkpoints.weights import read_model
from lit_gpt.config import Config
from lit_gpt.files import write_json
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.sampling.sample import sample_states
from lit_gpt.sampling.settings import ALGORITHMS, Sampling
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui import page_server
from lit_gpt.ui.page import PageModels, find_checkpoints
from scripts import web
from tests.support.checkpoint_files import make_model, run_record, write_run_checkpoint
from tests.support.small_models import export_arm_and_mdm
from tests.support.training_runs import restore_interrupts

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A thousand passes over a thousand tokens: much longer than the server's patience of 5 s, on any machine.
LONG = {"algorithm": "greedy", "steps": 4096, "context_length": 1024}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights in folders of their own, and a file that is no model."""
    folder = tmp_path_factory.mktemp("models")
    paths = export_arm_and_mdm(folder, block_size=1024)
    del paths["tokenizer"]
    save_file({"x": torch.zeros(2)}, folder / "foreign.safetensors")
    return paths


class Running:
    """The script in a process of its own."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        command = [sys.executable, str(ROOT / "scripts" / "web.py"), "--models", str(folder), "--port", "0"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            bufsize=1,
            preexec_fn=restore_interrupts,
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        found = re.fullmatch(r"(\d) checkpoints: (http://127\.0\.0\.1:(\d+)/) \(Ctrl-C ends\)\n", first)
        assert found, first + (self.process.stderr.read() if self.process.stderr else "")
        self.count, self.url, self.port = int(found[1]), found[2], int(found[3])
        self.log: list[str] = []
        threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True).start()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = {"content-type": "application/json"} if body is not None else {}
        text = body if body is None or isinstance(body, str) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, kind | (headers or {}))
        return connection.getresponse()

    def generate(self, path: Path, prompt: str = "", **sampling: Any) -> http.client.HTTPResponse:
        return self.ask("/api/generate", {"checkpoint": str(path), "prompt": prompt, "sampling": sampling})

    def wait_for(self, words: str) -> None:
        limit = time.monotonic() + 20
        while not any(words in line for line in self.log):
            assert time.monotonic() < limit, self.log
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(models, tmp_path_factory) -> Iterator[Running]:
    """Started elsewhere than in the checkout: the page is found beside the script."""
    running = Running(models["arm"].parents[1], tmp_path_factory.mktemp("elsewhere"))
    yield running
    running.process.send_signal(signal.SIGINT)
    _, err = running.process.communicate(timeout=20)
    assert running.process.returncode == 130
    lines = err.splitlines()
    assert len(lines) == 2 and "passed over" in lines[0] and "foreign" in lines[0] and lines[1] == "interrupted", err


def rows_of(lines: list[dict[str, Any]]) -> list[list[int]]:
    """The token ids of every state, put together from the changes."""
    rows: list[list[int]] = []
    row: list[int] = []
    for line in lines:
        for position, text, confidence, token in line["changes"]:
            assert 0 <= confidence <= 1 and position <= len(row)
            assert (text is None) == (token == 512)
            row[position : position + 1] = [token]
        assert line["masked"] == row.count(512)
        rows.append(list(row))
    return rows


def read(answer: http.client.HTTPResponse) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All states, and the last line."""
    assert answer.status == 200, answer.read()
    *states, last = map(json.loads, answer.read().splitlines())
    assert last["done"] and last["elapsed_s"] >= 0
    steps = [state["step"] for state in states]
    assert steps[0] == 0 and steps == sorted(set(steps))
    return states, last


# --- over HTTP ----------------------------------------------------------------------------------------------------


def test_the_page_is_one_file(server):
    answer = server.ask("/")
    text = answer.read().decode()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert text == (ROOT / "lit_gpt" / "ui" / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|@import|<script src|<link (?!rel=\"icon\" href=\"data:)", text)


def test_the_form_has_every_setting(server, models):
    options = json.loads(server.ask("/api/options").read())
    found = {(one["name"], one["kind"], one["block_size"]) for one in options["checkpoints"]}
    assert found == {(str(path), kind, 1024) for kind, path in models.items()}
    names = {control["name"]: control for control in options["controls"]}
    # A new field of `Sampling` that nobody thought of here must turn up by itself.
    simple = {field.name for field in dataclasses.fields(Sampling) if re.search(r"int|float|bool|str", field.type)}
    assert set(names) == simple | {"context_length"}
    assert names["algorithm"]["choices"] == list(ALGORITHMS)
    assert (names["steps"]["type"], names["steps"]["default"], names["steps"]["only"]) == ("int", 128, "mdm")
    assert names["use_cache"]["only"] == "arm" and names["temperature"]["only"] is None
    assert (names["threshold"]["only"], names["threshold"]["with"]) == ("mdm", "threshold")
    assert names["cache"]["only"] == "mdm" and "dual" in names["cache"]["choices"]
    assert all(control["group"] != "others" for control in names.values()), "each setting is in a group"
    assert all(control["help"] and not re.match("MDM|ARM", control["help"]) for control in names.values())


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_it_says_what_the_sampler_does(server, models, kind):
    prompt, settings = "My lord,", {"temperature": 0.7, "seed": 5, "context_length": 40}
    states, last = read(server.generate(models[kind], prompt, **{name: str(value) for name, value in settings.items()}))
    model, record = read_model(models[kind])
    tokenizer = Tokenizer(record.tokenizer["source"])
    ids = tokenizer.encode_ids(prompt)
    length = settings.pop("context_length")
    seen = list(sample_states(model, [ids], Sampling(**settings), length, tokenizer.eos_id))
    assert rows_of(states) == [state.tokens()[0].tolist() for state in seen]
    assert last["text"] == tokenizer.decode(seen[-1].tokens()[0])
    shown = "".join(text for _, text, _, _ in sorted(states[0]["changes"]) if text is not None)
    assert shown == prompt, "the tokens' texts are the prompt's, without the tokenizer's space"


def test_gaps_are_filled(server, models):
    states, last = read(server.generate(models["mdm"], "My ___5 lord", steps=7))
    assert states[0]["masked"] == 5 and states[-1]["masked"] == 0 and 1 < len(states) <= 8
    assert last["text"].startswith("My") and last["text"].endswith(" lord")


def test_gaps_have_as_many_steps_as_tokens_unless_told(server, models):
    for settings, steps in (({}, 5), ({"steps_per_token": 0}, 5), ({"steps": 9}, 9), ({"steps_per_token": 2}, 10)):
        states, _ = read(server.generate(models["mdm"], "My ___5 lord", algorithm="greedy", **settings))
        assert states[-1]["step"] == steps, settings


def test_a_space_typed_before_a_gap_is_kept(server, models):
    """Whatever the model begins the gap with; one typed space is one space, and none is none."""
    for prompt, seed in (("My ___2 lord", 3), ("My lord, ___1", 4), ("My___2 lord", 3), ("My ___2 lord ___2", 5)):
        states, last = read(server.generate(models["mdm"], prompt, seed=seed))
        shown = {change[0]: change[1] for state in states for change in state["changes"]}
        tokens = {change[0]: change[3] for state in states for change in state["changes"]}
        tokenizer = Tokenizer(read_model(models["mdm"])[1].tokenizer["source"])
        plain = tokenizer.decode([tokens[position] for position in sorted(tokens)])
        assert "".join(shown[position] for position in sorted(shown)) == last["text"]
        before = prompt[: prompt.index("___")]
        assert last["text"].startswith(before) and (before.endswith(" ") or last["text"] == plain)


def test_a_small_probability_keeps_its_digits(server, models):
    states, _ = read(server.generate(models["mdm"], "My lord", context_length=40))
    seen = [value for state in states for _, text, value, _ in state["changes"] if text is not None]
    assert any(0 < value < 0.01 and round(value, 4) != value for value in seen)


def test_an_mdm_may_stop_at_its_tokenizers_end_token(server, models):
    _, last = read(server.generate(models["mdm"], "My lord", early_stop=True, block_length=16, context_length=64))
    assert last["text"].startswith("My lord")


def test_tokens_may_be_masked_again(server, models):
    settings = {"remask": 0.3, "steps": 30, "context_length": 40, "temperature": 2}
    states, _ = read(server.generate(models["mdm"], "My lord", **settings))
    again = [change for state in states[1:] for change in state["changes"] if change[1] is None]
    assert again and all(confidence == 0 for _, _, confidence, _ in again)
    rows_of(states)


def test_an_empty_form_will_do(server, models):
    for path in models.values():
        states, _ = read(server.generate(path, context_length="", seed=None))
        assert len(rows_of(states)[-1]) <= 128


MISTAKES = {
    "steps": ({"steps": 0}, {}, "steps is 0: at least 1 is needed"),
    "too many steps": ({"steps": 10**7}, {}, "shows at most 4096"),
    "no number": ({"steps": "ten"}, {}, "steps: expected int, got 'ten'"),
    "half a step": ({"steps": 1.5}, {}, "steps: expected int, got '1.5'"),
    "nan": ({"temperature": float("nan")}, {}, "it holds the number NaN, which is not finite"),
    "sampler": ({"algorithm": "best"}, {}, "unknown sampling algorithm 'best': choose from origin, greedy"),
    "parameter": ({"stepps": 3}, {}, "unknown parameter stepps: known are context_length, algorithm"),
    "flag": ({"use_cache": "maybe"}, {}, "use_cache: expected bool"),
    "list": (["steps"], {}, "sampling: expected an object, got list"),
    "context": ({"context_length": 1025}, {}, "context length 1025: this model reads from 1 to 1024"),
    "prompt": ({}, {"prompt": "a long one " * 200}, "tokens, more than the context length 128"),
    "no text": ({}, {"prompt": 5}, "prompt: expected text, got int"),
    "huge": ({}, {"prompt": "a" * 1_100_000}, "longer than 1,000,000 bytes"),
    "gap": ({}, {"prompt": "___0"}, "gap ___0 has 0 tokens"),
    "huge gap": ({"context_length": 10**8}, {"prompt": "___99999999"}, "more than the context length 1024"),
    "endless gap": ({}, {"prompt": "___" + "9" * 5000}, "a gap's number has 5000 digits"),
    "no gaps": ({}, {"checkpoint": "arm", "prompt": "a ___ b"}, "an ARM writes from left to right"),
    "guidance": ({"cfg_scale": 1}, {"checkpoint": "arm"}, "cfg_scale 1.0 needs an MDM"),
    "elsewhere": ({}, {"checkpoint": "/etc/passwd"}, "no checkpoint '/etc/passwd': choose one of the list"),
    "foreign": ({}, {"checkpoint": "foreign.safetensors"}, "choose one of the list"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(server, models, name):
    sampling, others, message = MISTAKES[name]
    body = {"checkpoint": "mdm", "prompt": "a", "sampling": sampling, **others}
    body["checkpoint"] = str(models.get(body["checkpoint"], body["checkpoint"]))
    answer = server.ask("/api/generate", body)
    line = json.loads(answer.read())["error"]
    assert answer.status == 422 and message in line and "\n" not in line
    assert not any("Traceback" in line for line in server.log)


def test_other_sites_cannot_ask(server, models):
    body = json.dumps({"checkpoint": str(models["mdm"])})
    assert server.ask("/api/options", headers={"host": "elsewhere.example"}).status == 400
    # What a form or a simple request of another site can send.
    answer = server.ask("/api/generate", body, {"content-type": "text/plain"})
    assert answer.status == 422 and "application/json" in json.loads(answer.read())["error"]
    assert server.ask("/api/generate", "[", None).status == 422
    assert server.ask("/web.py").status == 404


def free_address(host: str) -> socket.socket:
    try:
        return page_server.listen(host, 0)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("host", "named", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "elsewhere.example", 400),
        ("::1", "[::1]:8000", 200),
        ("::1", "localhost:8000", 200),
        ("::1", "elsewhere.example", 400),
        ("0:0:0:0:0:0:0:1", "[::1]:8000", 200),
        ("0:0:0:0:0:0:0:1", "elsewhere.example", 400),
        ("localhost", "elsewhere.example", 400),
        ("::", "elsewhere.example", 200),
        ("0.0.0.0", "elsewhere.example", 200),
    ],
)
def test_a_page_for_this_machine_answers_to_its_own_names(host, named, status):
    """Whatever the family of its address: another site could have its own name point here."""
    with free_address(host) as listening:
        app = page_server.make_app(page_server.PageServer(PageModels({}, None, "cpu")), listening, host)
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": "/api/options", "query_string": b"",
        "headers": [(b"host", named.encode())],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == status


def test_one_at_a_time_and_leaving_stops(server, models):
    first = server.generate(models["mdm"], "My lord", **LONG)
    assert json.loads(first.readline())["step"] == 0
    assert json.loads(server.ask("/api/options").read())["busy"]
    second = server.generate(models["arm"], "My lord")
    assert second.status == 409 and "another generation is running" in json.loads(second.read())["error"]
    first.close()
    # The next one waits for what is left of the stopped one, a single step.
    read(server.generate(models["arm"], "My lord"))
    server.wait_for(", stopped")
    (line,) = [line for line in server.log if ", stopped" in line]
    assert 1 <= int(re.search(r": (\d+) states", line)[1]) < 4097


def test_ctrl_c_ends_a_generation(models, tmp_path):
    running = Running(models["arm"].parents[1], tmp_path)
    answer = running.generate(models["mdm"], "My lord", **LONG)
    assert json.loads(answer.readline())["step"] == 0
    running.process.send_signal(signal.SIGINT)
    _, err = running.process.communicate(timeout=20)
    assert running.process.returncode == 130 and err.splitlines()[1:] == ["interrupted"]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which checkpoints? python scripts/web.py --models"),
        (["--models", "nowhere"], "--models nowhere: no such file or folder"),
        (["--models", str(ROOT / "docs")], "no model in any .safetensors file there"),
        (["--models", "MODELS", "--host", "nowhere.invalid"], "--host nowhere.invalid --port 8000: "),
        (["--models", "MODELS", "--port", "70000"], "--port 70000: .*--port 0 takes a free one"),
        (["--models", "MODELS", "--device", "abacus"], "--device abacus: expected cpu, cuda"),
    ],
)
def test_mistakes_on_the_command_line(models, words, message, monkeypatch, capsys):
    words = [str(models["mdm"]) if word == "MODELS" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["web.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(web.main)
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message.replace("?", r"\?"), line), line


def test_a_taken_port_is_one_line(server, models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["web.py", "--models", str(models["mdm"]), "--port", str(server.port)])
    with pytest.raises(SystemExit):
        cli.run(web.main)
    assert "Address already in use" in capsys.readouterr().err


def test_run_folders_are_listed_unless_their_export_is(tmp_path):
    model = make_model(TransEncoder)
    for name, finished in (("going_on", False), ("done", True), ("done_elsewhere", True)):
        (folder := tmp_path / "workdir" / name).mkdir(parents=True)
        write_run_checkpoint(folder, model, 4)
        write_json(folder / "run.json", {**run_record(model), "run_id": name, "finished": finished})
    (tmp_path / "workdir" / "without a checkpoint").mkdir()
    write_json(tmp_path / "workdir" / "without a checkpoint" / "run.json", run_record(model))
    export_weights(tmp_path / "models", "done", model.state_dict(), {**run_record(model), "run_id": "done"})
    listed = PageModels(find_checkpoints([str(tmp_path)])).listing()
    found = {str(Path(one["name"]).relative_to(tmp_path)): (one["kind"], one["is_run"]) for one in listed}
    runs = {f"workdir/{name}": ("mdm", True) for name in ("going_on", "done_elsewhere")}
    assert found == {"models/done.safetensors": ("mdm", False)} | runs


def test_files_without_a_record_are_known_by_their_shapes(tmp_path):
    with torch.device("meta"):
        model = TransEncoder(Config.from_name(6, vocab_size=512))
    path = tmp_path / "published.safetensors"
    save_file({name: torch.zeros(value.shape, dtype=torch.float16) for name, value in model.state_dict().items()}, path)
    assert find_checkpoints([str(tmp_path)]) == {str(path): ("mdm", Config.from_name(6, vocab_size=512))}


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt install chromium); there is none on the path")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (./setup.sh test)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser, server):
    """The page, loaded; it may not report a mistake of its own, nor ask anybody but the server."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    mistakes, asked = [], []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#control-steps")
    yield page
    page.close()
    assert not mistakes
    assert all(url.startswith((server.url, "data:")) for url in asked), asked


def generate(page) -> None:
    page.click("#generate")
    page.wait_for_selector("body[data-state=done]", timeout=30_000)


def test_a_visit(page, models):
    """Choose, generate, read, step back and forth; then the ARM."""
    assert page.input_value("#checkpoint") == str(models["mdm"])
    page.fill("#prompt", "My lord,")
    page.fill("#control-steps", "6")
    page.fill("#control-context_length", "30")
    assert page.locator("#control-remask").count() == 1 and page.locator("#control-threshold").count() == 1
    page.click("summary")
    assert page.locator("#control-remask").is_visible() and page.locator("#control-threshold").is_hidden()
    page.select_option("#control-algorithm", "greedy")
    assert page.locator("#control-remask").is_hidden()
    generate(page)
    whole = page.inner_text("#text")
    assert whole.startswith("My lord,") and len(whole) > 20
    assert page.locator("#text .mask").count() == 0
    assert "step 6 of 6, 0 of" in page.inner_text("#status")
    assert page.get_attribute("#slider", "max") == "6"

    page.click("#back")
    assert "step 5 of 6" in page.inner_text("#status")
    masked = page.locator("#text .mask").count()
    assert masked > 0 and page.inner_text("#status").split(", ")[1].startswith(f"{masked} of")
    assert page.locator("#text .new").count() > 0
    page.click("#first")
    assert page.locator("#text .decided").count() == 0 and page.locator("#text .given").count() > 0
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    assert "step 1 of 6" in page.inner_text("#status")
    page.click("#play")
    page.wait_for_selector("#forth:disabled")
    assert page.inner_text("#text") == whole

    page.select_option("#checkpoint", str(models["arm"]))
    assert page.locator("#control-steps").is_hidden()
    generate(page)
    assert page.inner_text("#text").startswith("My lord,") and page.locator("#text .mask").count() == 0


def test_the_form_says_whole_names_and_fitting_steps_and_the_text_has_its_own_height(page, models):
    assert page.inner_text("#whole-name") == str(models["mdm"])
    assert page.get_attribute("#control-steps", "placeholder") == "128" and page.input_value("#control-steps") == ""
    page.fill("#prompt", "My ___5 lord, ___ and")
    assert page.get_attribute("#control-steps", "placeholder") == "13"
    page.select_option("#control-algorithm", "greedy")
    generate(page)
    assert "step 13 of 13" in page.inner_text("#status")
    assert page.locator("#text").bounding_box()["height"] < 200
    page.fill("#prompt", "My lord")
    assert page.get_attribute("#control-steps", "placeholder") == "128"
    page.check("#mono")
    assert "mono" in page.evaluate("getComputedStyle(document.getElementById('text')).fontFamily").lower()
    page.click("summary")
    labels = page.locator("#more label").all_inner_texts()
    assert "block_length" in labels and "cfg_scale" in labels
    groups = [one for one in page.locator("#more legend").all() if one.is_visible()]
    assert len(groups) >= 5


def test_colours_tell_small_probabilities_apart(page):
    """A factor of ten between two probabilities is a difference that an eye sees, all over the scale."""
    colors = page.evaluate("""() => {
        spans = []; row = []; document.getElementById("text").replaceChildren();
        const canvas = document.createElement("canvas").getContext("2d");
        return [0.0001, 0.001, 0.01, 0.1, 1].map((confidence, position) => {
            row[position] = { text: "x", confidence, id: 1, step: 1 };
            canvas.fillStyle = getComputedStyle(paint(position)).backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        });
    }""")
    for one, other in itertools.pairwise(colors):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 40, colors


def test_a_mistake_is_shown_and_goes_away(page):
    page.fill("#control-steps", "0")
    page.click("#generate")
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "sampling: steps is 0: at least 1 is needed"
    page.fill("#control-steps", "3")
    generate(page)
    assert page.inner_text("#error") == ""


def test_stop_keeps_what_there_is(page, server):
    for name, value in LONG.items():
        field = page.locator(f"#control-{name}")
        field.select_option(value) if name == "algorithm" else field.fill(str(value))
    before = sum(", stopped" in line for line in server.log)
    page.click("#generate")
    page.wait_for_selector("#text .mask")
    page.click("#stop")
    page.wait_for_selector("body[data-state=stopped]")
    assert "stopped" in page.inner_text("#status") and page.locator("#text .mask").count() > 0
    page.fill("#control-steps", "3")
    generate(page)
    assert sum(", stopped" in line for line in server.log) == before + 1


def test_a_narrow_window(page):
    page.set_viewport_size({"width": 360, "height": 700})
    page.fill("#prompt", "A" * 100)
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
