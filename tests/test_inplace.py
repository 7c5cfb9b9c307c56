"""What a model writes in place costs no copy in the result, and nobody can tell the two apart: not the caller by what was
given, not autograd."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, draw, randomise, relative_error, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxconv
from fxconv.inplace import _ARGUMENTS_NOT_KEPT, _RESULT_NOT_KEPT

X = (3, 7, 8)


class Scores(nn.Module):
    """Scores that no law touches (3 x 7 x 7), a bias for a part of them, and a function that writes in place."""

    def __init__(self, write: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.q, self.k, self.r, self.s = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 7), nn.Linear(7, 5)
        self.row = nn.Parameter(torch.zeros(7))
        self.write = write

    def forward(self, x: Tensor) -> Any:
        y = self.q(x) @ self.k(x).mT
        return self.write(self, x, y, torch.tanh(self.r(x)))


class Written(TorchDispatchMode):
    """Counts the elements that operators write: of a tensor in place, of their results otherwise, of views none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if isinstance(out, Tensor) and not any(a is not None and not a.is_write for a in aliases):
            self.elements += out.numel()
        return out


def written(model: Any, x: Tensor) -> int:
    with Written() as counter, torch.no_grad():
        model(x.clone())
    return counter.elements


# --- as few copies as the model --------------------------------------------------------------------------------------


def add_to_a_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:, 1:] += r[:, 1:, :1]
    return torch.softmax(y, -1)


def assign_a_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, :, 2:5] = r[:, :, :3].exp()
    return y @ x


def select_and_scale(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 0] *= r[:, 1]
    y.select(2, -1).mul_(2)
    return y.cos()


def both_ends(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, :1] = r[:, 2:3]
    y[:, -2:] += r[:, 1:3]
    y[..., 1::2] -= r[..., 1::2]
    return y.cos()


def same_part_twice(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    y[:, 1:] *= 3
    return y.cos()


def part_of_a_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:][:, :, 2:].add_(r[:, 1:, 2:])
    return y.cos()


def fill(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[..., 0] = 0.5
    y[:, 1].zero_()
    y[:, 3:5].fill_(-2.0)
    return y.cos()


def broadcast(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] = r[:, :1].exp()
    return y.cos()


def activate_a_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    F.relu(y[:, 2:], inplace=True)
    torch.sigmoid_(y[..., :2])
    return y.cos()


def part_then_whole(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    y.mul_(r)
    return torch.relu_(y).cos()


def whole_then_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y.tanh_()
    y[:, 1:] += r[:, 1:]
    y += r
    return y.cos()


def from_another_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 3] = y[:, 0].tanh()
    y[:, 1:] = y[:, :-1].sigmoid()
    return y.cos()


def returned(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    return y


def read_before(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = y.amax(-1)
    y[:, 1:] += r[:, 1:]
    return y.cos(), z


def read_the_part(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    return y.cos(), y[:, 1:].exp()


def attention(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    """MViT v2's: relative positions, and a shortcut past the class token."""
    y[:, 1:, 1:] += r[:, 1:, 1:]
    z = y.softmax(-1) @ x
    z[:, 1:, :] += x[:, 1:, :]
    return F.gelu(z)


PARTS = [
    add_to_a_part, assign_a_part, select_and_scale, both_ends, same_part_twice, part_of_a_part, fill, broadcast,
    activate_a_part, part_then_whole, whole_then_part, from_another_part, returned, read_before, read_the_part, attention,
]  # fmt: skip


@pytest.mark.parametrize("write", PARTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_no_more_is_written_than_by_the_model(write: Any, capture: str) -> None:
    out = check(randomise(Scores(write)), draw(X), capture=capture, sizes=False)
    x = draw(X, 3)
    assert written(out.result, x) <= written(out.original, x), out.result.graph
    assert not any("scatter" in str(n.target) or "clone" in str(n.target) for n in out.result.graph.nodes)
    assert torch.equal(x, draw(X, 3))


def test_what_a_functional_program_copies_is_its_own_choice() -> None:
    """A program without writes in place stays one: its runtime may not take them."""
    program = torch.export.export(randomise(Scores(attention)).double(), (draw(X),)).run_decompositions({})
    out = check(program.module(check_guards=False), draw(X), prepare=False, sizes=False, batches=())
    assert not any(str(n.target).endswith(("_.Tensor", "copy_.default")) for n in out.result.graph.nodes)


# --- where it would show -----------------------------------------------------------------------------------------------


def copy_of_the_input(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = x.clone()
    z[:, 1:] += x[:, :1]
    return z.cos()


def sum_with_zero(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = x * 1.0 + 0
    z[:, :2] *= r[:, :2, :1]
    z.mul_(2)
    return z.cos()


def copy_of_a_parameter(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = m.row.clone()
    z[2:] += r[0, 0, 2:]
    w = m.row.expand(7, 7).clone()
    w[1:, 2:] *= r[0, 1:, 2:]
    return y * z + w


def copy_read_later(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = y.clone()
    z[:, 1:] += r[:, 1:]
    return (z + y).cos()


def copy_of_a_view_read_later(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = y.mT.clone().unsqueeze(1)
    z[:, 0, 1:] = r[:, 1:]
    return z.cos(), y.flatten(1).cos()


def returned_with_what_it_was(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = y + 0
    z[:, 1:] += r[:, 1:]
    return y, z


def into_a_sum_of_both(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = y * 2 / 2
    z[:, ::2] += y[:, ::2].mean(1, keepdim=True)
    z[:, 1:3] = y[:, 1:3] * 3
    return z * y


def part_read_through_the_whole(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:, 1:] += r[:, 1:, 1:]
    z = y[:, 1:].exp()
    y[:, :, 2:] *= 0.5
    return y.cos(), z


def part_kept_over_a_second_write(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    z = m.s(y[:, 1:] * 3)
    w = y[:, 1:].exp()
    y[:, 2:] *= 0.5
    return y.cos(), z, w


def part_kept_over_a_whole_write(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    z = m.s(y[:, 1:] * 3)
    y.mul_(r)
    return y.cos(), z


def of_two_branches(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    a, b = y.clone(), y.clone()
    a[:, 1:] += r[:, 1:]
    b[:, :2] -= r[:, :2]
    return a.cos() + b.sin()


def repeated(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    z = m.s(y[:, :1] * 2).repeat(1, 7, 1) * 1.5
    z[:, 1:] *= r[:, 1:, :5]
    w = m.r(x[:, :1]).expand(-1, 7, 7).clone() * 2
    w.mul_(r)
    return z.cos(), w.cos()


def spread_out(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    """One row at every place: the resampling becomes an expansion, which has no storage of its own."""
    z = F.interpolate(m.q(x.amax(1))[:, :, None], size=x.shape[1])
    z[:, :, 1:] *= torch.sin(x[:, 1:]).mT
    w = F.interpolate(m.k(x.amax(1))[:, :, None], size=x.shape[1], mode="linear")
    w.mul_(torch.sin(x).mT)
    return z.cos(), w.cos()


def shifted(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    """Neutral factors between two parts that overlap."""
    y[:, 1:] = y[:, :-1] * 1.0
    y[:, :, 1:] += y[:, :, :-1] + 0
    y[:, :, :-2] = y[:, :, 2:].clone()
    return y.cos()


def scaled_before_the_write(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    """The factors move into the Linears, which stand behind the writes."""
    z = y * 2
    y[:, 1:] += r[:, 1:]
    w = y[:, 2:] * 3
    y[:, :, 2:] *= 0.5
    y[:, 1] = r[:, 0]
    return y.cos(), m.s(z), m.s(w)


def scaled_between_two_writes(m: Any, x: Tensor, y: Tensor, r: Tensor) -> Any:
    y[:, 1:] += r[:, 1:]
    z = y * 3
    y[:, :, 2:] *= 0.5
    return y.cos(), m.s(z)


APART = [
    copy_of_the_input, sum_with_zero, copy_of_a_parameter, copy_read_later, copy_of_a_view_read_later,
    returned_with_what_it_was, into_a_sum_of_both, part_read_through_the_whole, part_kept_over_a_second_write,
    part_kept_over_a_whole_write, of_two_branches, repeated, spread_out, shifted, scaled_before_the_write,
    scaled_between_two_writes,
]  # fmt: skip


@pytest.mark.parametrize("write", APART, ids=lambda f: f.__name__)
@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_nothing_else_is_overwritten(write: Any, capture: str) -> None:
    """Rewriting drops copies and neutral factors, and what the model wrote to may be someone else's then."""
    out = check(randomise(Scores(write)), draw(X), capture=capture, sizes=False)
    x = draw(X, 3)
    state = {name: t.clone() for name, t in out.result.state_dict().items()}
    first, second = out.result(x), out.result(x)
    assert relative_error(first, second) == 0
    assert torch.equal(x, draw(X, 3))
    assert all(torch.equal(t, state[name]) for name, t in out.result.state_dict().items())


class Random(nn.Module):
    """A random sequence of copies, factors, sums, Linears, nonlinear functions and writes to parts and wholes."""

    def __init__(self, seed: int, steps: int = 12) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.row = nn.Parameter(torch.zeros(8))
        self.seed, self.steps = seed, steps

    def forward(self, x: Tensor) -> Any:
        choose = random.Random(self.seed)
        values = [self.layer(x).tanh(), x @ x.mT @ x]
        for _ in range(self.steps):
            a, b = choose.choice(values), choose.choice(values)
            part = choose.choice(PLACES)
            match choose.randrange(9):
                case 0:
                    values.append(choose.choice((a.clone(), a * 1.0, a + 0)))
                case 1:
                    values.append(choose.choice((a * 3, a - b, a + self.row, a.mT.contiguous().mT * 2)))
                case 2:
                    values.append(self.layer(a))
                case 3:
                    values.append(choose.choice((a.sin(), torch.relu(a), a[part].mean() * b)))
                case 4:
                    a[part] += b[part].tanh()
                case 5:
                    a[part] = choose.choice((b[part].cos(), b[part] * 0.5, self.row[0].expand(())))
                case 6:
                    a[part].mul_(choose.choice((0.5, 1.0, -2.0)))
                case 7:
                    a[part][:, :1].copy_(b[:, :1, :1].sigmoid().expand_as(a[part][:, :1]))
                case 8:
                    choose.choice((a.mul_, a.add_))(0.5)
        return tuple(values)


PLACES = [
    (slice(None), slice(1, None)),
    (slice(None), slice(None, -2), slice(2, 5)),
    (slice(None), slice(3, 6)),
    (Ellipsis, slice(None, None, 2)),
    (slice(None), slice(None), slice(1, None)),
]


@pytest.mark.parametrize("seed", range(24))
def test_random_writes(seed: int) -> None:
    model = randomise(Random(seed)).double()
    result = fxconv.transform(model, draw(X), capture="export", verify="off")
    x = draw(X, 3)
    want = run(model, (x,))
    assert relative_error(result(x), want) < 1e-12, result.graph
    assert relative_error(result(x), want) < 1e-12, "at the second call"
    assert torch.equal(x, draw(X, 3))


# --- gradients ---------------------------------------------------------------------------------------------------------


def scaled_relu(m: Any, x: Tensor) -> Tensor:
    """ReLU's gradient is made from its result, which takes the factor in: it must not be overwritten then."""
    y = torch.relu(m.q(x)) * 2
    y.mul_(torch.sigmoid(m.k(x)))
    return torch.tanh(y)


def part_of_a_scaled_relu(m: Any, x: Tensor) -> Tensor:
    y = torch.relu(m.q(x)) * 2
    y[:, 1:] *= torch.sigmoid(m.k(x))[:, 1:]
    return torch.tanh(y)


def part_of_a_product(m: Any, x: Tensor) -> Tensor:
    y = m.q(x) @ m.k(x).mT
    y[:, 1:, 1:] += x[:, 1:, 2:]
    return torch.tanh(y.softmax(-1) @ x)


def part_of_a_relu_behind_a_view(m: Any, x: Tensor) -> Tensor:
    y = (torch.relu(m.q(x)) * 0.5).unflatten(-1, (2, 4))
    y[:, :, 1] += torch.tanh(m.k(x))[..., :4]
    return y.cos()


def read_before_the_write(m: Any, x: Tensor) -> Tensor:
    y = m.q(x)
    z = y * 3 + 1
    y[:, 1:] += torch.tanh(m.k(x))[:, 1:]
    return y.cos() + torch.exp(z)


def read_by_a_neighbour(m: Any, x: Tensor) -> Tensor:
    """The two Linears become one, of which the other half is kept for the gradient of the cosine."""
    y, z = m.q(x), m.k(x)
    w = z.cos()
    y[:, 1:] += torch.tanh(x)[:, 1:]
    return y.cos() + w


def pooled_before_the_write(m: Any, x: Tensor) -> Tensor:
    """The gradient of a pool asks for what was pooled, which is no copy any more."""
    y = m.q(x)
    w = F.avg_pool2d((y * 1.0)[:, None], (3, 1), (2, 1), (1, 0))
    y[:, 1:] += torch.tanh(m.k(x))[:, 1:]
    return y.cos() + w.cos().sum((1, 2))[:, None]


GRADIENTS = [
    scaled_relu, part_of_a_scaled_relu, part_of_a_product, part_of_a_relu_behind_a_view, read_before_the_write,
    read_by_a_neighbour, pooled_before_the_write,
]  # fmt: skip


class Layers(nn.Module):
    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


@pytest.mark.parametrize("f", GRADIENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("capture", ["export", "symbolic"])
def test_gradients_are_those_of_the_original(f: Any, capture: str) -> None:
    model = randomise(Layers(f)).double()
    result = fxconv.transform(model, draw(X), capture=capture)
    gradients = []
    for net in (model, result):
        x = draw(X, 3).requires_grad_()
        net(x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-12


def images(x: Tensor) -> Tensor:
    return x[:, None].expand(-1, 2, -1, -1)


def cubes(x: Tensor) -> Tensor:
    return images(x)[:, :, None]


ones = torch.ones
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, ones(5, 8, requires_grad=True)),
    "addmm": lambda x: torch.addmm(ones(5), x[0], ones(8, 5, requires_grad=True)),
    "matmul": lambda x: x @ ones(8, 5, requires_grad=True),
    "mm": lambda x: x[0].mm(ones(8, 5, requires_grad=True)),
    "bmm": lambda x: x.bmm(ones(3, 8, 5, requires_grad=True)),
    "baddbmm": lambda x: torch.baddbmm(ones(3, 7, 5), x, ones(3, 8, 5, requires_grad=True)),
    "conv1d": lambda x: F.conv1d(x, ones(5, 7, 3, requires_grad=True)),
    "conv2d": lambda x: F.conv2d(images(x), ones(5, 2, 3, 3, requires_grad=True)),
    "conv3d": lambda x: F.conv3d(cubes(x), ones(5, 2, 1, 3, 3, requires_grad=True)),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x, ones(7, 5, 3, requires_grad=True)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(images(x), ones(2, 5, 3, 3, requires_grad=True)),
    "conv_transpose3d": lambda x: F.conv_transpose3d(cubes(x), ones(2, 5, 1, 3, 3, requires_grad=True)),
    "convolution": lambda x: torch.convolution(x, ones(5, 7, 3, requires_grad=True), None, [1], [0], [1], False, [0], 1),
    "add": lambda x: x + ones(8, requires_grad=True),
    "sub": lambda x: x - ones(8, requires_grad=True),
    "mul": lambda x: x * ones(8, requires_grad=True),
    "div": lambda x: x / ones(8, requires_grad=True),
    "cat": lambda x: torch.cat([x, ones(3, 1, 8, requires_grad=True)], 1),
    "stack": lambda x: torch.stack([x, x]),
    "pad": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, 2)),
    "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum(1),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(images(x), 2),
    "avg_pool3d": lambda x: F.avg_pool3d(cubes(x), (1, 2, 2)),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "clone": lambda x: x.clone(),
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "_softmax": lambda x: torch._softmax(x, -1, False),
    "log_softmax": lambda x: x.log_softmax(-1),
    "_log_softmax": lambda x: torch._log_softmax(x, -1, False),
}


@pytest.mark.parametrize("name", sorted(n for n in _RESULT_NOT_KEPT if n[0].islower()))
def test_the_gradient_does_not_need_the_result(name: str) -> None:
    result = OPERATORS[name](draw(X, dtype=torch.float32).requires_grad_() * 2)
    result.mul_(3)
    result.sum().backward()


@pytest.mark.parametrize("name", sorted(_ARGUMENTS_NOT_KEPT))
def test_the_gradient_does_not_need_the_argument(name: str) -> None:
    argument = draw(X, dtype=torch.float32).requires_grad_() * 2
    result = OPERATORS[name](argument)
    argument.mul_(3)
    result.sum().backward()
