import pytest
import torch

from ppcl.ops.cka import centre, cka, cka_of_linear_map


def random_pair(tokens, dim_x, dim_y, seed=0, samples=()):
    """Two related feature sets with uncentred columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*samples, tokens, dim_x, generator=generator, dtype=torch.float64) + 3
    mix = torch.randn(dim_x, dim_y, generator=generator, dtype=torch.float64) / dim_x**0.5
    noise = torch.randn(*samples, tokens, dim_y, generator=generator, dtype=torch.float64)
    return x, x @ mix + noise


def hsic_reference(x, y):
    """Textbook biased HSIC: tr(K H L H) with H the centring matrix."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    return torch.trace((x @ x.T) @ centring @ (y @ y.T) @ centring).item()


def hsic_1_reference(x, y):
    """The unbiased estimator of Song et al. (2012), eq. 5, from Grams with zeroed diagonals."""
    n = len(x)
    gram_x, gram_y = (features @ features.T for features in (x, y))
    gram_x, gram_y = (gram - torch.diag(gram.diagonal()) for gram in (gram_x, gram_y))
    ones = torch.ones(n, dtype=torch.float64)
    inner = (
        torch.trace(gram_x @ gram_y)
        + (ones @ gram_x @ ones) * (ones @ gram_y @ ones) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (ones @ gram_x @ gram_y @ ones)
    )
    return inner.item() / (n * (n - 3))


def ratio(hsic, x, y):
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


@pytest.mark.parametrize(("tokens", "dim_x", "dim_y"), [(7, 20, 20), (40, 6, 6), (12, 5, 30), (12, 30, 5), (30, 8, 4)])
@pytest.mark.parametrize(("debiased", "reference"), [(False, hsic_reference), (True, hsic_1_reference)])
def test_cka_equals_the_textbook_formula(tokens, dim_x, dim_y, debiased, reference):
    x, y = random_pair(tokens, dim_x, dim_y)
    ours = cka(centre(x), centre(y), debiased=debiased).item()
    assert ours == pytest.approx(ratio(reference, x, y), abs=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("tokens", "dim"), [(6, 15), (15, 6)])
def test_gram_form_and_covariance_form_agree(tokens, dim, debiased):
    """Zero rows and zero columns change neither form, so they push the same features through either."""
    x, y = (centre(features) for features in random_pair(tokens, dim, dim))
    count = torch.tensor(float(tokens))
    more_rows = [torch.nn.functional.pad(features, (0, 0, 0, 40)) for features in (x, y)]
    more_columns = [torch.nn.functional.pad(features, (0, 40)) for features in (x, y)]
    by_covariance = cka(*more_rows, count, debiased=debiased)
    by_gram = cka(*more_columns, count, debiased=debiased)
    assert by_gram.item() == pytest.approx(by_covariance.item(), abs=1e-10)
    assert cka(x, y, debiased=debiased).item() == pytest.approx(by_gram.item(), abs=1e-10)


@pytest.mark.parametrize(("tokens", "dim"), [(6, 15), (40, 6)])
def test_cka_of_linear_map_needs_only_the_covariance(tokens, dim):
    x, _ = random_pair(tokens, dim, dim, samples=(3,))
    x = centre(x)
    linear_map = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = cka_of_linear_map(x.mT @ x, linear_map @ linear_map.mT)
    torch.testing.assert_close(found, cka(x, x @ linear_map), rtol=0, atol=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_scale_rotation_and_offset_but_not_a_general_map(debiased):
    x, y = random_pair(25, 8, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    stretch = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))

    def value(a, b):
        return cka(centre(a), centre(b), debiased=debiased).item()

    plain = value(x, y)
    assert value(5 * x, y @ rotation - 7) == pytest.approx(plain, abs=1e-10)
    assert value(x, -0.2 * x @ rotation) == pytest.approx(1, abs=1e-10)
    assert abs(value(x, y @ stretch) - plain) > 1e-2


def test_independent_features_look_similar_unless_debiased():
    """Biased CKA of independent features is about D / (N + D); debiasing brings it to zero."""
    generator = torch.Generator().manual_seed(0)
    x, y = (centre(torch.randn(50, 60, 60, generator=generator)) for _ in range(2))
    assert cka(x, y).mean().item() == pytest.approx(0.5, abs=0.03)
    assert cka(x, y, debiased=True).mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dim", [4, 30])
def test_padded_tokens_do_not_count(dim, debiased):
    """A batch padded with garbage gives each sample the value it has alone, by either form."""
    lengths = torch.tensor([12, 7, 9])
    mask = torch.arange(12) < lengths[:, None]
    x, y = random_pair(12, dim, dim, samples=(3,))
    x[~mask], y[~mask] = 1e3, -1e3
    padded = cka(centre(x, mask), centre(y, mask), mask.sum(dim=1), debiased=debiased)
    for sample, length in enumerate(lengths.tolist()):
        alone = cka(centre(x[sample, :length]), centre(y[sample, :length]), debiased=debiased)
        assert padded[sample].item() == pytest.approx(alone.item(), abs=1e-10)


def test_centre_zeroes_padding_and_the_mean_of_valid_tokens():
    mask = torch.tensor([[True, True, True, False]])
    features = torch.tensor([[[1.0, 2.0], [3.0, 2.0], [5.0, 8.0], [900.0, 900.0]]])
    expected = torch.tensor([[[-2.0, -2.0], [0.0, -2.0], [2.0, 4.0], [0.0, 0.0]]])
    torch.testing.assert_close(centre(features, mask), expected)
    torch.testing.assert_close(centre(features[:, :3]), expected[:, :3])
