"""What would refute the privacy claim of the sample unit, each as a function that raises AssertionError.

A `Device` is the real session with the parts that `edge_agent.trainer` wires into it, so that evidence is taken of what
runs: signed order in, ledger, sampling, clipping, noise, stored update out. Noise and draws come from the operating
system. Each piece of evidence raises a false alarm at most once in a million runs, and its counts are such that the
breaches of `tests.simulators.sabotage` are within reach: the functions say how far.
"""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from torch import nn

from edge_agent import trainer
from edge_agent.samples.cipher import open_cipher
from edge_agent.training.local import LocalParameters, load_initial
from edge_agent.training.onnx_engine import OnnxEngine
from edge_agent.training.session import TrainingSession
from edge_agent.training.step import Step
from edge_agent.training.updates import UpdateStore
from fl_server.packaging.export import export_architecture
from models.contract.encoding import build_digest
from models.contract.ledger import LedgerHead
from models.contract.manifest import TRAIN_STEP_NAME, FileEntry
from models.definitions import ModelDefinition, TensorSpec
from models.tensors.uplink import decode_update
from tests.simulators.linear import open_opacus_step
from tests.simulators.step_graph import build_privacy, build_step_manifest, build_training, open_onnx_step
from tests.simulators.training import NOW_S, Orders, build_training_job

FALSE_ALARM = 1e-6  # of one piece of evidence
SLACK = 2.0**-9  # by which noise is larger than claimed, in standard deviations: what rounding may add to a sample
CANARIES = 200_000
COINS_SEED = 20_261_124
CANARY_DELTA = "1e-11"  # so small that 200 000 canaries do not wash the bound out
CANARY_NOISE = {1: "9.182", 4: "2.441", 8: "1.282"}  # by epsilon of two rounds with everybody in each step
UNLIMITED = Decimal("1e18")
_LEARNING_RATE = Decimal("1e-6")  # so small that no step changes the gradients of the next
_CANARY_GRADIENT = 1000.0  # in clipping norms


class Device:
    """A session on real files, with `x` and `y` as its samples, as the training process wires it."""

    def __init__(self, directory: Path, step: Step, manifest, x, y, *, epsilon_limit=UNLIMITED, delta="0.001"):
        directory.mkdir(parents=True, exist_ok=True)
        self.x, self.y, self.round = x, y, 0
        self._directory, self._step, self._manifest, self._digest = directory, step, manifest, manifest.step_digest
        self._orders = Orders(graph_digest=self._digest)
        self._job = build_training_job(
            directory,
            epsilon_limit=epsilon_limit,
            total_epsilon_limit=UNLIMITED,
            delta=Decimal(delta),
            noise_multiplier_limit=Decimal(0),
            ledger_copy=LedgerHead(),  # a coordinator that always says that nothing was spent
        )

    def answer(self, parameters, privacy, training):
        """Return what the next round's update says of the sum of all its steps, in clipping norms; None if refused."""
        self.round += 1
        envelope = self._orders.build(self.round, parameters, privacy=privacy, training=training)
        samples = SimpleNamespace(load=lambda _input, _target: (self.x, self.y))
        with trainer.open_ledger(self._directory / trainer.LEDGER_NAME) as ledger:
            trainer._restore(ledger, self._job)
            session = TrainingSession(
                job=self._job,
                graph_digest=self._digest,
                size=self._step.size,
                key=self._orders.key.public_key(),
                ledger=ledger,
                updates=UpdateStore(self._directory / trainer.UPDATES_NAME),
                local=LocalParameters(
                    self._directory,
                    self._manifest,
                    load_initial(self._directory, self._manifest),
                    open_cipher(bytes(32)),
                ),
                train=trainer._build_training(self._step, samples, self._manifest),
                report=lambda _event: None,
                now_s=lambda: NOW_S,
            )
            update = session.handle(parameters, envelope)
        if update is None:
            return None
        share = float(training.learning_rate / training.expected_batch * privacy.clipping_norm)
        return -decode_update(update, training.uplink, size=self._step.size).astype(np.float64) / share


def build_linear_device(directory: Path, engine: str, *, features: int, x, y, batch: int = 8, **limits) -> Device:
    open_step = open_opacus_step if engine == "opacus" else open_onnx_step
    return Device(directory, *open_step(features=features, batch=batch), x, y, **limits)


def _plan(**changed):
    return build_privacy(**{"epsilon": str(UNLIMITED), **changed})


def _training(steps: int):
    return replace(build_training(steps=steps, rounds=1000), learning_rate=_LEARNING_RATE)


def check_noise(directory: Path, engine: str = "onnx") -> None:
    """Chi-square of the noise of two rounds, of their sum and of their difference: 10 000 values each.

    Two steps a round, over 40 samples without a gradient in batches of 8: noise that comes with every batch, or twice
    the same, shows. A standard deviation that is 4 % off is seen nearly always.
    """
    device = build_linear_device(
        directory, engine, features=9999, x=np.zeros((40, 9999), np.float32), y=np.zeros(40, np.float32)
    )
    privacy = _plan(clipping_norm="2", noise_multiplier="3", sampling_rate="1")
    first, second = (device.answer(np.zeros(10_000, np.float32), privacy, _training(steps=2)) for _ in range(2))
    low, high = stats.chi2.ppf([FALSE_ALARM / 8, 1 - FALSE_ALARM / 8], 10_000)
    for values in (first, second, (first + second) / np.sqrt(2), (first - second) / np.sqrt(2)):
        found = float((values**2).sum()) / (2 * 3**2)
        assert low <= found <= high * (1 + SLACK) ** 2, f"chi-square {found:.0f} is not in {low:.0f}..{high:.0f}"


def check_sensitivity_of_one_sample(directory: Path, engine: str = "onnx") -> None:
    """One sample more, ordinary or extreme, moves what leaves the device by at most the clipping norm.

    Noise is a millionth of it: what is measured is exact to 1e-5. A sample with a large gradient counts for all of it.
    """
    generator = np.random.default_rng(1)
    kept_x, kept_y = generator.normal(0, 2, (30, 3)).astype(np.float32), generator.normal(0, 2, 30).astype(np.float32)
    device = build_linear_device(directory, engine, features=3, x=kept_x, y=kept_y)
    privacy, parameters = _plan(noise_multiplier="1e-6", sampling_rate="1"), np.array([0.5, -1, 2, 0.1], np.float32)
    without = device.answer(parameters, privacy, _training(steps=1))
    moved = []
    for scale in (1e-3, 1, 1e3, 1e10, 1e20, 1e38, np.inf, np.nan):
        with np.errstate(over="ignore"):
            device.x = np.append(kept_x, (scale * generator.normal(size=(1, 3))).astype(np.float32), axis=0)
        device.y = np.append(kept_y, np.float32(1))
        moved.append(float(np.linalg.norm(device.answer(parameters, privacy, _training(steps=1)) - without)))
    assert max(moved) <= 1 + SLACK, f"one sample counts for {max(moved):.3f} clipping norms"
    assert max(moved) >= 0.99, "no sample counts: nothing was measured"


def check_sampler_is_poisson(directory: Path, engine: str = "onnx") -> None:
    """Who takes part is seen in the sums: sample i moves parameter i alone, and noise is a millionth.

    200 samples, rate 0.3: sizes of 60 draws and, over 400 steps, how often each sample took part are as spread as
    independent coins make them; no sample's part in a draw depends on that in the draw before. Batches of a fixed size
    have no spread at all, and shuffled ones depend on each other by 40 standard deviations.
    """
    count, rate = 200, 0.3
    x, y = 1e3 * np.eye(count, dtype=np.float32), np.full(count, -1e3, np.float32)
    device = build_linear_device(directory, engine, features=count, x=x, y=y, batch=64)
    privacy = _plan(noise_multiplier="1e-6", sampling_rate=str(rate))

    def count_parts(steps: int):
        return device.answer(np.zeros(count + 1, np.float32), privacy, _training(steps))[:count]

    draws = np.array([count_parts(1) for _ in range(60)])
    assert np.all((np.abs(draws) < 0.01) | (np.abs(draws - 1) < 0.01)), "a sample counts more than once"
    draws = draws > 0.5
    tail = FALSE_ALARM / 10  # of ten
    _check_spread("a draw's size", draws.sum(1), count, rate, tail)
    _check_spread("a sample's parts", np.rint(count_parts(400)), 400, rate, tail)
    products = (draws[1:] - rate) * (draws[:-1] - rate)
    deviations = float(products.sum()) / (rate * (1 - rate) * np.sqrt(products.size))
    assert abs(deviations) < stats.norm.isf(tail), f"draws depend on those before: {deviations:.1f} deviations"


def _check_spread(what: str, counts, coins: int, rate: float, tail: float) -> None:
    """Counts of independent coins: their mean, and their squared deviations, which are chi-square."""
    spread = coins * rate * (1 - rate)
    mean = (counts.mean() - coins * rate) / np.sqrt(spread / counts.size)
    assert abs(mean) < stats.norm.isf(tail), f"{what} is {counts.mean():.1f} in the mean, expected {coins * rate:.1f}"
    found = float(((counts - coins * rate) ** 2).sum()) / spread
    low, high = stats.chi2.ppf([tail, 1 - tail], counts.size)
    assert low <= found <= high, f"{what} has a squared deviation of {found:.0f}, expected {low:.0f}..{high:.0f}"


def check_budget_survives_restarts(directory: Path, engine: str, compute_epsilon) -> None:
    """What left the device, counted outside it, never costs more than its owner's limit of 2, over any restarts.

    Args:
        directory: Empty.
        engine: Of the device.
        compute_epsilon: Of another accountant: (rate, noise multiplier, steps, delta) -> epsilon.
    """
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(20, 3)).astype(np.float32), generator.normal(size=20).astype(np.float32)
    device = build_linear_device(directory, engine, features=3, x=x, y=y, epsilon_limit=Decimal(2))
    privacy, left = _plan(sampling_rate="0.1"), 0
    for _ in range(40):  # each opens the ledger anew; the budget is spent after seven
        left += device.answer(np.zeros(4, np.float32), privacy, _training(steps=2)) is not None
    assert left >= 2, "the device answers nothing"
    spent = compute_epsilon(0.1, 1.0, 2 * left, 0.001)
    assert spent <= 2 * 1.01, f"{left} updates left, which cost epsilon {spent:.2f}, the owner allows 2"


class _Canaries(nn.Module):
    """One number for each canary, so that no canary's gradient touches another's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CANARIES, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embedding(tokens)[:, 0, 0]
        return found


def build_canary_step(directory: Path):
    """Return the step of the canaries' model, from its packaged graph, and its manifest; takes some seconds."""
    definition = ModelDefinition(
        name="linear",
        build=_Canaries,
        inputs=(TensorSpec("tokens", ("batch", 1), "int64"),),
        outputs=(TensorSpec("found", ("batch",), "float32"),),
        loss="mse",
        metric="rmse",
        batch=4096,
    )
    architecture = export_architecture(definition, directory)
    graph = architecture.train_step_path.read_bytes()
    manifest = build_step_manifest(graph)
    entry = FileEntry(digest=build_digest(graph), size_bytes=len(graph))
    manifest = replace(
        manifest,
        inputs=definition.inputs,
        files={**manifest.files, TRAIN_STEP_NAME: entry},
        training=architecture.training,
    )
    return Step(OnnxEngine(graph, manifest.training.layout), manifest), manifest


def score_canaries(directory: Path, canary_step, epsilon: int):
    """Return one score a canary, and which of them were among the samples; one run at `epsilon`.

    Each canary is in by a fair coin of a fixed seed. The auditor chooses the parameters of both rounds, so that each
    canary's gradient points the other way in the second: their difference doubles it, and noise drawn twice cancels.
    """
    is_in = np.random.default_rng(COINS_SEED).random(CANARIES) < 0.5
    tokens = np.flatnonzero(is_in)[:, None]
    y = np.full(len(tokens), _CANARY_GRADIENT, np.float32)
    device = Device(directory, *canary_step, tokens, y, epsilon_limit=Decimal(epsilon), delta=CANARY_DELTA)
    privacy = build_privacy(
        noise_multiplier=CANARY_NOISE[epsilon], sampling_rate="1", delta=CANARY_DELTA, epsilon=str(epsilon)
    )
    first, second = (
        device.answer(np.full(CANARIES, start, np.float32), privacy, _training(steps=1))
        for start in (0.0, 2 * _CANARY_GRADIENT)
    )
    return second - first, is_in


def check_audit(scores, is_in, epsilon: int) -> None:
    """Guess those of the highest scores in, of the lowest out: (epsilon, delta) bounds how many guesses are right.

    At epsilon 1 and 4 the 2000 at each end, at 8 the 50 000: there 99 991 of 100 000 must be right to refute it, and
    four times the signal gets all but one or two.

    Source:
        Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846, Theorem 5.2
        and appendix D.
    """
    guesses = 50_000 if epsilon == 8 else 2000
    order = np.argsort(scores)
    right = int(is_in[order[-guesses:]].sum() + (~is_in[order[:guesses]]).sum())
    chance = compute_audit_chance(2 * guesses, right, epsilon, float(CANARY_DELTA))
    assert chance > FALSE_ALARM, f"{right} of {2 * guesses} guesses are right: chance {chance:.0e} at epsilon {epsilon}"


def compute_audit_chance(guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the chance, at most, of so many right guesses under (epsilon, delta)."""
    by_guessing = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    fewer = np.arange(1, right + 1)
    mass = by_guessing.cdf(right - 1) - by_guessing.cdf(right - 1 - fewer)
    return float(by_guessing.sf(right - 1) + 2 * CANARIES * delta * (mass / fewer).max())


def check_score_gap(scores, is_in, epsilon: int) -> None:
    """Those in may score higher than those out by sqrt(2) / z standard deviations, two rounds of the Gaussian mechanism.

    With 200 000 canaries the gap is known to 0.0045 deviations; it is 0.15, 0.58 and 1.10 at epsilon 1, 4 and 8.
    """
    allowed = np.sqrt(2) / float(CANARY_NOISE[epsilon])
    outside = scores[~is_in]
    gap = (scores[is_in].mean() - outside.mean()) / max(float(outside.std()), 1e-12)
    error = stats.norm.isf(FALSE_ALARM / 2) * np.sqrt((1 + allowed**2 / 2) * 4 / CANARIES)
    assert gap <= allowed + error, f"canaries stand out by {gap:.3f} deviations, {allowed:.3f} are allowed"
    assert gap >= allowed * (1 - SLACK) - error, (
        f"canaries stand out by {gap:.3f} deviations: the audit sees too little"
    )
