"""What a longer prompt does to the last state, and which tokens all paths lead to."""

from math import e

import pytest
import torch
from torch import nn

from lightning_collapse.functional import glasses, path_sums, state_distance
from lightning_collapse.monitoring import attention_maps
from tests.attention import GPT, LENGTH, WORDS, Encoder


class Average(nn.Module):
    """Uniform causal attention over the digits themselves, and a rate of 0.5 of dropout that must not be active."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids):
        self.calls += 1
        values = self.dropout(ids.double().unsqueeze(-1))
        return values.cumsum(1) / torch.arange(1, ids.shape[1] + 1).view(-1, 1)


def read(model, ids, mask):
    return model(ids)


@pytest.mark.parametrize(("ones", "equal"), [(10, 0.0), (100, 1.0)])
def test_a_mean_over_ones_and_a_two_has_a_closed_form_and_rounds_to_equality(ones, equal):
    # one 2, then ones: means 1 + 1 / n and 1 + 1 / (n + 1)
    ids = torch.cat([torch.tensor([2]), torch.ones(ones, dtype=torch.long)]).unsqueeze(0)
    found = glasses(Average(), ids, read, torch.bfloat16)
    assert found.l1.item() == pytest.approx(1 / ((ones + 1) * (ones + 2)), rel=1e-9)
    assert found.l_inf.item() == pytest.approx(found.l1.item(), rel=1e-12)
    assert found.relative_l2.item() == pytest.approx(found.l1.item() / (1 + 1 / (ones + 1)), rel=1e-9)
    assert found.equal_share.item() == equal


def test_model_gradients_and_random_state_are_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Dropout(), nn.BatchNorm1d(5))
    model[1].eval()
    model[0].weight.grad = torch.ones(4, 3)
    state, buffers = torch.random.get_rng_state(), [b.clone() for b in model.buffers()]
    glasses(model, torch.randint(4, (2, 5)), lambda m, ids, mask: torch.rand(*ids.shape, 3) + m[0](ids))
    drawn = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    torch.randint(4, (2, 5))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))


def test_the_last_real_token_is_the_one_that_is_repeated():
    seen = []

    def note(model, ids, mask):
        seen.append((ids.tolist(), mask.tolist()))
        return nn.functional.one_hot(ids, 10).float()

    batch = {"input_ids": torch.tensor([[1, 2, 3], [7, 8, 0], [0, 4, 5]])}
    batch |= {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1]]), "labels": None}
    found = glasses(nn.Identity(), batch, note)
    assert seen[1][0] == [[1, 2, 3, 3], [7, 8, 8, 0], [0, 4, 5, 5]]
    assert seen[1][1] == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert found.l1.tolist() == [0.0, 0.0, 0.0]


def test_causal_language_models_of_hugging_face_collapse_with_length():
    transformers = pytest.importorskip("transformers", reason="Hugging Face's library is not installed")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    llama = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for model in (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **sizes)),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, **sizes)),
    ):
        ids = torch.randint(1, 16, (3, 6))
        short = glasses(model, ids)
        padded = {"input_ids": nn.functional.pad(ids, (0, 2)), "attention_mask": torch.ones(3, 8).long()}
        padded["attention_mask"][:, 6:] = 0
        again = glasses(model, padded)
        torch.testing.assert_close(again.l1, short.l1, rtol=1e-3, atol=1e-5)
        assert model.training
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **sizes))
    repeated = [glasses(model, torch.ones(1, n).long(), dtype=torch.bfloat16) for n in (4, 256)]
    assert repeated[1].l1 <= repeated[0].l1
    assert repeated[1].equal_share.item() > 0.9


def test_wrong_prompts_and_models_are_refused_by_name():
    ids = torch.ones(1, 3).long()
    for batch in (ids.float(), ids[0], {"tokens": ids}, torch.ones(1, 0).long()):
        with pytest.raises(ValueError, match="`batch` must be token numbers"):
            glasses(Average(), batch, read)
    with pytest.raises(ValueError, match="last states is not known; pass `read="):
        glasses(Average(), ids)
    with pytest.raises(ValueError, match=r"States must be of shape \(1, 3, 'D'\), got \(3, 1\)"):
        glasses(Average(), ids, lambda model, ids, mask: model(ids)[0])
    with pytest.raises(ValueError, match=r"two of shape \(N, D\)"):
        state_distance(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="`beta` positive"):
        path_sums([torch.eye(3)], beta=0)


def test_path_sums_are_a_row_of_the_product():
    maps = torch.randn(3, 2, 6, 6, dtype=torch.float64).softmax(-1)
    for beta, query in ((1.0, -1), (2.5, 3)):
        product = torch.eye(6, dtype=torch.float64)
        for attention in maps:  # the last layer stands on the left
            product = (attention / beta + torch.eye(6)) @ product
        expected = product[:, query] / (1 + 1 / beta) ** 3
        torch.testing.assert_close(path_sums(maps, beta, query), expected, rtol=1e-10, atol=1e-12)


def test_without_positions_all_goes_to_the_first_token():
    uniform = torch.ones(32, 32, dtype=torch.float64).tril()
    assert path_sums([uniform / uniform.sum(1, keepdim=True)] * 20)[0].item() == pytest.approx(0.9467, abs=1e-4)


@pytest.mark.parametrize("length", [10, 100])
def test_alternating_digits_keep_their_distance_at_any_length(length):
    digits = torch.arange(length, dtype=torch.float64) % 2
    gap = (digits.softmax(0) - (1 - digits).softmax(0)).abs().sum()
    assert gap.item() == pytest.approx(2 * (e - 1) / (e + 1), rel=1e-9)


def test_maps_of_a_model_however_it_computes_them():
    torch.manual_seed(0)
    tokens = torch.randint(WORDS, (2, LENGTH))
    models = [GPT(how=how) for how in ("fused", "softmax")]
    models[1].load_state_dict(models[0].state_dict())
    maps = [attention_maps(model, tokens) for model in models]
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-6)
    assert maps[0].shape == (2, 2, LENGTH, LENGTH)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, LENGTH))
    assert maps[0].triu(1).abs().max() == 0
    shares = path_sums(maps[0])
    torch.testing.assert_close(shares.sum(-1), torch.ones(2))
    encoder = Encoder()
    assert attention_maps(encoder.eval(), tokens).shape == (2, 2, LENGTH, LENGTH)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="shows 0 maps of attention"):
        attention_maps(nn.Linear(2, 2), torch.ones(1, 2))
