"""A stack that composes binary trees while it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda leaf, weight, *_, **__: 4 * weight.numel() * leaf.shape[0] * leaf.shape[1])
def shift_reduce(leaf: Tensor, weight: Tensor, bias: Tensor, stack: Tensor, depth: Tensor,
                 given: tuple[Tensor, Tensor] | None, score: tuple[Tensor, Tensor] | None,
                 reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Reads one leaf after the other. Each is joined with the top of the stack or pushed on it;
    then the two topmost may be reduced to one (Bowman 2016, arXiv:1603.06021, section 3.1, with a
    leaf's shift and its first reduction as one step). Two nodes join as (Tai 2015,
    arXiv:1503.00075, eq. 9 to 14, for two children and no input of their own)

      i, f_l, f_r, o, g = W [h_l; h_r] + b
      c = sig(f_l) c_l + sig(f_r) c_r + sig(i) tanh(g),   h = sig(o) tanh(c)

    leaf: (B, T, 2 d), nodes as [h; c]; weight: (5 d, 2 d); bias: (5 d,); stack: (B, D, 2 d), its
    first min(n, D) slots in use, for depth n: (B,) int64. given: join and reduce, each (B, T) bool.
    score: instead, (2, 2 d) and (2,): join if sig(w_0 [h_top; h_leaf] + b_0) >= 1/2, reduce if
    sig(w_1 [h_below; h_top] + b_1) >= 1/2, with the gradient of the sigmoid passed straight through
    to the nodes (Choi 2018, arXiv:1707.02786, section 3.2, without noise). Where there is nothing
    to join with, both are left out. Beyond D nodes a push joins instead, and the depth still
    counts, so that the reductions that belong to it change nothing. reset: (B, T) bool, true where
    the stack is empty before the leaf.

    Returns [h_top; h_below] after each leaf (zeros for what is not there): (B, T, 2 d), the stack
    and the depth. Everything in the dtype of stack, float32 or float64.
    """
    with torch.autocast(leaf.device.type, enabled=False):
        wide, slots, half = stack.dtype, stack.shape[1], leaf.shape[2] // 2
        leaf, weight, bias = (x.to(wide) for x in (leaf, weight, bias))
        index, n, out = torch.arange(slots, device=leaf.device), depth, []

        def at(place: Tensor) -> Tensor:
            """The nodes at `place`, zeros where that is negative."""
            rows = place.clamp(min=0)[:, None, None].expand(-1, 1, 2 * half)
            return torch.where(place[:, None] < 0, 0, stack.gather(1, rows)[:, 0])

        def join(left: Tensor, right: Tensor) -> Tensor:
            both = torch.cat([left[:, :half], right[:, :half]], 1)
            i, f_l, f_r, o, g = F.linear(both, weight, bias).chunk(5, 1)
            c = (f_l.sigmoid() * left[:, half:] + f_r.sigmoid() * right[:, half:]
                 + i.sigmoid() * g.tanh())
            return torch.cat([o.sigmoid() * c.tanh(), c], 1)

        def choose(which: int, t: int, left: Tensor, right: Tensor, joined: Tensor, kept: Tensor,
                   possible: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
            """The decision, (B,) bool, and the node that follows. forced: join whatever is said."""
            if given is not None:
                yes = given[which][:, t] & possible
                return yes, torch.where((yes | forced)[:, None], joined, kept)
            assert score is not None
            both = torch.cat([left[:, :half], right[:, :half]], 1)
            p = ((both * score[0][which].to(wide)).sum(1) + score[1][which].to(wide)).sigmoid()
            yes = (p >= 0.5) & possible
            node = torch.where((yes | forced)[:, None], joined, kept)
            free = (possible & ~forced)[:, None]
            return yes, node + torch.where(free, (p - p.detach())[:, None] * (joined - kept), 0)

        none = torch.zeros_like(n, dtype=torch.bool)
        for t in range(leaf.shape[1]):
            if reset is not None:
                n = torch.where(reset[:, t], 0, n)
            top, new = at(n.clamp(max=slots) - 1), leaf[:, t]
            joins, node = choose(0, t, top, new, join(top, new), new, n > 0, n >= slots)
            n = n + ~joins
            place = n.clamp(max=slots) - 1
            below = at(torch.where(n > 1, place - 1, -1))
            held = n <= slots  # deeper ones have no slot of their own
            whole = join(below, node)
            reduces, reduced = choose(1, t, below, node, whole, node, (n > 1) & held, none)
            if given is not None:
                deeper = given[1][:, t] & ~held
            else:
                assert score is not None
                deeper = _says(score, torch.cat([below[:, :half], node[:, :half]], 1)) & ~held
            n = n - (reduces | deeper).long()
            place = torch.where(reduces, place - 1, place)
            stack = torch.where((index == place[:, None])[..., None], reduced[:, None], stack)
            beneath = at(torch.where(n > 1, place - 1, -1))
            out.append(torch.cat([reduced[:, :half], beneath[:, :half]], 1))
        return torch.stack(out, 1), stack, n


def _says(score: tuple[Tensor, Tensor], both: Tensor) -> Tensor:
    """Whether the second decision is yes: (B,) bool."""
    weight, bias = (x[1].to(both.dtype) for x in score)
    return (both * weight).sum(1) + bias >= 0


def _compiled(leaf: Tensor, weight: Tensor, bias: Tensor, stack: Tensor, depth: Tensor,
              given: tuple[Tensor, Tensor] | None, score: tuple[Tensor, Tensor] | None,
              reset: Tensor | None = None) -> bool:
    return (usable(leaf, weight, stack, depth) and single(leaf, weight, bias)
            and stack.dtype == torch.float32 and leaf.shape[0] * leaf.shape[1] > 0)


@shift_reduce.path("numba", when=_compiled)
def _(leaf: Tensor, weight: Tensor, bias: Tensor, stack: Tensor, depth: Tensor,
      given: tuple[Tensor, Tensor] | None, score: tuple[Tensor, Tensor] | None,
      reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The stack machine compiled, all rows step by step; see kernels/shift_reduce. Features are
    padded to whole vectors: those beyond stay zero by themselves."""
    half = leaf.shape[2] // 2
    more = -half % 16

    def padded(x: Tensor, parts: int) -> Tensor:
        """The last dimension, `parts` rows of features, with whole vectors of each."""
        x = x.float()
        return F.pad(x.unflatten(-1, (parts, half)), (0, more)).flatten(-2) if more else x

    with torch.autocast(leaf.device.type, enabled=False):
        to_gates = padded(padded(weight, 2).T, 5).T
        scores = torch.cat([padded(score[0], 2).flatten(), score[1].float()]) if score else None
        y, stack, depth = _ShiftReduce.apply(
            padded(leaf, 2), to_gates, padded(bias, 5), padded(stack, 2), scores, depth, given,
            reset)
        if more:
            y, stack = (x.unflatten(-1, (2, -1))[..., :half].flatten(-2) for x in (y, stack))
    return y, stack, depth


class _ShiftReduce(torch.autograd.Function):
    """Whole vectors of features; score: (4 d + 2), weights before the two biases."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, bias: Tensor, stack: Tensor,
                score: Tensor | None, depth: Tensor, given: tuple[Tensor, Tensor] | None,
                reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from manyform.ops.kernels import shift_reduce as kernel
        from manyform.ops.kernels.lanes import flat
        leaf, stack = leaf.contiguous(), stack.contiguous()
        (batch, length, node), slots = leaf.shape, stack.shape[1]
        size, more = node // 2, -len(weight) % kernel.BLOCK
        weight, bias = F.pad(weight, (0, 0, 0, more)), F.pad(bias, (0, more))
        left, right = weight.split(size, 1)  # (wide, size) each
        wide, training = len(bias), any(ctx.needs_input_grad)
        groups = max(-(-batch // 4), min(batch, threads()))
        dims = (batch, length, slots, size, wide, groups)
        products = torch.addmm(bias, leaf[..., :size].flatten(0, 1), right.T)
        after, count, y = stack.clone(), depth.clone(), torch.empty_like(leaf)
        owner = torch.empty(batch, slots, dtype=torch.int32)
        rows = batch * length if training else 0
        nodes, made = leaf.new_empty(rows * node), leaf.new_empty(rows * node)
        gates = leaf.new_empty(rows * 2 * wide)
        chances = leaf.new_empty(batch, length if training else 0, 2)
        links = torch.zeros(batch, length if training else 0, kernel.LINKS, dtype=torch.int32)
        run: Any = kernel.forward
        run(flat(leaf), flat(products), *(flat(_blocks(w.T, kernel.BLOCK)) for w in (left, right)),
            bias.detach().numpy(), *(_marks(x) for x in given or (None, None)),
            flat(leaf.new_empty(0) if score is None else score), _marks(reset), flat(after),
            count.numpy(), owner.numpy(), flat(y), flat(nodes), flat(made), flat(gates),
            chances.numpy(), links.numpy(), dims)
        if training:
            ctx.save_for_backward(leaf, weight, stack, score, nodes, made, gates, chances, links,
                                  owner)
            ctx.dims = dims
        ctx.mark_non_differentiable(count)
        return y, after, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstack: Tensor, _: Any) -> Any:
        from manyform.ops.kernels import shift_reduce as kernel
        from manyform.ops.kernels.lanes import flat
        (leaf, weight, stack, score, nodes, made, gates, chances, links,
         owner) = ctx.saved_tensors
        batch, length, slots, size, wide, groups = ctx.dims
        left, right = weight.split(size, 1)
        dmade, dleaf = torch.zeros_like(leaf), torch.zeros_like(leaf)
        dleft, dright, dnode = leaf.new_zeros(3, batch * length, wide)
        dleft0 = leaf.new_zeros(batch * slots, wide)
        dscore = leaf.new_zeros(groups, 4 * size + 2)
        # What the last stack holds was made by a step, or was there before.
        new = owner >= 0
        rows, steps = new.nonzero()[:, 0], owner[new].long()
        dmade[rows, steps] = dstack[new]
        dstack = dstack.masked_fill(new[..., None], 0.0).contiguous()
        threads()
        run: Any = kernel.backward
        run(flat(leaf), flat(stack), flat(nodes), flat(made), flat(gates), chances.numpy(),
            links.numpy(),
            *(flat(_blocks(F.pad(w, (0, -size % kernel.BLOCK)), kernel.BLOCK))
              for w in (left, right)),
            flat(leaf.new_empty(0) if score is None else score), flat(dy.contiguous()),
            flat(dstack), flat(dmade), flat(dleft), flat(dleft0), flat(dright), flat(dnode),
            flat(dleaf), dscore.numpy(), ctx.dims)
        with torch.autocast(leaf.device.type, enabled=False):
            h, h_node, h_made = (x.view(-1, 2 * size)[:, :size] for x in (leaf, nodes, made))
            dleaf.view(-1, 2 * size)[:, :size].addmm_(dright, right)
            dstack.view(-1, 2 * size)[:, :size].addmm_(dleft0, left)
            dw_left = torch.addmm(dleft0.T @ stack.view(-1, 2 * size)[:, :size], dleft.T, h_made)
            dw_right = torch.addmm(dright.T @ h, dnode.T, h_node)
        rows = 5 * size
        return (dleaf, torch.cat([dw_left[:rows], dw_right[:rows]], 1),
                (dright.sum(0) + dnode.sum(0))[:rows], dstack,
                None if score is None else dscore.sum(0), None, None, None)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(n, m) -> (m / block, n, block), contiguous."""
    return x.unflatten(1, (-1, block)).transpose(0, 1).contiguous()


def _marks(x: Tensor | None) -> Any:
    return (torch.zeros(0, 0, dtype=torch.bool) if x is None else x.contiguous()).numpy()
