"""What every stage shares: examples, prompts, the response format, shared-prompt rows, log-probs and sampling.

The one idea that carries the speed is the *row*: all rollouts of a prompt, both segments of each and the
teacher's response share the prompt with its images, so one forward computes

    [ prompt | branch 1 | branch 2 | ... ]

in which a branch attends to the prompt and to itself, never to a sibling, and its positions continue from the
prompt's last M-RoPE position.  It is exact: in float32 log-probs and gradients equal those of separate sequences.
Several rows are packed into one forward without padding; `Layout` tells attention who sees whom.

A response is  y = (c, t):  `<caption>..</caption>` (perception), then `<think>..</think><answer>..</answer>` (reasoning).
"""

import glob
import gzip
import io
import json
import math
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SYSTEM_PROMPT = (
    "Answer in three blocks. In <caption> and </caption> describe everything in the image that the question may need. "
    "In <think> and </think> reason step by step from that description. "
    "In <answer> and </answer> give the final answer alone."
)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image refuses what Pillow warns of
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # what one `<image>` of a data set becomes in the chat text


class InputError(ValueError):
    """A mistake in what the user passed: one line that names the file, row or flag and the cure."""


LOOK = 100  # rows of a source that are looked at before a model is loaded


class InputErrorOfAll(InputError):
    """Raised by every rank alike, so that one of them says it."""


# --------------------------------------------------------------------------------------------------------------- examples
@dataclass
class Example:
    """One row of a data set. `prompt`: chat messages whose content is text with one `<image>` per image."""

    id: str
    prompt: list[dict]
    images: list = field(default_factory=list)  # path, bytes or PIL image each; opened by `load_image` when needed
    response: str | None = None
    answer: str | list[str] | None = None
    rejected: str | None = None  # the student's response of a discriminator warm-up pair; `response` is the teacher's


class Examples(Sequence):
    """Rows of one or several files, turned into `Example` when indexed: a broken row is an InputError there, and images are
    opened only when used. files: [(rows, path, folder of relative image paths)]. sources: [(first row, rows, share of the
    draws)]; not weighted: all rows are drawn alike."""

    def __init__(self, files, sources, weighted):
        self.files, self.sources, self.weighted = files, sources, weighted
        self.ends = np.cumsum([len(rows) for rows, _, _ in files])

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        """-> (rows, path, folder, place in the file)."""
        f = int(np.searchsorted(self.ends, i, side="right"))
        return *self.files[f], i - int(self.ends[f]) + len(self.files[f][0])

    def where(self, i):
        """(file, line or row from 1) of example i."""
        rows, path, _, place = self.find(range(len(self))[i])
        return path, rows.line(place) if isinstance(rows, JsonLines) else place + 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        rows, _, folder, place = self.find(i)
        where = "{}:{}".format(*self.where(i))
        row = rows.parse(place, where) if isinstance(rows, JsonLines) else rows[place]
        return to_example(row, where, folder)


def load_examples(sources, split=None):
    """Examples of one source or a list of sources: a .json, .jsonl, .jsonl.gz or .parquet file, a folder of those, a glob, or
    a Hub data set `owner/name[:file]`. With weights, `a.jsonl:0.9 b.jsonl:0.1`, a source is drawn that often whatever its size.

    Rows are recognised by columns, see `to_example`, and are parsed when they are used; a file of whose first LOOK rows none can
    be used is an error now. Nothing but 16 bytes a row stays in memory. Raises InputError that names the source and the cure.
    """
    sources = [sources] if isinstance(sources, str) else sources
    files, parts = [], []
    for source in sources:
        name, weight = split_weight(source)
        opened = open_source(name, split)
        parts.append((sum(len(rows) for rows, _, _ in files), sum(len(rows) for rows, _, _ in opened), weight))
        files += opened
    given = [weight for _, _, weight in parts if weight is not None]
    if given and (len(given) < len(parts) or not all(0 < weight < np.inf for weight in given)):
        raise InputError(f"--data {' '.join(sources)}: give every source a weight above 0, or none")
    examples = Examples(files, parts, bool(given))
    for end, (rows, _, _) in zip(examples.ends.tolist(), files):
        errors = []
        for i in range(end - len(rows), end)[:LOOK]:
            try:
                examples[i]
                break
            except InputError as error:
                errors.append(error)
        else:
            raise errors[0]
    return examples


def split_weight(source):
    """"a.jsonl:0.9" -> ("a.jsonl", 0.9); without a weight, or when there is such a file, (source, None)."""
    name, _, weight = source.rpartition(":")
    try:
        return (source, None) if os.path.exists(source) or not name else (name, float(weight))
    except ValueError:
        return source, None


def open_source(source, split):
    """One source -> [(rows, path, folder of relative image paths)], one entry a file; no file is empty."""
    kinds = ("jsonl", "json", "jsonl.gz", "json.gz", "parquet")
    if os.path.isdir(source):
        for folder in (source, os.path.join(source, "*")):  # a clone of a Hub data set has its shards one level down
            paths = [path for kind in kinds for path in glob.glob(os.path.join(folder, f"*.{kind}"))]
            paths = sorted(path for path in paths if not os.path.basename(path).startswith("dataset_info"))
            if paths:
                break
        if not paths:
            raise InputError(f"{source}: the folder holds no .jsonl, .json, .jsonl.gz or .parquet file")
    else:
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source))
    if paths:
        files = [(read_file(path), path, os.path.dirname(os.path.abspath(path))) for path in paths]
        files = [file for file in files if len(file[0])]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", source) and not source.partition(":")[0].endswith(kinds):
        from datasets import load_dataset  # imported here: the local formats do not need it

        name, _, file = source.partition(":")
        try:
            rows = load_dataset(name, data_files=file or None, split=split or "train")
        except Exception as error:
            raise InputError(f"{source}: neither a local file nor a data set that the Hub gives ({error})") from error
        files = [(undecoded(rows), source, "")] if len(rows) else []
    else:
        raise InputError(f"{source}: no such file; give a .jsonl, .json or .parquet file, a folder, or a Hub id owner/name")
    if not files:
        raise InputError(f"{source}: the data set is empty")
    return files


class JsonLines(Sequence):
    """The JSON objects of a file, one a line, parsed when indexed. In memory: where each line starts, and its number."""

    def __init__(self, file, path):
        self.file, self.path, starts, at = file, path, [], 0
        for number, line in enumerate(file, 1):
            if line.strip():
                starts += [at, number]
            at += len(line)
            if len(starts) >= 1 << 16:  # as integers of Python they would take four times the memory
                starts = self._keep(starts)
        self._keep(starts)

    def _keep(self, starts):
        self.starts = np.concatenate([getattr(self, "starts", np.empty((0, 2), np.int64)), np.reshape(starts, (-1, 2))])
        return []

    def __len__(self):
        return len(self.starts)

    def line(self, i):
        return int(self.starts[i, 1])

    def parse(self, i, where):
        end = int(self.starts[i + 1, 0]) if i + 1 < len(self) else os.fstat(self.file.fileno()).st_size
        start = int(self.starts[i, 0])
        try:
            row = json.loads(os.pread(self.file.fileno(), end - start, start))  # pread: threads do not share a position
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); one JSON object per line is needed") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        return row

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.parse(i, f"{self.path}:{self.line(i)}")


def read_file(path):
    """Rows of one local file, none of them in memory; recognised by content: parquet, or JSON, gzipped or not, as lines or
    as one array."""
    try:
        file = open(path, "rb")
        magic = file.read(4)
        file.seek(0)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if magic == b"PAR1":
        from datasets import Dataset

        try:
            return undecoded(Dataset.from_parquet(path))
        except Exception as error:
            raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    try:
        if magic[:2] == b"\x1f\x8b":
            plain = tempfile.TemporaryFile()
            with gzip.open(file) as packed:
                shutil.copyfileobj(packed, plain)
            file = plain
            file.seek(0)
        if next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            file.seek(0)
            file = array_lines(file)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: {error}; JSON lines, or one JSON array of objects, are needed") from error
    file.seek(0)
    return JsonLines(file, path)


def array_lines(file, chunk=1 << 20):
    """A JSON array as a temporary file of one value a line; it is read in pieces, however long it is."""
    out, decoder, text = tempfile.TemporaryFile(), json.JSONDecoder(), io.TextIOWrapper(file, encoding="utf-8-sig")
    buffer, at, opening = "", 0, True
    while True:
        at = re.compile(r"\s*\[?\s*" if opening else r"\s*,?\s*").match(buffer, at).end()
        if buffer.startswith("]", at):
            if buffer[at + 1 :].strip() or text.read().strip():
                raise ValueError("not JSON (there is more after the end of the array)")
            return out
        try:
            value, at = decoder.raw_decode(buffer, at)
        except ValueError as error:  # cut by the end of the piece, or broken
            more = text.read(max(chunk, len(buffer)))
            if not more:
                raise ValueError(f"not JSON ({error})") from None
            buffer, at = buffer[0 if opening else at :] + more, 0
            continue
        opening = False
        out.write(json.dumps(value).encode() + b"\n")


def undecoded(dataset):
    """The data set with image columns left as {bytes, path}: they are decoded once, by `load_image`, when used."""
    from datasets import Image as ImageColumn
    from datasets import List

    for name, feature in dataset.features.items():
        if isinstance(feature, ImageColumn):
            dataset = dataset.cast_column(name, ImageColumn(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageColumn):
            dataset = dataset.cast_column(name, List(ImageColumn(decode=False)))
    return dataset


ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


def to_example(row, where, base=""):
    """One row of any recognised schema -> Example; `where` names the row in errors, `base` resolves relative paths.

    Ours: `prompt` (text or chat), `images`, `response`, `answer`. LLaMA-Factory ShareGPT: `messages` or `conversations`,
    `system`. The published alignment and RLVR sets: `prompt`, `teacher_*`, `reward_model`. geometry3k: `problem`.
    Discriminator warm-up pairs: `question` or `prompt`, `image`, `teacher_*`, `student_*`.
    """
    columns = ("messages", "conversations", "prompt", "problem", "question")
    turns = next((row[column] for column in columns if row.get(column)), None)
    if not turns:
        found = [column for column in columns if column in row]
        if found:
            raise InputError(f"{where}: the column {found[0]} is empty")
        raise InputError(f"{where}: none of the columns {', '.join(columns)}; found {', '.join(map(str, row)) or 'none'}")
    messages = to_messages([{"role": "user", "content": turns}] if isinstance(turns, str) else turns, where)
    if row.get("system") and messages[0]["role"] != "system":
        messages = to_messages([{"role": "system", "content": row["system"]}], where) + messages
    response, answer, rejected = row.get("response"), row.get("answer"), None
    if isinstance(row.get("reward_model"), dict):
        truth = row["reward_model"].get("ground_truth")
        answer = answer if truth is None else truth
        more = row["reward_model"].get("equivalent_answers") or []
        answer = [answer, *(more if isinstance(more, list) else [more])] if more else answer
    if messages[-1]["role"] == "assistant":
        response = messages.pop()["content"]
    if not any(message["role"] == "user" for message in messages):
        raise InputError(f"{where}: the chat has no turn of the user")
    if isinstance(answer, list):
        answer = [a for a in (to_answer(a, where) for a in answer) if a] or None
    answer = answer if isinstance(answer, list) else to_answer(answer, where)
    if row.get("teacher_response") or row.get("teacher_caption"):
        response = row.get("teacher_response") or join_blocks(row, "teacher", answer, where)
    if row.get("student_caption"):
        rejected = join_blocks(row, "student", answer, where)
    for name, text in (("response", response), ("student's response", rejected)):
        if not isinstance(text, str | None):
            raise InputError(f"{where}: the {name} must be a text, not {type(text).__name__}")
    images = row.get("images") or row.get("image")
    images = images if isinstance(images, list) else [images] if images else []
    images = [resolve(image, base, where) for image in images]
    return Example(str(row.get("id") or where), messages, images, response, answer, rejected)


def to_messages(turns, where):
    """Chat turns of either dialect -> [{"role", "content"}]."""
    if not isinstance(turns, list):
        raise InputError(f"{where}: the chat must be a text or a list of turns, not {type(turns).__name__}")
    messages = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {"content": turn}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: a chat turn needs the texts role and content (or from and value), got {str(turn)[:100]}")
        if role not in ROLES:
            raise InputError(f"{where}: the role {role[:40]} is none of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def to_answer(answer, where):
    """A gold answer as text; numbers are written out, and what is no number (NaN is a table's empty cell) is no answer."""
    if isinstance(answer, (int, float)):
        return str(answer) if math.isfinite(answer) else None
    if not isinstance(answer, str | None):
        raise InputError(f"{where}: the answer must be a text, a number or a list of those, not {type(answer).__name__}")
    return answer


def join_blocks(row, who, answer, where):
    """The canonical response from a published row's two parts, which come with or without their tags. A trace without an
    <answer> block gets the row's answer, or an empty one in warm-up pairs, which carry none."""
    caption, cot = row[f"{who}_caption"], row.get(f"{who}_cot") or ""
    if not isinstance(caption, str) or not isinstance(cot, str):
        raise InputError(f"{where}: {who}_caption and {who}_cot must be texts")
    answer = (answer[0] if isinstance(answer, list) else answer) or ""
    if "<caption>" not in caption:
        caption = f"<caption>\n{caption.strip()}\n</caption>"
    if "<think>" not in cot:
        think, tag, rest = cot.partition("<answer>")
        cot = f"<think>\n{think.strip()}\n</think>\n{tag}{rest}"
    if "<answer>" not in cot:
        cot = f"{cot.strip()}\n<answer>\n{answer}\n</answer>"
    return f"{caption.strip()}\n{cot.strip()}"


def resolve(image, base, where):
    """A picture as stored in a row -> path, bytes or PIL image; a path that leads nowhere is an error at once."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image.get("path")
    if isinstance(image, str):
        path = os.path.join(base, image)
        if not os.path.isfile(path):
            raise InputError(f"{where}: image {path} does not exist; paths are relative to the data file")
        return path
    if not isinstance(image, bytes | Image.Image):
        raise InputError(f"{where}: an image must be bytes, a path or a picture, not {type(image).__name__}")
    return image


def load_image(image):
    """A path, bytes or PIL image -> upright RGB PIL image: first frame, transparency on white, 16 bits scaled to 8. Raises
    an exception of Pillow's, or ValueError for more than Image.MAX_IMAGE_PIXELS pixels (a decompression bomb)."""
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS} in all")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode == "F":
        raise ValueError(f"32-bit pictures (mode {image.mode}) have no agreed range; convert them to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # convert("RGB") would clip it at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------- prompts
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


def encode_prompt(example, tokenizer, image_processor, max_tokens=None, system_prompt=SYSTEM_PROMPT):
    """Example -> Prompt, or None when it is longer than `max_tokens` (image tokens are never cut).

    A system message in the row is kept; otherwise `system_prompt` is put in front. Raises InputError when the number of
    `<image>` placeholders and of images differ, or an image cannot be read.
    """
    messages = [dict(m) for m in example.prompt]
    if messages[0]["role"] != "system" and system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    for message in messages:
        check_text(message["content"], example.id)
    found = sum(m["content"].count("<image>") for m in messages)
    if found == 0 and example.images:  # pictures without a place in the text come first, as the chat models expect
        user = next(m for m in messages if m["role"] == "user")
        user["content"] = "<image>" * len(example.images) + user["content"]
    elif found != len(example.images):
        raise InputError(f"{example.id}: {found} <image> in the text but {len(example.images)} images in the row")
    for message in messages:
        message["content"] = message["content"].replace("<image>", IMAGE)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pixel_values = grid = None
    if example.images:
        try:
            pictures = [load_image(image) for image in example.images]
            encoded = image_processor(images=pictures, return_tensors="pt")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise InputError(f"{example.id}: image cannot be read ({error})") from error
        pixel_values, grid = encoded["pixel_values"], encoded["image_grid_thw"]
        counts = iter((grid.prod(-1) // image_processor.merge_size**2).tolist())
        text = re.sub(re.escape("<|image_pad|>"), lambda _: "<|image_pad|>" * next(counts), text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if max_tokens is not None and len(ids) > max_tokens:
        return None
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return Prompt(ids, mrope_positions(ids, grid, pad, image_processor.merge_size), pixel_values, grid)


def check_text(text, where):
    """Raise InputError for half a surrogate pair, which no tokenizer takes, and for a literal image token, which would be
    taken for a picture that is not there."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text is no valid UTF-8 ({error.reason} at character {error.start})") from None
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>"):
        if token in text:
            raise InputError(f"{where}: the text contains {token}; write <image> where a picture belongs, or remove it")


def encode_response(text, tokenizer):
    """Token ids of a response as a policy would emit it: its text, then the EOS."""
    check_text(text or "", "response")
    return tokenizer(text or "", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def mrope_positions(input_ids, grid_thw, image_token_id, merge_size):
    """M-RoPE positions [3, P] of a prompt: text counts on in all three axes, an image of h x w merged tokens takes
    (t, row, column) from the current position and moves it on by max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2)."""
    out, at, i = [], 0, 0
    grids = iter(grid_thw.tolist() if grid_thw is not None else [])
    ids = input_ids.tolist()
    while i < len(ids):
        if ids[i] == image_token_id:
            t, h, w = next(grids)
            h, w = h // merge_size, w // merge_size
            out.append(torch.stack(torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij")).reshape(3, -1) + at)
            at, i = at + max(h, w), i + t * h * w
        else:
            out.append(torch.full((3, 1), at))
            at, i = at + 1, i + 1
    return torch.cat(out, dim=1)


def without_images(prompt, tokenizer):
    """The same prompt as a text-only reader sees it: image tokens and their markers removed."""
    drop = torch.tensor(tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]))
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, drop)]
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1), None, None)


# -------------------------------------------------------------------------------------------------------- response format
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


# ------------------------------------------------------------------------------------------------------------------- rows
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


def set_attention(backbone, name):
    """Choose sdpa, flash or flex for the language model and the vision tower of a loaded Qwen3VLModel. (Not through
    from_pretrained: there a name with 'flash' in it makes transformers look for a kernel of its own.)"""
    for part in (backbone.language_model, backbone.visual):
        part.config._attn_implementation = ATTENTION[name]


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


# -------------------------------------------------------------------------------------------------------------- log-probs
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
    """`target_logprobs` through FSDP: sharded models carry it as a registered forward method (see sft.shard)."""
    return getattr(model, "target_logprobs", partial(target_logprobs, model))(pack, **kwargs)


def branch_logprobs(model, prompt, branches):
    """Log-probs of every token of every branch of one prompt, as one shared-prompt row: list of [L_i], differentiable."""
    pack = pack_rows([prompt], [(0, branch) for branch in branches], model.device)
    return list(pack_logprobs(model, pack)[0].split(pack.lengths))


# --------------------------------------------------------------------------------------------------------------- sampling
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
