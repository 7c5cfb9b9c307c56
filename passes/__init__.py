"""The laws of affine rewriting, one file each: installed and imported as ``fxconv.passes``, never as ``passes``."""

if __name__ == "passes":
    # From the top of a checkout, `import passes` would find this folder and load every law a second time, under other
    # names: their classes would not be those that fxconv knows, and a law would be registered twice.
    raise ImportError(
        "these are fxconv's laws, imported as `fxconv.passes`: write `import fxconv.passes` (after `pip install -e .` "
        "in the checkout). Loaded as top-level `passes` they would be a second copy that fxconv does not know."
    )

from fxconv.law import Law
from fxconv.passes import (
    absorb_constants,
    absorb_together,
    absorb_views,
    collapse,
    commute,
    compose,
    distribute,
    distribute_together,
    drop_taps,
    factor,
    flatten_sums,
    homogeneity,
    merge_branches,
    merge_siblings,
    rearrange,
    recover,
    restate,
    swap_windows,
)

LAWS: tuple[Law, ...] = (
    compose.law,
    distribute.law,
    drop_taps.law,
    flatten_sums.law,
    merge_branches.law,
    rearrange.law,
    factor.law,
    absorb_constants.law,
    absorb_together.law,
    absorb_views.law,
    commute.law,
    swap_windows.law,
    homogeneity.law,
    distribute_together.law,
    merge_siblings.law,
    collapse.law,
    recover.law,
    restate.law,
)
"""Every law that `transform` uses by default, in the order in which it is tried."""

BY_NAME: dict[str, Law] = {law.name: law for law in LAWS}
