"""The tiny rollout utility: the response format, and sampling.

A response is  y = (c, t):  `<caption>..</caption>` (perception), then `<think>..</think><answer>..</answer>` (reasoning).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from transformers import DynamicCache

from rows import banned_ids, masked_logits, pack_rows, split_rows


# ------------------------------------------------------------------------------------------------------- response format
@dataclass
class Response:
    caption: str
    think: str
    answer: str


TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")


def parse_spans(text):
    """(start, end) of each of the six tags when the text is exactly the three blocks in order, else None. Linear time:
    every tag may occur once only, so a search from the left finds each of them, and no pattern can backtrack."""
    spans, at = [], 0
    for tag in TAGS:
        start = text.find(tag)
        if start < at or text.find(tag, start + 1) >= 0:
            return None
        at = start + len(tag)
        spans.append((start, at))
    between = (text[: spans[0][0]], text[spans[1][1] : spans[2][0]], text[spans[3][1] : spans[4][0]], text[at:])
    return None if any(part.strip() for part in between) else spans


def parse_response(text):
    """Text -> Response(caption, think, answer), each stripped, or None when the format is broken: exactly one of each
    block, in order, with white space only before, between and after. The only parser of the project."""
    spans = parse_spans(text)
    if spans is None:
        return None
    return Response(*(text[spans[i][1] : spans[i + 1][0]].strip() for i in (0, 2, 4)))


def byte_decoder():
    """Byte-level BPE writes each byte as one printable character; this is the way back (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(c): b for c, b in zip(printable + [256 + i for i in range(len(hidden))], printable + hidden)}


BYTE = byte_decoder()


def split_segments(ids, tokenizer):
    """Token ids of a response -> (caption_ids, trace_ids), or None when its format is broken. O(n).

    Both end in the tokenizer's EOS as the read-out token of the discriminator, for teacher and student alike. A token
    that straddles the boundary (`>` with the newline after it) belongs to the caption.
    """
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else list(ids)
    special = tokenizer.added_tokens_decoder
    pieces = [
        piece.encode() if i in special else bytes(BYTE[c] for c in piece)
        for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids))
    ]
    # surrogateescape: a character cut in two by sampling keeps its bytes, so offsets stay exact
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    spans = parse_spans(text)
    if spans is None:
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    boundary = len(text[: spans[1][1]].encode("utf-8", "surrogateescape"))
    cut = int(np.searchsorted(ends, boundary)) + 1  # the token that holds the last byte of </caption> is the caption's last
    return ids[:cut] + [tokenizer.eos_token_id], ids[cut:] + [tokenizer.eos_token_id]


# -------------------------------------------------------------------------------------------------------------- sampling
SLOT_TOKENS = 8  # cached positions while sampling, per token of --max-tokens


@dataclass
class Rollout:
    ids: list[int]  # with the EOS when finished
    logprobs: list[float]  # of the distribution sampled from, float32
    finished: bool  # False: cut at the length limit


class SlotCache:
    """Keys and values of the rows being decoded, [slots, Hkv, columns, D] per layer, allocated once; row s is filled up to
    lengths[s]. Attention reads the first `window` columns."""

    def __init__(self, layers, slots, heads, columns, dim, dtype, device):
        shape = (slots, heads, columns, dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows, self.columns = torch.arange(slots, device=device), torch.arange(columns, device=device)
        self.window = columns

    def fill(self, slot, prompt_kv):
        for layer, (k, v) in enumerate(prompt_kv):
            self.keys[layer][slot, :, : k.shape[1]] = k
            self.values[layer][slot, :, : k.shape[1]] = v
        self.lengths[slot] = prompt_kv[0][0].shape[1]

    def keep(self, slots):
        """Move these rows to the front and forget the others; in place, so that memory never rises."""
        for rows in (*self.keys, *self.values, self.lengths):
            rows[: len(slots)] = rows[slots]
        self.keys, self.values = ([rows[: len(slots)] for rows in part] for part in (self.keys, self.values))
        self.lengths, self.rows = self.lengths[: len(slots)], self.rows[: len(slots)]

    def open_window(self, filled, compiled):
        """Read `filled` columns, rounded up by at most a quarter, so that few shapes of the decode step occur; to the next power
        of two where every shape is compiled."""
        step = 1 << (filled - 1).bit_length() if compiled else max(1, 1 << filled.bit_length() - 3)
        self.window = min(len(self.columns), -(-filled // step) * step)

    def update(self, k, v, layer):  # called by the attention layers, one new token a row
        self.keys[layer][self.rows, :, self.lengths] = k[:, :, 0]
        self.values[layer][self.rows, :, self.lengths] = v[:, :, 0]
        return self.keys[layer][:, :, : self.window], self.values[layer][:, :, : self.window]


def prefill(model, prompts):
    """Encode prompts in one forward: per prompt its KV (layers x (k, v), each [Hkv, P, D]) and its last hidden state [D]."""
    cache, at, out = DynamicCache(), 0, []
    inputs = pack_rows(prompts, [], model.device).inputs
    hidden = model.model(**inputs, use_cache=True, past_key_values=cache).last_hidden_state[0]
    for prompt in prompts:
        here = slice(at, at := at + len(prompt.input_ids))
        out.append(([(la.keys[0, :, here], la.values[0, :, here]) for la in cache.layers], hidden[at - 1]))
    return out


def choose(logits, uniform, temperature):
    """Tokens [S] and their log-probs [S] by inverse transform, one uniform number a row; temperature 0 is greedy."""
    logprobs = logits.log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        # rounding may put u * total on the total itself: the last token that has any probability is then meant
        tokens = tokens.minimum(torch.searchsorted(cdf, cdf[:, -1:].contiguous())[:, 0])
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


@torch.no_grad()
def sample(model, prompts, n, *, max_new_tokens, eos_id, temperature=1.0, seeds=None, samples=None, slots=256,
           max_tokens=16384, compiled=False):  # fmt: skip
    """n rollouts per prompt -> list[list[Rollout]].

    The prompt is prefilled once; rows decode from copies of its KV; a finished row leaves its slot to the next (prompt,
    sample), and empty slots leave the batch. Random numbers belong to (seed, sample), so the result depends neither on the
    number of slots nor on that of processes. Memory is bounded by the flags, not by the batch: at most `slots` rows, and no
    more than fit into SLOT_TOKENS * max_tokens cached positions (at least one); prompts are prefilled when their turn comes,
    max_tokens at a time.
    seeds: one tuple of integers per prompt (default: its index). samples: one range per prompt, the numbers of the
    samples wanted here, when a group of n is spread over ranks. compiled: torch.compile the decode step (see decode_step).
    """
    training = model.training
    model.eval()  # in train mode transformers drops the cache of a model that recomputes activations
    seeds = seeds or [(i,) for i in range(len(prompts))]
    samples = samples or [range(n)] * len(prompts)
    queue = [(p, s) for p in range(len(prompts)) for s in samples[p]][::-1]
    packs = split_rows([(len(prompt.input_ids), [0] if len(s) else []) for prompt, s in zip(prompts, samples)], max_tokens)
    done, encoded = {}, {}
    text, device, dtype, banned = model.config.text_config, model.device, model.dtype, banned_ids(model.config)
    columns = max((len(p.input_ids) for p in prompts), default=0) + max_new_tokens
    if compiled:
        columns = -(-columns // 1024) * 1024  # another number is another shape to compile
    step = compiled_decode_step() if compiled else decode_step
    slots = min(slots, len(queue), max(1, SLOT_TOKENS * max_tokens // columns))
    cache = SlotCache(text.num_hidden_layers, slots, text.num_key_value_heads, columns, text.head_dim, dtype, device)
    hidden = torch.zeros(slots, text.hidden_size, dtype=dtype, device=device)
    noise = np.zeros((slots, max_new_tokens), dtype=np.float32)
    offset = torch.zeros(slots, dtype=torch.long, device=device)  # M-RoPE position of a row = its cache length + offset
    active = [None] * slots  # [(prompt, sample), ids, logprobs] per slot

    while True:
        for slot in [s for s, row in enumerate(active) if row is None][: len(queue)]:
            p, s = queue.pop()
            if p not in encoded:  # the queue goes by prompt: those encoded before have no sample left to start
                pack = [r for r, _ in next(packs)]
                encoded = dict(zip(pack, prefill(model, [prompts[r] for r in pack])))
            kv, hidden[slot] = encoded[p]
            cache.fill(slot, kv)
            noise[slot] = np.random.default_rng([*seeds[p], s]).random(max_new_tokens, dtype=np.float32)
            offset[slot] = prompts[p].next_position - len(prompts[p].input_ids)
            active[slot] = [(p, s), [], []]
        live = [s for s, row in enumerate(active) if row is not None]
        if not live:
            break
        if len(live) <= 0.75 * len(active) and not compiled:  # nothing left to refill with: finished rows leave the batch
            cache.keep(live)
            hidden, offset, noise, active = hidden[live], offset[live], noise[live], [active[s] for s in live]
        logits = masked_logits(model.lm_head, hidden, banned, temperature or 1.0)
        at = [len(row[1]) if row else 0 for row in active]
        uniform = torch.from_numpy(noise[np.arange(len(active)), at]).to(device)
        tokens, logprobs = choose(logits, uniform, temperature)
        filled = 0  # columns that the rows which go on need
        for slot, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            row = active[slot]
            if row is None:
                continue
            row[1].append(token)
            row[2].append(logprob)
            if token == eos_id or len(row[1]) == max_new_tokens:
                done[row[0]] = Rollout(row[1], row[2], token == eos_id)
                active[slot] = None
            else:
                filled = max(filled, len(prompts[row[0][0]].input_ids) + len(row[1]))
        if filled:
            cache.open_window(filled, compiled)
            hidden = step(model.model.language_model, cache, tokens, offset).clone()  # a captured step writes to one place
    model.train(training)
    return [[done[p, s] for s in samples[p]] for p in range(len(prompts))]


def decode_step(text, cache, tokens, offset):
    """One token for every row of the cache through the language model's layers -> last hidden states [S, D]. Its shapes
    depend on the slots and the window only, and it asks nothing of the host, so that it can be compiled or captured. Rows
    that just finished compute a token that nobody reads (their column is clamped), which is cheaper than moving the others."""
    cache.lengths.clamp_(max=len(cache.columns) - 1)
    mask = (cache.columns[: cache.window] <= cache.lengths[:, None])[:, None, None]  # [S, 1, 1, window]
    hidden = text.embed_tokens(tokens)[:, None]
    rotary = text.rotary_emb(hidden, (cache.lengths + offset)[None, :, None])  # beyond the prompt the three axes agree
    for layer in text.layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask, past_key_values=cache)
    cache.lengths += 1
    return text.norm(hidden)[:, 0]


@cache
def compiled_decode_step():
    """One compilation for each number of slots and window; on CUDA the steps between are replayed as CUDA graphs."""
    return torch.compile(decode_step, mode="reduce-overhead", dynamic=False)
