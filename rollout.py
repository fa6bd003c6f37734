"""The tiny rollout utility: the response format, and sampling; as a script: try a checkpoint.

A response is  y = (c, t):  `<caption>..</caption>` (perception), then
`<think>..</think><answer>..</answer>` (reasoning).

    python rollout.py --ckpt rl_out/ --image a.png --prompt "How many?"       # one answer, greedy
    python rollout.py --ckpt align_out/ --image a.png --samples 4 --disc align_out/discriminator

Without --prompt it asks for questions. Of the scores that --disc prints only differences between
answers to one question mean anything.
"""

import sys
from codecs import getincrementaldecoder
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain


def parse_args():
    from flags import InputError, Parser, integer, pixel_flags, real

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder or Hub id")
    add("--image", nargs="*", default=[], help="pictures, in the order of <image> in the prompt")
    add("--prompt", help="the question (default: it asks for questions)")
    add("--samples", type=integer(1, 4096), default=1, help="answers to a question")
    add("--temperature", type=real(0), help="0: greedy (default: 0 for one sample, else 1)")
    add("--max-new-tokens", type=integer(1, 2**18), default=4096, help="limit of an answer")
    add("--disc", help="discriminator, as OUT/discriminator of align.py: print its two scores")
    add("--system-prompt", metavar="FILE", help="system message in place of ours")
    add("--seed", type=integer(0), default=0, help="of sampling")
    pixel_flags(parser)
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = float(args.samples > 1)
    if args.samples > 1 and args.temperature == 0:
        raise InputError("--samples > 1 needs --temperature > 0: greedy answers are all the same")
    return args


if __name__ == "__main__":
    from flags import parse_or_end

    parse_or_end(parse_args)  # before torch is imported, which takes seconds

import numpy as np
import torch
from transformers import DynamicCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rows import (PAGE, Paged, banned_ids, check_attention, masked_logits, pack_rows, set_attention,
                  split_rows)  # fmt: skip


# --------------------------------------------------------------------------------- response format
@dataclass
class Response:
    caption: str
    think: str
    answer: str


TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")


def parse_spans(text):
    """(start, end) of each of the six tags when the text is exactly the three blocks in order, else
    None. Linear time: every tag may occur once only, so a search from the left finds each of them,
    and no pattern can backtrack."""
    spans, at = [], 0
    for tag in TAGS:
        start = text.find(tag)
        if start < at or text.find(tag, start + 1) >= 0:
            return None
        at = start + len(tag)
        spans.append((start, at))
    places = [0, *chain(*spans), len(text)]
    # before, between and after the blocks: from the end of one to the start of the next
    outside = [text[places[i] : places[i + 1]] for i in (0, 4, 8, 12)]
    return None if any(part.strip() for part in outside) else spans


def parse_response(text):
    """Text -> Response(caption, think, answer), each stripped, or None when the format is broken:
    exactly one of each block, in order, with white space only before, between and after. The only
    parser of the project."""
    spans = parse_spans(text)
    if spans is None:
        return None
    return Response(*(text[spans[i][1] : spans[i + 1][0]].strip() for i in (0, 2, 4)))


# byte-level BPE writes each byte as one printable character; this is the way back
BYTE = {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(ids, tokenizer):
    """The bytes of each token."""
    special = tokenizer.added_tokens_decoder
    pieces = zip(ids, tokenizer.convert_ids_to_tokens(ids))
    return [t.encode() if i in special else bytes(map(BYTE.get, t)) for i, t in pieces]


def split_segments(ids, tokenizer):
    """Token ids of a response -> (caption_ids, trace_ids), or None when its format is broken. O(n).

    Both end in the tokenizer's EOS as the read-out token of the discriminator, for teacher and
    student alike. A token that straddles the boundary (`>` with the newline after it) belongs to
    the caption.
    """
    eos = tokenizer.eos_token_id
    ids = ids[:-1] if ids and ids[-1] == eos else list(ids)
    pieces = token_bytes(ids, tokenizer)
    # surrogateescape: a character cut in two by sampling keeps its bytes, so offsets stay exact
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    spans = parse_spans(text)
    if spans is None:
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    boundary = len(text[: spans[1][1]].encode("utf-8", "surrogateescape"))
    # the token that holds the last byte of </caption> is the caption's last
    cut = int(np.searchsorted(ends, boundary)) + 1
    return ids[:cut] + [eos], ids[cut:] + [eos]


# ---------------------------------------------------------------------------------------- sampling
SLOT_TOKENS = 8  # cached positions while sampling, per token of --max-tokens
READ_EVERY = 8  # tokens, on CUDA, where device and host wait for one another at every read


@dataclass
class Rollout:
    ids: list[int]  # with the EOS when finished
    logprobs: list[float]  # of the distribution sampled from, float32
    finished: bool  # False: cut at the length limit

    @property
    def content(self):
        """The ids without the EOS."""
        return self.ids[: len(self.ids) - self.finished]


@torch.no_grad()
def sample(model, prompts, n, *, max_new_tokens, eos_id, temperature=1.0, seeds=None, samples=None,
           slots=256, max_tokens=16384, compiled=False, read_every=None, watch=None,
           lengths=None):  # fmt: skip
    """n rollouts per prompt -> list[list[Rollout]].

    A finished rollout leaves its slot to the next. Two slots, two rollouts of p and one of q:

        slot 0   p: p0 p0 p0 EOS   q: q0 q0 q0 EOS
        slot 1   p: p1 p1 p1 p1 p1 p1 p1 EOS

    Keys and values lie in pages of one pool, and rollouts share the full pages of their prompt (see
    Pool). They start while there are pages for the tokens that exist; when none is left, the
    youngest gives up its own, and goes on later from where it was. Random numbers belong to (seed,
    sample), so the result depends neither on slots and pages nor on the number of processes. Memory
    is bounded by the flags, not by the batch: at most `slots` slots and SLOT_TOKENS * max_tokens
    cached positions (at least those of a rollout of full length); prompts are prefilled when their
    turn comes, max_tokens at a time. Raises ValueError for a model whose attention was not chosen
    by `rows.set_attention`.

    seeds: one tuple of integers per prompt (default: its index). samples: one range per prompt, the
    numbers of the samples wanted here, when a group of n is spread over ranks. eos_id: the id that
    ends a response, or several. temperature: 0 is greedy. compiled: torch.compile the decode step
    (see decode_step). read_every: so many tokens, at least 1, are drawn before the host reads them
    (default: READ_EVERY on CUDA, else 1); those after a rollout's end are drawn in vain. watch:
    called after every read with the Slots that got tokens, and those of them that are finished.
    lengths: the tokens of each prompt; then `prompts` is indexed only when a prompt is prefilled,
    and may encode it as late as that."""
    if lengths is None:
        lengths = [len(prompt.input_ids) for prompt in prompts]
    seeds = seeds or [(i,) for i in range(len(lengths))]
    samples = samples or [range(n)] * len(lengths)
    ends, training = {eos_id} if isinstance(eos_id, int) else set(eos_id), model.training
    model.eval()  # in train mode a model that recomputes activations is given no cache
    queue = deque()
    for p, (tokens, numbers) in enumerate(zip(lengths, samples)):
        for s in numbers:
            noise = np.random.default_rng([*seeds[p], s]).random(max_new_tokens, np.float32)
            queue.append(Slot(p, s, tokens, noise))
    read_every = read_every or (READ_EVERY if model.device.type == "cuda" else 1)
    batch = Batch(model, prompts, queue, slots, max_new_tokens, max_tokens, compiled, read_every)
    done = [dict.fromkeys(numbers) for numbers in samples]
    while batch.refill():
        growing = batch.growing()
        tokens, logprobs = batch.draw(temperature)
        ended = batch.append(tokens, logprobs, ends)
        if watch:
            watch(growing, ended)
        for slot in ended:
            finished = slot.ids[-1] in ends
            done[slot.prompt][slot.sample] = Rollout(slot.ids, slot.logprobs, finished)
        batch.step()
    model.train(training)
    return [list(group.values()) for group in done]


@dataclass(eq=False)
class Slot:
    """What a slot holds: a rollout that is being decoded, or waits for its turn."""

    prompt: int  # index into prompts
    sample: int
    prompt_tokens: int
    noise: np.ndarray  # [max_new_tokens]  uniform in [0, 1), one number for each token
    offset: int = 0  # M-RoPE position of a token - tokens before it
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # of its tokens, in order
    start: torch.Tensor | None = None  # [hidden size]  of the prompt's last token
    place: int | None = None  # index into the batch's slots

    @property
    def tokens(self):
        return self.prompt_tokens + len(self.ids)


def choose(logits, uniform, temperature):
    """Tokens [S] and their log-probs [S] by inverse transform, one uniform number a slot;
    temperature 0 is greedy."""
    logprobs = logits.log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        # rounding may put u * total on the total: then the last token with any probability is meant
        tokens = tokens.minimum(torch.searchsorted(cdf, cdf[:, -1:].contiguous())[:, 0])
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Pool:
    """Keys and values, [layers, 1 + pages, page, Hkv + Hkv, D], allocated once, and who holds which
    page. Two rollouts 0, 1 of a prompt p of 6 tokens and one 2 of q of 3 in pages of 4 tokens:

        page      1 | p p p p |   2 | p p 0 0 |   3 | 0 0 . . |   4 | p p 1 . |   5 | q q q 2 |
        table     rollout 0: 1 2 3                rollout 1: 1 4                rollout 2: 5

    The full pages of a prompt are shared; its last one, partly filled, is copied for each rollout.
    Page 0 is nobody's: what a compiled step computes for empty slots goes there."""

    def __init__(self, text, pages, page, dtype, device, compiled=False):
        heads = 2 * text.num_key_value_heads
        shape = (text.num_hidden_layers, 1 + pages, page, heads, text.head_dim)
        if compiled:
            self.kv = static_memory(shape, dtype, device).zero_()  # nothing of an earlier call
        else:
            self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.page, self.free, self.holders = page, list(range(pages, 0, -1)), Counter()

    def hold(self, pages):
        self.holders.update(pages)
        return pages

    def take(self, count):
        """So many free pages."""
        return self.hold([self.free.pop() for _ in range(count)])

    def release(self, pages):
        self.holders.subtract(pages)
        self.free += [page for page in pages if not self.holders[page]]


class Batch:
    """The rollouts that decode together, a slot each, and those that wait."""

    def __init__(self, model, prompts, queue, slots, limit, max_tokens, compiled, read_every):
        check_attention(model.model)
        self.model, self.prompts, self.queue = model, prompts, queue
        self.limit, self.max_tokens = limit, max_tokens
        self.compiled, self.read_every = compiled, read_every
        self.banned = torch.tensor(banned_ids(model), device=model.device)
        text = model.model.language_model.config
        page = PAGE[text._attn_implementation]
        longest = max((slot.prompt_tokens for slot in queue), default=0) + limit
        if compiled:
            longest = -(-longest // 1024) * 1024  # another number is another shape to compile
        self.width = -(-longest // page)  # pages of the longest rollout
        slots, pages = min(slots, len(queue)), SLOT_TOKENS * max_tokens // page
        if not compiled:  # otherwise the same number in every call
            pages = min(pages, slots * self.width)
        self.pool = Pool(
            text, max(self.width, pages), page, model.dtype, model.device, compiled
        )  # fmt: skip
        self.slots, self.leaving = [None] * slots, []
        self.states = torch.zeros(slots, text.hidden_size, dtype=model.dtype, device=model.device)

    def growing(self):
        return [slot for slot in self.slots if slot is not None]

    def needed(self, slot, more):
        """Pages for its tokens and so many more, if it may become that long."""
        tokens = min(slot.tokens + more, slot.prompt_tokens + self.limit)
        return -(-tokens // self.pool.page)

    def refill(self):
        """Give empty slots to the rollouts that wait -> False when there is nothing to decode.
        Finished ones leave their pages in between, so that another of their prompt finds it."""
        self.admit()
        self.leave()
        self.admit()
        return any(self.slots)

    def leave(self):
        for slot in self.leaving:
            self.pool.release(slot.pages)
        self.leaving = []

    def admit(self):
        """Start rollouts in their order, while there are pages for their tokens and those of the
        next draw."""
        pool, page, encode, copy = self.pool, self.pool.page, [], []
        siblings = {slot.prompt: slot for slot in (*self.leaving, *self.growing())}
        for place in [s for s, slot in enumerate(self.slots) if slot is None][: len(self.queue)]:
            slot = self.queue[0]
            sibling, full = siblings.get(slot.prompt), slot.prompt_tokens // page
            shared = sibling.pages[:full] if sibling else []
            count = self.needed(slot, self.read_every) - len(shared)
            if count > len(pool.free):
                break
            slot.place, slot.pages = place, pool.hold(shared) + pool.take(count)
            self.slots[place] = siblings[slot.prompt] = self.queue.popleft()
            if sibling and not slot.ids:
                copy.append((slot, sibling))
            else:
                encode.append((slot, len(shared)))
        rows = [(slot.prompt_tokens, [len(slot.ids)]) for slot, _ in encode]
        for pack in split_rows(rows, self.max_tokens):
            self.prefill([encode[r] for r, _ in pack])
        for slot, sibling in copy:
            tail = slot.prompt_tokens // page
            pool.kv[:, slot.pages[tail]] = pool.kv[:, sibling.pages[tail]]
            slot.start = self.states[slot.place] = sibling.start
            slot.offset = sibling.offset

    def prefill(self, slots):
        """Encode prompts, and what their rollouts have sampled so far, in one forward. slots: list
        of (Slot, how many of its first pages are written already)."""
        branches = [(i, slot.ids) for i, (slot, _) in enumerate(slots) if slot.ids]
        prompts, cache = [self.prompts[slot.prompt] for slot, _ in slots], DynamicCache()
        inputs = pack_rows(prompts, branches, self.model.device).inputs
        out = self.model.model(**inputs, use_cache=True, past_key_values=cache)
        states, places = out.last_hidden_state[0], []
        for slot, written in slots:
            pages = np.array([0] * written + slot.pages[written:])  # what is there already stays
            own = pages[:, None] * self.pool.page + np.arange(self.pool.page)
            places.append(np.split(own.ravel()[: slot.tokens], [slot.prompt_tokens]))
        parts = [prompt for prompt, _ in places] + [branch for _, branch in places]  # as in a pack
        at = torch.from_numpy(np.concatenate(parts)).to(states.device)
        for pool, layer in zip(self.pool.kv, cache.layers):
            new = torch.cat([layer.keys[0], layer.values[0]])  # [2 Hkv, T, D]
            pool.flatten(0, 1)[at] = new.transpose(0, 1)
        ends = np.cumsum([len(part) for part in parts]) - 1
        for i, (slot, _) in enumerate(slots):
            slot.offset = prompts[i].next_position - slot.prompt_tokens
            slot.start = states[ends[i]].clone()
            self.states[slot.place] = states[ends[i + len(slots) if slot.ids else i]]

    @property
    def rows(self):
        """The slots that are computed: where steps are compiled all, else those that hold one."""
        return [s for s, slot in enumerate(self.slots) if slot is not None or self.compiled]

    def draw(self, temperature):
        """`read_every` tokens for every row, fewer where a rollout would become longer than it may,
        and their log-probs, each [rows, tokens]. The host reads none of them in here."""
        count = min(self.read_every, *(self.limit - len(slot.ids) for slot in self.growing()))
        noise, drawn = self.uniforms(count), []
        rows = torch.tensor(self.rows, device=noise.device)
        if count > 1:
            table, state = self.inputs()
        for i in range(count):
            hidden = self.states[rows]
            logits = masked_logits(self.model.lm_head, hidden, self.banned, temperature or 1.0)
            logits = logits.nan_to_num()  # of exploded weights: their next update is skipped
            tokens, logprobs = choose(logits, noise[i], temperature)
            drawn.append((tokens, logprobs))
            if i + 1 < count:
                state = torch.stack([tokens, state[:, 1] + 1, state[:, 2]], 1)
                self.decode(rows, table, state)
        return [torch.stack(parts, 1) for parts in zip(*drawn)]

    def uniforms(self, count):
        """The random numbers [count, rows] of each slot's next tokens; 0 for an empty slot."""
        slots = [self.slots[s] for s in self.rows]
        noise = np.zeros((count, len(slots)), np.float32)
        for i, slot in enumerate(slots):
            if slot is not None:
                noise[:, i] = slot.noise[len(slot.ids) :][:count]
        return torch.from_numpy(noise).to(self.states.device)

    def inputs(self):
        """table and state as decode_step takes them; zeros for an empty slot."""
        width = max(len(slot.pages) for slot in self.growing())
        if self.compiled:  # few shapes
            width = min(self.width, 1 << (width - 1).bit_length())
        slots = [self.slots[s] for s in self.rows]
        table = np.zeros((len(slots), width), np.int32)
        state = np.zeros((len(slots), 3), np.int64)
        for i, slot in enumerate(slots):
            if slot is not None:
                table[i, : len(slot.pages)] = slot.pages
                state[i] = slot.ids[-1] if slot.ids else 0, slot.tokens - 1, slot.offset
        # through numpy, which reads lists three times as fast
        return [torch.from_numpy(array).to(self.states.device) for array in (table, state)]

    def append(self, tokens, logprobs, ends):
        """Write tokens and log-probs to their slots -> the finished ones, which leave theirs."""
        for s, *drawn in zip(self.rows, tokens.tolist(), logprobs.tolist()):
            slot = self.slots[s]
            if slot is None:
                continue
            for token, logprob in zip(*drawn):
                slot.ids.append(token)
                slot.logprobs.append(logprob)
                if token in ends or len(slot.ids) == self.limit:
                    self.leaving.append(slot)
                    self.slots[s] = None
                    break
        return self.leaving

    def grow(self):
        """A page for every rollout that has filled its own, or will before the host reads again,
        the oldest first. When none is left, the youngest gives up its own and is the next to start
        again."""
        live = sorted(self.growing(), key=lambda slot: (slot.prompt, slot.sample))
        for slot in live:
            # of the tokens to be drawn the last is stored by a step that comes after another grow
            while slot.pages and len(slot.pages) < self.needed(slot, self.read_every - 1):
                if not self.pool.free:
                    self.leave()
                if self.pool.free:
                    slot.pages += self.pool.take(1)
                    continue
                youngest = live.pop()
                self.pool.release(youngest.pages)
                youngest.pages, self.slots[youngest.place] = [], None
                self.queue.appendleft(youngest)

    def step(self):
        """Decode one token further."""
        self.grow()
        if any(self.slots):
            self.decode(self.rows, *self.inputs())

    def decode(self, rows, table, state):
        step = compiled_decode_step() if self.compiled else decode_step
        # copied, because a captured step always writes to one and the same place
        self.states[rows] = step(self.model.model.language_model, self.pool.kv, table, state)


def decode_step(text, pool, table, state):
    """One token for every slot through the language model's layers -> last hidden states
    [S, hidden size]; its keys and values go to the pool. table [S, n] int32: pages of each slot.
    state [S, 3]: the token, the number of tokens before it, and its M-RoPE position less that
    number. Shapes depend on S and n only, and it asks nothing of the host, so that it can be
    compiled or captured."""
    tokens, before, offset = state.T
    paged = Paged(pool, table, before)
    hidden = text.embed_tokens(tokens)[:, None]  # [S, 1, hidden size]
    # beyond the prompt the three axes of a position agree
    rotary = text.rotary_emb(hidden, (before + offset)[None, :, None])
    for layer in text.layers:
        hidden = layer(hidden, rotary, past_key_values=paged, paged=paged)
    return text.norm(hidden)[:, 0]


@lru_cache(maxsize=1)
def static_memory(shape, dtype, device):
    """The pool of all calls: a CUDA graph writes to the address that it was captured with, and
    inductor captures none that writes to an input whose address may change."""
    kv = torch.empty(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(kv)
    return kv


@cache
def compiled_decode_step():
    """One compilation for each number of slots and window; on CUDA the steps between are replayed
    as CUDA graphs."""
    torch._dynamo.config.recompile_limit = 64  # after 8 it would decode without, and not say so
    return torch.compile(decode_step, mode="reduce-overhead", dynamic=False)


# --------------------------------------------------------------------------------- try a checkpoint
# The script alone needs more than rows.py, so its functions import it.
class Stream:
    """Prints the samples one after the other while all of them grow: the first read by read, the
    next from as far as it is by then. `watch` of `sample`."""

    def __init__(self, tokenizer, ends, samples):
        self.tokenizer, self.ends = tokenizer, set(ends)
        self.ids, self.finished = [[] for _ in range(samples)], set()
        self.start(0)

    def start(self, sample):
        self.sample, self.printed = sample, 0
        self.decoder = getincrementaldecoder("utf-8")("replace")  # a token may end in a character
        if 0 < sample < len(self.ids):
            print("---", flush=True)

    def __call__(self, growing, ended):
        for slot in growing:
            self.ids[slot.sample] = slot.ids
        self.finished |= {slot.sample for slot in ended}
        while self.sample < len(self.ids):
            last = self.sample in self.finished
            new = [i for i in self.ids[self.sample][self.printed :] if i not in self.ends]
            self.printed = len(self.ids[self.sample])
            text = self.decoder.decode(b"".join(token_bytes(new, self.tokenizer)), last)
            # whatever a model says must not steer the terminal
            text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
            print(text, end="\n" if last else "", flush=True)
            if not last:
                break
            self.start(self.sample + 1)


class Trial:
    """A checkpoint, the pictures and perhaps a discriminator, ready for questions."""

    def __init__(self, args):
        from data import load_image, system_prompt
        from discriminator import compare_tokenizers, load_discriminator
        from runtime import World, about, choose_attention, eos_ids, load_policy, load_tokenizer

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        world, self.args, self.pictures, self.disc = World(0, 1, device), args, [], None
        self.tokenizer, self.image_processor = load_tokenizer(args.ckpt, args)
        self.system = system_prompt(args)
        for path in args.image:
            with about(f"--image {path} is no picture that can be read"):
                self.pictures.append(load_image(path))
                self.image_processor(images=self.pictures[-1:])  # which refuses some shapes
        if args.disc:
            compare_tokenizers(self.tokenizer, args.disc)
            with about("--disc"):  # sdpa: it computes in float32
                self.disc = load_discriminator(args.disc, None, "sdpa").to(device).eval()
        policy = set_attention(load_policy(args.ckpt, world.dtype), choose_attention("auto", world))
        self.policy = policy.to(device).eval()
        self.ends = eos_ids(self.tokenizer, policy)

    def answer(self, question):
        """Print --samples answers as they come, then a line on each."""
        from data import Example, encode_prompt

        example = Example("--prompt", [{"role": "user", "content": question}], self.pictures)
        tools = self.tokenizer, self.image_processor
        prompt = encode_prompt(example, *tools, system_prompt=self.system)
        args, stream = self.args, Stream(self.tokenizer, self.ends, self.args.samples)
        limit = args.max_new_tokens
        (rollouts,) = sample(
            self.policy, [prompt], args.samples, max_new_tokens=limit, eos_id=self.ends,
            temperature=args.temperature, seeds=[(args.seed,)], watch=stream,
        )  # fmt: skip
        print()
        for number, rollout in enumerate(rollouts, 1):
            segments = split_segments(rollout.content, self.tokenizer)
            line = f"answer {number}: {len(rollout.ids)} tokens"
            line += "" if rollout.finished else f", cut at --max-new-tokens {limit}"
            line += self.scores(prompt, segments) if segments else ", not the three blocks"
            print(line, flush=True)

    @torch.no_grad()
    def scores(self, prompt, segments):
        """What both experts say of a well-formed answer, as a text."""
        from discriminator import visible_prompt

        if self.disc is None:
            return ""
        seen = visible_prompt(prompt, self.tokenizer, self.disc.variant)
        d_v, d_r = self.disc.scores([seen], *([(0, ids)] for ids in segments))
        return f", D_v {d_v.item():.3f}, D_r {d_r.item():.3f}"


def main():
    """Answer --prompt, or question after question until an empty one."""
    from flags import InputError

    args = parse_args()
    trial = Trial(args)
    if args.prompt is not None:
        trial.answer(args.prompt)
        return
    while True:
        try:
            question = input("\nquestion (an empty one ends): ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        try:
            trial.answer(question)
        except InputError as error:  # such as a literal <|image_pad|>
            print(error, flush=True)
        except KeyboardInterrupt:
            print(" stopped", flush=True)


if __name__ == "__main__":
    from runtime import run

    sys.stdin.reconfigure(errors="replace")  # a question may be in any encoding
    run(main)
