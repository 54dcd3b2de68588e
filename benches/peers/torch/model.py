"""The PARAM model in PyTorch: modules and parameters under the names of its checkpoints (reference/MODEL.md of the design).

Deterministic unless asked for noise. `dispatch` says how tokens reach experts: "gather" (nothing is dropped; what anyone
would write for speed), "grouped" (the same with grouped_mm, without waiting for the host) or "capacity" (the reference's one-hot
dispatch with its capacity rule).
"""

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The keys of a checkpoint's `config.json`, or of a preset's `.toml`, that bear on the model."""

    vocab_size: int
    context_length: int
    emb_dim: int
    num_heads: int
    num_layers: int
    top_k: int
    num_experts: int
    stride: int
    moe_phase: int = 0
    dropout_rate: float = 0.0
    qkv_bias: bool = False
    bias: bool = True
    use_noisy_top_k: bool = True
    use_aux_loss: bool = True
    use_router_z_loss: bool = True
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    train_capacity: float = 1.25
    eval_capacity: float = 2.0
    min_capacity: int = 4
    use_switch_tfm_init: bool = True
    switch_tfm_init_scale: float = 1.0
    norm_eps: float = 1e-5
    expert_activation: str = "gelu_erf"
    dense_activation: str = "gelu_tanh"

    @classmethod
    def load(cls, path):
        path, known = Path(path), {field.name for field in fields(cls)}
        parse = tomllib.loads if path.suffix == ".toml" else json.loads
        return cls(**{key: value for key, value in parse(path.read_text()).items() if key in known})

    def is_moe(self, layer):
        return self.num_experts > 1 and layer % self.stride == self.moe_phase


def gelu(name):
    return nn.GELU(approximate={"gelu_erf": "none", "gelu_tanh": "tanh"}[name])


class LayerNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.scale = nn.Parameter(torch.ones(config.emb_dim))
        self.shift = nn.Parameter(torch.zeros(config.emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.emb_dim
        self.n_head = config.num_heads
        self.dropout = config.dropout_rate
        self.W_query = nn.Linear(d, d, bias=config.qkv_bias)
        self.W_key = nn.Linear(d, d, bias=config.qkv_bias)
        self.W_value = nn.Linear(d, d, bias=config.qkv_bias)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x, pad_bias=None, cache=None):  # [B, T, d]
        B, T, d = x.shape
        q, k, v = (w(x).view(B, T, self.n_head, -1).transpose(1, 2) for w in (self.W_query, self.W_key, self.W_value))
        if cache is not None:
            k, v = cache.append(k, v)
        n_past = k.shape[2] - T
        mask = pad_bias
        if n_past > 0 and T > 1 or pad_bias is not None:
            # The fused causal mask assumes no past; one token alone sees everything.
            open_ = torch.ones(T, n_past + T, dtype=torch.bool, device=x.device).tril(n_past)
            causal = torch.zeros(T, n_past + T, dtype=x.dtype, device=x.device).masked_fill(~open_, float("-inf"))
            mask = causal if pad_bias is None else causal + pad_bias
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, d))


class Router(nn.Module):
    """Chooses experts in float32, whatever the rest computes in."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.top_k
        self.w_g = nn.Linear(config.emb_dim, config.num_experts, bias=False)
        if config.use_noisy_top_k:
            self.w_noise = nn.Linear(config.emb_dim, config.num_experts, bias=False)

    def forward(self, x, noise=None):  # [N, d], standard normal [N, E] or None
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            logits = F.linear(x, self.w_g.weight.float())  # [N, E]
            if noise is not None:
                logits = logits + F.softplus(F.linear(x, self.w_noise.weight.float())) * noise
            best, experts = logits.topk(self.top_k)  # [N, k]
            return logits, experts, best.softmax(-1)


class Experts(nn.Module):
    """Stacked two-layer experts, input-major."""

    def __init__(self, config):
        super().__init__()
        E, d = config.num_experts, config.emb_dim
        self.c_fc = nn.Parameter(torch.empty(E, d, 4 * d))
        self.c_proj = nn.Parameter(torch.empty(E, 4 * d, d))
        if config.bias:
            self.fc_bias = nn.Parameter(torch.zeros(E, 1, 4 * d))
            self.proj_bias = nn.Parameter(torch.zeros(E, 1, d))
        self.has_bias = config.bias
        self.activation = gelu(config.expert_activation)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x):  # [E, C, d]
        y = torch.bmm(x, self.c_fc)
        y = self.activation(y + self.fc_bias if self.has_bias else y)
        y = torch.bmm(y, self.c_proj)
        return self.dropout(y + self.proj_bias if self.has_bias else y)

    def each(self, parts):
        """Each expert on its own rows, [n, d] of any n; the results one after the other. Matrices by unbind, because the
        gradient of `c_fc[e]` would be as large as that of `c_fc`."""
        biases = (self.fc_bias.unbind(), self.proj_bias.unbind()) if self.has_bias else ([0.0] * len(parts),) * 2
        results = []
        for x, fc, proj, fc_bias, proj_bias in zip(parts, self.c_fc.unbind(), self.c_proj.unbind(), *biases):
            if x.shape[0] > 0:
                results.append(self.dropout(self.activation(x @ fc + fc_bias) @ proj + proj_bias))
        return torch.cat(results)

    def grouped(self, x, one_hot):
        """Each expert on its own rows of x [n, d], which are in the experts' order: one_hot [n, E]."""
        # Autocast does not know grouped_mm. Biases by a product, whose gradient is one too.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ends, one_hot = one_hot.sum(0).cumsum(0).to(torch.int32), one_hot.to(dtype)
        y = F.grouped_mm(x.to(dtype), self.c_fc.to(dtype), offs=ends)
        y = self.activation(y + one_hot @ self.fc_bias.squeeze(1) if self.has_bias else y)
        y = F.grouped_mm(y, self.c_proj.to(dtype), offs=ends)
        return self.dropout(y + one_hot @ self.proj_bias.squeeze(1) if self.has_bias else y)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x, dispatch="gather", noise=None):  # [B, T, d]
        flat = x.reshape(-1, x.shape[-1])  # [N, d]
        self.logits, self.chosen, weights = self.router(flat, noise)
        return getattr(self, dispatch)(flat, self.chosen, weights).view_as(x)

    def gather(self, x, chosen, weights):
        """Each expert on the rows that chose it, which are brought together by sorting."""
        expert_of = chosen.flatten()  # [N k]
        order = expert_of.argsort(stable=True)
        counts = expert_of.bincount(minlength=self.config.num_experts).tolist()
        rows = order // self.config.top_k
        y = self.experts.each(x[rows].split(counts))  # [N k, d]
        y = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
        return torch.zeros_like(x).index_add(0, rows, y.to(x.dtype))

    def grouped(self, x, chosen, weights):
        """As `gather`, with sizes that never leave the device."""
        expert_of, order = chosen.flatten().sort(stable=True)  # [N k]
        one_hot = F.one_hot(expert_of, self.config.num_experts)  # [N k, E]
        rows = order // self.config.top_k
        y = self.experts.grouped(x.index_select(0, rows), one_hot)  # [N k, d]
        y = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
        return torch.zeros_like(x).index_add(0, rows, y.to(x.dtype))

    def capacity(self, x, chosen, weights):
        """Queues of limited length, filled with all first choices, then all second ones; dispatch by one-hot products."""
        config, (N, E) = self.config, self.logits.shape
        cap = int(config.top_k * (config.train_capacity if self.training else config.eval_capacity) * N / E)
        cap = max(cap + cap % 2, config.min_capacity)
        one_hot = F.one_hot(chosen.T, E)  # [k, N, E], slot-major
        rank = (one_hot.reshape(-1, E).cumsum(0) - 1).view(-1, N, E)
        rank = (rank * one_hot).sum(-1)  # [k, N]
        places = torch.arange(cap, device=x.device)
        # One-hot over places is all zero where the rank is beyond the last: such pairs are dropped.
        places = (rank.unsqueeze(-1) == places).to(x.dtype)  # [k, N, cap]
        combine = torch.einsum("kn,kne,knc->nec", weights.T.to(x.dtype), one_hot.to(x.dtype), places)  # [N, E, cap]
        dispatched = torch.einsum("nec,nd->ecd", (combine != 0).to(x.dtype), x)
        return combine.view(N, -1) @ self.experts(dispatched).view(E * cap, -1)

    def losses(self):
        """Load balance and z of the last forward pass, before weighting."""
        logits, E = self.logits, self.config.num_experts
        kept = torch.full_like(logits, float("-inf")).scatter(1, self.chosen, logits.gather(1, self.chosen))
        share = F.one_hot(self.chosen, E).sum(1).float().mean(0)  # [E], sums to k
        balance = E * (kept.softmax(-1).mean(0) * share).sum()
        return balance, logits.logsumexp(-1).square().mean()


class Dense(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.emb_dim
        self.layers = nn.Sequential(nn.Linear(d, 4 * d), gelu(config.dense_activation), nn.Linear(4 * d, d))

    def forward(self, x):
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = LayerNorm(config)
        self.mhaunit = Attention(config)
        self.norm2 = LayerNorm(config)
        self.moe = MoE(config) if config.is_moe(layer) else Dense(config)
        self.drop = nn.Dropout(config.dropout_rate)

    def forward(self, x, pad_bias=None, cache=None, **moe):
        x = x + self.drop(self.mhaunit(self.norm1(x), pad_bias, cache))
        is_moe = isinstance(self.moe, MoE)
        return x + self.drop(self.moe(self.norm2(x), **moe) if is_moe else self.moe(self.norm2(x)))


class KvCache:
    """Keys and values of one block: [B, n_head, C, head_dim]."""

    def __init__(self, config, batch, like):
        shape = (batch, config.num_heads, config.context_length, config.emb_dim // config.num_heads)
        self.k, self.v, self.n = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, k, v):
        end = self.n + k.shape[2]
        self.k[:, :, self.n : end], self.v[:, :, self.n : end], self.n = k, v, end
        return self.k[:, :, :end], self.v[:, :, :end]


class Param(nn.Module):
    def __init__(self, config, dispatch="gather"):
        super().__init__()
        self.config, self.dispatch = config, dispatch
        self.token_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.position_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop = nn.Dropout(config.dropout_rate)
        self.transformer_blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = LayerNorm(config)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.out_head.weight = self.token_emb.weight

    def forward(self, ids, attention_mask=None, caches=None, last_only=False, noise=None):
        """Logits [B, T, V], or of the last position [B, 1, V]. `noise(N, E)` gives each router's standard normal noise in
        turn, such as torch.randn; None for none."""
        n_past = caches[0].n if caches else 0
        positions = torch.arange(n_past, n_past + ids.shape[1], device=ids.device)
        x = self.drop(self.token_emb(ids) + self.position_emb(positions))
        pad_bias = None
        if attention_mask is not None:
            pad_bias = ((1 - attention_mask.to(x.dtype)) * -1e9)[:, None, None]  # [B, 1, 1, T]
        for i, block in enumerate(self.transformer_blocks):
            moe = {"dispatch": self.dispatch}
            if noise is not None and self.config.use_noisy_top_k and isinstance(block.moe, MoE):
                moe["noise"] = noise(ids.numel(), self.config.num_experts).to(ids.device)
            x = block(x, pad_bias, caches[i] if caches else None, **moe)
        if last_only:
            x = x[:, -1:]
        return self.out_head(self.final_norm(x))

    def loss(self, ids, attention_mask=None, noise=None):
        """Cross-entropy of the next token plus the weighted router losses, summed over blocks; padding is not predicted."""
        logits = self(ids, attention_mask, noise=noise)
        targets = ids[:, 1:] if attention_mask is None else ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
        # The last position has no target: ignored, since cutting it off would copy all logits.
        targets = F.pad(targets, (0, 1), value=-100)
        return self.cross_entropy(logits, targets) + self.router_loss()

    @staticmethod
    def cross_entropy(logits, targets):
        """Of logits [B, T, V] and targets [B, T], -100 for none."""
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))

    def router_loss(self):
        """The weighted losses of all routers in the last forward pass."""
        loss = 0.0
        # As in the reference, the z loss counts only together with the load balance.
        if self.config.use_aux_loss:
            for block in self.transformer_blocks:
                if isinstance(block.moe, MoE):
                    balance, z = block.moe.losses()
                    z_weight = self.config.router_z_loss_weight if self.config.use_router_z_loss else 0.0
                    loss = loss + self.config.aux_loss_weight * balance + z_weight * z
        return loss

    @torch.no_grad()
    def initialize(self):
        """The reference's initialisation: truncated normals by fan-in, residual scaling of the experts' second matrices."""

        def linear(weight, fan_in):
            std = (self.config.switch_tfm_init_scale / fan_in) ** 0.5
            if self.config.use_switch_tfm_init:
                nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)
            else:
                nn.init.normal_(weight, 0.0, 0.02)

        nn.init.normal_(self.position_emb.weight, 0.0, 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                linear(module.weight, module.in_features)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                linear(module.c_fc, self.config.emb_dim)
                nn.init.normal_(module.c_proj, 0.0, 0.02 / (2 * self.config.num_layers) ** 0.5)

    def new_caches(self, batch=1):
        return [KvCache(self.config, batch, self.token_emb.weight) for _ in self.transformer_blocks]

    @classmethod
    def load(cls, folder, dispatch="gather"):
        """A checkpoint: `model.safetensors` with `config.json` beside it."""
        from safetensors.torch import load_file

        model = cls(Config.load(Path(folder) / "config.json"), dispatch)
        tensors = {k: v for k, v in load_file(Path(folder) / "model.safetensors").items() if not k.endswith(".mask")}
        model.load_state_dict(tensors)  # strict: every name and shape must fit
        return model.eval()
