"""The one idea that carries the speed: one prompt, many branches.

All rollouts of a prompt, both segments of each and the teacher's response share the prompt with
its images, so one forward computes the *row*

    [ prompt | branch 1 | branch 2 | ... ]

in which a branch attends to the prompt and to itself, never to a sibling, and its positions
continue from the prompt's last M-RoPE position. It is exact: in float32 log-probs and gradients
equal those of separate sequences. Several rows are packed into one forward without padding;
`Layout` tells attention who sees whom.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


@dataclass
class Prompt:
    """One encoded prompt. P tokens; image patches as the Qwen image processor gives them."""

    input_ids: torch.Tensor  # [P]
    position_ids: torch.Tensor  # [3, P]  temporal, height, width
    pixel_values: torch.Tensor | None  # [patches, channels * 2 * 16 * 16]
    image_grid_thw: torch.Tensor | None  # [images, 3]  in patches

    @cached_property
    def next_position(self):
        return int(self.position_ids.max()) + 1


# What a rank without work runs, times 0, while others go on: all take part in the collectives.
IDLE = Prompt(torch.zeros(1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long), None, None)


# -------------------------------------------------------------------------------------------- rows
@dataclass
class Pack:
    """Several rows in one forward: prompts first, then branches in the order given. T tokens, n of
    them in branches: the targets. `pack_rows` shows an example."""

    inputs: dict  # input_ids [1, T], position_ids [3, 1, T], pixel_values, image_grid_thw, layout
    source: torch.Tensor  # [n]  index of the token whose hidden state predicts the target
    targets: torch.Tensor  # [n]  every token of every branch
    lengths: list[int]  # tokens of each branch
    ends: torch.Tensor  # [branches]  index of the last token of each branch
    prompt_tokens: int


def pack_rows(prompts, branches, device="cpu"):
    """prompts: list of Prompt; branches: list of (index into prompts, token ids) -> Pack. Raises
    ValueError for a branch without a token.

    Two prompts p, q and three branches, (0, [a, A]), (1, [b, B]), (0, [c]):

        index       0   1   2   3   4   5   6   7   8   9
        input_ids   p0  p1  p2  q0  q1  a   A   b   B   c
        position    0   1   2   0   1   3   4   2   3   3      (of prompts without pictures)

        targets     a   A   b   B   c
        source      2   5   4   7   2       a branch's first token is predicted by its prompt's last
        ends        6   8   9               A, B and c: where a discriminator's head reads
        lengths     2   2   1
    """
    ids, positions, segments, at = [], [], [], 0
    for prompt in prompts:
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        segments.append(Segment(at, len(prompt.input_ids), 0, 0))
        at += len(prompt.input_ids)
    prompt_tokens, source, ends = at, [], []
    for p, branch in branches:
        if not len(branch):
            raise ValueError(f"a branch of prompt {p} has no token")
        branch = torch.as_tensor(branch)
        ids.append(branch)
        own = prompts[p].next_position + torch.arange(len(branch))
        positions.append(own.expand(3, -1))
        prefix = segments[p]
        segments.append(Segment(at, len(branch), prefix.start, prefix.length))
        source += [prefix.start + prefix.length - 1, *range(at, at + len(branch) - 1)]
        at += len(branch)
        ends.append(at - 1)
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions, dim=1)[:, None].to(device),
        "pixel_values": torch.cat(pixels).to(device) if pixels else None,
        "image_grid_thw": torch.cat(grids).to(device) if grids else None,
        "layout": Layout(segments, device),
    }
    return Pack(
        inputs=inputs,
        source=torch.tensor(source, dtype=torch.long, device=device),
        targets=inputs["input_ids"][0, prompt_tokens:],
        lengths=[len(branch) for _, branch in branches],
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        prompt_tokens=prompt_tokens,
    )


def split_rows(rows, max_tokens):
    """Group rows into packs of at most `max_tokens` tokens.

    rows: list of (tokens that every pack of the row repeats: its prompt, [tokens of each branch]).
    A row too long for one pack is split; a branch that is over the budget by itself gets its own
    pack. Yields lists of (row index, [branch indices]).
    """
    pack, used = [], 0
    for r, (fixed, lengths) in enumerate(rows):
        for b, length in enumerate(lengths):
            opened = bool(pack) and pack[-1][0] == r  # the row has its prompt in this pack
            if pack and used + length + (0 if opened else fixed) > max_tokens:
                yield pack
                pack, used, opened = [], 0, False
            if not opened:
                pack.append((r, []))
                used += fixed
            pack[-1][1].append(b)
            used += length
    if pack:
        yield pack


# --------------------------------------------------------------------------------- who attends whom
class Segment(NamedTuple):
    """A prompt or a branch in a pack, as token indices; the prefix of a branch is its prompt."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int  # 0 for a prompt


class Padded(NamedTuple):
    """S segments for SDPA, filled up to Lq queries and Lk keys each."""

    query: torch.Tensor  # [S, Lq]  token index
    key: torch.Tensor  # [S, Lk]  token index, prefix first
    real: torch.Tensor  # [S, Lq]  False: filled up
    mask: torch.Tensor  # [S, 1, Lq, Lk]  True: is seen


class Ragged(NamedTuple):
    """S segments for a variable-length kernel; each has more keys than queries by its prefix."""

    cu_q: torch.Tensor  # [S + 1] int32
    cu_k: torch.Tensor  # [S + 1] int32
    key: torch.Tensor  # [keys]  token index of every key, segment by segment


class Layout:
    """Who attends to whom in a pack of T tokens: S segments tile the pack in order; a segment sees
    its prefix and, causally, itself. Each attention backend reads its own form of it.

    The example of `pack_rows`: prompts p and q, branches aA and c of p, bB of q.

                   p0 p1 p2 q0 q1 a  A  b  B  c       segments: list of Segment
               p0  x                                  (0, 3, 0, 0)
               p1  x  x
               p2  x  x  x
               q0           x                         (3, 2, 0, 0)
               q1           x  x
               a   x  x  x        x                   (5, 2, 0, 3)
               A   x  x  x        x  x
               b            x  x        x             (7, 2, 3, 2)
               B            x  x        x  x
               c   x  x  x                    x       (9, 1, 0, 3)
    """

    def __init__(self, segments, device="cpu"):
        columns = torch.tensor(segments, device=device).T
        self.start, self.length, self.prefix_start, self.prefix_length = columns  # each [S]
        self.longest = max(length for _, length, _, _ in segments)
        self.longest_keys = max(length + prefix for _, length, _, prefix in segments)

    def keys(self, k):
        """Token index [S, Lk] of the k-th key [1, Lk] of each segment, prefix first, 0 beyond."""
        prefix, keys = self.prefix_length[:, None], (self.prefix_length + self.length)[:, None]
        own = torch.where(k < keys, self.start[:, None] + k - prefix, 0)
        return torch.where(k < prefix, self.prefix_start[:, None] + k, own)

    @cached_property
    def padded(self):
        """Up to two Padded, prompts and branches apart because their lengths differ. The padding
        exists here only, in index form; the model computes none."""
        parts, device = [], self.length.device
        for chosen in (self.prefix_length == 0, self.prefix_length > 0):
            if not chosen.any():
                continue
            start = self.start[chosen][:, None]
            length = self.length[chosen][:, None]
            prefix = self.prefix_length[chosen][:, None]
            q = torch.arange(int(length.max()), device=device)[None]
            k = torch.arange(int((prefix + length).max()), device=device)[None]
            real = q < length
            # causal, aligned bottom-right: the query at offset q of its segment sees the prefix and
            # the segment up to itself; filled up queries see key 0, so that no softmax is empty
            seen = k[:, None] <= (prefix + q)[:, :, None]
            mask = torch.where(real[:, :, None], seen, k[:, None] == 0)
            query = torch.where(real, start + q, 0)
            parts.append(Padded(query, self.keys(k)[chosen], real, mask[:, None]))
        return parts

    @cached_property
    def ragged(self):
        keys = self.prefix_length + self.length
        k = torch.arange(self.longest_keys, device=keys.device)[None]
        cu_q, cu_k = (F.pad(n.cumsum(0), (1, 0)).int() for n in (self.length, keys))
        return Ragged(cu_q, cu_k, self.keys(k)[k < keys[:, None]])


class Paged:
    """The cache of a decode step: keys and values of S slots in a pool of pages, [layers, pages,
    page, keys' Hkv + values' Hkv, D]. table [S, n] int32: the pages of each slot, in order, then
    any. before [S]: the tokens of each; one is added, and sees all. No property is cached here, as
    torch.compile knows none."""

    def __init__(self, pool, table, before):
        self.pool, self.table, self.before, page = pool, table, before, pool.shape[2]
        last = table.gather(1, (before // page)[:, None])[:, 0]
        self.place = last * page + before % page  # [S]  of the new token in the pool
        self.longest, self.gathered = table.shape[1] * page, None
        self.used = (before + 1).int()  # [S]
        self.cu_q = torch.arange(len(table) + 1, dtype=torch.int32, device=table.device)
        self.cu_k = F.pad(self.used.cumsum(0), (1, 0)).int()  # [S + 1]

    def update(self, k, v, layer):  # called by the attention layers, [S, Hkv, 1, D]
        self.pool[layer].flatten(0, 1)[self.place] = torch.cat([k, v], dim=1)[:, :, 0]
        return k, v

    def gather(self, layer):
        """Keys and values of the slots, [S, Hkv, n * page, D] each, until the next layer's; and a
        mask [S, 1, 1, n * page] to be added to the scores, 0 where a key is seen."""
        if self.gathered is None:  # one for all layers
            self.gathered = self.pool.new_empty(self.table.numel(), *self.pool.shape[2:])
            unseen = torch.arange(self.longest, device=self.table.device) > self.before[:, None]
            mask = torch.zeros(unseen.shape, dtype=self.pool.dtype, device=unseen.device)
            self.mask = mask.masked_fill(unseen, -torch.inf)[:, None, None]
        torch.index_select(self.pool[layer], 0, self.table.flatten(), out=self.gathered)
        pages = self.gathered.view(len(self.table), self.longest, *self.pool.shape[3:])
        return *pages.transpose(1, 2).chunk(2, dim=1), self.mask


# --------------------------------------------------------------------------------------- attention
def sdpa_rows(module, query, key, value, attention_mask, scaling=None, layout=None, paged=None,
              **kwargs):  # fmt: skip
    """Attention of packed rows, [1, H, T, D] -> [1, T, H, D], or of a decode step, [S, H, 1, D] ->
    [S, 1, H, D], for which the pages of every slot are gathered."""
    if paged is not None:
        k, v, mask = paged.gather(module.layer_idx)
        # the heads that share a key become queries of one head
        q = query.view(len(query), k.shape[1], -1, query.shape[-1])  # [S, Hkv, H / Hkv, D]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.flatten(1, 2)[:, None], None
    if layout is None or not module.is_causal:  # the vision tower, an ordinary batch
        inputs = query, key, value, attention_mask
        return sdpa_attention_forward(module, *inputs, scaling=scaling, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    groups, out = query.shape[1] // key.shape[1], torch.empty_like(q)
    for part in layout.padded:
        queries = q[part.query].transpose(1, 2)  # [S, H, Lq, D]
        keys = k[part.key].transpose(1, 2).repeat_interleave(groups, dim=1)  # [S, H, Lk, D]
        values = v[part.key].transpose(1, 2).repeat_interleave(groups, dim=1)
        found = F.scaled_dot_product_attention(queries, keys, values, part.mask, scale=scaling)
        out[part.query[part.real]] = found.transpose(1, 2)[part.real]
    return out[None], None


def varlen_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, table=None, used=None):
    """Variable-length attention on CUDA, [Tq, H, D] and [Tk, Hkv, D]; causal is aligned
    bottom-right. flash-attn where it is installed, else torch's own kernel. With the `table` and
    the keys `used` of Paged, k and v are pools [pages, page, Hkv, D], and there is no gradient."""
    sizes = (cu_q, cu_k, max_q, max_k)
    if flash_attn_varlen_func is not None:
        more = {"softmax_scale": scale, "causal": causal, "block_table": table}
        return flash_attn_varlen_func(q, k, v, *sizes, **more)
    from torch.nn.attention.varlen import varlen_attn

    window, gqa = (-1, 0 if causal else -1), q.shape[1] != k.shape[-2]
    more = {"window_size": window, "enable_gqa": gqa, "block_table": table, "seqused_k": used}
    if table is not None:
        more["num_splits"] = 1  # more lose rows or give NaN: pytorch 194167, torchtitan 3235
    return varlen_attn(q, k, v, *sizes, scale=scale, **more)


def flash_rows(module, query, key, value, attention_mask, scaling=None, layout=None, paged=None,
               cu_seq_lens_q=None, max_length_q=None, **kwargs):  # fmt: skip
    """`sdpa_rows` without padding and without a mask: one variable-length call, keys gathered per
    branch; a decode step reads its pages where they are. The vision tower comes with its own
    cu_seq_lens_q; an ordinary batch has nothing."""
    if paged is None and layout is None and cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    if paged is not None:
        k, v = paged.pool[module.layer_idx].chunk(2, dim=2)
        sizes, pages = (paged.cu_q, paged.cu_k, 1, paged.longest), (paged.table, paged.used)
        # one query sees all keys; not called causal, as only then may the kernel split the keys
        out = varlen_kernel(query[:, :, 0], k, v, *sizes, scaling, False, *pages)  # [S, H, D]
        return out[:, None], None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if cu_seq_lens_q is not None:
        cu, longest = cu_seq_lens_q.int(), max_length_q
        out = varlen_kernel(q, k, v, cu, cu, longest, longest, scaling, causal=False)
    else:
        cu_q, cu_k, index = layout.ragged
        sizes = (cu_q, cu_k, layout.longest, layout.longest_keys)
        out = varlen_kernel(q, k[index], v[index], *sizes, scaling, causal=True)
    return out[None], None


def refuse_padding(*args, attention_mask=None, **kwargs):
    """transformers' hook for the mask of the attention functions above: rows need none, and neither
    does an ordinary causal batch without padding. Raises ValueError for one with padding."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            "a padded batch, but set_attention made this model one for rows, which has no padding "
            "mask: pack the sequences with pack_rows, or call model.set_attn_implementation('sdpa')"
        )


ATTENTION = {"sdpa": "rows", "flash": "rows_flash"}  # --attn -> transformers' attn_implementation
PAGE = {"rows": 16, "rows_flash": 256}  # tokens; flash-attn's kernel takes multiples of 256 only
for _name, _function in ((ATTENTION["sdpa"], sdpa_rows), (ATTENTION["flash"], flash_rows)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, refuse_padding)


def set_attention(model, name):
    """Choose sdpa or flash for the language model and the vision tower of a loaded Qwen3-VL, with
    or without its head -> the model. (Not through from_pretrained: there a name with 'flash' in it
    makes transformers look for a kernel of its own.)"""
    backbone = getattr(model, "model", model)
    for part in (backbone.language_model, backbone.visual):
        part.config._attn_implementation = ATTENTION[name]
    return model


def check_attention(backbone):
    """Raise ValueError unless the attention was chosen by `set_attention`: any other one would
    ignore the layout, and every branch would see its siblings."""
    name = backbone.language_model.config._attn_implementation
    if name not in ATTENTION.values():
        raise ValueError(f"attention {name} knows no rows: call rows.set_attention(model, 'sdpa')")


def hidden_states(backbone, inputs):
    """Final hidden states [T, D] of the inputs of a Pack, differentiable.

    A pack without pictures still runs the vision tower, on a blank that adds exactly zero: under
    FSDP every rank must take part in the tower's collectives, whatever its examples hold. Raises
    ValueError for a model whose attention was not chosen by `set_attention`."""
    check_attention(backbone)
    if inputs["pixel_values"] is None:
        nothing = blank_features(backbone)
        embeddings = backbone.get_input_embeddings()(inputs["input_ids"])
        inputs = {**inputs, "input_ids": None, "inputs_embeds": embeddings + nothing}
    return backbone(**inputs, use_cache=False).last_hidden_state[0]


def blank_features(backbone):
    """0 times what the vision tower makes of one blank token."""
    vision = backbone.config.vision_config
    side = vision.spatial_merge_size
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    weight = next(backbone.visual.parameters())
    blank = torch.zeros(side**2, size, device=weight.device, dtype=weight.dtype)
    grid = torch.tensor([[1, side, side]], device=weight.device)
    features = backbone.visual(blank, grid_thw=grid)
    return sum(f.sum() for f in (features.pooler_output, *features.deepstack_features)) * 0


# --------------------------------------------------------------------------------------- log-probs
def banned_ids(model):
    """Ids that a policy must never emit: three vision tokens, after which the next forward would
    look for pixels that are not there, and those beyond the tokenizer, where the embedding is
    padded (Qwen3-VL: 151,936 rows for 151,669 tokens): from `model.usable_vocabulary` on. That is
    an attribute of the model, not of its config: a copy keeps it, but no checkpoint carries it on.
    """
    config = model.config
    size = config.text_config.vocab_size
    beyond = range(getattr(model, "usable_vocabulary", size), size)
    return [config.image_token_id, config.video_token_id, config.vision_start_token_id, *beyond]


@lru_cache
def on_device(ids, device):
    """A tensor of a tuple of ids, which is sent to the device once."""
    return torch.tensor(ids, device=device)


def masked_logits(lm_head, hidden, banned, temperature):
    """float32 logits [n, V] of hidden states [n, D] with the ids `banned` (a tensor) at the lowest
    finite value (finite: 0 * it stays 0 in the entropy)."""
    logits = lm_head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    return logits.index_fill(-1, banned, torch.finfo(torch.float32).min)


def head_chunk(lm_head, hidden, targets, banned, temperature, entropies):
    logits = masked_logits(lm_head, hidden, banned, temperature)
    log_z = logits.logsumexp(-1)
    logp, entropy = logits.gather(-1, targets[:, None])[:, 0] - log_z, None
    if entropies:
        with torch.no_grad():
            entropy = log_z - ((logits - log_z[:, None]).exp() * logits).sum(-1)
    return logp, entropy


def target_logprobs(model, pack, temperature=1.0, chunk=256, entropies=True):
    """Log-probs [n] and entropies [n, no gradient] of all branch tokens of a pack, float32; without
    `entropies`, which are some of the work, None in their place.

    They are of the distribution that `rollout.sample` draws from: softmax(logits / temperature)
    without the three vision tokens and the ids beyond the tokenizer (`banned_ids`), which a stock
    model's log_softmax includes.

    The head runs on target positions only, `chunk` at a time, and is recomputed in backward, so
    that memory never holds a (tokens x vocabulary) tensor."""
    hidden = hidden_states(model.model, pack.inputs)[pack.source]
    banned = on_device(tuple(banned_ids(model)), hidden.device)
    head, parts = partial(checkpoint, head_chunk, model.lm_head, use_reentrant=False), []
    for h, t in zip(hidden.split(chunk), pack.targets.split(chunk)):
        parts.append(head(h, t, banned, temperature, entropies))
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy) if entropies else None


def pack_logprobs(model, pack, **kwargs):
    """`target_logprobs` through FSDP: sharded models carry it as a registered forward method (see
    runtime.shard)."""
    return getattr(model, "target_logprobs", partial(target_logprobs, model))(pack, **kwargs)
