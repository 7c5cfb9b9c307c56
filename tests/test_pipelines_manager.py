"""fx pass managers: the transform among other passes, `modified` only when something changed."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxconv.pipelines import TransformPass


class DropDropout(PassBase):
    """Another pass: removes dropout, and so changes something at its first run."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), nn.Dropout):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                modified = True
        return PassResult(graph_module, modified)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


def test_in_a_manager_with_another_pass() -> None:
    original, x = model(), torch.randn(2, 3, 6, 6)
    ours = TransformPass(x, capture="symbolic")
    manager = PassManager(passes=[DropDropout(), ours, DropDropout()], run_checks_after_each_pass=True)
    result = manager(fx.symbolic_trace(original))
    assert result.modified and ours.report is not None and ours.report.verified and len(ours.report.applied) == 1
    assert "BatchNorm2d" not in {type(m).__name__ for m in result.graph_module.modules()}
    torch.testing.assert_close(result.graph_module(x), original(x), rtol=1e-5, atol=1e-5)


def test_modified_only_when_something_changed() -> None:
    x = torch.randn(2, 3, 6, 6)
    ours = TransformPass(x)
    first = ours(fx.symbolic_trace(model()))
    assert first.modified
    second = ours(first.graph_module)
    assert not second.modified and second.graph_module is first.graph_module
    plain = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert PassManager(passes=[TransformPass(torch.randn(2, 4))])(plain).modified is False


def test_inputs_from_the_metadata_of_the_graph() -> None:
    original, x = model(), torch.randn(2, 3, 6, 6)
    gm = fx.symbolic_trace(original)
    fx.passes.shape_prop.ShapeProp(gm)
    with torch._subclasses.FakeTensorMode() as mode:
        next(iter(gm.graph.nodes)).meta["val"] = mode.from_tensor(x)
    result = TransformPass()(gm)
    assert result.modified
    torch.testing.assert_close(result.graph_module(x), original(x), rtol=1e-5, atol=1e-5)
