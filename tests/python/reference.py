"""The reference model in numpy, written from its description: loads a checkpoint of ours strictly by name and shape and
compares its logits with ours.

usage: reference.py CHECKPOINT_FOLDER LOGITS.safetensors ID,ID,...
"""

import json
import math
import os
import sys

import numpy as np
from safetensors.numpy import load_file

BOUND = 1e-4


def expected_tensors(c):
    """Every name and shape of the reference's state dict."""
    d, e, ctx = c["emb_dim"], c["num_experts"], c["context_length"]
    shapes = {
        "token_emb.weight": (c["vocab_size"], d),
        "out_head.weight": (c["vocab_size"], d),
        "position_emb.weight": (ctx, d),
        "final_norm.scale": (d,),
        "final_norm.shift": (d,),
    }
    for i in range(c["num_layers"]):
        block = {f"{norm}.{part}": (d,) for norm in ("norm1", "norm2") for part in ("scale", "shift")}
        block["mhaunit.mask"] = (ctx, ctx)
        for name in ("W_query", "W_key", "W_value"):
            block[f"mhaunit.{name}.weight"] = (d, d)
            if c["qkv_bias"]:
                block[f"mhaunit.{name}.bias"] = (d,)
        block["mhaunit.out_proj.weight"] = (d, d)
        block["mhaunit.out_proj.bias"] = (d,)
        if is_moe(c, i):
            block["moe.router.w_g.weight"] = (e, d)
            if c["use_noisy_top_k"]:
                block["moe.router.w_noise.weight"] = (e, d)
            block["moe.experts.c_fc"] = (e, d, 4 * d)
            block["moe.experts.c_proj"] = (e, 4 * d, d)
            if c["bias"]:
                block["moe.experts.fc_bias"] = (e, 1, 4 * d)
                block["moe.experts.proj_bias"] = (e, 1, d)
        else:
            block["moe.layers.0.weight"] = (4 * d, d)
            block["moe.layers.0.bias"] = (4 * d,)
            block["moe.layers.2.weight"] = (d, 4 * d)
            block["moe.layers.2.bias"] = (d,)
        shapes |= {f"transformer_blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def is_moe(c, i):
    return c["num_experts"] > 1 and i % c["stride"] == 0


def load_strictly(path, c):
    weights = load_file(path)
    expected = expected_tensors(c)
    assert weights.keys() == expected.keys(), f"names differ: {sorted(weights.keys() ^ expected.keys())}"
    for name, shape in expected.items():
        assert weights[name].shape == shape, f"{name}: {weights[name].shape} instead of {shape}"
        assert weights[name].dtype == np.float32, f"{name}: {weights[name].dtype}"
    assert np.array_equal(weights["token_emb.weight"], weights["out_head.weight"]), "the tied tensors differ"
    mask = np.triu(np.ones((c["context_length"],) * 2, np.float32), k=1)
    for i in range(c["num_layers"]):
        assert np.array_equal(weights[f"transformer_blocks.{i}.mhaunit.mask"], mask), f"mask of block {i}"
    return {name: weight.astype(np.float64) for name, weight in weights.items()}


def norm(x, w, name):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * w[f"{name}.scale"] + w[f"{name}.shift"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


gelu_erf = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, w, c):
    t, d = x.shape
    h = c["num_heads"]
    q, k, v = (
        linear(x, w, f"mhaunit.W_{name}").reshape(t, h, d // h).transpose(1, 0, 2) for name in ("query", "key", "value")
    )
    scores = q @ k.transpose(0, 2, 1)
    scores[:, w["mhaunit.mask"][:t, :t] > 0] = -np.inf
    mixed = softmax(scores / math.sqrt(d // h)) @ v
    return linear(mixed.transpose(1, 0, 2).reshape(t, d), w, "mhaunit.out_proj")


def mixture(x, w, c):
    logits = x @ w["moe.router.w_g.weight"].T
    out = np.zeros_like(x)
    for n, row in enumerate(logits):
        chosen = np.argsort(-row)[: c["top_k"]]
        for weight, e in zip(softmax(row[chosen]), chosen):
            hidden = x[n] @ w["moe.experts.c_fc"][e]
            hidden = gelu_erf(hidden + (w["moe.experts.fc_bias"][e, 0] if c["bias"] else 0.0))
            y = hidden @ w["moe.experts.c_proj"][e]
            out[n] += weight * (y + (w["moe.experts.proj_bias"][e, 0] if c["bias"] else 0.0))
    return out


def forward(ids, weights, c):
    x = weights["token_emb.weight"][ids] + weights["position_emb.weight"][: len(ids)]
    for i in range(c["num_layers"]):
        prefix = f"transformer_blocks.{i}."
        w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        x = x + attention(norm(x, w, "norm1"), w, c)
        y = norm(x, w, "norm2")
        dense = lambda y: linear(gelu_tanh(linear(y, w, "moe.layers.0")), w, "moe.layers.2")
        x = x + (mixture(y, w, c) if is_moe(c, i) else dense(y))
    return norm(x, weights, "final_norm") @ weights["out_head.weight"].T


def main(folder, logits, ids):
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    weights = load_strictly(os.path.join(folder, "model.safetensors"), config)
    ours = load_file(logits)["logits"]
    want = forward([int(i) for i in ids.split(",")], weights, config)
    assert ours.shape == want.shape, f"logits {ours.shape} instead of {want.shape}"
    off = float(np.abs(ours - want).max())
    assert off <= BOUND, f"logits off by {off}"
    print(f"{len(weights)} tensors by name and shape; logits off by at most {off:.1e}")


main(*sys.argv[1:])
