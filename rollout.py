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
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from transformers import DynamicCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rows import banned_ids, check_attention, masked_logits, pack_rows, set_attention, split_rows


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
    # before, between and after the blocks: from the end of one to the start of the next
    ends, starts = [0, *(spans[i][1] for i in (1, 3, 5))], [spans[i][0] for i in (0, 2, 4)]
    outside = [text[end:start] for end, start in zip(ends, [*starts, len(text)])]
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
    return [t.encode() if i in special else bytes(BYTE[c] for c in t) for i, t in pieces]


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


@dataclass
class Rollout:
    ids: list[int]  # with the EOS when finished
    logprobs: list[float]  # of the distribution sampled from, float32
    finished: bool  # False: cut at the length limit


@torch.no_grad()
def sample(model, prompts, n, *, max_new_tokens, eos_id, temperature=1.0, seeds=None, samples=None,
           slots=256, max_tokens=16384, compiled=False, watch=None):  # fmt: skip
    """n rollouts per prompt -> list[list[Rollout]].

    A prompt is prefilled once; its rollouts decode from copies of its KV. A finished rollout leaves
    its slot to the next; empty slots leave the batch. Two slots, two rollouts of p and one of q:

        slot 0   p: p0 p0 p0 EOS   q: q0 q0 q0 EOS
        slot 1   p: p1 p1 p1 p1 p1 p1 p1 EOS

    Random numbers belong to (seed, sample), so the result depends neither on the number of slots
    nor on that of processes. Memory is bounded by the flags, not by the batch: at most `slots`
    slots, and no more than fit into SLOT_TOKENS * max_tokens cached positions (at least one);
    prompts are prefilled when their turn comes, max_tokens at a time. Raises ValueError for a model
    whose attention was not chosen by `rows.set_attention`.

    seeds: one tuple of integers per prompt (default: its index). samples: one range per prompt, the
    numbers of the samples wanted here, when a group of n is spread over ranks. eos_id: the id that
    ends a response, or several. temperature: 0 is greedy. compiled: torch.compile the decode step
    (see decode_step). watch: called after every token with the Slots that got one, and those of
    them that are finished."""
    seeds = seeds or [(i,) for i in range(len(prompts))]
    samples = samples or [range(n)] * len(prompts)
    columns = max((len(p.input_ids) for p in prompts), default=0) + max_new_tokens
    if compiled:
        columns = -(-columns // 1024) * 1024  # another number is another shape to compile
    slots = min(slots, sum(map(len, samples)), max(1, SLOT_TOKENS * max_tokens // columns))
    ends, training = {eos_id} if isinstance(eos_id, int) else set(eos_id), model.training
    model.eval()  # in train mode a model that recomputes activations is given no cache
    batch = Batch(model, slots, columns, compiled)
    queue = waiting(model, prompts, seeds, samples, max_new_tokens, max_tokens)
    banned = torch.tensor(banned_ids(model), device=model.device)
    done = [dict.fromkeys(numbers) for numbers in samples]
    while batch.refill(queue):
        logits = masked_logits(model.lm_head, batch.hidden, banned, temperature or 1.0)
        logits = logits.nan_to_num()  # of exploded weights: their next update is skipped
        tokens, logprobs = choose(logits, batch.uniforms(), temperature)
        growing = [slot for slot in batch.slots if slot is not None]
        ended = batch.append(tokens, logprobs, ends, max_new_tokens)
        if watch:
            watch(growing, ended)
        for slot in ended:
            finished = slot.ids[-1] in ends
            done[slot.prompt][slot.sample] = Rollout(slot.ids, slot.logprobs, finished)
        batch.step(model.model.language_model, tokens)
    model.train(training)
    return [list(group.values()) for group in done]


@dataclass
class Encoded:
    """A prompt of P tokens after its prefill."""

    kv: list  # (keys, values) of each layer, each [Hkv, P, D]
    hidden: torch.Tensor  # [hidden size]  of its last token
    offset: int  # M-RoPE position of the next token - P


@dataclass
class Slot:
    """What a slot holds: a rollout that is being decoded."""

    prompt: int  # index into prompts
    sample: int
    prompt_tokens: int
    noise: np.ndarray  # [max_new_tokens]  uniform in [0, 1), one number for each token
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def waiting(model, prompts, seeds, samples, max_new_tokens, max_tokens):
    """The rollouts that wait for a slot, prompt by prompt: yields (Slot, Encoded). Prompts are
    prefilled when the first of them is asked for, as many as fit into max_tokens."""
    wanted = [p for p, numbers in enumerate(samples) if len(numbers)]
    rows = [(len(prompts[p].input_ids), [0]) for p in wanted]  # a prompt and a branch of 0 tokens
    for pack in split_rows(rows, max_tokens):
        chosen = [wanted[r] for r, _ in pack]
        for p, encoded in zip(chosen, prefill(model, [prompts[p] for p in chosen])):
            for s in samples[p]:
                noise = np.random.default_rng([*seeds[p], s]).random(max_new_tokens, np.float32)
                yield Slot(p, s, len(prompts[p].input_ids), noise), encoded


def prefill(model, prompts):
    """Encode prompts in one forward -> list of Encoded."""
    check_attention(model.model)
    cache, at, out = DynamicCache(), 0, []
    inputs = pack_rows(prompts, [], model.device).inputs
    states = model.model(**inputs, use_cache=True, past_key_values=cache).last_hidden_state[0]
    for prompt in prompts:
        start, at = at, at + len(prompt.input_ids)
        kv = [(layer.keys[0, :, start:at], layer.values[0, :, start:at]) for layer in cache.layers]
        out.append(Encoded(kv, states[at - 1], prompt.next_position - (at - start)))
    return out


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


class Batch:
    """The slots that decode together: what each holds, its cache and its last hidden state."""

    def __init__(self, model, slots, columns, compiled):
        text, dtype, device = model.config.text_config, model.dtype, model.device
        layers, heads, dim = text.num_hidden_layers, text.num_key_value_heads, text.head_dim
        self.cache = SlotCache(layers, slots, heads, columns, dim, dtype, device)
        self.slots = [None] * slots
        self.hidden = torch.zeros(slots, text.hidden_size, dtype=dtype, device=device)
        # M-RoPE position of a slot's next token = its cache length + offset
        self.offset = torch.zeros(slots, dtype=torch.long, device=device)
        self.compiled = compiled

    def refill(self, queue):
        """Give empty slots to the rollouts that wait; once none does, empty slots leave the batch.
        -> False when there is nothing left to decode."""
        for s, slot in enumerate(self.slots):
            if slot is None and (ready := next(queue, None)) is not None:
                self.slots[s], encoded = ready
                self.cache.fill(s, encoded.kv)
                self.hidden[s], self.offset[s] = encoded.hidden, encoded.offset
        live = [s for s, slot in enumerate(self.slots) if slot is not None]
        if 0 < len(live) <= 0.75 * len(self.slots) and not self.compiled:
            self.cache.keep(live)
            self.hidden, self.offset = self.hidden[live], self.offset[live]
            self.slots = [self.slots[s] for s in live]
        return len(live) > 0

    def uniforms(self):
        """The random number [S] of each slot's next token; 0 for an empty slot."""
        numbers = [0.0 if slot is None else float(slot.noise[len(slot.ids)]) for slot in self.slots]
        return torch.tensor(numbers, dtype=torch.float32, device=self.hidden.device)

    def append(self, tokens, logprobs, ends, max_new_tokens):
        """Write a token and its log-prob to each slot -> the finished ones, which leave theirs."""
        finished = []
        for s, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            slot = self.slots[s]
            if slot is None:
                continue
            slot.ids.append(token)
            slot.logprobs.append(logprob)
            if token in ends or len(slot.ids) == max_new_tokens:
                finished.append(slot)
                self.slots[s] = None
        return finished

    def step(self, text, tokens):
        """Decode one token further, through the layers of the language model `text`."""
        filled = [slot.prompt_tokens + len(slot.ids) for slot in self.slots if slot is not None]
        if not filled:
            return
        self.cache.open_window(max(filled), self.compiled)
        step = compiled_decode_step() if self.compiled else decode_step
        # cloned because a captured step always writes to one and the same place
        self.hidden = step(text, self.cache, tokens, self.offset).clone()


class SlotCache:
    """Keys and values of the slots, [slots, Hkv, columns, D] per layer, allocated once; slot s is
    filled up to lengths[s]. Attention reads the first `window` columns."""

    def __init__(self, layers, slots, heads, columns, dim, dtype, device):
        shape = (slots, heads, columns, dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.slots = torch.arange(slots, device=device)
        self.columns = torch.arange(columns, device=device)
        self.window = columns

    def fill(self, slot, kv):
        """Copy the KV of a prompt, (keys, values) of each layer, into a slot."""
        for layer, (k, v) in enumerate(kv):
            self.keys[layer][slot, :, : k.shape[1]] = k
            self.values[layer][slot, :, : k.shape[1]] = v
        self.lengths[slot] = kv[0][0].shape[1]

    def keep(self, slots):
        """Move these slots to the front and forget the others, in place: memory never rises."""
        for tensor in (*self.keys, *self.values, self.lengths):
            tensor[: len(slots)] = tensor[slots]
        self.keys = [keys[: len(slots)] for keys in self.keys]
        self.values = [values[: len(slots)] for values in self.values]
        self.lengths, self.slots = self.lengths[: len(slots)], self.slots[: len(slots)]

    def open_window(self, filled, compiled):
        """Read `filled` columns, rounded up by at most a quarter, so that few shapes of the decode
        step occur; to the next power of two where every shape is compiled."""
        step = 1 << (filled - 1).bit_length() if compiled else max(1, 1 << filled.bit_length() - 3)
        self.window = min(len(self.columns), -(-filled // step) * step)

    def update(self, k, v, layer):  # called by the attention layers, one new token a slot
        self.keys[layer][self.slots, :, self.lengths] = k[:, :, 0]
        self.values[layer][self.slots, :, self.lengths] = v[:, :, 0]
        return self.keys[layer][:, :, : self.window], self.values[layer][:, :, : self.window]


def decode_step(text, cache, tokens, offset):
    """One token for every slot through the language model's layers -> last hidden states
    [S, hidden size]. Its shapes depend on the slots and the window only, and it asks nothing of the
    host, so that it can be compiled or captured. Slots that just finished compute a token that
    nobody reads (their column is clamped), which is cheaper than moving the others."""
    cache.lengths.clamp_(max=len(cache.columns) - 1)
    seen = cache.columns[: cache.window] <= cache.lengths[:, None]  # [S, window]
    hidden = text.embed_tokens(tokens)[:, None]  # [S, 1, hidden size]
    # beyond the prompt the three axes of a position agree
    rotary = text.rotary_emb(hidden, (cache.lengths + offset)[None, :, None])
    for layer in text.layers:
        hidden = layer(hidden, rotary, seen[:, None, None], past_key_values=cache)
    cache.lengths += 1
    return text.norm(hidden)[:, 0]


@cache
def compiled_decode_step():
    """One compilation for each number of slots and window; on CUDA the steps between are replayed
    as CUDA graphs."""
    return torch.compile(decode_step, mode="reduce-overhead", dynamic=False)


# --------------------------------------------------------------------------------- try a checkpoint
# The script alone needs more than rows.py, so its functions import it.
class Stream:
    """Prints the samples one after the other while all of them grow: the first token by token, the
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


def parse_args():
    from data import pixel_flags
    from runtime import InputError, Parser, integer, real

    parser = Parser(description=__doc__)
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
        segments = [split_segments(r.ids[: len(r.ids) - r.finished], self.tokenizer)
                    for r in rollouts]  # fmt: skip
        scores = self.scores(prompt, [parts for parts in segments if parts])
        print()
        for number, (rollout, parts) in enumerate(zip(rollouts, segments), 1):
            line = f"answer {number}: {len(rollout.ids)} tokens"
            line += "" if rollout.finished else f", cut at --max-new-tokens {limit}"
            line += "" if parts else ", not the three blocks"
            line += next(scores) if parts else ""
            print(line, flush=True)

    @torch.no_grad()
    def scores(self, prompt, segments):
        """What both experts say of well-formed answers, as texts."""
        from discriminator import make_pairs, row_scores

        if not segments or self.disc is None:
            yield from [""] * len(segments)
            return
        first, *others = segments  # the first in the teacher's place
        row = make_pairs(prompt, "", first, others, self.tokenizer, self.disc.variant)
        for d_v, d_r in row_scores(self.disc, [row]).T.tolist():
            yield f", D_v {d_v:.3f}, D_r {d_r:.3f}"


def main():
    """Answer --prompt, or question after question until an empty one."""
    from runtime import InputError

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
