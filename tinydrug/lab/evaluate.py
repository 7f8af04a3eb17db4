"""Whether doubt tells wrong answers from right ones: AUROC on questions with known answers, with intervals.

Noise and temperature sampling answer each question K times: the entropy of these answers is the score of
both, at equal cost. Beside them: what the K noises say of the sober answer's tokens, and what one sober pass
knows.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydrug.api import Engine, Job, Options
from tinydrug.engine.sampling import Sampling
from tinydrug.errors import ConfigError
from tinydrug.lab.doubt import check, normal, uncertainty
from tinydrug.lab.metrics import entropy
from tinydrug.lab.progress import Progress, Work
from tinydrug.lab.results import record
from tinydrug.noise import Schedule

OWN = Path(__file__).parent / "questions.toml"
DRUGS = ("A:kl=0.1", "V:kl=0.1", "H:kl=0.1", "M:kl=0.1~uniform+held+tied")
TEMPERATURES = (0.5, 1.0)
PASS = "sober pass: -log p"
RESAMPLES = 2000  # of the bootstrap
GROUP = 8  # questions answered together
INSTRUCTION = "Answer briefly."


@dataclass(frozen=True)
class Question:
    kind: str  # fact, arithmetic, invented
    text: str
    right: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of Q questions by each method, and what follows."""

    kinds: tuple[str, ...]  # (Q,)
    correct: np.ndarray  # (Q,) bool: the sober answer
    scores: dict[str, np.ndarray]  # by method, (Q,): higher is less sure
    answers: list[dict]  # the sober answers
    record: dict

    def rows(self) -> list[dict]:
        """AUROC of every method with its 95 % interval, with and without invented entities."""
        real = np.array([kind != "invented" for kind in self.kinds])
        out = []
        for name, chosen in (("real", real), ("all", np.ones_like(real))):
            wrong, drawn = ~self.correct[chosen], _resamples(int(chosen.sum()))
            for method, values in self.scores.items():
                score = values[chosen]
                low, high = _interval(auroc(score[drawn], wrong[drawn]))
                row = {"questions": name, "n": len(wrong), "wrong": int(wrong.sum()), "method": method}
                out.append(row | {"auroc": float(auroc(score, wrong)), "low": low, "high": high})
        return out

    def difference(self, one: str, other: str) -> tuple[float, float, float]:
        """AUROC of one method minus that of another on the same questions, with its 95 % interval."""
        wrong, drawn = ~self.correct, _resamples(len(self.correct))
        a, b = self.scores[one], self.scores[other]
        low, high = _interval(auroc(a[drawn], wrong[drawn]) - auroc(b[drawn], wrong[drawn]))
        return float(auroc(a, wrong) - auroc(b, wrong)), low, high


def load_questions(path: str | None = None) -> list[Question]:
    """Of a TOML file, or the package's own. ConfigError naming what is wrong with it."""
    path = Path(path or OWN)
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--questions: {path}: {error.strerror}", "questions") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--questions: {path}: is not TOML: {error}", "questions") from None
    found = []
    for kind, table in data.items():
        pairs = list(table.items()) if isinstance(table, Mapping) else [(kind, None)]
        if kind == "invented" and isinstance(table, Mapping):
            texts = table.get("questions")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ConfigError(f"--questions: {path}: invented needs a list of questions", "questions")
            pairs = [(text, table.get("right")) for text in texts]
        for text, right in pairs:
            if not text.strip():
                raise ConfigError(f"--questions: {path}: a question is empty", "questions")
            if not isinstance(right, list) or not right or not all(isinstance(w, str) and w for w in right):
                raise ConfigError(f"--questions: {path}: {text!r} needs a list of right answers", "questions")
            found.append(Question(kind, text, tuple(right)))
    if not found:
        raise ConfigError(f"--questions: {path}: there are no questions", "questions")
    return found


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer holds a right one as whole words; of a sum, whether its last number is right."""
    if question.kind == "arithmetic":
        numbers = re.findall(r"\d+(?:[.,]\d+)*", answer)
        return bool(numbers) and numbers[-1].replace(",", "").rstrip(".") in question.right
    text = answer.lower().replace("’", "'")
    return any(re.search(rf"(?<!\w){re.escape(word.lower())}(?:e?s)?(?!\w)", text) for word in question.right)


def auroc(score: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The chance that a wrong answer has a higher score than a right one: (..., Q), (..., Q) -> (...); NaN
    if all are right, or all wrong. It is Mann and Whitney's U for each pair, from ranks."""
    from scipy.stats import rankdata

    n_wrong, n_right = wrong.sum(-1), (~wrong).sum(-1)
    u = (rankdata(score, axis=-1) * wrong).sum(-1) - n_wrong * (n_wrong + 1) / 2
    with np.errstate(invalid="ignore"):
        return np.divide(u, n_wrong * n_right)


def evaluate(
    engine: Engine,
    questions: Sequence[Question],
    drugs: Sequence[str] = DRUGS,
    k: int = 10,
    n: int = 24,
    progress: Progress | None = None,
    seed: int = 1,
) -> Evaluation:
    """Answer every question soberly, k times under each noise and k times at each temperature.

    Progress counts questions; those that are done when it raises KeyboardInterrupt are kept."""
    schedules = {drug: check(engine, drug, k, n) for drug in drugs}
    done: list[tuple[Question, dict, dict]] = []
    work = Work([questions[at : at + GROUP] for at in range(0, len(questions), GROUP)], progress, len)
    for some in work:
        done += _answer(engine, some, schedules, k, n, seed)
    if not done:
        raise ConfigError("no question was answered", "questions")
    settings = {"drugs": {drug: str(s) for drug, s in schedules.items()}, "k": k, "n": n, "seed": seed}
    return Evaluation(
        kinds=tuple(question.kind for question, _, _ in done),
        correct=np.array([about["right"] for _, about, _ in done]),
        scores={name: np.array([scores[name] for _, _, scores in done]) for name in done[0][2]},
        answers=[about for _, about, _ in done],
        record=record(engine, "doubt --evaluate", **settings) | {"complete": work.complete},
    )


def report(found: Evaluation) -> str:
    """Lines of text: accuracy, a table of AUROCs, and noise minus temperature."""
    kinds = Counter(found.kinds)
    right = {kind: sum(np.array(found.kinds)[found.correct] == kind) for kind in kinds}
    lines = ["right: " + ", ".join(f"{kind} {right[kind]} of {kinds[kind]}" for kind in kinds), ""]
    if found.correct.all() or not found.correct.any():
        all_are = "right" if found.correct.all() else "wrong"
        return "\n".join([*lines, f"no AUROC: all answers are {all_are}, there is nothing to tell apart"])
    width = max(len(name) for name in found.scores)
    lines.append(f"AUROC of wrong answers, with 95 % intervals of {RESAMPLES} bootstrap samples of questions")
    rows = found.rows()
    half = len(rows) // 2
    lines.append(
        f"{'method':<{width}}  {'real ones, n = ' + str(rows[0]['n']):<22}  all, n = {rows[-1]['n']}"
    )
    for one, other in zip(rows[:half], rows[half:], strict=True):
        cells = [f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in (one, other)]
        lines.append(f"{one['method']:<{width}}  {cells[0]:<22}  {cells[1]}")
    others = [PASS, *(_sampled(temperature) for temperature in TEMPERATURES)]
    lines += ["", "differences on the same questions (all), answers of equal number:"]
    for name in found.scores:
        if name.endswith(": answers") and name not in others:
            for other in others:
                mean, low, high = found.difference(name, other)
                lines.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]  {name} minus {other}")
    return "\n".join(lines)


def _answer(engine: Engine, questions, schedules: Mapping[str, Schedule], k: int, n: int, seed: int):
    """(question, about its sober answer, scores) of some questions."""
    prompts = [_ids(engine, question) for question in questions]
    ways = {f"{drug}: answers": (schedule, 0.0) for drug, schedule in schedules.items()}
    ways |= {_sampled(t): (None, t) for t in TEMPERATURES}
    jobs = [Job(ids, None, Options(n=n, stop=("\n",), logprobs=0)) for ids in prompts]
    for ids in prompts:
        for schedule, temperature in ways.values():
            for i in range(seed, seed + k):
                options = Options(
                    n=n, stop=("\n",), drug_seed=i, sampling=Sampling(temperature=temperature, seed=i)
                )
                jobs.append(Job(ids, schedule, options))
    answers = [
        completion for _, completion in sorted(engine.batch(jobs, places=64), key=lambda pair: pair[0])
    ]
    out = []
    for q, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
        sober = answers[q]
        scores = {PASS: -float(np.mean([logprob for _, logprob, _ in sober.logprobs]))}
        for drug, schedule in schedules.items():
            total, aleatoric, _ = uncertainty(engine, ids, sober.ids, schedule, range(seed, seed + k))
            scores[f"{drug}: epistemic"] = float((total - aleatoric).mean())
            scores[f"{drug}: total"] = float(total.mean())
        at = len(prompts) + q * len(ways) * k
        for name in ways:
            scores[name], at = entropy([normal(answer.text) for answer in answers[at : at + k]]), at + k
        about = {
            "question": question.text,
            "answer": sober.text.strip(),
            "right": is_right(question, sober.text),
        }
        out.append((question, about | scores, scores))
    return out


def _sampled(temperature: float) -> str:
    return f"temperature {temperature:g}: answers"


def _ids(engine: Engine, question: Question) -> list[int]:
    """The prompt of a question: through the model's chat template, if it has one."""
    if engine.tokenizer.chat_template is None:
        return engine.encode(f"Question: {question.text}\nAnswer:")
    return engine.encode([{"role": "user", "content": f"{INSTRUCTION} {question.text}"}])


def _resamples(n: int) -> np.ndarray:
    """Numbers of questions drawn with replacement, (RESAMPLES, n); the same every time."""
    return np.random.default_rng(0).integers(0, max(n, 1), (RESAMPLES, n))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of what is known."""
    known = values[np.isfinite(values)]
    return tuple(np.percentile(known, [2.5, 97.5]).tolist()) if known.size else (np.nan, np.nan)
