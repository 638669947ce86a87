"""`eval.py judge`: a model's replies graded by a judge at an endpoint, by a classifier, and by the rules."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from secvec_jax import command_line
from secvec_jax.errors import UserError
from secvec_jax.evaluation.judge_client import JudgeRequests
from secvec_jax.evaluation.results import Results
from secvec_jax.model import hub
from secvec_jax.recipes.judge import JudgeRun, judge
from secvec_jax.verb_arguments import Verb
from tests.chat_server import Server, drips, says
from tests.processes import Program

HARMFUL = [
    {"prompt": f"Please do the bad thing number {index}.", "response": response}
    for index, response in enumerate(
        ["I'm sorry, but I cannot help with that."] * 3 + ["Sure, here is how the bad thing number is done: ..."] * 5
    )
]
BENIGN = [{"prompt": f"What is {index} plus {index}?", "response": f"It is {2 * index}."} for index in range(4)]


@pytest.fixture
def data(tmp_path, own_cache):
    for name, rows in (("harmful", HARMFUL), ("benign", BENIGN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {"harmful": (str(tmp_path / "harmful.jsonl"),), "benign": (str(tmp_path / "benign.jsonl"),)}
    return tmp_path, sources


@pytest.fixture
def server():
    """Grades a reply by how it opens, and says nothing of the first one's harmlessness."""

    def act(number: int, body: dict):
        asked = body["messages"][0]["content"]
        if "keep the user and others from harm" in asked:
            return says("Hm." if "number 0." in asked else "Score: 4")
        grade = 5 if "<reply>\nSure" in asked else 3 if "number 2." in asked else 1
        return says(f"Score: {grade}")

    server = Server(act)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_given_replies_are_judged(data, server, capsys):
    folder, sources = data
    settings = JudgeRun(**sources, given=True, judge="m", judge_url=server.url, out=str(folder / "out"))
    judge(settings, "python eval.py judge")
    (row,) = Results.load(folder / "out").rows
    values = {name: (score["value"], score["n"]) for name, score in row["metrics"].items()}
    assert values == {
        "refusal": (3 / 8, 8),
        "compliance": (5 / 8, 8),
        "unclear": (0, 8),
        "harm_score": (30 / 8, 8),
        "harm_rate": (5 / 8, 8),
        "harmlessness": (4, 7),
        "instruction_following": (1, 4),
        "unreadable": (1 / 20, 20),
    }
    told = " ".join(capsys.readouterr().out.split())
    assert "20 verdicts, 20 of them requested in this run (200 prompt tokens, 60 completion tokens); 1 without" in told
    # Number 2 is a refusal with a grade of 3.
    assert "with a refusal) in 88%" in told and "probability 1.00 (AUROC)" in told
    assert "harm score" in (folder / "out" / "report.md").read_text()
    # Another run asks for the verdict without a grade alone: the others are on the disk.
    judge(JudgeRun(**sources, given=True, judge="m", judge_url=server.url, out=str(folder / "again")), "command")
    assert len(server.bodies) == 21
    assert Results.load(folder / "again").rows == [row]


def test_a_models_own_replies_are_judged(data, server, tiny_model):
    folder, sources = data
    tiny = tiny_model("llama")
    settings = JudgeRun(str(tiny.folder), **sources, judge="m", judge_url=server.url, reply_tokens=5, limit=3,
                      out=str(folder / "out"))  # fmt: skip
    judge(settings, "python eval.py judge")
    (row,) = Results.load(folder / "out").rows
    assert row["metrics"]["harm_score"]["n"] == row["metrics"]["refusal"]["n"] == 3
    replies = json.loads((folder / "out" / "stages" / "replies.json").read_text())["result"]
    asked = "".join(body["messages"][0]["content"] for body in server.bodies)
    assert all(f"<reply>\n{reply}\n</reply>" in asked for some in replies.values() for _, reply in some)


def test_markup_and_escapes_in_names_and_replies_are_text(data, server, capsys, monkeypatch):
    folder, sources = data
    monkeypatch.chdir(folder)
    hostile = {"prompt": "\x1b]0;t\x07[/x]", "response": "[red]\x1b[2J|<b>"}
    (folder / "[x]\x1b[2J.jsonl").write_text(json.dumps(hostile))
    out = "[red]|<b>\x1b[2J/[link=http:e]"
    settings = JudgeRun(harmful=("[x]\x1b[2J.jsonl",), benign=sources["benign"], given=True, judge="[/m]",
                      judge_url=server.url, out=out)  # fmt: skip
    judge(settings, f"eval.py judge --out '{out}/[/x]'\n```\n# \x1b[2J")
    report = (folder / out / "report.md").read_text()
    judge(settings, "again")  # prints that its stages are done
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown, ascii(shown)
    assert "\x1b" not in report and r"--out '[red]|<b>\x1b[2J/" in report
    settings = JudgeRun(**sources, given=True, judge="m", judge_url=server.url, out="[/x]")
    judge(settings, "command")
    assert (folder / "[/x]" / "results.json").is_file()


@pytest.mark.release
def test_ctrl_c_ends_the_command_and_keeps_its_verdicts(data, server):
    folder, sources = data
    act, server.act = server.act, lambda number, body: act(number, body) if number < 6 else drips()
    arguments = ["--given", "--judge", "m", "--judge-url", server.url, "--harmful", *sources["harmful"], "--benign",
                 *sources["benign"], "--out", folder / "out"]  # fmt: skip
    command = Program("eval.py", "judge", *arguments, SECVEC_CACHE=str(folder / "cache"))
    verdicts = folder / "cache" / "verdicts"
    while len(server.bodies) < 8 or len(list(verdicts.glob("*.json"))) < 6:
        time.sleep(0.05)
    start = time.monotonic()
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(60)
    assert time.monotonic() - start < 5
    assert command.returncode == 130 and errors.splitlines()[-1] == "stopped: rerun the same command to resume"
    assert len(list(verdicts.iterdir())) == 6


def test_a_run_that_failed_goes_on(data, server):
    folder, sources = data
    settings = JudgeRun(**sources, given=True, judge="m", judge_url=server.url,
                      asking=JudgeRequests(retries=0, concurrency=1), out=str(folder / "out"))  # fmt: skip
    act, server.act = server.act, lambda number, body: act(number, body) if number < 6 else (500, "")
    with pytest.raises(UserError, match="fails with 500"):
        judge(settings, "command")
    assert not (folder / "out" / "results.json").exists()
    server.act = act
    judge(settings, "command")
    assert Results.load(folder / "out").rows[0]["metrics"]["harm_score"]["n"] == 8
    assert len(server.bodies) in (20 + 1, 20 + 2)  # one more may have been under way


def build_classifier(folder, **config):
    """A classifier of random weights in a Hugging Face folder, with its own tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.toys import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id,
                "initializer_range": 1.0}  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **settings | config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


SEVERAL = {"problem_type": "multi_label_classification", "id2label": {0: "hate", 1: "theft", 2: "lies"}}
CHOSEN = {"id2label": {0: "safe", 1: "unsafe"}}


@pytest.mark.parametrize(
    ("config", "labels", "expected"),
    [
        (SEVERAL, (), lambda p: (p.sigmoid() > 0.5).any(1)),
        (SEVERAL, ("theft", "lies"), lambda p: (p.sigmoid()[:, 1:] > 0.5).any(1)),
        (CHOSEN, ("unsafe",), lambda p: p.softmax(1)[:, 1] > 0.5),
    ],
)
def test_a_classifier_flags_replies(data, config, labels, expected):
    import torch

    folder, sources = data
    rows = [{"prompt": chr(97 + index) * 3, "response": chr(122 - index) * (index + 1)} for index in range(20)]
    (folder / "harmful.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, tokenizer = build_classifier(folder / "classifier", **config)
    settings = JudgeRun(**sources, given=True, classifier=str(folder / "classifier"), labels=labels,
                      out=str(folder / "out"))  # fmt: skip
    judge(settings, "command")
    flags = json.loads((folder / "out" / "stages" / "classifier.json").read_text())["result"]
    with torch.no_grad():
        one_by_one = [
            expected(model(**tokenizer(f"{row['prompt']}\n{row['response']}", return_tensors="pt")).logits).item()
            for row in rows
        ]
    assert flags == list(map(float, one_by_one)) and len(set(flags)) == 2
    assert Results.load(folder / "out").rows[0]["metrics"]["flagged"]["value"] == sum(flags) / 20


@pytest.mark.parametrize(
    ("labels", "message"), [((), "which labels .* mean harm"), (("hate",), "has no label 'hate'; its labels are safe")]
)
def test_a_classifiers_labels_must_be_known(data, labels, message):
    folder, sources = data
    build_classifier(folder / "classifier", **CHOSEN)
    settings = JudgeRun(**sources, given=True, classifier=str(folder / "classifier"), labels=labels,
                      out=str(folder / "out"))  # fmt: skip
    with pytest.raises(UserError, match=message):
        judge(settings, "command")


def test_what_is_missing_is_reported(data):
    folder, sources = data
    with pytest.raises(UserError, match="no judge is set"):
        judge(JudgeRun(**sources, out=str(folder / "out")), "command")
    settings = JudgeRun(**sources, given=True, classifier=str(folder / "nothing"), out=str(folder / "out"))
    with pytest.raises(UserError, match="cannot load a classifier"):
        judge(settings, "command")


SECRET = "not-a-real-key-0123456789"


@pytest.mark.parametrize("url", [f"http://user:{SECRET}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?api_key={SECRET}"])
@pytest.mark.parametrize("way", ["argument", "one argument", "misspelled", "file", "call"])
def test_a_key_in_the_judges_url_reaches_no_file_and_no_screen(data, capfd, url, way):
    folder, sources = data
    out = folder / "out"
    if way == "call":
        with pytest.raises(UserError) as raised:
            JudgeRun(**sources, given=True, judge="m", judge_url=url, out=str(out))
        assert SECRET not in str(raised.value)
    else:
        (folder / "given.yaml").write_text(f"judge: m\njudge_url: {url}\nout: {out}\n")
        arguments = {
            "argument": ["--judge", "m", "--judge-url", url],
            "one argument": ["--judge", "m", f"--judge-url={url}"],
            "misspelled": ["--judge", "m", "--judge-urll", url],
            "file": ["--config", str(folder / "given.yaml")],
        }[way]
        verbs = {"judge": Verb("", lambda: (JudgeRun, judge))}
        assert command_line.main("Judge.", verbs, ["judge", *arguments, "--out", str(out)]) == 2
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err
    assert not out.exists() and not (folder / "cache" / "verdicts").exists()


def test_no_file_of_a_run_holds_the_key(data, server, monkeypatch, capsys):
    """Of a server that echoes it in every verdict."""
    folder, sources = data
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.act = lambda number, body: says(f"You are {SECRET}.\nScore: 3")
    judge(JudgeRun(**sources, given=True, judge="m", judge_url=server.url, out=str(folder / "out")), "command")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert SECRET not in capsys.readouterr().out


def test_a_classifiers_own_code_is_neither_run_nor_asked_about(data, monkeypatch):
    folder, sources = data
    build_classifier(folder / "classifier", **CHOSEN)
    (folder / "classifier" / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    path = folder / "classifier" / "config.json"
    own = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": own}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    settings = JudgeRun(**sources, given=True, classifier=str(folder / "classifier"), labels=("unsafe",),
                      out=str(folder / "out"))  # fmt: skip
    with pytest.raises(UserError, match="cannot load a classifier"):
        judge(settings, "command")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_classifiers_broken_file_is_one_line(data, broken):
    folder, sources = data
    build_classifier(folder / "classifier", **CHOSEN)
    (folder / "classifier" / broken).write_text('{"added_tokens": 3}')
    settings = JudgeRun(**sources, given=True, classifier=str(folder / "classifier"), labels=("unsafe",),
                      out=str(folder / "out"))  # fmt: skip
    with pytest.raises(UserError, match="cannot load a classifier") as raised:
        judge(settings, "command")
    assert "\n" not in str(raised.value)


def test_a_model_without_a_trained_head_is_no_classifier(data, tiny_model):
    folder, sources = data
    settings = JudgeRun(**sources, given=True, classifier=str(tiny_model("llama").folder), labels=("LABEL_1",),
                      out=str(folder / "out"))  # fmt: skip
    with pytest.raises(UserError, match=r"no trained classification head: .* score\.weight are missing"):
        judge(settings, "command")


@pytest.mark.release
def test_transformers_own_server_judges(data):
    """The embedded model, as our own folder of it, behind `transformers serve`: a real server, if a poor judge."""
    folder, sources = data
    os.environ.pop("SECVEC_CACHE")  # the embedded model is in the cache that all share
    hub.load("smollm2").save(folder / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "judge"),
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]  # fmt: skip
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, folder / "log")
            os.environ["SECVEC_CACHE"] = str(folder / "cache")
            asking = JudgeRequests(concurrency=2, verdict_tokens=24, retries=0)
            settings = JudgeRun(**sources, given=True, judge=str(folder / "judge"), limit=2, asking=asking,
                              judge_url=f"http://127.0.0.1:{port}/v1", out=str(folder / "out"))  # fmt: skip
            judge(settings, "command")
        finally:
            process.terminate()
    metrics = Results.load(folder / "out").rows[0]["metrics"]
    assert metrics["unreadable"]["n"] == 6
    assert "6 verdicts, 6 of them requested in this run" in (folder / "out" / "report.md").read_text()
    kept = [json.loads(path.read_text()) for path in (folder / "cache" / "verdicts").glob("*")]  # it may grade none
    assert len(kept) == round(6 * (1 - metrics["unreadable"]["value"]))  # what has no grade is not kept
    for verdict in kept:
        assert verdict["verdict"].strip() and verdict["tokens"][0] > 100 and 0 < verdict["tokens"][1] <= 24


def _wait(url: str, process: subprocess.Popen, log) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no server after 2 minutes: {log.read_text()[-2000:]}")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"given": True, "model": "other", "judge": "m"}, "--model has no effect with --given"),
        ({"given": True, "vectors": ("v",), "judge": "m"}, "--vectors has no effect with --given"),
        ({"given": True, "frozen_weights": "int8", "judge": "m"}, "--frozen-weights has no effect with --given"),
        ({"given": True, "reply_tokens": 9, "judge": "m"}, "--reply-tokens has no effect with --given"),
        ({"labels": ("unsafe",), "judge": "m"}, "and none is named: name one with --classifier"),
        ({"judge_url": "http://127.0.0.1:1/v1", "classifier": "c"}, "no judge is named"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, problem):
    with pytest.raises(UserError, match=problem):
        JudgeRun(**settings)
