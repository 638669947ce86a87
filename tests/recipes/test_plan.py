"""The search for the fastest step that fits, on a made-up compiler."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from secvec_jax.planning.gpus import GPUS, Gpu
from secvec_jax.planning.plan import Plan, TooLarge
from secvec_jax.planning.roofline import Roofline
from secvec_jax.planning.schedule import Account
from secvec_jax.planning.torus import CHIPS, Chip
from secvec_jax.recipes import plan
from secvec_jax.recipes.plan import REMATS, PlanRun
from tests.toys import ARCHITECTURE

CHIP, PARTS, LENGTH = CHIPS["TPU v5 lite"], 4, 2048
COST = dict(zip(REMATS, (8, 4, 2, 1)))


def search(
    fixed: float, slope: float, monkeypatch, chip: Chip | Gpu = CHIP
) -> tuple[list[tuple[str, int, bool]], tuple[PlanRun, Plan] | None]:
    """What was tried (remat, lines, whether it fits), and what was found; sizes are shares of a chip's memory."""
    tried = []

    def compile_plan(settings: PlanRun, architecture) -> Plan:
        training = settings.training
        share = fixed + slope * COST[training.remat] * training.batch_size / PARTS
        tried.append((training.remat, training.batch_size, share <= 1))
        if share > 1:
            raise TooLarge("it does not fit")
        # Lines make a step more efficient, and so does remembering more.
        seconds = 1 + training.batch_size * (1 - 0.05 * COST[training.remat])
        account: Account | Roofline = Account(seconds, seconds, 0.0, 0.0, 0.0, 0.0, {}, [], [], 0)
        if isinstance(chip, Gpu):
            account = Roofline(0.0, 0.0, seconds, 0.0, 0.0, {}, {}, [])
        size = int(share * chip.memory)
        tokens = training.batch_size * LENGTH
        return Plan(chip, PARTS, 0, 0, size, size, 1.0, "6N+3a per token", tokens, account, 0.0)

    monkeypatch.setattr(plan, "compile_plan", compile_plan)
    monkeypatch.setattr(plan, "num_shards", lambda axis: PARTS)
    asked = PlanRun(fit=True)
    asked = dataclasses.replace(asked, training=dataclasses.replace(asked.training, max_seq_len=LENGTH))
    try:
        return tried, plan._fastest(asked, ARCHITECTURE, Console(quiet=True))
    except TooLarge:
        return tried, None


@settings(max_examples=200)
@given(fixed=st.floats(0, 1.2), slope=st.floats(1e-4, 1.5))
def test_the_search_ends_and_finds_a_batch_that_fits_if_there_is_one(fixed, slope):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tried, found = search(fixed, slope, monkeypatch)
    assert len(tried) == len(set(tried)) <= 24
    assert all(lines % PARTS == 0 for _, lines, _ in tried)
    fitting = {(remat, lines) for remat, lines, fits in tried if fits}
    assert (found is None) == (fixed + slope > 1) == (not fitting)
    if found is not None:
        assert (found[0].training.remat, found[0].training.batch_size) in fitting
        most = min((1 - fixed) / slope, 32768 / LENGTH)  # of lines in a part, with the smallest remat
        assert max(lines for remat, lines in fitting if remat == "full") / PARTS > most / 4


@pytest.mark.parametrize("chip", [CHIP, GPUS["h100"]])
def test_the_fastest_is_taken(chip, monkeypatch):
    tried, found = search(0.1, 0.05, monkeypatch, chip)
    best = max((lines / (1 + lines * (1 - 0.05 * COST[remat])), remat, lines) for remat, lines, fits in tried if fits)
    assert (found[0].training.remat, found[0].training.batch_size) == best[1:]
