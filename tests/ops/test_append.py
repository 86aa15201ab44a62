"""append equals torch.cat, whoever holds which older view."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyform.ops.append import append


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 5), st.integers(0, 3)),
                min_size=1, max_size=25), st.booleans(), st.booleans())
def test_random_forks_equal_cat(steps, inference, graph):
    """A tree of views: each step appends to any earlier one, perhaps cut from the left."""
    torch.manual_seed(0)
    views = [torch.randn(2, 3, 2, 4)]
    copies = [views[0].clone()]
    mode = torch.inference_mode() if inference else torch.no_grad()
    with mode:
        for which, size, cut in steps:
            i = which % len(views)
            cut = min(cut, views[i].shape[2])
            new = torch.randn(2, 3, size, 4)
            views.append(append(views[i][:, :, cut:], new, 2))
            copies.append(torch.cat([copies[i][:, :, cut:], new], 2))
    for view, copy in zip(views, copies, strict=True):
        assert torch.equal(view, copy)


def test_the_newest_view_is_not_copied():
    with torch.no_grad():
        a = append(torch.zeros(1, 4, 2), torch.ones(1, 1, 2), 1)
        b = append(a, torch.ones(1, 1, 2), 1)
        fork = append(a, torch.zeros(1, 1, 2), 1)
    assert b.data_ptr() == a.data_ptr()
    assert fork.data_ptr() != a.data_ptr()
    assert b[0, -1].eq(1).all()
    assert fork[0, -1].eq(0).all()


def test_steps_are_amortised():
    with torch.no_grad():
        cache, places = torch.zeros(1, 1, 2), set()
        for i in range(1000):
            cache = append(cache, torch.full((1, 1, 2), float(i)), 1)
            places.add(cache.data_ptr())
    assert len(places) < 12
    assert torch.equal(cache[0, 1:, 0], torch.arange(1000.0))


def test_a_window_slides_through_the_buffer():
    with torch.no_grad():
        cache, places = torch.zeros(1, 7, 2), set()
        for i in range(1000):
            grown = append(cache, torch.full((1, 1, 2), float(i)), 1)
            places.add(grown.untyped_storage().data_ptr())
            assert grown.untyped_storage().nbytes() <= 8 * 2 * 4 * 8
            cache = grown[:, 1:]
        assert torch.equal(cache[0, :, 0], torch.arange(993.0, 1000.0))


def test_gradients_pass():
    a, b = (torch.randn(1, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(lambda a, b: append(a, b, 1), (a, b))


def test_a_graph_that_saved_an_older_view_is_not_disturbed():
    with torch.no_grad():
        cache = append(torch.randn(1, 3, 2), torch.randn(1, 1, 2), 1)
    w = torch.randn(1, 4, 2, requires_grad=True)
    y = (w * cache).sum()
    with torch.no_grad():
        append(cache, torch.randn(1, 1, 2), 1)
    y.backward()
    assert torch.equal(w.grad, cache)


@pytest.mark.parametrize("change", [
    lambda c: c.transpose(1, 2), lambda c: c[..., :1], lambda c: c.expand(2, -1, -1),
    lambda c: c[:, ::2]])
def test_other_views_of_a_buffer_are_copied(change):
    with torch.no_grad():
        cache = append(torch.randn(1, 4, 4), torch.randn(1, 4, 4), 1)
        view = change(cache)
        new = torch.randn_like(view)[:, :1]
        assert torch.equal(append(view, new, 1), torch.cat([view, new], 1))
        again = torch.randn(1, 1, 4)
        assert torch.equal(append(cache, again, 1), torch.cat([cache, again], 1))
