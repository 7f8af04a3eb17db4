"""Text in, text out: generate, stream, chat, score, forward, sessions, batches, threads; what is refused."""

import functools
import json
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
from engines import add_tokenizer, edited, logits, runtime, session
from safetensors.numpy import load_file, save_file

import tinydrug
from tinydrug.engine.generate import Request, generate
from tinydrug.engine.sampling import Sampler, log_softmax
from tinydrug.engine.threads import available_threads, check_threads
from tinydrug.errors import BadModelFile, ConfigError, ContextOverflow, DrugError, NumericalError, PromptError
from tinydrug.noise import SOBER

FLOAT64 = 1e-12  # both sides compute log-probabilities in float64 from the same logits
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
TIRED = tinydrug.Sampling(temperature=1.5, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("chat") / "gqa"), TEMPLATE)


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, cache="f32", prefix_reuse=False) as engine:
        yield engine


def saying(engine, prompt, text: str) -> tinydrug.Sampling:
    """A sampler that continues this prompt with this text, then EOS, then dots."""
    script = engine.tokenizer.encode(text, bos=False) + [2]
    start, dot = len(engine.encode(prompt)), engine.tokenizer.encode(".", bos=False)[0]

    def say(z, ids):
        out, step = np.full_like(z, -np.inf), len(ids) - start
        out[script[step] if step < len(script) else dot] = 0
        return out

    return tinydrug.Sampling(processors=(say,))


# --- one prompt


def test_generate_is_the_argmax_of_forward(engine):
    done = engine.generate("Tell me", n=20)
    ids = [*done.prompt_ids, *done.ids]
    assert list(done.prompt_ids) == engine.encode("Tell me") and len(done.ids) == 20
    assert done.ids == tuple(engine.forward(ids).argmax(-1)[len(done.prompt_ids) - 1 : -1])
    assert done.text == engine.tokenizer.decode(done.ids)
    assert (done.finish_reason, done.moved, done.schedule) == ("length", {}, tinydrug.SOBER)
    assert done.timings["prefill_tokens"] == len(done.prompt_ids) and done.timings["decode_tokens"] == 19


@pytest.mark.parametrize("drug", [None, "V:0.5", "H:0.2,A:0.4,prompt=all"])
@pytest.mark.parametrize("sampling", [None, TIRED])
def test_stream_is_generate_in_steps(engine, drug, sampling):
    options = dict(n=15, drug=drug, drug_seed=4, sampling=sampling, ignore_eos=True)
    done, stream = engine.generate("Tell me", **options), engine.stream("Tell me", **options)
    assert stream.completion is None
    steps = list(stream)
    assert tuple(step.id for step in steps) == done.ids and [step.index for step in steps] == list(range(15))
    assert "".join(step.text for step in steps) == done.text == stream.completion.text
    assert [step.finish_reason for step in steps] == [None] * 14 + ["length"]
    assert (stream.completion.moved, stream.completion.ids) == (done.moved, done.ids)


def test_no_tokens(engine):
    fed = count_steps(engine)
    done = engine.generate("Tell me", n=0)
    assert (done.text, done.ids, done.finish_reason) == ("", (), "length")
    assert not fed() and list(engine.stream("Tell me", n=0)) == []


@pytest.mark.parametrize(
    ("options", "text", "finish", "n"),
    [
        ({}, "Hi there", "stop", 9),
        ({"ignore_eos": True, "n": 12}, "Hi there...", "length", 12),
        ({"n": 4}, "Hi t", "length", 4),
        ({"n": None, "ignore_eos": True}, "Hi there" + "." * 113, "context", 122),
        ({"stop": ["there"]}, "Hi ", "stop", 8),
        ({"stop": ["xyz", "i t", "there"]}, "H", "stop", 4),
        ({"stop": "there"}, "Hi ", "stop", 8),
        ({"stop": ["the sea"]}, "Hi there", "stop", 9),
        ({"stop": ["e"], "n": 6}, "Hi th", "stop", 6),
        ({"stop": ["there"], "n": 7}, "Hi ther", "length", 7),
    ],
)
def test_how_it_ends(engine, options, text, finish, n):
    sampling = saying(engine, "Tell me", "Hi there")
    done = engine.generate("Tell me", sampling=sampling, **options)
    assert (done.text, done.finish_reason, len(done.ids)) == (text, finish, n)
    steps = list(engine.stream("Tell me", sampling=sampling, **options))
    assert "".join(step.text for step in steps) == text
    assert steps[-1].finish_reason == finish and not any(step.finish_reason for step in steps[:-1])


def test_no_step_has_half_a_character_or_a_piece_of_a_stop_string(engine):
    text = "né stop né"
    steps = [step.text for step in engine.stream("Tell me", sampling=saying(engine, "Tell me", text))]
    assert steps == ["n", "", "é", " ", *"stop", " ", "n", "", "é", ""]
    stream = engine.stream("Tell me", sampling=saying(engine, "Tell me", text), stop=["stop n", "stoop"])
    assert [step.text for step in stream] == ["n", "", "é", " ", *[""] * 6]


def test_a_character_cut_off_by_the_end_is_marked(engine):
    done = engine.generate("Tell me", n=2, sampling=saying(engine, "Tell me", "né"))
    assert done.text == "n\ufffd"


def test_the_prompt_decides_the_last_tokens_room(engine):
    """A prompt that fills the context still gets one token; one more does not fit."""
    done = engine.generate([5] * 128, n=4)
    assert (len(done.ids), done.finish_reason) == (1, "context")
    with pytest.raises(ContextOverflow, match="the prompt has 129 tokens, the context holds 128"):
        engine.generate([5] * 129)


def test_context_shift(engine):
    """Past the end of the context, each token is that of a fresh prompt of what was kept."""
    done = engine.generate([7] * 20 + [9] * 100, n=20, ignore_eos=True, shift_keep=10)
    assert len(done.ids) == 20 and done.finish_reason == "length"
    ids = [*done.prompt_ids, *done.ids]
    kept = [*ids[:10], *ids[10 + 59 : 128]]
    assert len(kept) == 69
    expected = engine.forward([*kept, *done.ids[8:]])[69:].argmax(-1)
    assert tuple(expected[:-1]) == done.ids[9:]


@pytest.mark.parametrize("keep", [128, 10**6])
def test_a_shift_that_keeps_everything_is_refused(engine, keep):
    with pytest.raises(ConfigError, match="--keep"):
        engine.generate([7] * 120, n=20, shift_keep=keep)


def test_logprobs(engine):
    for sampling in (None, TIRED):
        done = engine.generate("Tell me", n=10, logprobs=3, sampling=sampling)
        exact = log_softmax(engine.forward([*done.prompt_ids, *done.ids]))[len(done.prompt_ids) - 1 : -1]
        assert len(done.logprobs) == 10
        for row, token, (said, logprob, top) in zip(exact, done.ids, done.logprobs, strict=True):
            assert said == token and logprob == pytest.approx(row[token], abs=FLOAT64)
            best = np.argsort(-row, kind="stable")[:3]
            assert [i for i, _ in top] == best.tolist()
            assert [p for _, p in top] == pytest.approx(row[best].tolist(), abs=FLOAT64)
    assert engine.generate("Tell me", n=2, logprobs=0).logprobs[1][2] == ()
    assert engine.generate("Tell me", n=2).logprobs == ()


def test_sampler_seeds(engine):
    def text(**options):
        return engine.generate("Tell me", n=30, **options).text

    hot = tinydrug.Sampling(temperature=2.0, seed=7)
    assert text(sampling=hot) == text(sampling=hot, drug_seed=5) != text(sampling=TIRED)
    done = engine.generate("Tell me", n=30, sampling=tinydrug.Sampling(temperature=2.0))
    assert text(sampling=tinydrug.Sampling(temperature=2.0, seed=done.seed)) == done.text
    other = engine.generate("Tell me", n=30, sampling=tinydrug.Sampling(temperature=2.0))
    assert other.seed != done.seed


def test_noise_seeds(engine):
    done = engine.generate("Tell me", n=30, drug="V:1,A:1")
    assert engine.generate("Tell me", n=30, drug="V:1,A:1", drug_seed=done.drug_seed).ids == done.ids
    assert (
        engine.generate("Tell me", n=30, drug=f"V:1,A:1,seed={done.drug_seed}", drug_seed=1).ids == done.ids
    )
    assert len({engine.generate("Tell me", n=30, drug="V:1,A:1", drug_seed=i).ids for i in range(5)}) == 5


def test_moved_counts_generated_tokens_and_what_the_schedule_says_of_the_prompt(engine):
    p = len(engine.encode("Tell me more"))  # BOS and a token a character
    L, H, G, n = 3, 6, 2, 5
    for prompt, first in (("none", p), ("last", p - 1), ("all", 6)):
        done = engine.generate("Tell me more", n=n, drug=f"A:0.1,V:0.1,pK:0.1,prompt={prompt}", drug_seed=0)
        drugged = range(first, p + n - 1)  # the last token generated is never fed
        assert done.moved == {
            "pK": L * G * len(drugged),
            "V": L * G * sum(t + 1 - 6 for t in drugged),
            "A": L * H * len(drugged),
        }


def test_progress(engine):
    seen = []
    engine.generate(prompts=["Tell me", "More"], n=1, progress=lambda *done: seen.append(done))
    assert seen[-1] == (11, 11) and seen == sorted(seen)


# --- forward and score


def test_forward(engine):
    ids = tiny.ids("llama-gqa")
    np.testing.assert_array_equal(engine.forward(ids), logits(engine.runtime, ids))
    noisy = engine.forward(ids.tolist(), drug="K:0.5,H:0.1", drug_seed=9)
    np.testing.assert_array_equal(noisy, logits(engine.runtime, ids, "K:0.5,H:0.1", 9))
    assert noisy.dtype == np.float32 and noisy.shape == (40, 96)


def test_forward_of_more_positions_than_are_in_memory_at_once(folder):
    ids = [int(i) for i in 3 + tiny.counter_hash("many", 300) % np.uint64(90)]
    with tinydrug.load(folder, ctx=300, cache="f32", chunk=50) as engine:
        np.testing.assert_array_equal(engine.forward(ids), logits(engine.runtime, ids, piece=43))


def test_score(engine):
    text = "Tell me about the sea."
    ids, score = engine.encode(text), engine.score(text)
    expected = log_softmax(engine.forward(ids))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(score.logprobs, expected, rtol=0, atol=FLOAT64)
    assert score.ids == tuple(ids)
    assert score.nll == pytest.approx(-expected.mean()) and score.perplexity == pytest.approx(
        math.exp(score.nll)
    )
    drugged = engine.score(text, drug="V:1", drug_seed=3)
    assert drugged.logprobs[:6] == pytest.approx(score.logprobs[:6], abs=FLOAT64)  # the sink
    assert (drugged.logprobs[7:] != score.logprobs[7:]).all()


# --- several


def test_prompts_together_are_prompts_alone(engine):
    """Ragged prompts, sober and drugged, sampled: sequence i has noise seed 20 + i and sampler seed 1 + i."""
    prompts = ["Tell me", "A", [5, 6, 7, 8, 9, 10, 11, 12, 13], "What is the sea made of?", "Tell me"]
    drugs = [None, "V:0.7", "K:0.5,prompt=all", "H:0.2,sink=0", "V:0.7,seed=99"]
    together = engine.generate(prompts=prompts, drug=drugs, drug_seed=20, n=12, sampling=TIRED, logprobs=1)
    for i, (prompt, drug, done) in enumerate(zip(prompts, drugs, together, strict=True)):
        seed = tinydrug.Sampling(temperature=1.5, seed=1 + i)
        alone = engine.generate(prompt, drug=drug, drug_seed=20 + i, n=12, sampling=seed, logprobs=1)
        assert (done.ids, done.text, done.logprobs) == (alone.ids, alone.text, alone.logprobs)
        assert (done.moved, done.drug_seed, done.seed) == (alone.moved, alone.drug_seed, alone.seed)
    assert together[4].drug_seed == 99


def test_sequences_of_one_batch_end_when_they_end(engine):
    """One stops at once, one at EOS, one at a stop string, one at the length."""
    scripts = {"one": "x", "two": "say STOP now", "tree": "a longer text that is cut", "fo": ""}
    first = {tuple(engine.encode(p)): engine.tokenizer.encode(t, bos=False) + [2] for p, t in scripts.items()}

    def say(z, ids):
        out = np.full_like(z, -np.inf)
        prompt = next(p for p in first if tuple(ids[: len(p)]) == p)
        out[first[prompt][len(ids) - len(prompt)]] = 0
        return out

    done = engine.generate(
        prompts=list(scripts), n=10, stop=["STOP"], sampling=tinydrug.Sampling(processors=(say,))
    )
    assert [each.text for each in done] == ["x", "say ", "a longer t", ""]
    assert [each.finish_reason for each in done] == ["stop", "stop", "length", "stop"]
    assert [len(each.ids) for each in done] == [2, 8, 10, 1]


def test_more_sequences_than_a_step_holds(folder):
    """Seven sequences in steps of three tokens: decoded in groups, with the same results."""
    prompts = [[5 + i] * (1 + i) for i in range(7)]
    with (
        tinydrug.load(folder, ctx=64, cache="f32", chunk=3) as small,
        tinydrug.load(folder, ctx=64, cache="f32") as large,
    ):
        few, many = (e.generate(prompts=prompts, n=8, drug="V:0.5", drug_seed=1) for e in (small, large))
    assert [each.ids for each in few] == [each.ids for each in many]


def test_prompts_and_drugs_must_agree(engine):
    assert engine.generate(prompts=[]) == []
    with pytest.raises(ConfigError, match="2 prompts but 3 drugs"):
        engine.generate(prompts=["a", "b"], drug=[None, None, None])
    for both in ({"prompt": "a", "prompts": ["a"]}, {}):
        with pytest.raises(ConfigError, match="either prompt or prompts"):
            engine.generate(**both)


# --- chat and kept sessions


def test_chat(engine):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "a", "content": "Yo"},
        {"role": "user", "content": "So?"},
    ]
    text = "<user>Hi<a>Yo<user>So?<a>"
    assert engine.render(messages) == text
    done = engine.chat(messages, n=5)
    assert list(done.prompt_ids) == engine.tokenizer.encode(text, bos=False)
    assert done.ids == engine.generate(list(done.prompt_ids), n=5).ids
    assert engine.chat(messages, n=1, template="{{ messages[0].content }}").prompt_ids == tuple(
        engine.tokenizer.encode("Hi", bos=False)
    )


def count_steps(engine):
    """A function that tells how many tokens were fed since it was made."""
    step, fed = engine.runtime.step, []

    def counted(parts):
        fed.append(sum(len(part.ids) for part in parts))
        return step(parts)

    engine.runtime.step = counted

    def total():
        engine.runtime.step = step
        return sum(fed)

    return total


@pytest.mark.parametrize("drug", [None, "V:0"])
def test_a_kept_session_reads_only_what_is_new(engine, drug):
    kept, text = engine.session(drug), "Tell me"
    for turn in ("", " of the sea", " and of", ""):
        text += turn
        fresh = engine.generate(text, n=6, logprobs=2)
        before, shared = list(kept.ids), 0
        ids = engine.encode(text)
        while shared < min(len(before), len(ids) - 1) and before[shared] == ids[shared]:
            shared += 1
        fed = count_steps(engine)
        stream = engine.stream(text, session=kept, n=6, logprobs=2)
        list(stream)
        assert stream.completion.logprobs == fresh.logprobs and stream.completion.text == fresh.text
        assert fed() == len(ids) - shared + 5
        assert stream.completion.prompt_ids == tuple(ids)
        text += fresh.text
    kept_text = "Quite another beginning"
    fresh = engine.generate(kept_text, n=6, logprobs=2)
    stream = engine.stream(kept_text, session=kept, n=6, logprobs=2)
    list(stream)
    assert stream.completion.logprobs == fresh.logprobs


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_reuse_between_calls_changes_no_bit(name, tmp_path):
    """An engine keeps its last sequence: whatever ran before, drugged or not, the next answer is the same."""
    folder = add_tokenizer(tiny.build(name, tmp_path))
    calls = [
        ([5, 6, 7, 8] * 5, None),
        ([5, 6, 7, 8] * 5 + [9, 10], None),
        ([5, 6, 7, 8] * 5 + [9, 11, 12], "V:0.9,K:0.9"),
        ([5, 6, 7, 8] * 5 + [9, 11, 12], None),
        ([5, 6, 7, 8] * 5 + [9, 11, 12, 13], "H:0.9,prompt=all"),
        ([5, 6, 7, 8] * 5 + [9, 11, 12, 13], "H:0.9,prompt=last"),
        ([5, 6, 7, 8] * 5 + [9, 11, 12, 13], None),
        ([5, 6, 7, 8], None),
        ([5, 6, 7, 8] * 30, "A:0.5~linear:20"),
        ([5, 6, 7, 8] * 3, None),
    ]
    load = functools.partial(tinydrug.load, folder, ctx=256, cache="f32", chunk=32, rewind_every=6)
    with load() as keeps, load(prefix_reuse=False) as anew:
        saved = 0
        for prompt, drug in calls:
            fed = count_steps(keeps)
            found = keeps.generate(prompt, drug=drug, drug_seed=1, n=12, logprobs=1, ignore_eos=True)
            saved += len(prompt) + 11 - fed()
            expected = anew.generate(prompt, drug=drug, drug_seed=1, n=12, logprobs=1, ignore_eos=True)
            assert found.logprobs == expected.logprobs and found.moved == expected.moved
        assert saved > 0, "nothing was reused"


def test_a_kept_session_of_a_wrapped_ring_starts_over(tmp_path):
    """The prefix is shared, but the ring has moved past it."""
    folder = add_tokenizer(tiny.build("mistral-window", tmp_path))
    with tinydrug.load(folder, ctx=512, cache="f32", chunk=16, rewind_every=0) as engine:
        kept = engine.session()
        for prompt in ([5, 6, 7] * 60, [5, 6, 7] * 8, [5, 6, 7] * 40):
            stream = engine.stream(prompt, session=kept, n=8, logprobs=1)
            list(stream)
            assert stream.completion.logprobs == engine.generate(prompt, n=8, logprobs=1).logprobs


def test_a_session_has_its_own_schedule(engine):
    with pytest.raises(ConfigError, match="session"):
        engine.stream("a", session=engine.session(), drug="V:1")
    kept = engine.session("V:0.9,A:0.9", drug_seed=3)
    stream = engine.stream("Tell me", session=kept, n=10)
    list(stream)
    assert stream.completion.ids == engine.generate("Tell me", n=10, drug="V:0.9,A:0.9", drug_seed=3).ids
    again = engine.generate("Tell me", session=engine.session("V:0.9,A:0.9", drug_seed=3), n=10)
    assert (again.ids, again.moved) == (stream.completion.ids, stream.completion.moved)


# --- stopping


def test_closing_a_stream_stops_the_work_and_frees_the_cache(engine, monkeypatch):
    caches, new_cache = [], engine.runtime.new_cache

    def remembered():
        cache = new_cache()
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine.runtime, "new_cache", remembered)
    stream = engine.stream("Tell me", n=50)
    steps = [next(stream).id for _ in range(3)]
    fed = count_steps(engine)
    assert caches[0]() is not None
    stream.close()
    assert fed() == 0 and caches[0]() is None
    assert list(stream) == []
    assert engine.generate("Tell me", n=3).ids == tuple(steps)
    with engine.stream("Tell me", n=50) as stream:
        next(stream)
    assert list(stream) == [] and caches[-1]() is None


def test_a_failing_callback_stops_the_work(engine):
    def fail(*_):
        raise RuntimeError("no more")

    for options in ({"progress": fail}, {"sampling": tinydrug.Sampling(processors=(fail,))}):
        with pytest.raises(RuntimeError, match="no more"):
            engine.generate("Tell me", n=5, **options)
    assert len(engine.generate("Tell me", n=5).ids) == 5


# --- from several threads


def test_a_step_in_between_changes_nothing(folder):
    """Steps of other sequences between the tokens of a batch, as another thread may take them."""
    model = runtime(folder, n_ctx=128)

    def run(between=lambda: None):
        requests = [
            Request(session(model), ids, Sampler(tinydrug.Sampling(), 0), 8)
            for ids in ([5, 6, 7], [9, 10], [11])
        ]
        for _ in generate(model, requests):
            between()
        return [request.generated for request in requests]

    assert run(lambda: session(model).feed([17, 18, 19, 20], outputs=4)) == run()
    model.close()


def test_engines_may_be_used_from_any_thread(engine):
    prompts = [[5 + i, 6, 7 + i] for i in range(6)]
    expected = [
        engine.generate(prompt, n=15, drug="V:0.5", drug_seed=i).ids for i, prompt in enumerate(prompts)
    ]
    found, interval = [None] * 6, sys.getswitchinterval()

    def work(i):
        found[i] = [engine.generate(prompts[i], n=15, drug="V:0.5", drug_seed=i).ids for _ in range(6)]

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == [[ids] * 6 for ids in expected]


def test_close_lets_the_threads_go_and_use_brings_them_back(folder):
    """At once, too: a helper that has not yet heard of the end must not join the next team's work."""
    model = runtime(folder, threads=3, n_ctx=64)

    def helpers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("tinydrug-")]

    others = len(helpers())
    exact = logits(model, [5, 6, 7])
    assert len(helpers()) == others + 2
    for _ in range(200):
        model.close()
        np.testing.assert_array_equal(logits(model, [5, 6, 7]), exact)
    model.close()
    assert len(helpers()) == others
    model.close()


def test_more_cores_than_a_team_can_use(folder, monkeypatch):
    """A machine of 300 cores: whatever is chosen there must work, asleep and awake."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(300), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_: "max 100000")
    chosen = check_threads(None)
    monkeypatch.undo()
    model = runtime(folder, threads=chosen, n_ctx=64)
    exact = logits(model, [5, 6, 7])
    threading.Event().wait(1)  # all helpers sleep by now
    np.testing.assert_array_equal(logits(model, [5, 6, 7]), exact)
    few = runtime(folder, threads=1, n_ctx=64)
    np.testing.assert_array_equal(logits(few, [5, 6, 7]), exact)
    model.close()


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 8), (None, 8)],
)
def test_threads_of_a_control_group(quota, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert available_threads(tmp_path) == expected


FORK = """
import os, sys, time
import tinydrug
engine = tinydrug.load(sys.argv[1], ctx=64)
before = engine.generate([5, 6, 7], n=8).ids
pid = os.fork()
if pid == 0:
    os._exit(0 if engine.generate([5, 6, 7], n=8).ids == before else 3)
here = engine.generate([5, 6, 7], n=8).ids
for _ in range(600):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    sys.exit("the child hangs")
print(os.waitstatus_to_exitcode(status), here == before)
"""


def python(*arguments, **env) -> subprocess.CompletedProcess:
    places = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", *arguments]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": places} | env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_generates(folder):
    done = python(FORK, str(folder))
    assert (done.stdout, done.returncode) == ("0 True\n", 0), done.stderr


INTERRUPTED = """
import sys, time
import numpy as np, tiny
from engines import feed, logits, runtime, session
from tinydrug.kernels import team

model, ids, serve, calls = runtime(sys.argv[1], n_ctx=128), tiny.ids("llama-gqa"), team.serve, []
exact = logits(model, ids, piece=1)

def interrupted(call, tid, job):
    if tid == 0 and not calls:
        calls.append(job)
        time.sleep(0.05)  # the helper has done its share and waits
        raise KeyboardInterrupt
    return serve(call, tid, job)

team.serve = interrupted
sequence = session(model)
try:
    feed(sequence, ids)
except KeyboardInterrupt:
    sequence.reset()
print(len(calls), np.array_equal(feed(sequence, ids, 1), exact))
calls.clear()
try:
    feed(session(model), ids)
except KeyboardInterrupt:
    print("closed")
    model.close()
"""


def test_an_interrupted_step_does_not_spoil_the_next_nor_the_end(folder):
    """Ctrl-C after the helpers were told to begin, before the caller did: they must not wait for ever."""
    done = python(INTERRUPTED, str(folder))
    assert (done.stdout, done.stderr, done.returncode) == ("1 True\nclosed\n", "", 0)


IMPORT = """
import os, sys, threading
environment = dict(os.environ)
import tinydrug
text = {"tokenizers", "sentencepiece", "jinja2", "gguf", "huggingface_hub"}
heavy = text | {"numba", "llvmlite", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert threading.active_count() == 1 and dict(os.environ) == environment
tinydrug.Schedule.parse("V:0.05")
assert "numba" not in sys.modules
import tinydrug.api, tinydrug.loading
assert threading.active_count() == 1 and dict(os.environ) == environment
assert not text & set(sys.modules), text & set(sys.modules)
from tinydrug.kernels import attention, jit, linear, noise, team
assert "numba" not in sys.modules
assert not any("address" in vars(k) for k in vars(linear).values() if isinstance(k, jit.Kernel)), "compiled"
assert jit.cache_folder.cache_info().currsize == 0, "a cache folder was made"
"""


def test_import_does_nothing(tmp_path):
    done = python(IMPORT, TINYDRUG_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "cache").exists()


def test_every_public_name_is_there():
    for name in tinydrug.__all__:
        assert getattr(tinydrug, name) is not None
    assert set(tinydrug.__all__) <= set(dir(tinydrug))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = tinydrug.nothing_like_it


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant": "q3"}, ConfigError, "--quant: 'q3' is not one of none, f32, q8, q4"),
        ({"cache": "f8"}, ConfigError, "--cache-type: 'f8' is not f16 or f32"),
        ({"threads": 0}, ConfigError, "--threads: 0 is not between 1 and"),
        ({"threads": 10**6}, ConfigError, "--threads: 1000000 is not between 1 and"),
        ({"threads": True}, ConfigError, "--threads: True"),
        ({"threads": 1.5}, ConfigError, "--threads: 1.5"),
        ({"ctx": -1}, ConfigError, "--ctx-size: -1"),
        ({"ctx": "long"}, ConfigError, "--ctx-size: 'long'"),
        ({"ctx": 10**13}, ConfigError, "--ctx-size: 10000000000000"),
        ({"chunk": 0}, ConfigError, "--batch-size: 0"),
        ({"rewind_every": -1}, ConfigError, "--rewind-every: -1"),
        ({"rewind_every": 2**31}, ConfigError, "--rewind-every: 2147483648 is not .* at most 2147483647"),
    ],
)
def test_options_of_load(folder, options, error, message):
    with pytest.raises(error, match=message):
        tinydrug.load(folder, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, PromptError, "the prompt is empty"),
        ([5, 96], {}, PromptError, "token id 96 is not between 0 and 95"),
        ("\ud800", {}, PromptError, "not valid Unicode"),
        ("a", {"n": -1}, ConfigError, "--n-predict: -1"),
        ("a", {"n": 1.5}, ConfigError, "--n-predict: 1.5"),
        ("a", {"n": True}, ConfigError, "--n-predict: True"),
        ("a", {"n": 2**31}, ConfigError, "--n-predict: 2147483648 is not .* at most 2147483647"),
        ("a", {"logprobs": -1}, ConfigError, "--logprobs: -1"),
        ("a", {"shift_keep": -1}, ConfigError, "--keep: -1"),
        ("a", {"drug_seed": -1}, ConfigError, "--drug-seed: -1"),
        ("a", {"drug_seed": 2**64}, ConfigError, "--drug-seed"),
        ("a", {"drug_seed": "x"}, ConfigError, "--drug-seed"),
        ("a", {"stop": [""]}, ConfigError, "stop"),
        ("a", {"stop": 5}, ConfigError, "stop: expected a list of texts, not 5"),
        ("a", {"sampling": 0.8}, ConfigError, "sampling: expected a Sampling, not 0.8"),
        (5, {}, PromptError, "expected text, token ids or chat messages, not 5"),
        ([5, 1.5], {}, PromptError, "expected text, token ids or chat messages"),
        ([5, "a"], {}, PromptError, "expected text, token ids or chat messages"),
        ({"role": "user"}, {}, PromptError, "expected text, token ids or chat messages"),
        ([{"role": "user", "content": "Hi"}], {"template": 5}, ConfigError, "template: expected a text"),
        ("a", {"drug": 5}, DrugError, "drug must be text, doses or a Schedule, not 5"),
        ("a", {"drug": 0}, DrugError, "drug must be text, doses or a Schedule, not 0"),
        ("a", {"drug": [5]}, DrugError, "a dose must be a Dose, not 5"),
        ("a", {"drug": "X:1"}, DrugError, "there is no site 'X'"),
        ("a", {"drug": "V:nan"}, DrugError, "V:nan"),
        ("a", {"drug": "V:1@7"}, DrugError, "there is no layer 7"),
        ("a", {"drug": "V:1,V:2"}, DrugError, "site V is dosed twice"),
        ("a", {"drug": "R:1"}, DrugError, "residual"),
    ],
)
def test_options_of_generate(engine, prompt, options, error, message):
    with pytest.raises(error, match=message):
        engine.generate(prompt, **options)
    with pytest.raises(error, match=message):
        list(engine.stream(prompt, **options))


CALLS = {  # of a session of 9 tokens, 3 of them drugged: what the refusal says
    "dose('V:1')": "schedule must be a Schedule, not 'V:1': Schedule.parse reads text",
    "dose(SOBER, -1)": "noise_seed: -1 is not a whole number of at least 0",
    "dose(SOBER, 2**64)": "noise_seed: 18446744073709551616 is not a whole number of at most",
    "dose(SOBER, 'x')": "noise_seed: 'x' is not a whole number",
    "protect('ab')": "positions: expected a list of whole numbers of at least 0",
    "protect(5)": "positions: expected a list of whole numbers of at least 0",
    "protect([1.5])": "positions: expected a list of whole numbers of at least 0",
    "protect(ids=[-1])": "ids: expected a list of whole numbers of at least 0",
    "check(5)": "token ids must be a list, not 5",
    "check('ab')": "token id 'a' is not between 0 and 95",
    "check([1.5])": "token id 1.5 is not between 0 and 95",
    "feed([])": "there are no tokens to feed",
    "feed({5})": "token ids must be a list, not {5}",
    "feed([5], True)": "drugged: True is not none or last or all",
    "feed([5], 'some')": "drugged: 'some' is not none or last or all",
    "feed([5], outputs=-1)": "outputs: -1 is not a whole number of at least 0",
    "feed([5], outputs=2)": "outputs: 2 is not a whole number of at most 1",
    "feed([5], outputs=1.0)": "outputs: 1.0 is not a whole number",
    "sober_up(chunk=0)": "chunk: 0 is not a whole number of at least 1",
    "sober_up(chunk=-1)": "chunk: -1 is not a whole number of at least 1",
    "sober_up(chunk='a')": "chunk: 'a' is not a whole number",
    "rewind(-1)": "cannot rewind -1 of 9 tokens",
    "rewind(10)": "cannot rewind 10 of 9 tokens",
    "rewind(1.0)": "cannot rewind 1.0 of 9 tokens",
    "rewind(True)": "cannot rewind True of 9 tokens",
    "shift(-1)": "keep: -1 is not a whole number of at least 0",
    "shift(None)": "keep: None is not a whole number",
    "engine.stream('a', session=5)": "session: it is not of this engine",
    "engine.generate('a', session=5)": "session: it is not of this engine",
    "engine.generate(prompts=['a'], session=engine.session())": "session: it continues one prompt",
    "engine.generate(prompts='ab')": "prompts: expected a list of prompts, not 'ab'",
    "engine.generate(prompts=5)": "prompts: expected a list of prompts, not 5",
    "engine.batch([], places=0).__next__()": "places: 0 is not a whole number of at least 1",
    "engine.chat(5)": "messages: expected a list",
    "engine.render(5)": "messages: expected a list",
    "engine.render([], template=5)": "template: expected a text, not 5",
    "engine.replay('a.json')": "record: expected a Record, not 'a.json': Record.load reads files",
    "engine.session(5)": "drug must be text, doses or a Schedule, not 5",
    "engine.session(None, 1.5)": "--drug-seed: 1.5",
    "engine.resolve(5)": "drug must be text, doses or a Schedule, not 5",
    "engine.forward('ab')": "expected text, token ids or chat messages, not 'ab'",
    "engine.forward([1.5])": "expected text, token ids or chat messages",
    "engine.hidden(5)": "expected text, token ids or chat messages, not 5",
    "engine.score(5)": "expected text, token ids or chat messages, not 5",
    "engine.score_after('a', 5)": "expected text, token ids or chat messages, not 5",
    "engine.pieces(size=1)": "size: 1 is not a whole number of at least 2",
    "engine.pieces(5)": "expected text, token ids or chat messages, not 5",
    "engine.runtime.redraw(1)": "attention: softmax has no features to redraw",
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_that_make_no_sense_are_refused_and_change_nothing(engine, call):
    sequence, ids = engine.session("V:1", 1), [5, 6, 7, 8, 9, 10, 11, 12, 13]
    sequence.feed(ids[:6]), sequence.feed(ids[6:], "all")
    twin = sequence.fork()
    with pytest.raises((ConfigError, DrugError, PromptError), match=f"^.*{re.escape(CALLS[call])}") as error:
        names = {"engine": engine, "SOBER": SOBER, "sequence": sequence}
        eval(call if call.startswith("engine.") else f"sequence.{call}", names)
    assert "\n" not in str(error.value)
    assert (sequence.ids, sequence.dirty, sequence.noise) == (ids, 3, twin.noise)
    np.testing.assert_array_equal(sequence.feed([5], "all"), twin.feed([5], "all"))


def test_a_session_of_another_engine_is_refused(engine, folder):
    with tinydrug.load(folder, ctx=64) as other, pytest.raises(ConfigError, match="not of this engine"):
        engine.stream("a", session=other.session())


def test_special_tokens_in_messages_are_text(engine):
    """What a template writes is special, what someone said is not; the text that is shown has no guards."""
    template = "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}<s>"
    said = ["Hi</s><s>you ", "<s>", "plain"]
    messages = [{"role": "user", "content": text} for text in said]
    expected = []
    for text in said:
        expected += [1, *engine.tokenizer.encode(text.strip(), bos=False, special=False), 2]
    assert engine.encode(messages, template) == [*expected, 1]
    assert engine.render(messages, template) == "<s>Hi</s><s>you</s><s><s></s><s>plain</s><s>"
    assert engine.encode("a<s>b").count(1) == 1  # a text of one's own may have them


def test_messages_are_refused_in_words(engine, tmp_path):
    for messages in ([], 5, "Hi", ["Hi"], [{"role": "user", "content": "Hi"}, "Hi"]):
        with pytest.raises(PromptError, match="messages"):
            engine.chat(messages)
    bare = add_tokenizer(tiny.build("llama-mha", tmp_path))
    with tinydrug.load(bare) as base, pytest.raises(PromptError, match="has no chat template"):
        base.chat([{"role": "user", "content": "Hi"}])


def test_scores_need_two_tokens(engine):
    with pytest.raises(PromptError, match="at least two tokens"):
        engine.score([5])


def damaged(folder: Path, to: Path, name: str, value: float) -> Path:
    def spoil(tensors):
        spoilt = tensors[name].copy()
        spoilt[..., 3] = value
        return tensors | {name: spoilt}

    return add_tokenizer(edited(folder, to, spoil))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", ["none", "q8", "q4"])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_never_sampled_from(folder, value, quant, tensor, tmp_path):
    spoilt = damaged(folder, tmp_path, tensor, value)
    with tinydrug.load(spoilt, quant=quant) as engine:
        hot = tinydrug.Sampling(temperature=1.0)
        for use in (
            lambda: engine.generate([5, 6], n=1),
            lambda: engine.generate([5, 6], n=1, sampling=hot, drug="V:0.5"),
            lambda: engine.forward([5, 6]),
            lambda: engine.score([5, 6]),
            lambda: next(engine.stream([5, 6], n=1)),
        ):
            with pytest.raises(NumericalError, match="--check-tensors"):
                use()
    with pytest.raises(BadModelFile, match=rf"tensor {tensor}: \d+ values are NaN or infinite"):
        tinydrug.load(spoilt, quant=quant, check_tensors=True)


def test_missing_and_misshaped_tensors_are_all_named(folder, tmp_path):
    def spoil(tensors):
        tensors = dict(tensors)
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.self_attn.k_proj.weight"]
        up = tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ascontiguousarray(up.T)
        tensors["model.layers.1.input_layernorm.weight"] = np.ones(47, np.float32)
        return tensors

    add_tokenizer(edited(folder, tmp_path, spoil))
    with pytest.raises(BadModelFile) as raised:
        tinydrug.load(tmp_path)
    message = str(raised.value)
    for part in (
        "model.norm.weight is missing",
        "model.layers.2.self_attn.k_proj.weight is missing",
        "model.layers.0.mlp.up_proj.weight is (48, 100), expected (100, 48) (transposed?)",
        "model.layers.1.input_layernorm.weight is (47,), expected (48,)",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": []}, r"model_type \[\] is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral'; supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs the field factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor is 'x', not a number"),
        ({"rope_scaling": 3}, "rope_parameters is 3"),
        ({"rope_theta": -10000.0}, "rope type default has no frequencies for {'rope_theta': -10000.0}"),
        ({"rope_theta": 0}, "has no frequencies"),
        ({"rope_theta": 10**400}, "has no frequencies for {'rope_theta': inf}"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "has no frequencies"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "rope_theta": 1.0}}, "has no frequencies"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": -3.0}}, "has no frequencies"),
        ({"rope_scaling": {"rope_type": "factors"}}, "has no frequencies"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"num_key_value_heads": 4}, "heads must divide"),
        ({"head_dim": 7}, "width must be even"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide into 5 heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps is \[1\]"),
    ],
)
def test_configs_that_are_refused(folder, fields, message, tmp_path):
    add_tokenizer(edited(folder, tmp_path, **fields))
    with pytest.raises(tinydrug.UnsupportedModel, match=message) as raised:
        tinydrug.load(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 3}, "does not divide into 3 heads"),
    ],
)
def test_gpt2_configs_that_are_refused(fields, message, tiny_model, tmp_path):
    source = tiny_model("gpt2")
    config = json.loads((source / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    add_tokenizer(tmp_path)
    with pytest.raises(tinydrug.UnsupportedModel, match=message):
        tinydrug.load(tmp_path)


def test_gpt2_has_no_positions_beyond_its_table(tiny_model, tmp_path):
    folder = add_tokenizer(tiny.build("gpt2", tmp_path))
    with pytest.raises(ConfigError, match="--ctx-size: 65 is more than the 64 positions"):
        tinydrug.load(folder, ctx=65)


# --- what it would take


def test_inspect(tiny_model, tmp_path):
    for name in ("llama-mha", "gpt2", "llama-head12", "llama-bias"):
        folder = add_tokenizer(tiny.build(name, tmp_path / name))
        about = tinydrug.inspect(folder)
        assert about.model_type == tiny.SPECS[name]["model_type"]
        weights = tiny.weights(name)
        if name != "gpt2":  # whose masks are in the file, too
            assert about.parameters == sum(w.size for w in weights.values())
        assert about.file_bytes == sum(about.bytes_by_kind.values())
        for quant, nbytes in about.weight_bytes.items():
            model = runtime(folder, quant=quant, threads=1)
            assert 0.4 * model.weights.nbytes < nbytes <= model.weights.nbytes, "padding of heads aside"
            model.close()
