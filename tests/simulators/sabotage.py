"""Breaches of the privacy claim, each made in the real code that `edge_agent.trainer` wires together."""

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from edge_agent import trainer


def quarter_the_noise(patch: pytest.MonkeyPatch) -> None:
    draw = trainer.draw_gaussian
    patch.setattr(trainer, "draw_gaussian", lambda count, deviation: draw(count, deviation / 4))


def clip_at_five_times_the_norm(patch: pytest.MonkeyPatch) -> None:
    train = trainer.local_training

    def train_loosely(step, x, y, parameters, privacy, *others):
        loose = replace(
            privacy,
            clipping_norm=5 * privacy.clipping_norm,
            noise_multiplier=privacy.noise_multiplier / Decimal(5),
        )
        return train(step, x, y, parameters, loose, *others)

    patch.setattr(trainer, "local_training", train_loosely)


def reuse_the_seed(patch: pytest.MonkeyPatch) -> None:
    draw = trainer.draw_gaussian
    patch.setattr(
        trainer, "draw_gaussian", lambda count, deviation: draw(count, deviation, np.random.default_rng(1).bytes)
    )


def shuffle(patch: pytest.MonkeyPatch) -> None:
    """Batches of a fixed size, one after the other through a random order of all samples."""
    generator, waiting = np.random.default_rng(), []

    def draw(count, rate):
        size = round(count * rate)
        if len(waiting) < size:
            waiting.extend(generator.permutation(count))
        drawn = np.zeros(count, bool)
        drawn[waiting[:size]] = True
        del waiting[:size]
        return drawn

    patch.setattr(trainer, "draw_poisson", draw)


def draw_batches_of_a_fixed_size(patch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng()

    def draw(count, rate):
        return generator.permutation(count) < round(count * rate)

    patch.setattr(trainer, "draw_poisson", draw)


def reset_the_ledger(patch: pytest.MonkeyPatch) -> None:
    open_ledger = trainer.open_ledger

    def open_empty(path):
        path.unlink(missing_ok=True)
        return open_ledger(path)

    patch.setattr(trainer, "open_ledger", open_empty)
