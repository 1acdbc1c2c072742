"""Sampling is a pure function of (seed, position, logits), and samples what it says it does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generate.embedded.sampling import RowSampling, kept_tokens, sample, uniforms

CPU = torch.device("cpu")


def rows(n: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> RowSampling:
    return RowSampling.of(np.full(n, temperature), np.full(n, top_p), np.full(n, top_k), CPU)


def test_uniforms_are_uniform_and_depend_on_seed_and_position() -> None:
    seeds = np.repeat(np.arange(200), 100)
    positions = np.tile(np.arange(100), 200)
    draws = uniforms(seeds, positions)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert len(np.unique(draws)) == 20_000
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_uniforms_are_fixed_for_ever() -> None:
    """A changed hash would change every seeded run."""
    state = 5 + 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    bits = mix((mix(state % 2**64) + 3 * 0x9E3779B97F4A7C15) % 2**64)
    assert uniforms(np.array([5]), np.array([2]))[0] == (bits >> 12) / 2**52


def test_top_k_and_top_p_by_hand() -> None:
    logprobs = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    on, off = torch.tensor([0.7]), torch.tensor([1.0])
    zero, two, three = torch.tensor([0]), torch.tensor([2]), torch.tensor([3])
    assert kept_tokens(logprobs, on, zero).tolist() == [[True, True, False, False]]  # 0.5 < 0.7 <= 0.75
    assert kept_tokens(logprobs, off, three).tolist() == [[True, True, True, False]]
    assert kept_tokens(logprobs, torch.tensor([0.6]), two).tolist() == [[True, False, False, False]]  # 0.5/0.75 >= 0.6
    assert kept_tokens(logprobs, torch.tensor([1e-6]), zero).tolist() == [[True, False, False, False]]


def test_logprobs_are_of_the_cut_distribution() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    picked = sample(logits, np.array([0.9]), rows(1, top_k=2))
    assert picked.ids.tolist() == [1]
    assert picked.logprobs.item() == pytest.approx(np.log(0.25 / 0.75), abs=1e-6)
    assert picked.kept_logmass is not None
    assert picked.kept_logmass.item() == pytest.approx(np.log(0.75), abs=1e-6)


@pytest.mark.parametrize("top_k", [0, 3])
def test_what_was_sampled_reaches_the_host_in_one_piece_and_exactly(top_k: int) -> None:
    logits = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0))
    picked = sample(logits, uniforms(np.arange(4), np.zeros(4)), rows(4, top_k=top_k))
    host = picked.on_host()
    assert len({id(column.base) for column in host}) == 1
    assert host[0].tolist() == picked.ids.tolist()
    assert host[1].astype(np.float32).tolist() == picked.logprobs.tolist()
    assert (picked.kept_logmass is None) == (len(host) == 2)
    assert picked.kept_logmass is None or host[2].astype(np.float32).tolist() == picked.kept_logmass.tolist()


def test_temperature_zero_is_a_point_mass() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    picked = sample(logits, np.array([0.99]), rows(1, temperature=0.0, top_p=0.5))
    assert picked.ids.tolist() == [1]
    assert picked.logprobs.tolist() == [0.0]
    assert picked.kept_logmass is not None
    assert picked.kept_logmass.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stay_visible(temperature: float) -> None:
    picked = sample(torch.full((1, 4), float("nan")), np.array([0.5]), rows(1, temperature=temperature))
    assert not torch.isfinite(picked.logprobs).any()


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.8, 0), (1.3, 0.9, 5)])
def test_frequencies_match_the_processed_distribution(temperature: float, top_p: float, top_k: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 10) * 1.5
    n = 20_000
    picked = sample(logits.expand(n, -1), uniforms(np.arange(n), np.zeros(n)), rows(n, temperature, top_p, top_k))
    logprobs = (logits / temperature).log_softmax(-1)
    keep = kept_tokens(logprobs, torch.tensor([top_p]), torch.tensor([top_k]))[0]
    expected = (logprobs[0].exp() * keep / (logprobs[0].exp() * keep).sum()).double().numpy() * n
    counts = np.bincount(picked.ids.numpy(), minlength=10)
    assert counts[~keep.numpy()].sum() == 0
    live = keep.numpy()
    chi_square = ((counts[live] - expected[live]) ** 2 / expected[live]).sum()
    assert chi_square < 27.9  # 9 degrees of freedom at the most, p = 0.001


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 40),
    vocabulary=st.integers(2, 30),
)
def test_top_p_keeps_the_smallest_set_that_reaches_its_mass(seed: int, top_p: float, top_k: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = (torch.randn(1, vocabulary, generator=generator) * 3).log_softmax(-1)
    keep = kept_tokens(logprobs, torch.tensor([top_p]), torch.tensor([top_k]))[0]
    probability = logprobs[0].double().exp()
    top = probability.sort(descending=True).values[: top_k or vocabulary]
    assert 1 <= keep.sum() <= len(top)
    assert probability[keep].min() >= (probability[~keep].max() if (~keep).any() else 0.0)
    goal = top_p * top.sum()
    assert probability[keep].sum() >= goal - 1e-6
    if keep.sum() > 1 and top_p < 1:
        assert probability[keep].sum() - probability[keep].min() < goal + 1e-6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 6))
def test_a_row_does_not_feel_its_neighbours(seed: int, n: int) -> None:
    """Plain, greedy and cut rows side by side give what each gives alone."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(n, 12)).astype(np.float32) * 2)
    temperature, top_p = rng.choice([0.0, 0.7, 1.0], n), rng.choice([0.5, 1.0], n)
    top_k, draws = rng.choice([0, 3], n), rng.random(n)
    together = sample(logits, draws, RowSampling.of(temperature, top_p, top_k, CPU))
    for i in range(n):
        one = slice(i, i + 1)
        alone = sample(logits[one], draws[one], RowSampling.of(temperature[one], top_p[one], top_k[one], CPU))
        assert alone.ids.item() == together.ids[i].item()
        assert alone.logprobs.item() == together.logprobs[i].item()
        if together.kept_logmass is not None:
            assert together.kept_logmass[i].item() == (0.0 if alone.kept_logmass is None else alone.kept_logmass.item())


def test_a_large_vocabulary_keeps_its_tail() -> None:
    """200,000 equal tokens: a float32 running sum would be off by whole tokens."""
    n = 200_000
    picked = sample(torch.zeros(1, n), np.array([1.0 - 2.0**-52]), rows(1))
    assert picked.ids.item() == n - 1
    middle = sample(torch.zeros(1, n), np.array([0.5 + 0.5 / n]), rows(1))
    assert middle.ids.item() == n // 2
