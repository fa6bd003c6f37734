"""Rows of any file -> Example -> Prompt, and the feed that gives every stage its next batch.

    load_examples(sources)     an `Example` for each row, made when it is used
    look(examples, ..)         each is looked at once, before a model is loaded
    encode_prompt(example, ..) messages and pictures -> `Prompt`
    Feed(examples, ..)         the next batch, encoded by threads while the last one trains
"""

import base64
import gzip
import io
import itertools
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
from functools import partial
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from flags import InputError, InputErrorOfAll, quote
from rows import Prompt
from runtime import about, append_rows, fingerprint, write_rows

SYSTEM_PROMPT = (
    "Answer in three blocks. "
    "In <caption> and </caption> describe everything in the image that the question may need. "
    "In <think> and </think> reason step by step from that description. "
    "In <answer> and </answer> give the final answer alone."
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # what one `<image>` becomes in the chat text
# load_image refuses what Pillow only warns of
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---------------------------------------------------------------------------------------- files
class File(NamedTuple):
    """One file, or a split of a Hub data set."""

    rows: Sequence  # of dicts, one a row; read when indexed
    path: str
    folder: str  # where relative paths of pictures start


@dataclass
class Example:
    """One row of a data set."""

    id: str
    prompt: list[dict]  # chat messages whose content is text with one `<image>` per image
    images: list = field(default_factory=list)  # path, bytes or PIL image; see `load_image`
    response: str | None = None
    answer: str | list[str] | None = None
    rejected: str | None = None  # the student's response of a discriminator warm-up pair
    options: list[str] = field(default_factory=list)  # texts of the choices, A first
    digits: int | None = None  # numbers are compared after rounding to so many decimals
    info: dict = field(default_factory=dict)  # what a report groups by
    row: dict | None = field(default=None, repr=False)  # as it stands in the data set


class Examples(Sequence):
    """Rows of one or several files, turned into `Example` when indexed: a broken row is an
    InputError there, which names it, and images are opened only when used.

    files: list of File. sources: [(first row, rows, share of the draws)] of weighted sources;
    without, all rows are drawn alike. read(row, where, folder) -> Example (default: to_example)."""

    def __init__(self, files, sources=(), read=None):
        self.files = files
        self.sources = sources
        self.read = read or to_example
        self.starts = np.cumsum([0] + [len(file.rows) for file in files])  # and the end

    def __len__(self):
        return int(self.starts[-1])

    def find(self, i):
        """-> (File, place in it)."""
        i = range(len(self))[i]
        f = np.searchsorted(self.starts, i, side="right") - 1
        return self.files[f], i - int(self.starts[f])

    def where(self, i):
        """(path, line or row from 1) of example i."""
        file, place = self.find(i)
        lines = isinstance(file.rows, JsonLines)
        return file.path, file.rows.line(place) if lines else place + 1

    def __getitem__(self, i):
        file, place = self.find(i)
        where = "{}:{}".format(*self.where(i))
        with about(where):
            return self.read(file.rows[place], where, file.folder)

    def fingerprint(self):
        """A text that changes when the rows do."""
        found = [self.sources]
        for file in self.files:
            local = os.path.isfile(file.path)
            found.append(fingerprint(file.path) if local else file.rows._fingerprint)
        return f"{len(self)} rows, content {zlib.crc32(repr(found).encode()):08x}"


def load_examples(sources, split=None):
    """Examples of one source or a list of sources: a .json, .jsonl, .jsonl.gz or .parquet file, a
    folder of those, a glob, or a Hub data set `owner/name[:file]`. With weights, `a.jsonl:0.9
    b.jsonl:0.1`, a source is drawn that often whatever its size.

    Of a file, 16 bytes a row stay in memory. Raises InputError that names the source and the cure.
    """
    sources = as_list(sources)
    files, parts, first = [], [], 0
    for source in sources:
        name, weight = split_weight(source)
        opened = Examples(open_source(name, split))
        parts.append((first, len(opened), weight))
        files += opened.files
        first += len(opened)
    weights = {weight for _, _, weight in parts}
    if weights == {None}:
        return Examples(files)
    if not all(weight and 0 < weight < math.inf for weight in weights):
        raise InputError(f"--data {' '.join(sources)}: give every source a weight above 0, or none")
    return Examples(files, parts)


def as_list(value):
    return value if isinstance(value, list) else [value]


def split_weight(source):
    """"a.jsonl:0.9" -> ("a.jsonl", 0.9); without a weight, or when there is such a file, (source,
    None)."""
    name, _, weight = source.rpartition(":")
    if os.path.exists(source) or not name:
        return source, None
    try:
        return name, float(weight)
    except ValueError:
        return source, None


POINTER = b"version https://git-lfs"  # what git keeps in place of a large file
KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
SPLITS = {"train", "test", "validation", "val", "dev", "testmini"}


def open_source(source, split, default=None):
    """One source -> list of File; no file is empty. default: the split that is taken where there
    are several and `split` is None (None: of a Hub id or save_to_disk train, of a folder none)."""
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", source)
    if is_saved(source):
        files = [File(load_saved(source, split, default or "train"), source, source)]
    elif paths := files_of(source, split, default):
        files = [File(read_file(path), path, os.path.dirname(path)) for path in paths]
    elif hub and not hub[1].endswith(KINDS):
        from datasets import load_dataset  # imported here: the local formats do not need it

        with about(f"{source}: neither a local file nor a data set that the Hub gives"):
            rows = load_dataset(hub[1], data_files=hub[2], split=split or default or "train")
            files = [File(undecoded(rows), source, "")]
    else:
        raise InputError(f"{source}: no such file; give a .jsonl, .json or .parquet file, "
                         "a folder, or a Hub id owner/name")
    files = [file for file in files if len(file.rows)]
    if not files:
        raise InputError(f"{source}: the data set is empty")
    return files


def files_of(source, split, default):
    """Paths of a file, a glob, or the data files of a folder (in a clone of a Hub data set they lie
    one level down). A file belongs to the split in its name, as `train-0001.parquet` or
    `test/0001.jsonl` do; of several splits one is chosen: nobody trains on a test set unasked."""
    if not os.path.isdir(source):
        paths = [source] if os.path.exists(source) else sorted(glob(source))
        if paths and split:
            raise InputError(f"--split {split}: {source} is a file, it has no splits")
        return paths
    for pattern in ("*", "*/*"):
        names = [name for name in sorted(glob(pattern, root_dir=source)) if name.endswith(KINDS)]
        names = [name for name in names if not os.path.basename(name).startswith("dataset_info")]
        if names:
            break
    else:
        raise InputError(f"{source}: the folder holds no file of {', '.join(KINDS)}")
    words = {name: re.split(r"[-_./]", name) for name in names}
    found = sorted(SPLITS & {word for parts in words.values() for word in parts})
    if split is None and len(found) > 1:
        split = choose_split(source, found, default)
    chosen = [name for name in names if split is None or split in words[name]]
    if not chosen:
        raise InputError(f"--split {split}: no file of {source} has it in its name")
    return [os.path.join(source, name) for name in chosen]


def choose_split(source, found, default):
    """The split that nobody asked for, said in one line; InputError where it is not there."""
    if default not in found:
        raise InputError(f"{source}: holds {', '.join(found)}; choose one with --split, or name "
                         "its files")
    if len(found) > 1 and os.environ.get("RANK", "0") == "0":
        print(f"{source}: holds {', '.join(found)}; {default} is taken", flush=True)
    return default


def is_saved(folder):
    """Did datasets' save_to_disk write this folder?"""
    names = set(glob("*.json", root_dir=folder))
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def load_saved(folder, split, default):
    from datasets import Dataset, load_from_disk

    with about(f"{folder}: not a readable folder of save_to_disk"):
        saved = load_from_disk(folder)
    if not isinstance(saved, Dataset):  # several splits
        if split not in saved:
            split = choose_split(folder, list(saved), None if split else default)
        return undecoded(saved[split])
    if split:
        raise InputError(f"--split {split}: {folder} is one data set, it has no splits")
    return undecoded(saved)


class JsonLines(Sequence):
    """The JSON objects of a file, one a line, parsed when indexed. In memory: where each line ends,
    and its number."""

    def __init__(self, file):
        self.file = file
        file.seek(0)
        # a blank line counts as a line, but holds no object: its length is kept with a minus
        lengths = (len(line) if line.strip() else -len(line) for line in file)
        lengths = np.fromiter(lengths, np.int64)
        self.lines = np.flatnonzero(lengths > 0)
        self.ends = np.abs(lengths).cumsum()[self.lines]

    def __len__(self):
        return len(self.lines)

    def line(self, i):
        """Number, from 1, of the line of object i."""
        return int(self.lines[i]) + 1

    def __getitem__(self, i):
        start = int(self.ends[i - 1]) if i else 0  # blank lines before the object do no harm
        # pread: threads do not share a position
        text = os.pread(self.file.fileno(), int(self.ends[i]) - start, start)
        with about("not JSON"):
            row = json.loads(text)
        if not isinstance(row, dict):
            raise InputError(f"a JSON object is needed, not {type(row).__name__}")
        return row


def read_file(path):
    """Rows of one local file, none of them in memory; recognised by content: parquet, or JSON,
    gzipped or not, as lines or as one array."""
    with about(path):
        file = open(path, "rb")
        magic = file.read(40)
        if magic.startswith(POINTER):
            raise InputError("a Git-LFS pointer, not the file itself; run git lfs pull")
        if magic.startswith(b"PAR1") or path.endswith(".parquet"):
            from datasets import Dataset

            with about("not a readable parquet file"):
                return undecoded(Dataset.from_parquet(path))
        file.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            packed = gzip.open(file)
            file = tempfile.TemporaryFile()
            shutil.copyfileobj(packed, file)
            file.seek(0)
        start = file.read(1 << 20).removeprefix(b"\xef\xbb\xbf").lstrip()
        return JsonLines(array_lines(file) if start.startswith(b"[") else file)


def array_lines(file, chunk=1 << 20):
    """A JSON array as a temporary file of one value a line; it is read in pieces."""
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    out = tempfile.TemporaryFile()
    while text.read(1) != "[":  # which is there
        pass
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,]*")
    buffer, at = "", 0
    while True:
        at = gap.match(buffer, at).end()
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
            buffer, at = buffer[at:] + more, 0
        else:
            out.write(json.dumps(value).encode() + b"\n")


def undecoded(dataset):
    """The data set with image columns left as {bytes, path}, for `load_image` to decode."""
    from datasets import Image as ImageColumn
    from datasets import List

    for name, feature in dataset.features.items():
        if isinstance(feature, ImageColumn):
            dataset = dataset.cast_column(name, ImageColumn(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageColumn):
            dataset = dataset.cast_column(name, List(ImageColumn(decode=False)))
    return dataset


# ---------------------------------------------------------------------------------------- examples
ROLES = {"human": "user", "gpt": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}
CHATS = ("messages", "conversations", "prompt", "problem", "question", "query", "instruction")
RESPONSES = ("response", "output")
PARTS = ("bytes", "path", "image", "image_url", "url", "base64")  # where an image part keeps it
UNREAD = ("video", "videos", "audio", "audios")  # columns that a row must not fill


def first_of(row, columns):
    """The first of the columns that holds something, or None."""
    return next((row[column] for column in columns if row.get(column)), None)


def to_example(row, where, base=""):
    """One row of any recognised schema -> Example. where: its id if it has none; base: folder of
    relative paths. Raises InputError, to which `Examples` adds the row.

    Ours: `prompt` (text or chat), `images`, `response`, `answer`. LLaMA-Factory ShareGPT:
    `messages` or `conversations`, `system`. TRL and OpenAI: content as a list of parts. The
    published alignment and RLVR sets: `prompt`, `teacher_*`, `reward_model`. geometry3k: `problem`.
    R1-V: `problem`, `solution`. Alpaca: `instruction`, `input`, `output`. Discriminator warm-up
    pairs: `question` or `prompt`, `image`, `teacher_*`, `student_*`.
    """
    for column in UNREAD:
        if row.get(column):
            raise InputError(f"the row has a column {column}; only pictures are read")
    messages, pictures = read_chat(row)
    last = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not any(message["role"] == "user" for message in messages):
        raise InputError("the chat has no turn of the user")
    answer = read_answer(row, last)
    response = first_of(row, RESPONSES) if last is None else last
    if row.get("teacher_response") or row.get("teacher_caption"):
        response = row.get("teacher_response") or join_blocks(row, "teacher", answer)
    rejected = join_blocks(row, "student", answer) if row.get("student_caption") else None
    if not isinstance(response, str | None):
        raise InputError(f"the response must be a text, not {type(response).__name__}")
    # those of the columns fill the places that the chat leaves open
    column = as_list(row.get("images") or row.get("image"))
    column = iter([image for image in column if image is not None and image != ""])
    images = [next(column, None) if image is None else image for image in pictures]
    images = [image for image in [*images, *column] if image is not None]
    options = row.get("options") or row.get("choices")
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        options = []
    name = str(row.get("id") or where).encode("utf-8", "backslashreplace").decode()
    return Example(name, messages, [resolve(image, base) for image in images],
                   without_eos(response), answer, without_eos(rejected), options, row=row)


def read_chat(row):
    """The chat of a row -> [{"role", "content"}], its system message first if it has one, and the
    pictures that stand in it, None for a placeholder."""
    turns = first_of(row, CHATS)
    if turns is None:
        found = quote(", ".join(map(str, row)) or "none")
        columns = ", ".join(CHATS)
        raise InputError(f"none of the columns {columns} is there and not empty; found {found}")
    # a text that begins as a list of objects, one of which has a role: a chat written as a text
    if isinstance(turns, str) and re.match(r"""\s*\[\s*\{.*["'](role|from)["']\s*:""", turns, re.S):
        with about("the chat is a text that is not JSON"):
            turns = json.loads(turns)
    if isinstance(turns, str):
        more = row.get("input") if "instruction" in row else None
        turns = [{"role": "user", "content": f"{turns}\n{more}" if more else turns}]
    if not isinstance(turns, list):
        what = type(turns).__name__
        raise InputError(f"the chat must be a text or a list of turns, not {what}")
    pictures = []
    messages = [to_message(turn, pictures) for turn in turns]
    if row.get("system") and messages[0]["role"] != "system":
        turn = {"role": "system", "content": row["system"]}
        messages.insert(0, to_message(turn, pictures))
    return messages, pictures


def to_message(turn, pictures):
    """A chat turn of either dialect -> {"role", "content"}; pictures that stand in it, and None for
    each placeholder of the prompt, are appended to `pictures`."""
    turn = turn if isinstance(turn, dict) else {"content": turn}
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if turn.get("tool_calls"):
        raise InputError("a chat turn has tool_calls; only texts and pictures are read")
    if isinstance(role, str) and role not in ROLES:
        raise InputError(f"the role {quote(role)} is none of {', '.join(ROLES)}")
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise InputError("a chat turn needs the texts role and content (or from and value), "
                         f"got {quote(turn)}")
    role, text = ROLES[role], ""
    for part in as_list(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            if role != "assistant":  # there <image> is a word
                pictures += [None] * part["text"].count("<image>")
        elif kind in ("image", "image_url"):
            text += "<image>"
            pictures.append(first_of(part, PARTS))
        else:
            raise InputError("a part of a chat turn is neither a text nor a picture, "
                             f"got {quote(part)}")
    return {"role": role, "content": without_eos(text) if role == "assistant" else text}


def without_eos(response):
    """A response less the EOS that some files write out: it is added anew when encoded."""
    return response and re.sub(r"\s*(<\|(im_end|endoftext)\|>\s*)+$", "", response)


def read_answer(row, last):
    """The gold answer of a row, a text or a list of accepted texts; None where it has none. last:
    what the assistant's last turn says, whose <answer> block is the answer of LLaVA's rows."""
    model = row.get("reward_model")
    model = model if isinstance(model, dict) else {}
    said = re.findall(r"<answer>.*?</answer>", last or "", re.S)
    given = [model.get("ground_truth"), row.get("answer"), row.get("solution"), *said[-1:]]
    answer = next((one for one in given if one is not None), None)
    if more := model.get("equivalent_answers"):
        answer = [answer, *as_list(more)]
    if not isinstance(answer, list):
        return to_answer(answer)
    texts = [to_answer(one) for one in answer]
    return [text for text in texts if text] or None


def to_answer(answer):
    """A gold answer as text; numbers are written out, and what is no number (NaN is a table's empty
    cell) is no answer."""
    if answer is None or (isinstance(answer, float) and not math.isfinite(answer)):
        return None
    if not isinstance(answer, str | int | float):
        what = type(answer).__name__
        raise InputError(f"the answer must be a text, a number or a list of those, not {what}")
    check_text(str(answer), "answer")
    return unwrap(str(answer))


def unwrap(answer):
    """What a gold says: the last <answer> block, what follows the last ####, the last \\boxed{}."""
    tagged = re.findall(r"<answer>(.*?)</answer>", answer, re.S)
    answer = (tagged or [answer])[-1].rpartition("####")[2]
    _, box, inside = answer.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(inside if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:place].strip()
    return answer.strip()


def join_blocks(row, who, answer):
    """The canonical response from a published row's two parts, which come with or without their
    tags. A trace without an <answer> block gets the row's answer, or an empty one in warm-up pairs,
    which carry none."""
    caption = row[f"{who}_caption"]
    cot = row.get(f"{who}_cot") or ""
    if not isinstance(caption, str) or not isinstance(cot, str):
        raise InputError(f"{who}_caption and {who}_cot must be texts")
    if "<caption>" not in caption:
        caption = f"<caption>\n{caption.strip()}\n</caption>"
    if "<think>" not in cot:
        think, tag, rest = cot.partition("<answer>")
        cot = f"<think>\n{think.strip()}\n</think>\n{tag}{rest}"
    if "<answer>" not in cot:
        cot = f"{cot.strip()}\n<answer>\n{as_list(answer)[0] or ''}\n</answer>"
    return f"{caption.strip()}\n{cot.strip()}"


def resolve(image, base):
    """A picture as stored in a row -> path, bytes or PIL image; a path that leads nowhere is an
    error at once."""
    if isinstance(image, dict):
        image = first_of(image, PARTS)
    if isinstance(image, str):
        path = os.path.join(base, image)
        if os.path.isfile(path):
            if os.path.getsize(path) < 1000 and Path(path).read_bytes().startswith(POINTER):
                raise InputError(f"image {quote(path, 200)} is a Git-LFS pointer, "
                                 "not the picture; run git lfs pull")
            return path
        data = image.partition(";base64,")[2] if image.startswith("data:") else image
        if len(data) < 64 or not re.fullmatch(r"[A-Za-z0-9+/_=\s-]+", data):
            raise InputError(f"image {quote(image, 200)} does not exist; "
                             "paths are relative to the data file")
        with about(f"image {quote(image)} is no base64"):
            return base64.b64decode(data.replace("-", "+").replace("_", "/"))
    if not isinstance(image, bytes | Image.Image):
        what = type(image).__name__
        raise InputError(f"an image must be bytes, a path or a picture, not {what}")
    return image


# ---------------------------------------------------------------------------------------- pictures
def open_image(image):
    """A path, bytes or PIL image -> PIL image of which only the header was read. Raises an
    exception of Pillow's, or ValueError for more than Image.MAX_IMAGE_PIXELS pixels (a
    decompression bomb) and for pictures whose range nobody knows."""
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"{size} pixels, more than {Image.MAX_IMAGE_PIXELS} in all")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pictures (mode {image.mode}) have no agreed range; "
                         "convert them to 8 or 16 bits")
    return image


def load_image(image):
    """A path, bytes or PIL image -> upright RGB PIL image: first frame, transparency on white, 16
    bits scaled to 8. Raises what `open_image` raises."""
    image = ImageOps.exif_transpose(open_image(image))
    if image.mode.startswith("I;16"):  # convert("RGB") would clip it at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_tokens(image, image_processor):
    """Tokens that a picture takes in a prompt, from its header alone."""
    picture = open_image(image)
    width, height = picture.size
    # not picture.getexif(): for a PNG that decodes the whole picture
    if Image.Image.getexif(picture).get(0x0112, 1) >= 5:  # these orientations lie on their side
        width, height = height, width
    if picture is not image:
        picture.close()
    patches = image_processor.get_number_of_image_patches(height, width)
    return patches // image_processor.merge_size**2


# ---------------------------------------------------------------------------------------- prompts
def system_prompt(args):
    """The text of --system-prompt, or ours."""
    if args.system_prompt is None:
        return SYSTEM_PROMPT
    with about(f"--system-prompt {args.system_prompt}"):
        return Path(args.system_prompt).read_text("utf-8").strip()


def check_text(text, where):
    """Raise InputError for half a surrogate pair, which no tokenizer takes, and for a literal image
    token, which would be taken for a picture that is not there."""
    with about(f"{where}: the text is no valid UTF-8"):
        text.encode()
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>"):
        if token in text:
            raise InputError(f"{where}: the text contains {token}; "
                             "write <image> where a picture belongs, or remove it")


def chat_text(example, tokenizer, system_prompt):
    """The prompt as text, one `<|image_pad|>` a picture. A system message in the row is kept;
    otherwise `system_prompt` is put in front. Raises InputError when the number of `<image>`
    placeholders and of images differ."""
    messages = [dict(message) for message in example.prompt]
    if messages[0]["role"] != "system" and system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    for message in messages:
        check_text(message["content"], example.id)
    found = sum(message["content"].count("<image>") for message in messages)
    if found == 0 and example.images:  # pictures without a place in the text come first
        user = next(message for message in messages if message["role"] == "user")
        user["content"] = "<image>" * len(example.images) + user["content"]
    elif found != len(example.images):
        raise InputError(f"{example.id}: {found} <image> in the text "
                         f"but {len(example.images)} images in the row")
    for message in messages:
        message["content"] = message["content"].replace("<image>", IMAGE)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def measure_prompt(example, tokenizer, image_processor, system, args):
    """-> (tokens of the prompt that `encode_prompt` makes, 0), from the headers of its pictures, or
    None for one longer than --max-prompt. Raises as that does; only with --bad-rows stop are the
    pictures decoded to find out."""
    text = chat_text(example, tokenizer, system)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - len(example.images)
    with about(f"{example.id}: image cannot be read"):
        for image in example.images:
            if args.bad_rows == "stop":
                load_image(image)
            tokens += image_tokens(image, image_processor)
    return (tokens, 0) if tokens <= args.max_prompt else None


def encode_prompt(example, tokenizer, image_processor, max_tokens=None,
                  system_prompt=SYSTEM_PROMPT):
    """Example -> Prompt, or None when it is longer than `max_tokens` (image tokens are never cut).
    Raises InputError as `chat_text` does, and when an image cannot be read."""
    text = chat_text(example, tokenizer, system_prompt)
    pixel_values = grid = None
    if example.images:
        with about(f"{example.id}: image cannot be read"):
            pictures = [load_image(image) for image in example.images]
            encoded = image_processor(images=pictures, return_tensors="pt")
        pixel_values, grid = encoded["pixel_values"], encoded["image_grid_thw"]
        counts = iter((grid.prod(-1) // image_processor.merge_size**2).tolist())
        text = re.sub(r"<\|image_pad\|>", lambda _: "<|image_pad|>" * next(counts), text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if max_tokens is not None and len(ids) > max_tokens:
        return None
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    positions = mrope_positions(ids, grid, pad, image_processor.merge_size)
    return Prompt(ids, positions, pixel_values, grid)


def encode_response(text, tokenizer):
    """Token ids of a response as a policy would emit it: its text, then the EOS."""
    check_text(text or "", "response")
    return tokenizer(text or "", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def mrope_positions(input_ids, grid_thw, image_token_id, merge_size):
    """M-RoPE positions [3, P] of a prompt: text counts on in all three axes, an image of h x w
    merged tokens takes (t, row, column) from the current position and moves it on by max(h, w)
    (Qwen2-VL, arXiv 2409.12191, section 2)."""
    out, at, i = [], 0, 0
    grids = iter(grid_thw.tolist() if grid_thw is not None else [])
    ids = input_ids.tolist()
    while i < len(ids):
        if ids[i] == image_token_id:
            t, h, w = next(grids)
            h, w = h // merge_size, w // merge_size
            axes = torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij")
            out.append(torch.stack(axes).reshape(3, -1) + at)
            at, i = at + max(h, w), i + t * h * w
        else:
            out.append(torch.full((3, 1), at))
            at, i = at + 1, i + 1
    return torch.cat(out, dim=1)


# ---------------------------------------------------------------------------------------- one look
BAD, LONG = -1, -2  # in place of a number of tokens
TOO_LONG = "too long for --max-prompt or --max-length"


@dataclass
class Found:
    """What one look at every example has found."""

    examples: Examples
    identity: dict  # what a run remembers of its data, for --resume
    prompt: np.ndarray  # [n] int32, tokens; BAD or LONG for an example that cannot be used
    response: np.ndarray  # the same
    reasons: dict[int, str]  # {index: why it cannot be used}; empty after --resume
    limit: float  # more unusable ones end the run

    @property
    def usable(self):
        """Indices of the examples that can be used."""
        return np.flatnonzero(self.prompt >= 0)


def attempt(function, examples, i):
    """function(example i) -> (result, None), or (None, why the example cannot be used)."""
    try:
        result = function(examples[i])
    except MemoryError:  # no fault of the row
        raise
    except Exception as error:  # whatever is wrong with a row, it must not end a run of days
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        text = text.removeprefix("{}:{}: ".format(*examples.where(i)))
        return None, quote(" ".join(text.split()), 400)
    return result, TOO_LONG if result is None else None


def attempt_all(function, examples, world):
    """`attempt` for every example, by threads and a share on each rank. Yields blocks, the same on
    all ranks: [(i, result, reason), ...]."""
    size = 1024 * world.size
    hidden = world.rank > 0 or None  # None: shown on a terminal only
    bar = tqdm(total=len(examples), desc="rows", leave=False, delay=2, disable=hidden)
    with ThreadPoolExecutor(4) as pool, bar:
        for start in range(0, len(examples), size):
            block = range(len(examples))[start : start + size]
            mine = block[world.rank :: world.size]
            tried = pool.map(lambda i: (i, *attempt(function, examples, i)), mine)
            yield sorted(one for part in world.gather(list(tried)) for one in part)
            bar.update(len(block))


def look(sources, measure, args, world):
    """Look at every example once -> Found, the same on all ranks.

    measure(example) -> (tokens of the prompt, tokens of the response), or None for one that is too
    long; an exception makes the example unusable. Raises InputError when more than --max-bad of the
    rows cannot be used, with --bad-rows stop when one cannot, and when none can. --resume takes
    what OUT/rows.npz has kept.
    """
    try:
        examples = load_examples(sources, args.split)
    except InputError as error:
        raise InputErrorOfAll(str(error)) from error
    limit = 0 if args.bad_rows == "stop" else args.max_bad * len(examples)
    identity = {"data": world.on_first(examples.fingerprint)}
    kept = os.path.join(args.out, "rows.npz")
    if args.resume and os.path.exists(kept):
        with np.load(kept) as arrays:
            if arrays["fingerprint"] == identity["data"]:
                return Found(examples, identity, arrays["prompt"], arrays["response"], {}, limit)
    tokens = np.zeros((2, len(examples)), np.int32)
    reasons, bad, looked = {}, [], 0
    for block in attempt_all(measure, examples, world):
        for i, lengths, reason in block:
            if reason:
                reasons[i], lengths = reason, LONG if reason == TOO_LONG else BAD
            if lengths == BAD:
                bad.append(i)
            tokens[:, i] = lengths
        looked += len(block)
        if len(bad) > limit:  # a wrong file of a million rows: no need to see them all
            break
    found = Found(examples, identity, *tokens, reasons, limit)
    if len(bad) <= limit and len(found.usable):
        return found
    first = (bad or [0])[0]
    reason = "{}:{}: ".format(*examples.where(first)) + reasons[first]
    if len(bad) <= limit:
        cure = "no row of --data can be used"
    elif args.bad_rows == "stop":
        cure = "--bad-rows skip leaves such rows out"
    else:
        cure = (f"{len(bad)} of {looked} rows looked at cannot be used, more than --max-bad "
                f"{args.max_bad:g}; with a higher one they are skipped and listed in "
                f"{args.out}/skipped.jsonl")
    raise InputErrorOfAll(f"{reason} ({cure})")


# ---------------------------------------------------------------------------------------- feed
def order(n, seed):
    """Endless indices of n rows: a new permutation every epoch."""
    for epoch in itertools.count():
        yield from map(int, np.random.default_rng([seed, epoch]).permutation(n))


def mixed_order(sources, seed):
    """Endless indices of weighted sources [(first row, rows, weight)]: every position draws a
    source, which gives its next row."""
    firsts, sizes, weights = zip(*sources)
    borders = np.cumsum(weights)[:-1] / sum(weights)
    orders = [order(n, seed) for n in sizes]
    for block in itertools.count():
        draws = np.random.default_rng([seed, block, 1]).random(1024)
        for source in np.searchsorted(borders, draws, side="right"):
            yield firsts[source] + next(orders[source])


@dataclass
class Drawn:
    """One example of a global batch."""

    place: int  # in the batch
    index: int  # in the data set
    encoded: object | None  # None on the ranks that do not need it


class Feed:
    """The examples of each step, in an order that depends on the seed alone and is the same on
    every rank. They are encoded by threads, one batch ahead.

    encode(example) -> anything. need(indices) -> the places among them that this rank encodes
    (default: a share of about equal tokens). A picture that passed the look and cannot be decoded
    leaves its example out of that batch: counted, and named in OUT/skipped.jsonl.
    """

    def __init__(self, found, encode, args, world, progress, need=None):
        self.found = found
        self.examples = found.examples
        self.encode = encode
        self.args = args
        self.world = world
        self.need = need or (lambda indices: world.share(self.tokens(indices).tolist()))
        self.position = progress["position"]
        self.lost = set(progress.get("lost", []))  # indices of those that could not be decoded
        self.dropped = int((found.prompt == LONG).sum())
        self.unusable = int((found.prompt == BAD).sum())
        self.usable = found.usable
        self.stream = self.indices(self.position)
        self.pool = ThreadPoolExecutor(4)
        self.coming = None  # the next batch, see `start`
        self.path = os.path.join(args.out, "skipped.jsonl")
        if world.rank == 0 and not progress["step"]:
            os.makedirs(args.out, exist_ok=True)
            np.savez(os.path.join(args.out, "rows.npz"), prompt=found.prompt,
                     response=found.response, fingerprint=found.identity["data"])
            if found.reasons:
                write_rows(self.path, [self.line(i, why, 0) for i, why in found.reasons.items()])

    @property
    def bad(self):
        return self.unusable + len(self.lost)

    @property
    def counts(self):
        """For the log: rows of the data that are too long, and that cannot be used."""
        return {"dropped": self.dropped, "bad": self.bad}

    def progress(self):
        return {"position": self.position, "lost": sorted(self.lost)}

    def tokens(self, indices):
        return self.found.prompt[indices] + self.found.response[indices]

    def line(self, i, reason, step):
        path, row = self.examples.where(i)
        return {"step": step, "file": path, "row": row, "reason": reason}

    def indices(self, position):
        """Endless indices of usable examples from a position of the run."""
        sources = []
        for number, (first, rows, weight) in enumerate(self.examples.sources, 1):
            low, high = np.searchsorted(self.usable, [first, first + rows])
            if low == high:
                raise InputErrorOfAll(f"--data: no row of source {number} can be used")
            sources.append((low, high - low, weight))
        stream = mixed_order(sources or [(0, len(self.usable), 1.0)], self.args.seed)
        return (int(self.usable[i]) for i in itertools.islice(stream, position, None))

    def start(self, count):
        """Start to encode the next `count` examples -> (their indices, {place: what will be})."""
        indices = list(itertools.islice(self.stream, count))
        submit = partial(self.pool.submit, attempt, self.encode, self.examples)
        return indices, {place: submit(indices[place]) for place in self.need(indices)}

    def draw(self, count, step):
        """-> the next `count` examples, list of Drawn, less those that could not be decoded. count:
        the same in every step."""
        while True:
            indices, jobs = self.coming or self.start(count)
            self.coming = self.start(count)  # is encoded while this one trains
            self.position += count
            encoded, failed = {}, {}
            for place, job in jobs.items():
                encoded[place], reason = job.result()
                if reason:
                    failed[indices[place]] = reason
            for part in self.world.gather(failed):
                failed |= part
            self.lose(failed, step)
            drawn = [Drawn(place, i, encoded.get(place)) for place, i in enumerate(indices)]
            drawn = [item for item in drawn if item.index not in failed]
            if drawn:
                return drawn

    def batch(self, count, step):
        """This rank's share of the next `count` examples, encoded; it may be empty."""
        return [item.encoded for item in self.draw(count, step) if item.encoded is not None]

    def lose(self, failed, step):
        """Count and write down what could not be decoded; InputError when that ends the run."""
        new = [self.line(i, failed[i], step + 1) for i in sorted(set(failed) - self.lost)]
        if not new:
            return
        self.lost |= set(failed)
        if self.world.rank == 0:
            append_rows(self.path, new)
        if self.bad > self.found.limit or len(self.lost) == len(self.usable):
            raise InputErrorOfAll("{file}:{row}: {reason} ".format(**new[-1]) +
                                  f"({self.bad} of {len(self.examples)} rows cannot be used)")

    def plan(self, steps, count):
        """Print what the run will do with its data."""
        if self.world.rank == 0:
            n = len(self.usable)
            tokens = self.tokens(self.usable).sum(dtype=np.int64)
            print(f"data: {n} of {len(self.examples)} rows ({self.dropped} too long, {self.bad} "
                  f"unusable), {tokens} tokens; {steps} steps of {count}, "
                  f"{steps * count / n:.2f} epochs", flush=True)

    def close(self):
        """Print the totals."""
        self.pool.shutdown(cancel_futures=True)
        if self.world.rank == 0 and self.dropped + self.bad:
            print(f"rows: {self.position} drawn; {self.dropped} are too long, {self.bad} unusable; "
                  f"listed in {self.path}", flush=True)
