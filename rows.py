"""The one idea that carries the speed: one prompt, many branches.

All rollouts of a prompt, both segments of each and the teacher's response share the prompt with its images, so one forward
computes the *row*

    [ prompt | branch 1 | branch 2 | ... ]

in which a branch attends to the prompt and to itself, never to a sibling, and its positions continue from the
prompt's last M-RoPE position.  It is exact: in float32 log-probs and gradients equal those of separate sequences.
Several rows are packed into one forward without padding; `Layout` tells attention who sees whom.
"""

from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass
class Prompt:
    """One encoded prompt. P tokens; image patches as the Qwen image processor gives them."""

    input_ids: torch.Tensor  # [P]
    position_ids: torch.Tensor  # [3, P]  temporal, height, width
    pixel_values: torch.Tensor | None  # [patches, channels * 2 * 16 * 16]
    image_grid_thw: torch.Tensor | None  # [images, 3]  in patches

    @property
    def next_position(self):
        return int(self.position_ids.max()) + 1


# What a rank that has nothing left to compute runs, times 0, while the others go on: all must take part in the collectives.
IDLE = Prompt(torch.zeros(1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long), None, None)


# ------------------------------------------------------------------------------------------------------------------ rows
class Layout:
    """Who attends to whom in a pack of T tokens: S segments that tile the pack in order; a segment sees its prefix (the
    prompt of a branch, nothing for a prompt) and, causally, itself. Each attention backend reads its own form of it.

    segments: list of (start, length, prefix_start, prefix_length)."""

    def __init__(self, segments, device="cpu"):
        self.start, self.length, self.prefix_start, self.prefix = torch.tensor(segments, device=device).T
        self.longest = max(length for _, length, _, _ in segments)
        self.longest_keys = max(length + prefix for _, length, _, prefix in segments)

    def keys(self, k):
        """Token index of the k-th key of each segment, prefix first; k [1, Lk] or matching; 0 beyond the last."""
        start, length, prefix_start, prefix = (x[:, None] for x in (self.start, self.length, self.prefix_start, self.prefix))
        own = torch.where(k < prefix + length, start + k - prefix, 0)
        return torch.where(k < prefix, prefix_start + k, own)

    @cached_property
    def padded(self):
        """For SDPA, prompts and branches apart because their lengths differ: up to two (query [S, Lq] and key [S, Lk] token
        indices, real [S, Lq], mask [S, 1, Lq, Lk]). The padding exists here only, in index form; the model computes none."""
        parts, keys = [], self.prefix + self.length
        for chosen in (self.prefix == 0, self.prefix > 0):
            if not chosen.any():
                continue
            start, length, prefix = (x[chosen][:, None] for x in (self.start, self.length, self.prefix))
            q = torch.arange(int(length.max()), device=length.device)[None]
            k = torch.arange(int(keys[chosen].max()), device=length.device)[None]
            real = q < length
            # causal, aligned bottom-right: the query at offset q of its segment sees the prefix and the segment up to
            # itself; padded queries see key 0, so that no softmax is empty
            mask = torch.where(real[:, :, None], k[:, None] <= (prefix + q)[:, :, None], k[:, None] == 0)
            parts.append((torch.where(real, start + q, 0), self.keys(k)[chosen], real, mask[:, None]))
        return parts

    @cached_property
    def ragged(self):
        """For variable-length kernels: cu_q, cu_k [S + 1] int32, and the token index of every key, segment by segment."""
        k = torch.arange(self.longest_keys, device=self.length.device)[None]
        key = self.keys(k)[k < (self.prefix + self.length)[:, None]]
        cu_q, cu_k = (F.pad(n.cumsum(0), (1, 0)).int() for n in (self.length, self.prefix + self.length))
        return cu_q, cu_k, key

    @cached_property
    def block_mask(self):
        """For flex attention: a token sees its own segment up to itself, and the segment that is its prefix."""
        total = int(self.length.sum())
        segment = torch.repeat_interleave(torch.arange(len(self.length), device=self.length.device), self.length)
        parent = torch.searchsorted(self.start.contiguous(), self.prefix_start.contiguous(), right=True) - 1
        parent = torch.where(self.prefix > 0, parent, -1)[segment]
        sees = lambda b, h, q, k: ((segment[q] == segment[k]) & (k <= q)) | (parent[q] == segment[k])
        return create_block_mask(sees, None, None, total, total, device=self.length.device)


def without_layout(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Plain SDPA for the vision tower and for decoding, where the heads that share a key become queries of one head."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    q = query.view(len(query), key.shape[1], -1, query.shape[-1])  # [S, Hkv, H / Hkv, D]
    return F.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=scaling).flatten(1, 2)[:, None], None


def sdpa_rows(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of packed rows, [1, H, T, D] -> [1, T, H, D]."""
    if layout is None or not module.is_causal:
        return without_layout(module, query, key, value, attention_mask, scaling, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    groups, out = query.shape[1] // key.shape[1], torch.empty_like(q)
    for q_index, k_index, real, mask in layout.padded:
        keys, values = (x[k_index].transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k, v))  # [S, H, Lk, D]
        part = F.scaled_dot_product_attention(q[q_index].transpose(1, 2), keys, values, attn_mask=mask, scale=scaling)
        out[q_index[real]] = part.transpose(1, 2)[real]
    return out[None], None


def varlen_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    """Variable-length attention on CUDA, [Tq, H, D] and [Tk, Hkv, D]; causal is aligned bottom-right. flash-attn where it
    is installed, else torch's own kernel."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)
        gqa = q.shape[1] != k.shape[1]
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, enable_gqa=gqa)
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal)


def flash_rows(module, query, key, value, attention_mask, scaling=None, layout=None, cu_seq_lens_q=None, max_length_q=None,
               **kwargs):  # fmt: skip
    """`sdpa_rows` without padding and without a mask: one variable-length call, keys gathered per branch. The vision
    tower comes with its own cu_seq_lens_q; decoding has neither and takes SDPA."""
    if layout is None and cu_seq_lens_q is None:
        return without_layout(module, query, key, value, attention_mask, scaling)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if cu_seq_lens_q is not None:
        cu_q = cu_seq_lens_q.int()
        return varlen_kernel(q, k, v, cu_q, cu_q, max_length_q, max_length_q, scaling, False)[None], None
    cu_q, cu_k, index = layout.ragged
    out = varlen_kernel(q, k[index], v[index], cu_q, cu_k, layout.longest, layout.longest_keys, scaling, True)
    return out[None], None


def flex_rows(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """`sdpa_rows` through flex attention: a block mask instead of gathered keys; compiled on CUDA."""
    if layout is None or not module.is_causal:
        return without_layout(module, query, key, value, attention_mask, scaling, **kwargs)
    attend = compiled_flex() if query.is_cuda else flex_attention
    gqa = query.shape[1] != key.shape[1]
    return attend(query, key, value, block_mask=layout.block_mask, scale=scaling, enable_gqa=gqa).transpose(1, 2), None


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=True)


ATTENTION = {"sdpa": "rows", "flash": "rows_flash", "flex": "rows_flex"}  # --attn -> transformers' attn_implementation
for _name, _function in zip(ATTENTION.values(), (sdpa_rows, flash_rows, flex_rows)):
    AttentionInterface.register(_name, _function)


def set_attention(model, name):
    """Choose sdpa, flash or flex for the language model and the vision tower of a loaded Qwen3-VL, with or without its head
    -> the model. (Not through from_pretrained: there a name with 'flash' in it makes transformers look for a kernel of its
    own.)"""
    backbone = getattr(model, "model", model)
    for part in (backbone.language_model, backbone.visual):
        part.config._attn_implementation = ATTENTION[name]
    return model


@dataclass
class Pack:
    """Several rows in one forward: prompts first, then branches in the order given. T tokens, n target tokens."""

    inputs: dict  # input_ids [1, T], position_ids [3, 1, T], pixel_values, image_grid_thw, layout
    source: torch.Tensor  # [n]  index of the token whose hidden state predicts the target
    targets: torch.Tensor  # [n]  every token of every branch
    lengths: list[int]  # tokens of each branch
    ends: torch.Tensor  # [branches]  index of the last token of each branch
    prompt_tokens: int


def pack_rows(prompts, branches, device="cpu"):
    """prompts: list of Prompt; branches: list of (index into prompts, token ids) -> Pack."""
    ids, positions, segments, at, starts = [], [], [], 0, []
    for prompt in prompts:
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        starts.append(at)
        segments.append((at, len(prompt.input_ids), 0, 0))
        at += len(prompt.input_ids)
    prompt_tokens, source, nexts = at, [], [prompt.next_position for prompt in prompts]
    for p, branch in branches:
        branch = torch.as_tensor(branch)
        ids.append(branch)
        positions.append((torch.arange(len(branch)) + nexts[p]).expand(3, -1))
        source.append(torch.arange(at - 1, at + len(branch) - 1))
        source[-1][0] = starts[p] + len(prompts[p].input_ids) - 1  # the first token is predicted by the prompt's last
        segments.append((at, len(branch), starts[p], len(prompts[p].input_ids)))
        at += len(branch)
    images = [prompt for prompt in prompts if prompt.pixel_values is not None]
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions, dim=1)[:, None].to(device),
        "pixel_values": torch.cat([p.pixel_values for p in images]).to(device) if images else None,
        "image_grid_thw": torch.cat([p.image_grid_thw for p in images]).to(device) if images else None,
        "layout": Layout(segments, device),
    }
    lengths = [len(branch) for _, branch in branches]
    source = torch.cat(source) if source else torch.empty(0, dtype=torch.long)
    targets = torch.cat(ids[len(prompts) :]) if branches else torch.empty(0, dtype=torch.long)
    ends = torch.tensor([prompt_tokens - 1 + end for end in np.cumsum(lengths)], dtype=torch.long)
    return Pack(inputs, source.to(device), targets.to(device), lengths, ends.to(device), prompt_tokens)


def split_rows(rows, max_tokens):
    """Group rows into packs of at most `max_tokens` tokens.

    rows: list of (tokens that every pack of the row repeats: its prompt, [tokens of each branch]). A row too long for one
    pack is split; a branch that is over the budget by itself gets its own pack.
    Yields lists of (row index, [branch indices]).
    """
    pack, used = [], 0
    for r, (fixed, lengths) in enumerate(rows):
        opened = False
        for b, length in enumerate(lengths):
            cost = length + (0 if opened else fixed)
            if pack and used + cost > max_tokens:
                yield pack
                pack, used, opened = [], 0, False
                cost = length + fixed
            if not opened:
                pack.append((r, []))
                opened = True
            pack[-1][1].append(b)
            used += cost
    if pack:
        yield pack


def hidden_states(backbone, inputs):
    """Final hidden states [T, D] of a pack. A pack without pictures still runs the vision tower, on a blank that adds
    exactly zero: under FSDP every rank must take part in the tower's collectives, whatever its examples hold."""
    if inputs["pixel_values"] is None:
        vision = backbone.config.vision_config
        side = vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        weight = next(backbone.visual.parameters())
        blank = torch.zeros(side**2, size, device=weight.device, dtype=weight.dtype)
        grid = torch.tensor([[1, side, side]], device=weight.device)
        features = backbone.visual(blank, grid_thw=grid)
        nothing = sum(f.sum() for f in (features.pooler_output, *features.deepstack_features)) * 0
        inputs = {**inputs, "inputs_embeds": backbone.get_input_embeddings()(inputs["input_ids"]) + nothing}
        inputs["input_ids"] = None
    return backbone(**inputs, use_cache=False).last_hidden_state[0]


# ------------------------------------------------------------------------------------------------------------- log-probs
def banned_ids(config):
    """Tokens that a policy must never emit: the next forward would look for pixels that are not there."""
    return [config.image_token_id, config.video_token_id, config.vision_start_token_id]


def masked_logits(lm_head, hidden, banned, temperature):
    """float32 logits [n, V] with the banned tokens at the lowest finite value (finite: 0 * it stays 0 in the entropy)."""
    logits = lm_head(hidden).float() / temperature
    return logits.index_fill(-1, torch.tensor(banned, device=logits.device), torch.finfo(torch.float32).min)


def head_chunk(lm_head, hidden, targets, banned, temperature):
    logits = masked_logits(lm_head, hidden, banned, temperature)
    log_z = logits.logsumexp(-1)
    logp = logits.gather(-1, targets[:, None])[:, 0] - log_z
    with torch.no_grad():
        entropy = log_z - ((logits - log_z[:, None]).exp() * logits).sum(-1)
    return logp, entropy


def target_logprobs(model, pack, temperature=1.0, chunk=256):
    """Log-probs [n] and entropies [n, no gradient] of all branch tokens of a pack, float32.

    The head runs on target positions only, `chunk` at a time, and is recomputed in backward, so that memory never
    holds a (tokens x vocabulary) tensor."""
    hidden = hidden_states(model.model, pack.inputs)[pack.source]
    banned, parts = banned_ids(model.config), []
    for h, t in zip(hidden.split(chunk), pack.targets.split(chunk)):
        parts.append(checkpoint(head_chunk, model.lm_head, h, t, banned, temperature, use_reentrant=False))
    return tuple(torch.cat(part) for part in zip(*parts))


def pack_logprobs(model, pack, **kwargs):
    """`target_logprobs` through FSDP: sharded models carry it as a registered forward method (see runtime.shard)."""
    return getattr(model, "target_logprobs", partial(target_logprobs, model))(pack, **kwargs)


def branch_logprobs(model, prompt, branches):
    """Log-probs of every token of every branch of one prompt, as one shared-prompt row: list of [L_i], differentiable."""
    pack = pack_rows([prompt], [(0, branch) for branch in branches], model.device)
    return list(pack_logprobs(model, pack)[0].split(pack.lengths))
