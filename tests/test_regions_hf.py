"""Regions as real libraries write them: peft's adapters, transformers' Llama block and SegFormer head (random)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import absorbable_affines, kinds
from helpers import Outcome, check, draw, macs, randomise, relative_error, run
from torch import Tensor, nn


def llama(layers: int = 1) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        use_cache=False,
    )

    class FromEmbeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = LlamaModel(config)

        def forward(self, embeddings: Tensor) -> Tensor:
            return self.llama(inputs_embeds=embeddings).last_hidden_state

    return randomise(FromEmbeddings())


def from_embeddings(**expect: Any) -> Outcome:
    # the rotary table is computed in float32 whatever the model's dtype is: its values are the same in both models
    return check(llama(), draw((2, 7, 32)), sizes=False, **expect)


def test_llama_block_norm_weights_go_into_the_projections() -> None:
    """RMSNorm's weights into Q, K, V and into gate, up; only the last norm, which has no projection after it, keeps
    its own.
    """
    out = from_embeddings(at_most={"linear": 7})
    assert absorbable_affines(out.result, out.args) == []


def test_llama_block_siblings_merge_where_launches_count() -> None:
    """Q, K, V as one Linear; gate and up as one; then o and down. K's half rotation is a Linear of its own instead of two
    slices, a negation and a concatenation, Q's a convolution: launches are what counts, up to a tenth more multiply-adds."""
    out = from_embeddings(objective="launches", ops={"linear": 5}, at_most={"cat": 0}, more_macs=True, max_macs_ratio=1.1)
    assert out.report.cost_before.launches - out.report.cost_after.launches >= 9


@pytest.mark.parametrize("n_layers", [1, 2])
def test_llama_never_costs_more(n_layers: int) -> None:
    model = llama(n_layers).double()
    x = draw((2, 7, 32))
    out = check(model, x, sizes=False)
    assert macs(out.result, (x,)) <= macs(model, (x,))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("adapters", [1, 2])
def test_peft_adapters_left_in_the_graph(adapters: int) -> None:
    """peft's own merge_and_unload is the oracle: the same function, as many Linears, no dropout."""
    from peft import LoraConfig, get_peft_model

    base = randomise(Mlp(), 1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["up", "down"])
    model = get_peft_model(base, config)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"extra{i}")
        model.add_adapter(names[-1], LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=["up", "down"]))
    model.base_model.set_adapter(names)
    randomise(model, 2).double()

    x = draw((2, 5, 32))
    out = check(model, x, ops={"linear": 2, "mul": 0, "identity": 0, "add": 1})
    merged = model.merge_and_unload(adapter_names=names)
    assert relative_error(run(out.result, (x,)), run(merged, (x,))) < 1e-12
    assert out.macs_after == macs(merged, (x,))


class SegformerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import SegformerConfig
        from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

        config = SegformerConfig(hidden_sizes=[16, 32, 80, 128], decoder_hidden_size=64, num_labels=9, num_encoder_blocks=4)
        self.head = SegformerDecodeHead(config)

    def forward(self, x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return self.head([x, y, z, w])


def test_transformers_segformer_head() -> None:
    """A Linear per scale at its own resolution, summed: 2,539,520 + 9*64*1,280 of 24,248,320 multiply-adds."""
    shapes = ((2, 16, 32, 40), (2, 32, 16, 20), (2, 80, 8, 10), (2, 128, 4, 5))
    args = tuple(draw(shape, i) for i, shape in enumerate(shapes))
    out = check(randomise(SegformerHead()), args, max_macs_ratio=0.15, ops={"batch_norm": 0, "cat": 0})
    assert kinds(out.result)["interpolate"] <= 3
