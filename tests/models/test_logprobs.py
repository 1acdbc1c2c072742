import math

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, HyperCLOVAXConfig, LlamaConfig

from asyncrl.models.logprobs import Head, entropy, sampled_logprobs


def test_logprobs_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    found = sampled_logprobs(logits, torch.tensor([1, 0]), 1.0)
    assert found.tolist() == pytest.approx([math.log(0.75), math.log(0.5)])  # 3 / (1 + 3), 1 / 2


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[0.0, 2 * math.log(3.0)]])
    assert sampled_logprobs(logits, torch.tensor([0]), 2.0).item() == pytest.approx(math.log(0.25))


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert entropy(logits, 1.0).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    assert entropy(torch.tensor([[0.0, 2 * math.log(3.0)]]), 2.0).item() == pytest.approx(0.5623351)  # −¼ ln ¼ − ¾ ln ¾


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([0, 1, 2, 3])
    assert sampled_logprobs(logits, ids, 1.0).dtype == torch.float32
    expected = logits.double().log_softmax(-1)[torch.arange(4), ids]
    torch.testing.assert_close(sampled_logprobs(logits, ids, 1.0).double(), expected, atol=1e-5, rtol=0)


def test_gradient_is_one_hot_minus_softmax() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    sampled_logprobs(logits, torch.tensor([2]), 2.0).sum().backward()
    expected = (torch.tensor([[0.0, 0.0, 1.0]]) - (logits.detach() / 2).softmax(-1)) / 2
    torch.testing.assert_close(logits.grad, expected)


def make_head(vocabulary: int, width: int, dtype: torch.dtype, *, bias: bool = False, **tail: float) -> Head:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    made = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    return Head(weight, made, **tail)


TAILS = [{}, {"softcap": 3.0}, {"divisor": 8.0}, {"softcap": 2.0, "divisor": 0.25}]


@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 7, 100, None])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_in_chunks_are_those_of_all_logits_at_once(tail: dict[str, float], rows: int | None, bias: bool) -> None:
    head = make_head(50, 8, torch.float64, bias=bias, **tail)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(11, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(0, 50, (11,), generator=generator)
    leaves = [hidden, head.weight, *([head.bias] if bias else [])]
    weights = torch.randn(2, 11, dtype=torch.float64, generator=generator)

    logits = hidden @ head.weight.T + (head.bias if bias else 0)
    if "softcap" in tail:
        logits = tail["softcap"] * torch.tanh(logits / tail["softcap"])
    log_p = (logits / tail.get("divisor", 1.0) / 0.7).log_softmax(-1)
    expected = (log_p[torch.arange(11), ids], -(log_p.exp() * log_p).sum(-1))

    found = head.scores(hidden, ids, 0.7, rows)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    for chosen in ([0], [1], [0, 1]):  # gradients of log-probabilities alone, of entropies alone, of both
        ours = torch.autograd.grad(sum(found[i] @ weights[i] for i in chosen), leaves, retain_graph=True)
        plain = torch.autograd.grad(sum(expected[i] @ weights[i] for i in chosen), leaves, retain_graph=True)
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_models_dtype_chunks_keep_the_bits_and_lose_nothing_in_their_gradients(dtype: torch.dtype) -> None:
    head = make_head(300, 16, dtype)
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    ids = torch.arange(64)
    logits = torch.nn.functional.linear(hidden, head.weight)
    plain = (sampled_logprobs(logits, ids, 1.3), entropy(logits, 1.3))
    found = head.scores(hidden, ids, 1.3, rows=10)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))

    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, head.weight)]
    exact_logits = exact[0] @ exact[1].T
    sampled_logprobs(exact_logits, ids, 1.3).sum().backward()
    for scored in (found, plain):
        grads = torch.autograd.grad(scored[0].sum(), (hidden, head.weight))
        for grad, leaf in zip(grads, exact, strict=True):
            gap = (grad.double() - leaf.grad).abs().max() / leaf.grad.abs().max()
            assert gap < (1e-6 if dtype is torch.float32 else 1e-2)


def test_what_has_no_gradient_gets_none() -> None:
    head = Head(torch.randn(5, 4), torch.zeros(5))
    hidden = torch.randn(3, 4, requires_grad=True)
    logp, _ = head.scores(hidden, torch.tensor([0, 1, 2]), 1.0)
    logp.sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    with torch.no_grad():
        assert not head.scores(hidden, torch.tensor([0, 1, 2]), 1.0)[0].requires_grad


@pytest.mark.parametrize(
    ("kind", "fields", "scale"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}, 1 / 8),
        (HyperCLOVAXConfig, {"logits_scaling": 4.0}, 4.0),
        (CohereConfig, {"logit_scale": 0.25}, 0.25),
        (
            LlamaConfig,
            {"logits_scaling": 8.0, "logit_scale": 3.0, "final_logit_softcapping": 2.0},
            1.0,
        ),  # reads none
    ],
)
def test_a_head_does_with_logits_what_its_model_does(kind: type, fields: dict[str, float], scale: float) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **fields)).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(Head.of(model).logits(hidden), model(input_ids=ids).logits[0])
        plain = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
        torch.testing.assert_close(Head.of(model).logits(hidden), plain * scale)
