"""The model as someone would write it who wants PyTorch's best speed on a GPU: static shapes throughout, so that a step of decoding
is captured as a CUDA graph; no waiting for the host; matrices of one input beside each other, experts' matrices by rows.

How tokens reach experts (`dispatch`): "chosen" multiplies with the matrices that the one token chose; "all" runs every expert on every
token and weighs what was not chosen with zero, which costs nothing where reading the weights is what takes time; "grouped" sorts by
expert and multiplies by grouped_mm; "loop" sorts, and multiplies expert by expert with sizes the host waits for.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MoE


class FastMoE(nn.Module):
    def __init__(self, moe):
        super().__init__()
        experts, config = moe.experts, moe.config
        self.top_k, self.n_expert = config.top_k, config.num_experts
        self.gelu = experts.activation
        self.register_buffer("router", moe.router.w_g.weight.detach().float())  # [E, d]
        self.register_buffer("up", experts.c_fc.detach().transpose(1, 2).contiguous())  # [E, 4d, d]
        self.register_buffer("down", experts.c_proj.detach().transpose(1, 2).contiguous())  # [E, d, 4d]
        biases = (experts.fc_bias, experts.proj_bias) if experts.has_bias else (self.up.new_zeros(1), self.down.new_zeros(1))
        E = self.n_expert
        self.register_buffer("up_bias", biases[0].detach().reshape(-1).expand(E * self.up.shape[1]).view(E, -1).contiguous())
        self.register_buffer("down_bias", biases[1].detach().reshape(-1).expand(E * self.down.shape[1]).view(E, -1).contiguous())

    def forward(self, x, dispatch):  # [N, d]
        best, chosen = F.linear(x.float(), self.router).topk(self.top_k)  # [N, k]
        return getattr(self, dispatch)(x, chosen, best.softmax(-1))

    def chosen(self, x, chosen, weights):
        chosen = chosen[0]
        # Products and sums, which the compiler fuses with the gathering; without it as products of matrices and vectors.
        if torch.compiler.is_compiling():
            h = self.gelu((self.up[chosen] * x).sum(-1) + self.up_bias[chosen])  # [k, 4d]
            y = (self.down[chosen] * h.unsqueeze(1)).sum(-1)
        else:
            h = self.gelu(torch.matmul(self.up[chosen], x[0]) + self.up_bias[chosen])
            y = torch.bmm(self.down[chosen], h.unsqueeze(-1)).squeeze(-1)
        y = y + self.down_bias[chosen]  # [k, d]
        return (y * weights[0].to(y.dtype).unsqueeze(1)).sum(0, keepdim=True)

    def all(self, x, chosen, weights):
        E = self.n_expert
        h = torch.baddbmm(self.up_bias.unsqueeze(1), x.expand(E, *x.shape), self.up.transpose(1, 2))
        y = torch.baddbmm(self.down_bias.unsqueeze(1), self.gelu(h), self.down.transpose(1, 2))  # [E, N, d]
        weights = torch.zeros(x.shape[0], E, device=x.device).scatter(1, chosen, weights)
        return torch.einsum("ne,end->nd", weights.to(y.dtype), y)

    def sorted(self, chosen):
        """Of the pairs of token and expert, ordered by expert: the tokens, the experts, the order."""
        expert_of, order = chosen.flatten().sort(stable=True)
        return order // self.top_k, expert_of, order

    def combine(self, x, y, weights, order):
        """y [N k, d] ordered by expert, summed over each token's experts."""
        y = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
        back = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
        return y[back].view(x.shape[0], self.top_k, -1).sum(1)

    def grouped(self, x, chosen, weights):
        tokens, expert_of, order = self.sorted(chosen)
        experts = torch.arange(self.n_expert, device=x.device)
        ends = torch.searchsorted(expert_of, experts, right=True).to(torch.int32)  # [E]
        h = F.grouped_mm(x[tokens], self.up.transpose(1, 2), offs=ends)
        h = self.gelu(h + self.up_bias[expert_of])
        y = F.grouped_mm(h, self.down.transpose(1, 2), offs=ends) + self.down_bias[expert_of]
        return self.combine(x, y, weights, order)

    def loop(self, x, chosen, weights):
        tokens, expert_of, order = self.sorted(chosen)
        counts = expert_of.bincount(minlength=self.n_expert).tolist()
        parts = []
        for e, rows in enumerate(x[tokens].split(counts)):
            h = self.gelu(F.linear(rows, self.up[e], self.up_bias[e]))
            parts.append(F.linear(h, self.down[e], self.down_bias[e]))
        return self.combine(x, torch.cat(parts), weights, order)


class FastBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        attention = block.mhaunit
        self.n_head = attention.n_head
        self.norm1, self.norm2, self.out_proj = block.norm1, block.norm2, attention.out_proj
        parts = (attention.W_query, attention.W_key, attention.W_value)
        self.register_buffer("qkv", torch.cat([w.weight.detach() for w in parts]))
        bias = None if parts[0].bias is None else torch.cat([w.bias.detach() for w in parts])
        self.register_buffer("qkv_bias", bias)
        self.is_moe = isinstance(block.moe, MoE)
        self.ff = FastMoE(block.moe) if self.is_moe else block.moe

    def forward(self, x, keys, values, position, mask, dispatch):  # x [B, T, d]; caches [B, H, C, head_dim]
        B, T, d = x.shape
        qkv = F.linear(self.norm1(x), self.qkv, self.qkv_bias)
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        if mask is None:  # from an empty cache
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, keys, values, mask)
        x = x + self.out_proj(y.transpose(1, 2).reshape(B, T, d))
        h = self.norm2(x)
        h = self.ff(h.view(B * T, d), dispatch).view(B, T, d) if self.is_moe else self.ff(h)
        return x + h


class Fast(nn.Module):
    """Made from a Param, whose weights it takes or copies."""

    def __init__(self, param):
        super().__init__()
        self.config = param.config
        self.token_emb, self.position_emb = param.token_emb, param.position_emb
        self.blocks = nn.ModuleList(FastBlock(block) for block in param.transformer_blocks)
        self.final_norm, self.out_head = param.final_norm, param.out_head

    def new_cache(self, batch, n_ctx):
        """Keys, then values: [L, B, H, C, head_dim] each."""
        c = self.config
        shape = (c.num_layers, batch, c.num_heads, n_ctx, c.emb_dim // c.num_heads)
        return self.token_emb.weight.new_zeros(shape), self.token_emb.weight.new_zeros(shape)

    def forward(self, ids, position, cache, dispatch, prefill=False):
        """Logits [B, V] of the last of the tokens [B, T] at the positions [T]: a prompt from the beginning, or one token each."""
        keys, values = cache
        x = self.token_emb(ids) + self.position_emb(position)
        mask = None
        if not prefill:
            mask = (torch.arange(keys.shape[3], device=ids.device) <= position).unsqueeze(0)  # [1, C]
        for i, block in enumerate(self.blocks):
            x = block(x, keys[i], values[i], position, mask, dispatch)
        return self.out_head(self.final_norm(x[:, -1]))

    def step(self, ids, position, cache, dispatch, likeliest):
        """Decodes a token of each sequence: of ids [B, n] those at position [1], which becomes one more. Their likeliest successors go
        to likeliest [B]."""
        logits = self(ids.index_select(1, position), position, cache, dispatch)
        likeliest.copy_(logits.argmax(-1))
        position.add_(1)
