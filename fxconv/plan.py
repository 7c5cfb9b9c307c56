"""How a map would be written as torch operators: the steps, before any of them is built.

Costing and emission read the same plan, so what is priced is what is emitted. A plan is a chain of unary steps on the
operand's tensor (`plan_map`, `steps.plan_view`), or a combination of several tensors (`sums.plan_sum`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxconv import kernel as kernels
from fxconv.axes import Size, is_static, product, same
from fxconv.expr import (
    Const,
    Kept,
    Leaf,
    Map,
    New,
    Resample,
    Role,
    Shared,
    Value,
    Window,
    axis_positions,
    is_selection,
)
from fxconv.kernel import Kernel
from fxconv.resample import PADDING, PICK
from fxconv.steps import Chain, Layout, Plan, Target
from fxconv.window import Filter


def plan_map(m: Map, layout: Layout, target: Target, bias: Const | None = None) -> list[Plan]:
    """The ways to write a map of a tensor in the given layout; empty where there is none.

    ``bias`` (a constant over the output slots) is added by the operator itself; see `takes_bias`.
    """
    if any(isinstance(r, Resample) for r in m.roles):
        return _plan_resample(m, layout)
    if (index := gathered(m.kernel)) is not None:
        return _plan_gather(m, layout, index)
    if is_selection(m):
        return _plan_selection(m, layout)
    active = [r for r in m.roles if not isinstance(r, Kept)]
    if not active and not m.contracted:
        return _plan_scale(m, layout, bias)
    if not m.contracted and all(isinstance(r, Shared) for r in active):
        return _plan_scale(m, layout, bias)
    if not m.contracted and m.kernel.uniform is not None and bias is None:
        special = _plan_uniform(m, layout)
        if special:
            return special
    plans: list[Plan] = []
    if target.linear:  # of windows, those on patches that touch: by views and one copy, which the original may be written as
        plans += _plan_linear(m, layout, bias)
    if target.conv:
        from fxconv.plan_conv import plan_conv

        plans += plan_conv(m, layout, target, bias)
    return plans


def takes_bias(m: Map, c: Const) -> bool:
    """Whether the operator that a map becomes can add the constant for nothing: one value per output channel, or one for
    all of a convolution that has a single channel."""
    rows = {o for o, r in enumerate(m.roles) if isinstance(r, (New, Shared))}
    varying = {o for o, v in enumerate(c.varies) if v}
    if not varying <= rows:
        return False
    if any(isinstance(r, Resample) for r in m.roles) or is_selection(m) or gathered(m.kernel) is not None:
        return False
    plain_scale = not m.contracted and all(isinstance(r, (Kept, Shared)) for r in m.roles)
    slides = m.kernel.uniform is None and any(isinstance(r, Window) for r in m.roles)
    return plain_scale or slides or bool(m.contracted) or any(isinstance(r, (New, Shared)) for r in m.roles)


def bias_kernel(m: Map, c: Const, slots: Sequence[int]) -> Kernel:
    """The constant as a flat vector over the given output slots (those of the operator's channels, in order)."""
    varying = [o for o, v in enumerate(c.varies) if v]
    sizes = [int(c.sizes[o]) for o in slots]
    k = kernels.permute(c.kernel, [varying.index(o) for o in slots if o in varying])
    k = kernels.reshape(k, [s if o in varying else 1 for o, s in zip(slots, sizes, strict=True)])
    return kernels.reshape(kernels.expand(k, sizes), [math.prod(sizes)])


# -- Elementwise, selection, pooling ----------------------------------------------------------------------------------


def _kept_rename(m: Map) -> dict[int, int]:
    return {r.src: o for o, r in enumerate(m.roles) if not isinstance(r, New)}


def _plan_scale(m: Map, layout: Layout, bias: Const | None) -> list[Plan]:
    chain = Chain(m.x.sizes, layout)
    shared = [r.src for r in m.roles if isinstance(r, Shared)]
    rename = _kept_rename(m)
    varying = {i for i, o in rename.items() if bias is not None and bias.varies[o]}
    needed = set(shared) | varying
    # A dim that mixes slots that the constants vary along with slots that they don't is split.
    split: list[tuple[int, ...]] = []
    for group in layout:
        part: list[int] = []
        for s in group:
            if part and (s in needed) != (part[-1] in needed):
                split.append(tuple(part))
                part = []
            part.append(s)
        split.append(tuple(part))
    chain.to(split)
    axis = axis_positions(m)
    weights: list[Kernel] = [
        broadcast_kernel(m.kernel, [axis[rename[i]] for i in _in_order(split, shared)], split, shared, m.x.sizes)
    ]
    attrs: dict[str, Any] = {}
    if bias is not None:
        order = [o for o, v in enumerate(bias.varies) if v]
        weights.append(
            broadcast_kernel(bias.kernel, [order.index(rename[i]) for i in _in_order(split, varying)], split, varying, m.x.sizes)
        )
        attrs["bias"] = True
    chain.add("scale", chain.shape(), weights=weights, macs=0, **attrs)
    out_layout = layout if len(split) == len(layout) else tuple(split)
    return [chain.done(rename, out_layout)]


def _in_order(layout: Sequence[Sequence[int]], slots: Any) -> list[int]:
    return [s for g in layout for s in g if s in slots]


def broadcast_kernel(
    k: Kernel, axes: Sequence[int], layout: Sequence[Sequence[int]], slots: Any, sizes: tuple[Size, ...]
) -> Kernel:
    """A constant that varies along ``slots`` in the shape that broadcasts against a tensor in ``layout``."""
    k = kernels.permute(k, list(axes))
    shape = [product([sizes[s] for s in g]) if g and g[0] in slots else 1 for g in layout]
    while shape and shape[0] == 1:
        shape.pop(0)
    return kernels.reshape(k, shape)


def _plan_selection(m: Map, layout: Layout) -> list[Plan]:
    chain = Chain(m.x.sizes, layout)
    rename = _kept_rename(m)
    sliding = {r.src for r in m.roles if isinstance(r, Window)}
    chain.to(_isolate(layout, sliding))
    shape = list(chain.shape())
    pads = [(0, 0)] * len(shape)
    slices: list[tuple[int, int, int | None, int]] = []
    later: list[tuple[int, int, int | None, int]] = []
    for r in m.roles:
        if not isinstance(r, Window):
            continue
        d = next(i for i, g in enumerate(chain.layout) if r.src in g)
        f = r.filter
        hi = f.extent - f.offset - (f.down - 1)
        lo = f.offset
        if f.down > 1 and is_static(r.size) and is_static(shape[d]):
            hi = (int(r.size) - 1) * f.down + 1 - int(shape[d]) - lo
        if lo > 0 or hi > 0:
            pads[d] = (max(lo, 0), max(hi, 0))
        crop_hi = hi if hi < 0 else None
        if lo < 0 or crop_hi is not None or f.down > 1:
            step = f.down if lo <= 0 and hi <= 0 else 1
            slices.append((d, max(-lo, 0), crop_hi, step))
            if step != f.down:
                later.append((d, 0, None, f.down))
        shape[d] = r.size
    for d, start, end, step in slices:
        now = list(chain.steps[-1].shape if chain.steps else chain.shape())
        now[d] = shape[d] if pads[d] == (0, 0) else now[d]
        chain.add("slice", now, dim=d, start=start, end=end, step=step)
    if any(p != (0, 0) for p in pads):
        now = [shape[d] if not any(x[0] == d for x in later) else product([shape[d], 1]) for d in range(len(shape))]
        chain.add("pad", now, pads=tuple(pads))
    for d, start, end, step in later:
        chain.add("slice", shape, dim=d, start=start, end=end, step=step)
    return [chain.done(rename)]


def _isolate(layout: Layout, slots: set[int]) -> list[tuple[int, ...]]:
    """The layout with each of the given slots in a dim of its own."""
    out: list[tuple[int, ...]] = []
    for group in layout:
        part: list[int] = []
        for s in group:
            if s in slots:
                if part:
                    out.append(tuple(part))
                    part = []
                out.append((s,))
            else:
                part.append(s)
        if part or not group:
            out.append(tuple(part))
    missing = slots - {s for g in layout for s in g}
    return out + [(s,) for s in sorted(missing)]


def _spatial_layout(chain: Chain, sliding: set[int]) -> tuple[list[tuple[int, ...]], int] | None:
    """[batch, channel, spatial…] with everything from the first sliding slot on spatial, and how many are spatial.

    Pooling and resampling want one or more leading dims and 1 to 3 trailing ones. Channels behind an image are moved in
    front of it: treated as a third spatial dim they would make bilinear interpolation a far slower trilinear one.
    """
    order = chain.order()
    order += [s for s in sorted(sliding) if s not in order]
    first = min(order.index(s) for s in sliding)
    lead, tail = order[:first], order[first:]
    if len(tail) > 3 or len(sliding) > 1 and tail[-1] not in sliding:
        tail = [s for s in order if s in sliding]
        lead = [s for s in order if s not in sliding]
        if len(tail) > 3:
            return None
    groups: list[tuple[int, ...]] = []
    if len(lead) <= 1:
        groups = [(), tuple(lead)]
    else:
        dims = [tuple(s for s in g if s in lead) for g in chain.layout]
        dims = [g for g in dims if g]
        groups = dims if len(dims) == 2 else [tuple(lead[:-1]), (lead[-1],)]
    return [*groups, *((s,) for s in tail)], len(tail)


def _plan_uniform(m: Map, layout: Layout) -> list[Plan]:
    """Average pooling, nearest upsampling and expansion: kernels of equal entries."""
    value = m.kernel.uniform
    assert value is not None
    news = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    windows = {r.src: r for r in m.roles if isinstance(r, Window)}
    if news and not windows and value == 1.0 and not any(isinstance(r, Shared) for r in m.roles):
        chain = Chain(m.x.sizes, layout)
        grown = [*(m.roles[o].size for o in news if isinstance(m.roles[o], New)), *chain.shape()]  # type: ignore[union-attr]
        chain.add("reshape", [*(1 for _ in news), *chain.shape()])
        chain.add("expand", grown)
        rename = _kept_rename(m)
        kept = tuple(tuple(rename[s] for s in g if s in rename) for g in layout)
        return [Plan(tuple(chain.steps), (*((o,) for o in news), *kept))]
    if news or any(isinstance(r, Shared) for r in m.roles):
        return []
    filters = [w.filter for w in windows.values()]
    nearest = all(f.is_nearest for f in filters)
    pooled = all(f.up == 1 and f.dilation == 1 for f in filters)
    chain = Chain(m.x.sizes, layout)
    found = _spatial_layout(chain, set(windows))
    if found is None:
        return []
    groups, nd = found
    rename = _kept_rename(m)
    if nearest and value == 1.0:
        chain.to(groups)
        scales = tuple(windows[g[0]].filter.up if g and g[0] in windows else 1 for g in groups[-nd:])
        shape = [*chain.shape()[:-nd], *_sizes_after(m, groups[-nd:])]
        chain.add("nearest", shape, scales=scales)
        return [chain.done(rename, groups)]
    total = math.prod(f.taps for f in filters)
    if pooled and abs(value * total - 1.0) < 1e-15:
        kernel = [windows[g[0]].filter if g[0] in windows else Filter() for g in groups[-nd:]]
        if all(f.offset == f.pad_hi and 0 <= f.offset <= f.taps // 2 for f in kernel) or _pool_size_ok(m, groups[-nd:]):
            chain.to(groups)
            shape = [*chain.shape()[:-nd], *_sizes_after(m, groups[-nd:])]
            chain.add(
                "avg_pool",
                shape,
                kernel=tuple(f.taps for f in kernel),
                stride=tuple(f.down for f in kernel),
                padding=tuple(f.offset for f in kernel),
                inside=False,
                ceil_mode=False,
            )
            return [chain.done(rename, groups)]
    return []


def _pool_size_ok(m: Map, spatial: Sequence[tuple[int, ...]]) -> bool:
    """Whether symmetric padding gives the sizes anyway (they are static, and the stride skips the rest)."""
    for r in m.roles:
        if isinstance(r, Window):
            f, n = r.filter, m.x.sizes[r.src]
            if not 0 <= f.offset <= f.taps // 2:
                return False
            if f.offset == f.pad_hi:
                continue
            if not (is_static(n) and is_static(r.size)):
                return False
            if (int(n) + 2 * f.offset - f.taps) // f.down + 1 != r.size:
                return False
    return True


def _sizes_after(m: Map, spatial: Sequence[tuple[int, ...]]) -> list[Size]:
    size = {r.src: r.size for r in m.roles if isinstance(r, (Window, Resample))}
    return [size.get(g[0], m.x.sizes[g[0]]) for g in spatial]


def _plan_resample(m: Map, layout: Layout) -> list[Plan]:
    if any(not isinstance(r, (Kept, Resample)) for r in m.roles) or m.kernel.uniform != 1.0:
        return []
    if any(m.x.sizes[i] != 1 for i in m.contracted):  # what a selection left of an axis may go by the way
        return []
    roles = {r.src: r for r in m.roles if isinstance(r, Resample)}
    if any(r.kind == PICK for r in roles.values()):
        return _plan_picks(m, layout, roles)
    chain = Chain(m.x.sizes, layout)
    rename = _kept_rename(m)
    if all(r.kind == "adaptive_avg" and r.size == 1 for r in roles.values()):
        # A mean over whole dims needs no particular order.
        groups = _isolate_group(layout, set(roles))
        chain.to(groups)
        dims = tuple(d for d, g in enumerate(groups) if g and g[0] in roles)
        chain.add("mean", [s for d, s in enumerate(chain.shape()) if d not in dims], dims=dims)
        return [chain.done(rename, [g for d, g in enumerate(groups) if d not in dims])]
    plain = PADDING | {"adaptive_avg", "avg_inside"}
    kinds = {(r.kind, r.parameters[:1] if r.kind not in plain else ()) for r in roles.values()}
    found = _spatial_layout(chain, set(roles))
    if len(kinds) != 1 or found is None:
        return []
    (kind, parameters), (groups, nd) = kinds.pop(), found
    spatial = [g[0] for g in groups[-nd:]]
    chain.to(groups)
    shape = [*chain.shape()[:-nd], *_sizes_after(m, groups[-nd:])]
    if kind == "adaptive_avg":
        chain.add("adaptive_avg", shape, size=tuple(shape[-nd:]))
    elif kind in PADDING:
        around = [(0, 0)] * (len(shape) - nd) + [roles[s].parameters if s in roles else (0, 0) for s in spatial]
        chain.add("pad", shape, pads=tuple(around), mode=kind)
    elif kind == "avg_inside":
        given = [roles[s].parameters if s in roles else (1, 1, 0, False) for s in spatial]
        if len({p[3] for s, p in zip(spatial, given, strict=True) if s in roles}) != 1:
            return []
        ceil = next(roles[s].parameters[3] for s in spatial if s in roles)
        chain.add(
            "avg_pool",
            shape,
            kernel=tuple(p[0] for p in given),
            stride=tuple(p[1] for p in given),
            padding=tuple(p[2] for p in given),
            inside=True,
            ceil_mode=ceil,
        )
    else:
        if kind == "cubic" and nd != 2:
            return []
        scales = [roles[s].parameters[1] if s in roles else 1.0 for s in spatial]
        if any(s is None for s in scales):
            if any(s is not None and s != 1.0 for s in scales):
                return []
            scales = [None] * nd
        chain.add("interpolate", shape, mode=kind, align_corners=parameters[0], scales=tuple(scales), size=tuple(shape[-nd:]))
    return [chain.done(rename, groups)]


def _plan_picks(m: Map, layout: Layout, roles: Mapping[int, Resample]) -> list[Plan]:
    """Entries of axes by their places: as slices where they are evenly spaced."""
    if any(r.kind != PICK for r in roles.values()):
        return []
    chain = Chain(m.x.sizes, layout)
    chain.to(_isolate(layout, set(roles)))
    shape = list(chain.shape())
    for slot, r in roles.items():
        d = next(i for i, g in enumerate(chain.layout) if slot in g)
        places = r.parameters
        step = places[1] - places[0] if len(places) > 1 else 1
        shape[d] = len(places)
        if step > 0 and all(b - a == step for a, b in itertools.pairwise(places)):
            end = places[-1] + 1
            chain.add("slice", shape, dim=d, start=places[0], end=end if end != 0 else None, step=step)
        elif min(places) >= 0:
            chain.add("gather", shape, dim=d, index=places)
        else:
            return []
    return [chain.done(_kept_rename(m))]


def _isolate_group(layout: Layout, slots: set[int]) -> list[tuple[int, ...]]:
    """The layout with dims cut where membership in ``slots`` changes."""
    out: list[tuple[int, ...]] = []
    for group in layout:
        part: list[int] = []
        for s in group:
            if part and (s in slots) != (part[-1] in slots):
                out.append(tuple(part))
                part = []
            part.append(s)
        out.append(tuple(part))
    return out + [(s,) for s in sorted(slots - {s for g in layout for s in g})]


def gathered(k: Kernel) -> tuple[int, ...] | None:
    """The entries that a map's rows select, where its kernel is a selection found by `recover`."""
    while k.spec == "reshape":
        k = k.parents[0]
    return k.spec[1] if isinstance(k.spec, tuple) and k.spec and k.spec[0] == "gather" else None


def _plan_gather(m: Map, layout: Layout, index: tuple[int, ...]) -> list[Plan]:
    """Entries of one dim by their indices."""
    chain = Chain(m.x.sizes, layout)
    columns = m.contracted
    groups = [tuple(s for s in g if s not in columns) for g in layout]
    place = next((d for d, g in enumerate(layout) if g == columns), None)
    if place is None:
        groups = [*(g for g in groups if g), columns]
        place = len(groups) - 1
    else:
        groups[place] = columns
    chain.to(groups)
    shape = list(chain.shape())
    shape[place] = len(index)
    chain.add("gather", shape, dim=place, index=index)
    rename = _kept_rename(m)
    news = tuple(o for o, r in enumerate(m.roles) if isinstance(r, New))
    out = tuple(news if d == place else tuple(rename[s] for s in g) for d, g in enumerate(groups))
    return [Plan(tuple(chain.steps), out)]


# -- Linear -----------------------------------------------------------------------------------------------------------


def _patches(m: Map, layout: Layout) -> tuple[Map, Layout] | None:
    """A strided convolution of patches that touch (taps = stride) as a Linear on patches: its slots split in two."""
    windows = {r.src: r for r in m.roles if isinstance(r, Window)}
    if not windows or any(isinstance(r, (Shared, Resample)) for r in m.roles):
        return None
    sizes: list[Size] = []
    parts: list[tuple[int, ...]] = []
    for s, n in enumerate(m.x.sizes):
        split: tuple[Size, ...] = (n,)
        if s in windows:
            f, size = windows[s].filter, windows[s].size
            if (f.up, f.offset, f.dilation) != (1, 0, 1) or f.taps != f.down or not same(size * f.down, n):
                return None
            split = (size, f.taps)
        parts.append(tuple(range(len(sizes), len(sizes) + len(split))))
        sizes += split
    roles: list[Role] = [r if isinstance(r, New) else Kept(parts[r.src][0]) for r in m.roles]
    at = axis_positions(m)
    taps = {parts[r.src][1]: at[o] for o, r in enumerate(m.roles) if isinstance(r, Window)}
    columns = {parts[s][0]: len(at) + i for i, s in enumerate(m.contracted)}
    order = [at[o] for o, r in enumerate(m.roles) if isinstance(r, New)]
    order += [axis for _, axis in sorted((taps | columns).items())]
    fine = Map(Value(Leaf("patches", tuple(sizes))), tuple(roles), kernels.permute(m.kernel, order))
    return fine, tuple(tuple(p for s in g for p in parts[s]) for g in layout)


def _plan_linear(m: Map, layout: Layout, bias: Const | None) -> list[Plan]:
    patches = _patches(m, layout)
    if patches is not None:
        m, layout = patches
    if any(not isinstance(r, (Kept, New)) for r in m.roles) or not m.contracted:
        return []
    chain = Chain(m.x.sizes, layout)
    columns = set(m.contracted)
    listed = [s for g in layout for s in g]
    inner = [s for s in listed if s in columns] + [s for s in m.contracted if s not in listed]
    batch = [tuple(s for s in g if s not in columns) for g in layout]
    batch = [g for g in batch if g]
    chain.to([*batch, tuple(inner)])
    news = [o for o, r in enumerate(m.roles) if isinstance(r, New)]
    rows = math.prod(int(r.size) for r in m.roles if isinstance(r, New))
    width = math.prod(int(m.x.sizes[s]) for s in inner)
    axes = m.contracted
    weight = kernels.permute(m.kernel, [*range(len(news)), *(len(news) + axes.index(s) for s in inner)])
    weight = kernels.reshape(weight, (rows, width))
    weights = [weight] if bias is None else [weight, bias_kernel(m, bias, news)]
    lead = chain.shape()[:-1]
    chain.add("linear", [*lead, rows], weights=weights, macs=product([*lead, rows * width]))
    rename = _kept_rename(m)
    out: list[tuple[int, ...]] = [tuple(rename[s] for s in g) for g in batch]
    return [Plan(tuple(chain.steps), (*out, tuple(news)))]
