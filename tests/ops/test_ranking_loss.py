import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, strided_variants

from fastrl.ops import ranking_loss
from fastrl.ops.backend import choose

NATIVE = "cpu"
BACKENDS = ["reference", NATIVE]


def case(size, groups, dtype=torch.float32, seed=0, scale=3.0):
    """scores, group ids in any order, ranks with ties, margins."""
    g = torch.Generator().manual_seed(seed)
    scores = (torch.randn(size, generator=g) * scale).to(dtype)
    group_ids = torch.randint(-groups, groups, (size,), generator=g) * 1000
    return scores, group_ids, torch.randint(0, 4, (size,), generator=g), torch.rand(size, generator=g).to(dtype)


def gradients(scores, group_ids, ranks, upstream=1.0, **options):
    leaf = scores.detach().clone().requires_grad_()
    loss, stats = ranking_loss(leaf, group_ids, ranks, **options)
    (loss * upstream).backward()
    return loss.detach(), stats, leaf.grad


def test_native_is_the_default():
    assert choose("ranking_loss", torch.empty(1)) == NATIVE


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Group 7: ranks 0 < 1 = 1, two pairs with differences 0 and log 3; group -2: one pair, difference -log 3.

    -log sigmoid: log 2, log 4/3, log 4; loss = ((log 2 + log 4/3) / 2 + log 4) / 2. The answer of group 5 has no rival.
    """
    log3 = math.log(3)
    scores = torch.tensor([1.0, 9.0, log3, 1.0, 0.0, 1 - log3])
    group_ids = torch.tensor([7, 5, -2, 7, -2, 7], dtype=torch.int32)
    ranks = torch.tensor([0, 0, 5, 1, 2, 1])
    loss, stats, dscores = gradients(scores, group_ids, ranks, backend=backend)
    assert loss.item() == pytest.approx(((math.log(2) + math.log(4 / 3)) / 2 + math.log(4)) / 2)
    spread = scores.std(correction=0).item()
    want = dict(accuracy=0.5, pairs=3, groups=2, margin_mean=0, score_mean=scores.mean().item(), score_std=spread)
    for name, value in want.items():
        assert getattr(stats, name).item() == pytest.approx(value, abs=1e-6), name
    # sigmoid(-difference): 1/2, 1/4 (each pair weighs 1/4), 3/4 (weighs 1/2)
    torch.testing.assert_close(dscores, torch.tensor([-3 / 16, 0, 3 / 8, 1 / 8, -3 / 8, 1 / 16]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_equal_the_usual_line(backend):
    """K = 2 is -logsigmoid(chosen - rejected - margin).mean(), with TRL's centring term."""
    chosen, rejected, margin = torch.randn(3, 20).unbind()
    scores = torch.stack([chosen, rejected], 1).flatten()
    margins = torch.stack([margin, torch.full((20,), float("nan"))], 1).flatten()  # the rejected slot is not read
    group_ids, ranks = torch.arange(20).repeat_interleave(2), torch.tensor([0, 1]).repeat(20)
    loss, stats = ranking_loss(scores, group_ids, ranks, margins=margins, center_coef=0.3, backend=backend)
    want = -F.logsigmoid(chosen - rejected - margin).mean() + 0.3 * ((chosen + rejected) ** 2).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(stats.accuracy, (chosen > rejected).float().mean())
    torch.testing.assert_close(stats.margin_mean, (chosen - rejected).mean())


@pytest.mark.parametrize("size", [1, 2, 3, 9, 31, 100, 257])
@pytest.mark.parametrize("groups", [1, 5, 60])
def test_matches_float64(size, groups):
    """K-wise groups of any size in any order, ties, margins, centring, any upstream."""
    scores, group_ids, ranks, margins = case(size, groups)
    for options in ({}, dict(margins=margins, center_coef=0.1)):
        actual = gradients(scores, group_ids, ranks, upstream=-1.7, backend=NATIVE, **options)
        eager = gradients(scores, group_ids, ranks, upstream=-1.7, backend="reference", **options)
        truth = gradients(scores.double(), group_ids, ranks.double(), upstream=-1.7, **options)
        assert truth[0].dtype == torch.float64
        assert_as_accurate(actual[0], eager[0], truth[0], "loss")
        assert_as_accurate(actual[2], eager[2], truth[2], "dscores")
        for name, a, t in zip(truth[1]._fields, actual[1], truth[1], strict=True):
            torch.testing.assert_close(a, t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_differences(backend):
    """log sigmoid is stable for +-1e4, and keeps its digits where the loss is tiny."""
    for difference, want, slope in ((1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (20.0, 2.0611536e-9, -2.0611536e-9)):
        loss, _, dscores = gradients(
            torch.tensor([difference, 0.0]), torch.zeros(2).long(), torch.tensor([0, 1]), backend=backend
        )
        assert loss.item() == pytest.approx(want, rel=1e-5)
        assert dscores.tolist() == pytest.approx([slope, -slope], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 4])
def test_no_pair_at_all(backend, size):
    """pitfall 10: nothing to compare gives loss 0 with zero gradient, not 0 / 0."""
    for group_ids, ranks in ((torch.arange(size), torch.arange(size)), (torch.zeros(size).long(), torch.ones(size))):
        loss, stats, dscores = gradients(torch.ones(size), group_ids, ranks, center_coef=0.1, backend=backend)
        assert loss == 0 and (dscores == 0).all() and dscores.shape == (size,)
        assert stats.pairs == 0 and stats.groups == 0 and stats.accuracy == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_seen(backend):
    scores, group_ids, ranks = torch.randn(6), torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 1, 0, 1, 0, 0])
    scores[2] = torch.nan
    loss, _, dscores = gradients(scores, group_ids, ranks, backend=backend)
    assert loss.isnan() and dscores[2:4].isnan().all() and dscores[[0, 1, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_dtypes(dtype):
    """T21, pitfall 24: strided inputs give the contiguous result; the gradient has the scores' dtype."""
    scores, group_ids, ranks, margins = case(37, 5, dtype)
    want = gradients(scores, group_ids, ranks, margins=margins, backend=NATIVE)
    assert want[0].dtype == torch.float32 and want[2].dtype == dtype
    variants = [list(strided_variants(t)) for t in (scores, group_ids, ranks, margins)]
    for (name, s), (_, g), (_, r), (_, m) in zip(*variants, strict=True):
        s = s.requires_grad_()
        loss, _ = ranking_loss(s, g.int(), r.to(torch.float32), margins=m, backend=NATIVE)
        assert torch.equal(loss, want[0]), name
        assert torch.equal(torch.autograd.grad(loss, s)[0], want[2]), name
    columns = torch.stack([scores, scores], 1)[:, 1]
    assert torch.equal(ranking_loss(columns, group_ids, ranks, margins=margins, backend=NATIVE)[0], want[0])


def test_repeatable_on_any_number_of_threads():
    """T15, pitfall 44: same bits on every run and thread count."""
    scores, group_ids, ranks, margins = case(2000, 100)
    threads = torch.get_num_threads()
    want = gradients(scores, group_ids, ranks, margins=margins, backend=NATIVE)
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        again = gradients(scores, group_ids, ranks, margins=margins, backend=NATIVE)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(want[0], again[0]) and torch.equal(want[2], again[2])
    assert torch.equal(torch.stack(want[1]), torch.stack(again[1]))


def test_second_backward_repeats_and_double_backward_raises():
    """T13"""
    scores, group_ids, ranks, _ = case(9, 2)
    leaf = scores.clone().requires_grad_()
    loss, stats = ranking_loss(leaf, group_ids, ranks, backend=NATIVE)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, second) and torch.equal(leaf.detach(), scores)
    assert not any(s.requires_grad for s in stats)
    (once,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        once.sum().backward()


def test_reference_gradcheck():
    scores, group_ids, ranks, margins = case(9, 2, torch.float64)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: ranking_loss(s, group_ids, ranks, margins=margins, center_coef=0.1)[0], scores
    )


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, forward and backward, equal to eager."""
    scores, group_ids, ranks, margins = case(20, 3)

    def run(scores):
        loss, stats = ranking_loss(scores * 1, group_ids, ranks, margins=margins, center_coef=0.1, backend=NATIVE)
        return loss * 2, stats.accuracy

    results = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = scores.clone().requires_grad_()
        loss, accuracy = f(leaf)
        loss.backward()
        results.append((loss.detach(), accuracy, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_opcheck():
    scores, group_ids, ranks, margins = case(9, 2)
    outputs = torch.empty(()), torch.empty(6), torch.empty(9)
    args = (NATIVE, scores, group_ids, ranks.double(), margins, 0.1, *outputs)
    torch.library.opcheck(torch.ops.fastrl.ranking_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    scores, group_ids, ranks, margins = case(5, 2)
    good = dict(scores=scores, group_ids=group_ids, ranks=ranks)
    bad = [
        (dict(scores=scores[None]), "scores"),
        (dict(scores=scores.long()), "scores"),
        (dict(group_ids=group_ids[:4]), "group_ids"),
        (dict(group_ids=group_ids.float()), "group_ids"),
        (dict(ranks=ranks[:4]), "ranks"),
        (dict(ranks=ranks.bool()), "ranks"),
        (dict(ranks=ranks.to("meta")), "ranks"),
        (dict(ranks=torch.tensor([0, 1, torch.nan, 2, 3])), "ranks"),
        (dict(margins=margins[:4]), "margins"),
        (dict(margins=margins.long()), "margins"),
        (dict(center_coef=-0.1), "center_coef"),
    ]
    for change, argument in bad:
        with pytest.raises(ValueError, match=f"ranking_loss: {argument}: expected .*, got"):
            ranking_loss(**{**good, **change}, backend=backend)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 10**6))
def test_properties(size, groups, seed):
    """Order of answers and names of groups do not matter; a common offset does not either; gradients sum to 0."""
    scores, group_ids, ranks, margins = case(size, groups, seed=seed)
    loss, stats, dscores = gradients(scores, group_ids, ranks, margins=margins, backend=NATIVE)
    assert loss >= 0 and 0 <= stats.accuracy <= 1 and abs(dscores.sum()) < 1e-5
    order = torch.randperm(size)
    shuffled = gradients(scores[order], -group_ids[order] + 3, ranks[order], margins=margins[order], backend=NATIVE)
    torch.testing.assert_close(shuffled[0], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shuffled[2], dscores[order], rtol=1e-5, atol=1e-6)
    shifted = ranking_loss(scores + 8, group_ids, ranks * 2 - 5, margins=margins, backend=NATIVE)[0]
    torch.testing.assert_close(shifted, loss, rtol=1e-5, atol=1e-5)
