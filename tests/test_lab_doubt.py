"""Doubt: uncertainties against SciPy on separate passes, answers, the page, and the evaluation."""

import json
import re

import numpy as np
import pytest
import tiny
from engines import add_tokenizer
from scipy.special import softmax
from scipy.stats import entropy

import tinydrug
from tinydrug.cli import main
from tinydrug.errors import ConfigError, DrugError, PromptError
from tinydrug.lab import doubt as module
from tinydrug.lab.doubt import doubt, normal
from tinydrug.lab.evaluate import Evaluation, Question, auroc, evaluate, is_right, load_questions, report

PROMPT = "Tell me of the sea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}?"
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("doubt") / "gqa"), template)


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, cache="f32") as engine:
        yield engine


# --- the measurement


@pytest.mark.parametrize("prompt", ["last", "all"])
def test_uncertainties_are_those_of_separate_passes(engine, prompt, monkeypatch):
    found = doubt(engine, PROMPT, f"A:1,V:0.5,prompt={prompt}", k=5, n=12, seed=3)
    ids = engine.encode(PROMPT)
    answer = engine.generate(PROMPT, n=12).ids
    passes = []
    for seed in range(3, 8):
        session = engine.session("A:1,V:0.5", seed)
        if prompt == "last":
            session.feed(ids[:-1])
            logits = session.feed([ids[-1], *answer[:-1]], "all", len(answer))
        else:
            logits = session.feed([*ids, *answer[:-1]], "all", len(answer))
        passes.append(softmax(logits.astype("f8"), -1))
    passes = np.array(passes)
    total, aleatoric = entropy(passes.mean(0), axis=-1), entropy(passes, axis=-1).mean(0)
    np.testing.assert_allclose(found.total, total, rtol=1e-9)
    np.testing.assert_allclose(found.aleatoric, aleatoric, rtol=1e-9)
    np.testing.assert_allclose(found.epistemic, total - aleatoric, atol=1e-12)
    assert (found.epistemic >= 0).all() and found.epistemic.max() > 0
    sober = softmax(engine.forward([*ids, *answer[:-1]])[len(ids) - 1 :].astype("f8"), -1)
    np.testing.assert_allclose(found.likelihood, sober[np.arange(len(answer)), answer], rtol=1e-9)
    monkeypatch.setattr(module, "ROWS", 1)  # one pass at a time
    again = doubt(engine, PROMPT, f"A:1,V:0.5,prompt={prompt}", k=5, n=12, seed=3)
    np.testing.assert_allclose(again.total, found.total, rtol=1e-12)


def test_answers_are_those_of_separate_generations(engine):
    found = doubt(engine, PROMPT, "A:1.2", k=6, n=4)
    schedule = tinydrug.Schedule.parse("A:1.2,prompt=last")
    texts = [normal(engine.generate(PROMPT, drug=schedule, drug_seed=s, n=4).text) for s in range(1, 7)]
    counts = [texts.count(text) for text in dict.fromkeys(texts)]
    assert sorted(count for _, count in found.answers) == sorted(counts) and sum(counts) == 6
    assert found.entropy == pytest.approx(entropy(counts))
    assert {normal(text) for text, _ in found.answers} == set(texts)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Paris.", "paris"), (" The  sea!\nand more", "the sea"), ("", ""), ("?!", ""), ("É", "é")],
)
def test_normal_answers(one, other):
    assert normal(one) == other


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"k": 1}, ConfigError, "1 is not a number of passes from 2 to 1000"),
        ({"k": 0}, ConfigError, "from 2"),
        ({"k": 2.5}, ConfigError, "2.5 is not"),
        ({"k": 10**6}, ConfigError, "to 1000"),
        ({"n": 0}, ConfigError, "at least 1"),
        ({"drug": "sober"}, DrugError, "sober passes never disagree"),
        ({"drug": "V:0"}, DrugError, "sober passes never disagree"),
        ({"drug": "V:1,sink=90", "n": 3}, PromptError, "noise leaves the first 90 alone"),
    ],
)
def test_bad_arguments(engine, more, kind, message):
    with pytest.raises(kind, match=message):
        doubt(engine, **{"prompt": PROMPT, "drug": "V:0.9"} | more)


# --- the evaluation


def test_auroc_counts_pairs():
    rng = np.random.default_rng(1)
    score, wrong = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in score[wrong] for b in score[~wrong]]
    assert auroc(score, wrong) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(score, np.ones(60, bool))) and np.isnan(auroc(score, np.zeros(60, bool)))


def test_own_questions_are_many_and_sound():
    questions = load_questions()
    kinds = [question.kind for question in questions]
    assert kinds.count("fact") + kinds.count("arithmetic") >= 200 and kinds.count("invented") >= 40
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert question.text.endswith("?") and all(question.right)
        if question.kind == "arithmetic":
            assert worked_out(question.text) == int(question.right[0]), question.text
        assert is_right(question, f"It is {question.right[0]}."), question


def worked_out(text: str) -> float:
    a, *more = map(int, re.findall(r"\d+", text))
    rules = {"+": lambda b: a + b, "-": lambda b: a - b, "times": lambda b: a * b, "divided": lambda b: a / b}
    for sign, rule in rules.items():
        if f" {sign} " in text:
            return rule(*more)
    return a / 2 if "half" in text else 2 * a


@pytest.mark.parametrize(
    ("kind", "right", "answer", "verdict"),
    [
        ("fact", ["Paris"], "The capital is PARIS, of course.", True),
        ("fact", ["Paris"], "It is in the Parisian basin.", False),
        ("fact", ["cow"], "cows", True),
        ("fact", ["0"], "At 10 degrees", False),
        ("fact", ["0"], "At 0°C", True),
        ("fact", ["carbon dioxide", "CO2"], "They take in CO2.", True),
        ("fact", ["Au"], "", False),
        ("arithmetic", ["12"], "5 + 7 = 12.", True),
        ("arithmetic", ["5"], "5 + 7 = 12", False),
        ("arithmetic", ["1234"], "1,234", True),
        ("arithmetic", ["12"], "twelve", False),
        ("invented", ["can't"], "I can’t say.", True),
    ],
)
def test_is_right(kind, right, answer, verdict):
    assert is_right(Question(kind, "?", tuple(right)), answer) == verdict


def test_intervals_hold_what_they_should():
    """A score that knows, one that guesses, and their difference."""
    rng = np.random.default_rng(0)
    wrong = rng.random(120) < 0.5
    scores = {"knows": wrong + 0.8 * rng.normal(size=120), "guesses": rng.normal(size=120)}
    kinds = ("fact",) * 100 + ("invented",) * 20
    found = Evaluation(kinds, ~wrong, scores, [], {})
    rows = {(row["questions"], row["method"]): row for row in found.rows()}
    assert rows["real", "knows"]["n"] == 100 and rows["all", "knows"]["n"] == 120
    for row in rows.values():
        assert row["low"] < row["auroc"] < row["high"]
    assert (
        rows["all", "knows"]["low"] > 0.6
        and rows["all", "guesses"]["low"] < 0.5 < rows["all", "guesses"]["high"]
    )
    mean, low, high = found.difference("knows", "guesses")
    assert low < mean < high and mean == pytest.approx(
        rows["all", "knows"]["auroc"] - rows["all", "guesses"]["auroc"]
    )


def test_evaluation_of_a_tiny_model(engine):
    questions = [Question("fact", f"What is {word}?", ("a",)) for word in ("sea", "wind", "ship")]
    questions += [
        Question("invented", "Who is Zorb?", ("no",)),
        Question("arithmetic", "What is 1 + 1?", ("2",)),
    ]
    seen = []
    found = evaluate(engine, questions, ["A:0.9"], k=3, n=4, progress=lambda *state: seen.append(state[:2]))
    assert seen == [(0, 5), (5, 5)] and len(found.answers) == 5 and found.record["complete"]
    names = ["sober pass: -log p", "A:0.9: epistemic", "A:0.9: total", "A:0.9: answers"]
    assert list(found.scores) == [*names, "temperature 0.5: answers", "temperature 1: answers"]
    assert all(values.shape == (5,) and np.isfinite(values).all() for values in found.scores.values())
    one = doubt(
        engine, engine.encode([{"role": "user", "content": "Answer briefly. What is sea?"}]), "A:0.9", 3, 4
    )
    assert found.scores["A:0.9: epistemic"][0] == pytest.approx(one.epistemic.mean(), abs=1e-9)
    assert "AUROC" in report(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no questions"),
        ("x = 1", "'x' needs a list of right answers"),
        ('[fact]\n"a?" = []', "'a\\?' needs a list"),
        ('[fact]\n"a?" = [1]', "'a\\?' needs a list"),
        ('[invented]\nquestions = ["a?"]', "'a\\?' needs a list"),
        ('[invented]\nquestions = "a?"\nright = ["x"]', "invented needs a list of questions"),
        ('[invented]\nquestions = [1]\nright = ["x"]', "invented needs a list of questions"),
        ('[invented]\nright = ["x"]', "invented needs a list of questions"),
        ('[fact]\n" " = ["x"]', "a question is empty"),
        ("[", "is not TOML"),
    ],
)
def test_bad_questions(tmp_path, text, message):
    path = tmp_path / "q.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_questions(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        load_questions(str(tmp_path / "none.toml"))


# --- the command


def test_command(folder, tmp_path, capsys):
    words = ["lab", "doubt", "-m", str(folder), "-p", PROMPT, "--drug", "A:0.9", "-k", "4", "-n", "6"]
    files = [
        "--html",
        str(tmp_path / "d.html"),
        "--json",
        str(tmp_path / "d.json"),
        "--csv",
        str(tmp_path / "d.csv"),
    ]
    assert main([*words, *files]) == 0
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "d.json").read_text())
    assert out.startswith("token") and "answers of 4 passes" in out and "\x1b" not in out
    assert len(data["tokens"]) == len((tmp_path / "d.csv").read_text().splitlines()) - 1 == 6
    assert sum(count for _, count in data["answers"]) == 4 and data["record"]["settings"]["k"] == 4
    assert "http" not in re.sub(r'"[^"]*"', "", (tmp_path / "d.html").read_text().replace("http-equiv", ""))


def test_heat_map_on_a_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr("tinydrug.cli.lab.doubt.paints", lambda: True)
    monkeypatch.setattr("tinydrug.cli.lab.model.paints", lambda: True)
    words = ["lab", "doubt", "-m", str(folder), "-p", PROMPT, "--drug", "A:0.9", "-k", "3", "-n", "6"]
    assert main([*words, "--by", "total", "--no-chat"]) == 0
    out = capsys.readouterr().out
    assert out.count("\x1b[30;48;5;") >= 6 + 8 and "total uncertainty in nats" in out


def test_command_evaluates(folder, tmp_path, capsys):
    (tmp_path / "q.toml").write_text('[fact]\n"a?" = ["b"]\n"c?" = ["d"]\n')
    words = ["lab", "doubt", "-m", str(folder), "--evaluate", "--questions", str(tmp_path / "q.toml")]
    assert main([*words, "--drug", "A:0.9", "-k", "2", "-n", "3", "--json", str(tmp_path / "e.json")]) == 0
    out = capsys.readouterr().out
    assert "right: fact 0 of 2" in out and "no AUROC: all answers are wrong" in out and "nan" not in out
    assert len(json.loads((tmp_path / "e.json").read_text())["questions"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", PROMPT, "--drug", "V:0.1", "-k", "1"], "1 is not a number of passes"),
        (["-p", PROMPT, "--drug", "V:0.1", "-n", "0"], "0 is not a number of tokens"),
        (["-p", PROMPT, "--drug", "V:0.1", "--seed", str(2**63)], "of at most 9223372036854775807"),
        (["-p", PROMPT, "--drug", "V:0.1", "--questions", "q.toml"], "--questions needs --evaluate"),
        (["-p", PROMPT, "--drug", "V:0.1", "-f", "x"], "give --prompt or --file, not both"),
        (["-p", PROMPT, "--drug", "V:0"], "sober passes never disagree"),
        (["-p", PROMPT], "give the noise by --drug"),
        (["--evaluate", "--questions", "/no/such"], "--questions: /no/such: No such file"),
        (["--evaluate", "-p", PROMPT], "--prompt is for one prompt: drop it or --evaluate"),
        (["--evaluate", "--drug-sink", "0"], "--drug-sink is for one prompt"),
        (["--evaluate", "--by", "total"], "--by is for one prompt"),
        (["--evaluate", "--html", "x.html"], "--html is for one prompt"),
    ],
)
def test_bad_words_are_one_line(folder, words, message, capsys):
    assert main(["lab", "doubt", "-m", str(folder), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_real_model_is_surer_of_paris(smollm2):
    """Its doubt about the name of an invented capital is larger than about that of a real one."""
    with tinydrug.load(smollm2, ctx=256) as engine:
        asked = [
            doubt(
                engine,
                [{"role": "user", "content": f"Answer briefly. What is the capital of {name}?"}],
                "A:0.5",
                5,
                16,
            )
            for name in ("Italy", "Zelvania")
        ]
    assert "Rome" in asked[0].text and asked[0].epistemic.mean() < asked[1].epistemic.mean()
    assert asked[0].entropy <= asked[1].entropy
