"""A map as a convolution: which slots are batch, channels and space, and what padding, cropping and taps it needs."""

from __future__ import annotations

import math
from dataclasses import replace

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static, product, same
from fxconv.expr import Const, Map, New, Shared, View, Window, axis_positions, role_size
from fxconv.kernel import Kernel
from fxconv.plan import _kept_rename, bias_kernel
from fxconv.steps import Chain, Layout, Plan, Step, Target
from fxconv.window import Filter, conv_filter


def plan_conv(m: Map, layout: Layout, target: Target, bias: Const | None) -> list[Plan]:
    """The ways to write a map as one convolution or transposed convolution."""
    if any(isinstance(r, Window) and r.filter.transposed for r in m.roles):
        # As a convolution it would be padded by as much as it is wide, and multiply with zeros all along its border.
        stays = _plan(m, layout, target, bias, transposed=True)
        if stays is not None and stays.steps[-1].kind == "conv_transpose":
            return [stays]
    plans = [_plan(m, layout, target, bias), _plan(m, layout, target, bias, channels_last=True)]
    if len(layout) > 2:
        plans.append(_plan(m, layout, target, bias, tokens=True))
    if target.full_kernel:
        plans.insert(0, _plan(m, layout, target, bias, full=True))  # which a target that wants it takes first
    return [p for p in plans if p is not None]


def _plan(
    m: Map,
    layout: Layout,
    target: Target,
    bias: Const | None,
    full: bool = False,
    channels_last: bool = False,
    tokens: bool = False,
    transposed: bool = False,
) -> Plan | None:
    """One way to write a map as a convolution.

    Args:
        full: whether contracted slots become full kernels.
        channels_last: whether the operand's channels come last in memory and shall stay there, in the result too.
        tokens: whether all dims but the first, of an operand with channels last, become spatial.
        transposed: whether it becomes a transposed convolution though it upsamples nothing.
    """
    sizes = m.x.sizes
    windows: dict[int, Window] = {r.src: r for r in m.roles if isinstance(r, Window)}
    transposed = transposed or any(w.filter.up > 1 for w in windows.values())
    if transposed and any(w.filter.down > 1 for w in windows.values()):
        return None
    shared = [r.src for r in m.roles if isinstance(r, Shared)]
    contracted = list(m.contracted)
    if not all(is_static(sizes[s]) for s in (*shared, *contracted)):
        return None
    listed = [s for g in layout for s in g]
    listed += [s for s in range(len(sizes)) if s not in listed and (s in windows or s in contracted)]
    swept: list[int] = []  # contracted slots that a full kernel covers
    if full:
        found = _full_kernel_slots(m, layout, contracted, windows, shared)
        if found is None:
            return None
        swept = found
    channel = [s for s in listed if s in shared] + [s for s in listed if s in contracted and s not in swept]
    spatial_set = set(windows) | set(swept)
    if channel:
        first = min(listed.index(s) for s in channel)
    elif spatial_set:
        first = min(listed.index(s) for s in spatial_set)
    else:
        first = len(listed)
    others = [s for s in listed if s not in channel and s not in spatial_set and sizes[s] != 1]
    batch = [s for s in others if listed.index(s) < first]
    if tokens:
        head = [s for s in layout[0] if s in batch]
        if len(head) == len(batch) or windows:
            return None
        batch = head
    spatial = [s for s in listed if s in spatial_set or (s in others and s not in batch)]
    # Images stay images: a convolution of them keeps channels last in memory where they are, one of sequences does not.
    groups = _spatial_groups(spatial, set(spatial) if tokens and len(spatial) < 4 else spatial_set, layout)
    if groups is None:
        return None
    nd = len(groups)
    while nd == 0 or nd not in target.conv:
        if nd >= 3:
            return None
        groups.append(())
        nd += 1
    chain = Chain(sizes, layout)
    in_layout = [tuple(batch), tuple(channel), *groups]
    if channels_last and (nd < 2 or transposed or chain.order() != chain.order([tuple(batch), *groups, tuple(channel)])):
        return None
    if channels_last and chain.order() == chain.order(in_layout):
        return None
    chain.to(in_layout, free=channels_last)

    filters: list[Filter] = []
    for g in groups:
        s = g[0] if len(g) == 1 else -1
        if s in windows:
            filters.append(windows[s].filter)
        elif s in swept:
            filters.append(conv_filter(int(sizes[s]), 1, 0, 0, 1))
        else:
            filters.append(Filter())
    out_sizes: list[Size] = []
    for g in groups:
        s = g[0] if len(g) == 1 else -1
        out_sizes.append(windows[s].size if s in windows else 1 if s in swept else product([sizes[t] for t in g]))

    news = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    rename = _kept_rename(m)
    group_count = math.prod(int(sizes[s]) for s in shared)
    rows = math.prod(int(role_size(m.roles[o], sizes)) for o in news)
    columns = [s for s in channel if s in contracted]
    width = math.prod(int(sizes[s]) for s in columns)
    axis = axis_positions(m)
    column_axis = {s: len(axis) + i for i, s in enumerate(contracted)}
    tap_axes: list[int | None] = []
    for g in groups:
        s = g[0] if len(g) == 1 else -1
        tap_axes.append(axis[rename[s]] if s in windows else column_axis[s] if s in swept else None)
    shared_order = [s for s in channel if s in shared]
    order = [
        *(axis[rename[s]] for s in shared_order),
        *(axis[o] for o in news),
        *(column_axis[s] for s in columns),
        *(a for a in tap_axes if a is not None),
    ]
    k = kernels.permute(m.kernel, order)
    taps = [f.taps for f in filters]
    k = kernels.reshape(k, (group_count, rows, width, *taps))
    out_channels = (*(rename[s] for s in shared_order), *news)
    before = chain.shape()
    lead: list[Size] = [before[0]]
    ok = (_emit_transposed if transposed else _emit_conv)(chain, k, filters, before, out_sizes, lead, group_count)
    if not ok:
        return None
    if bias is not None:
        _attach_bias(chain, bias_kernel(m, bias, out_channels))
    out_layout: list[tuple[int, ...]] = [tuple(rename[s] for s in batch), out_channels]
    for g in groups:
        out_layout.append(tuple(rename[s] for s in g if s in rename))
    if channels_last:
        shape = chain.steps[-1].shape
        back = (0, *range(2, len(shape)), 1)
        chain.add("permute", [shape[d] for d in back], dims=back, free=True)
        out_layout = [out_layout[d] for d in back]
    return Plan(tuple(chain.steps), tuple(out_layout))


def as_images(plan: Plan, view: View) -> Plan:
    """The plan of a pointwise convolution of sequences whose result is viewed as images, with images all through it.

    What it reads is then viewed in place of what it writes: next to other convolutions of images and additions to images no
    reshape keeps a runtime from fusing them, or from its own layout. A plan of anything else comes back as it is.
    """
    last = plan.steps[-1]
    pointwise = (
        last.kind == "conv" and last.weights[0].shape[2:] == (1,) and (last.attrs["stride"], last.attrs["padding"]) == ((1,), (0,))
    )
    sizes = [n for s in plan.layout[-1] for n in view.splits[s] if n != 1] if pointwise else []
    if len(sizes) != 2:
        return plan
    images, result = (*last.in_shape[:2], *sizes), (*last.shape[:2], *sizes)
    weight = kernels.reshape(last.weights[0], (*last.weights[0].shape[:2], 1, 1))
    attrs = last.attrs | {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    conv = replace(last, in_shape=images, shape=result, weights=(weight, *last.weights[1:]), attrs=attrs)
    steps = (*plan.steps[:-1], Step("reshape", last.in_shape, images), conv, Step("reshape", result, last.shape))
    return Plan(steps, plan.layout)


def _attach_bias(chain: Chain, bias: Kernel) -> None:
    """Give the convolution among the last steps (a crop may follow it) a bias."""
    for i in range(len(chain.steps) - 1, -1, -1):
        if chain.steps[i].kind in ("conv", "conv_transpose"):
            chain.steps[i] = replace(chain.steps[i], weights=(*chain.steps[i].weights, bias))
            return


def _full_kernel_slots(
    m: Map, layout: Layout, contracted: list[int], windows: dict[int, Window], shared: list[int]
) -> list[int] | None:
    """Contracted slots that become full kernels: those in the tensor's dims after the channel dim (the second one)."""
    if windows or shared or len(layout) < 3:
        return None
    swept = [s for g in layout[2:] for s in g if s in contracted]
    kept_in_channel = [s for s in layout[1] if s not in contracted]
    kept_behind = [s for g in layout[2:] for s in g if s not in contracted]
    if not swept or len(swept) > 3 or kept_in_channel or kept_behind:
        return None
    return swept


def _spatial_groups(spatial: list[int], single: set[int], layout: Layout) -> list[tuple[int, ...]] | None:
    """At most three spatial dims: sliding slots by themselves, kept ones as the tensor groups them, merged if too many."""
    dim_of = {s: d for d, g in enumerate(layout) for s in g}
    for merge_all in (False, True):
        groups: list[tuple[int, ...]] = []
        for s in spatial:
            if groups and s not in single and groups[-1][-1] not in single:
                if merge_all or dim_of.get(s) == dim_of.get(groups[-1][-1]):
                    groups[-1] = (*groups[-1], s)
                    continue
            groups.append((s,))
        if len(groups) <= 3:
            return groups
    return None


def _emit_conv(
    chain: Chain,
    k: Kernel,
    filters: list[Filter],
    before: tuple[Size, ...],
    out_sizes: list[Size],
    lead: list[Size],
    group_count: int,
) -> bool:
    _, rows, width, *taps = (int(s) for s in k.shape)
    weight = kernels.reshape(k, (group_count * rows, width, *taps))
    pads: list[tuple[int, int]] = []
    padding: list[int] = []
    crops: list[tuple[int, int]] = []
    for i, f in enumerate(filters):
        n, out = before[2 + i], out_sizes[i]
        lo, hi = f.offset, f.pad_hi
        if is_static(n) and is_static(out):
            hi = (int(out) - 1) * f.down + f.span - int(n) - lo
            symmetric = lo >= 0 and (int(n) + 2 * lo - f.span) // f.down + 1 == out
        else:
            symmetric = lo >= 0 and lo == hi
        if symmetric:
            pads.append((0, 0))
            padding.append(lo)
            crops.append((0, 0))
        else:
            # Unequal or negative padding: crop or pad first.
            pads.append((max(lo, 0), max(hi, 0)))
            crops.append((max(-lo, 0), min(hi, 0)))
            padding.append(0)
    shape = list(before)
    for i, (start, end) in enumerate(crops):
        f = filters[i]
        if end < 0 and same(conv_filter(f.taps, f.down, f.offset, 0, f.dilation).out_size(before[2 + i]), out_sizes[i]):
            end = 0  # what a stride leaves over is not read anyway
        if start or end < 0:
            shape[2 + i] = _less(shape[2 + i], start - min(end, 0))
            chain.add("slice", shape, dim=2 + i, start=start, end=end if end < 0 else None, step=1)
    if any(p != (0, 0) for p in pads):
        for i, (lo, hi) in enumerate(pads):
            shape[2 + i] = _less(shape[2 + i], -(lo + hi))
        chain.add("pad", shape, pads=((0, 0), (0, 0), *pads))
    result = [lead[0], group_count * rows, *out_sizes]
    chain.add(
        "conv",
        result,
        weights=[weight],
        macs=product([*result, width * math.prod(taps)]),
        stride=tuple(f.down for f in filters),
        padding=tuple(padding),
        dilation=tuple(f.dilation for f in filters),
        groups=group_count,
    )
    return True


def _less(size: Size, by: int) -> Size:
    return size - by if is_static(size) else size + (-by)


def _emit_transposed(
    chain: Chain,
    k: Kernel,
    filters: list[Filter],
    before: tuple[Size, ...],
    out_sizes: list[Size],
    lead: list[Size],
    group_count: int,
) -> bool:
    _, rows, width, *_ = (int(s) for s in k.shape)
    padding: list[int] = []
    output_padding: list[int] = []
    crops: list[tuple[int, int]] = []
    for i, f in enumerate(filters):
        pad = f.span - 1 - f.offset
        if pad < 0:
            # Zero taps at the end make the padding non-negative.
            more = (-pad + f.dilation - 1) // f.dilation
            k = kernels.placed(k, 3 + i, f.taps + more, 0, 1)
            f = filters[i] = Filter(f.up, 1, f.taps + more, f.dilation, f.offset, f.extent)
            pad = f.span - 1 - f.offset
        extra = f.extent + f.up + 2 * pad - f.span
        if 0 <= extra < max(f.up, f.dilation):
            padding.append(pad)
            output_padding.append(extra)
            crops.append((0, 0))
        elif extra < 0:
            padding.append(pad)
            output_padding.append(0)
            crops.append((0, extra))
        else:
            return False
    _, _, _, *taps = (int(s) for s in k.shape)
    # [G, O/G, C/G, taps] → [G·C/G, O/G, taps reversed]
    weight = kernels.permute(k, (0, 2, 1, *range(3, 3 + len(taps))))
    weight = kernels.reshape(weight, (group_count * width, rows, *taps))
    weight = kernels.flip(weight, range(2, 2 + len(taps)))
    full = [out_sizes[i] if crops[i] == (0, 0) else _less(out_sizes[i], -(crops[i][0] - crops[i][1])) for i in range(len(taps))]
    chain.add(
        "conv_transpose",
        [lead[0], group_count * rows, *full],
        weights=[weight],
        macs=product([*before, rows * math.prod(taps)]),
        stride=tuple(f.up for f in filters),
        padding=tuple(padding),
        output_padding=tuple(output_padding),
        dilation=tuple(f.dilation for f in filters),
        groups=group_count,
    )
    shape = [lead[0], group_count * rows, *full]
    for i, (start, end) in enumerate(crops):
        if start or end:
            shape[2 + i] = out_sizes[i]
            chain.add("slice", shape, dim=2 + i, start=start, end=end if end < 0 else None, step=1)
    return True
