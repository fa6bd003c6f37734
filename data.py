"""Rows of any file -> Example -> Prompt, and the feed that gives every stage its next batch."""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps

from rows import Prompt
from runtime import InputError, InputErrorOfAll, integer, real


SYSTEM_PROMPT = (
    "Answer in three blocks. In <caption> and </caption> describe everything in the image that the question may need. "
    "In <think> and </think> reason step by step from that description. "
    "In <answer> and </answer> give the final answer alone."
)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image refuses what Pillow warns of
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # what one `<image>` of a data set becomes in the chat text
LOOK = 100  # rows of a source that are looked at before a model is loaded


# -------------------------------------------------------------------------------------------------------------- examples
@dataclass
class Example:
    """One row of a data set. `prompt`: chat messages whose content is text with one `<image>` per image."""

    id: str
    prompt: list[dict]
    images: list = field(default_factory=list)  # path, bytes or PIL image each; opened by `load_image` when needed
    response: str | None = None
    answer: str | list[str] | None = None
    rejected: str | None = None  # the student's response of a discriminator warm-up pair; `response` is the teacher's
    options: list[str] = field(default_factory=list)  # texts of the choices, A first; empty when there are none
    digits: int | None = None  # numbers in an answer are compared after rounding to so many decimals
    info: dict = field(default_factory=dict)  # what a report groups by


class Examples(Sequence):
    """Rows of one or several files, turned into `Example` when indexed: a broken row is an InputError there, and images are
    opened only when used. files: [(rows, path, folder of relative image paths)]. sources: [(first row, rows, share of the
    draws)]; not weighted: all rows are drawn alike. read(row, where, folder) -> Example (default: to_example)."""

    def __init__(self, files, sources, weighted, read=None):
        self.files, self.sources, self.weighted, self.read = files, sources, weighted, read or to_example
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
        return self.read(row, where, folder)


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
    options = row.get("options") or row.get("choices")
    options = options if isinstance(options, list) and all(isinstance(text, str) for text in options) else []
    return Example(str(row.get("id") or where), messages, images, response, answer, rejected, options)


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


# --------------------------------------------------------------------------------------------------------------- prompts
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


# ------------------------------------------------------------------------------------------------------------------ feed
def data_flags(parser):
    """The flags of everything that reads examples."""
    group = parser.add_argument_group("data")
    group.add_argument("--split", default=None, help="split of a Hub data set")
    group.add_argument("--system-prompt", default=None, metavar="FILE", help="system message for rows that carry none")
    group.add_argument("--max-prompt", type=integer(1), default=2048, help="longer prompts are dropped and counted, never cut")
    pixel_flags(group)
    group.add_argument("--bad-rows", choices=("skip", "stop"), default="skip", help="rows that cannot be used")
    group.add_argument("--max-bad", type=real(0, 1), default=0.05, help="share of unusable rows that ends the run")


def pixel_flags(group):
    group.add_argument("--min-pixels", type=integer(1), default=None, help="smaller pictures are enlarged (default: the checkpoint's)")
    group.add_argument("--max-pixels", type=integer(1), default=None, help="larger pictures are reduced (default: the checkpoint's)")


def system_prompt(args):
    if args.system_prompt is None:
        return SYSTEM_PROMPT
    try:
        with open(args.system_prompt, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--system-prompt {args.system_prompt}: {getattr(error, 'strerror', None) or error}") from error


def load_data(sources, args, check=lambda example: None):
    """load_examples, and a look at the first rows of every source, with --bad-rows stop at all of them: a wrong file is an error
    now, not after a model was loaded. check(example) raises InputError for a row that lacks what the stage needs."""
    try:
        examples = load_examples(sources, args.split)
    except InputError as error:
        raise InputErrorOfAll(str(error)) from error
    for first, count, _ in examples.sources:
        look, bad = count if args.bad_rows == "stop" else min(LOOK, count), 0
        for i in range(first, first + look):
            try:
                check(examples[i])
            except InputError as error:
                bad += 1
                if args.bad_rows == "stop":
                    raise InputErrorOfAll(f"{error} (--bad-rows skip leaves such rows out)") from error
                if bad > allowed(look, count, args):
                    raise too_many(bad, look, args, error) from error
    return examples


def allowed(seen, rows, args):
    """How many of `seen` rows may be bad: the share --max-bad, and before all rows were seen three standard deviations more, so
    that a set with fewer bad rows does not end a run by chance."""
    share = args.max_bad * seen
    return share if seen >= rows else share + 3 * math.sqrt(share)


def too_many(bad, seen, args, last):
    why = f"{bad} of {seen} rows looked at cannot be used, more than --max-bad {args.max_bad:g}"
    return InputErrorOfAll(f"{last} ({why}; with a higher one they are skipped and listed in {args.out}/skipped.jsonl)")


def order(n, start, seed):
    """Endless indices of a data set of n rows from global position `start`: a new permutation every epoch."""
    epoch, at = divmod(start, n)
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(n)[at:]:
            yield int(i)
        epoch, at = epoch + 1, 0


def mixed_order(sources, start, seed, block=1024):
    """The same for weighted sources [(first row, rows, weight)]: every position draws a source, which gives its next row."""
    firsts, sizes, weights = zip(*sources)
    shares = np.cumsum(weights)[:-1] / sum(weights)
    choose = lambda b: np.searchsorted(shares, np.random.default_rng([seed, b, 1]).random(block), side="right")
    b, at = divmod(start, block)
    past = np.concatenate([choose(i) for i in range(b)] + [choose(b)[:at]])
    orders = [order(n, int((past == s).sum()), seed) for s, n in enumerate(sizes)]
    while True:
        for s in choose(b)[at:]:
            yield firsts[s] + next(orders[s])
        b, at = b + 1, 0


class Feed:
    """The next usable examples of a data set, in an order that depends on the seed alone and is the same on every rank.

    encode(example) -> anything, or None for a row that is too long; an exception makes the row unusable. The ranks encode a
    share of the candidates each, in threads and one batch ahead, and tell each other which were usable. What is not is
    replaced by the next row and written to OUT/skipped.jsonl; too many unusable rows (--max-bad) end the run.
    """

    def __init__(self, examples, encode, args, world, progress):
        self.examples, self.encode, self.args, self.world = examples, encode, args, world
        self.position, self.dropped, self.bad = (progress.get(key, 0) for key in ("position", "dropped", "bad"))
        if progress.get("rows", len(examples)) != len(examples):
            raise InputErrorOfAll(f"--resume: --data has {len(examples)} rows, but {progress['rows']} when the state was saved")
        self.pool, self.ahead = ThreadPoolExecutor(4), {}
        self.path = os.path.join(args.out, "skipped.jsonl")
        self.new, self.written = [], set()  # (file, row): after the first epoch a row is counted again, but not written again
        if os.path.exists(self.path):
            with open(self.path) as file:
                self.written = {(row["file"], row["row"]) for row in map(json.loads, file)}

    def progress(self):
        return {"position": self.position, "dropped": self.dropped, "bad": self.bad, "rows": len(self.examples)}

    def try_encode(self, i):
        """-> (encoded or None, why it cannot be used or None, whether that is the row's fault)."""
        try:
            encoded = self.encode(self.examples[i])
        except Exception as error:  # whatever is wrong with a row, it must not end a run of days
            return None, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}", True
        return encoded, None if encoded is not None else "too long for --max-prompt or --max-length", False

    def mine(self, candidates):
        """The places in a list of candidates that this rank encodes."""
        return [c for c in range(len(candidates)) if c * self.world.size // len(candidates) == self.world.rank]

    def draw(self, count, step):
        """-> (indices of the next `count` usable examples, {place among them: encoded} for those encoded on this rank)."""
        indices, encoded, lost = [], {}, 0  # lost: in a row
        if self.examples.weighted:
            upcoming = mixed_order(self.examples.sources, self.position, self.args.seed)
        else:
            upcoming = order(len(self.examples), self.position, self.args.seed)
        while len(indices) < count:
            candidates = [next(upcoming) for _ in range(count - len(indices))]
            jobs = {c: self.ahead.pop(candidates[c], None) or self.pool.submit(self.try_encode, candidates[c])
                    for c in self.mine(candidates)}  # fmt: skip
            results = {c: job.result() for c, job in jobs.items()}
            verdicts = self.world.gather({c: result[1:] for c, result in results.items()})
            verdicts = {c: verdict for part in verdicts for c, verdict in part.items()}
            self.position += len(candidates)
            for c, i in enumerate(candidates):
                reason, fault = verdicts[c]
                if reason is None:
                    if c in results:
                        encoded[len(indices)] = results[c][0]
                    indices.append(i)
                    lost = 0
                else:
                    lost += 1
                    self.skip(i, reason, fault, step)
            if lost >= 2 * len(self.examples):  # two epochs; between two uses of a row lie fewer
                raise InputErrorOfAll(f"--data: no row can be used; the last: {reason}")
        self.write()
        upcoming = [next(upcoming) for _ in range(count)]
        self.ahead = {upcoming[c]: self.pool.submit(self.try_encode, upcoming[c]) for c in self.mine(upcoming)}
        return indices, encoded

    def batch(self, count, step, length):
        """This rank's share, about equal in tokens, of the next `count` usable examples, encoded; length(encoded) -> tokens."""
        indices, encoded = self.draw(count, step)
        known = self.world.gather({i: length(item) for i, item in encoded.items()})
        lengths = {i: n for part in known for i, n in part.items()}
        mine = self.world.share([lengths[i] for i in range(count)])
        return [encoded.get(i) or self.encode(self.examples[indices[i]]) for i in mine]

    def skip(self, i, reason, fault, step):
        """Count and write down a row that cannot be used; InputError when that ends the run."""
        file, row = self.examples.where(i)
        where, reason = f"{file}:{row}", " ".join(reason.removeprefix(f"{file}:{row}: ").split())
        self.dropped += not fault
        self.bad += fault
        if fault and self.args.bad_rows == "stop":
            raise InputErrorOfAll(f"{where}: {reason} (--bad-rows skip leaves such rows out)")
        if (file, row) not in self.written:
            self.new.append({"step": step + 1, "file": file, "row": row, "reason": reason})
            self.written.add((file, row))
        if self.bad > allowed(max(self.position, min(LOOK, len(self.examples))), len(self.examples), self.args):
            if os.path.exists(os.path.join(self.args.out, "metrics.jsonl")):  # earlier a run leaves nothing behind
                self.write()
            raise too_many(self.bad, self.position, self.args, f"{where}: {reason}")

    def write(self):
        """Append the new rows to OUT/skipped.jsonl."""
        if self.world.rank == 0 and self.new:
            os.makedirs(self.args.out, exist_ok=True)
            with open(self.path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.new)
        self.new = []

    def close(self):
        """Print the totals."""
        self.pool.shutdown(cancel_futures=True)
        if self.world.rank == 0 and self.dropped + self.bad:
            print(f"rows: {self.position} seen, {self.dropped} too long, {self.bad} unusable; listed in {self.path}", flush=True)
