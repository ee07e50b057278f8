"""Every prompt, once.

An embedding is the hidden state behind "... in one word:": what a model was trained with has to
be repeated to the character. A prompt is a template with the places TEXT and IMAGE; `render`
returns segments, so that "<image>" inside a user's text stays text.
"""

import dataclasses
import hashlib

from unime_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a rendered prompt.

    Attributes:
      role: "prompt" (the template's own), "text" (the user's, may be cut) or "image" (the slot).
      value: its characters; "" for the slot.
    """

    role: str
    value: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """The prompt of one model family.

    Attributes:
      text: around a text without an image; image: around an image without a text; both: around
        an image with a text. {text} and {image} mark the places, as in `str.format`.
      instruction: around an instruction, which stands in front of the text; {instruction} is its
        place.
      skip_instruction: whether a mean over tokens leaves the instruction out.
      model_types: values of `model_type` in config.json that this is the default of.
      raw: texts are taken as they are: blanks at their ends stay, and an image stands where the
        text says (`Slotted`), or on a line of its own before a text that does not say.
    """

    text: str
    image: str = ""
    both: str = ""
    instruction: str = "{instruction}\n"
    skip_instruction: bool = False
    model_types: tuple[str, ...] = ()
    raw: bool = False


@dataclasses.dataclass(frozen=True)
class Slotted:
    """A text of its own wording around an image, for raw prompts.

    Attributes:
      before, after: the text on either side of the image.
    """

    before: str
    after: str


TEMPLATES = {
    # Sentence encoders: the text alone.
    "none": Template(text="{text}", model_types=("bert",)),
    # NV-Embed-v2: passages are plain, queries carry a task; the end token is part of the mean.
    "nv_embed": Template(
        text="{text}</s>",
        instruction="Instruct: {instruction}\nQuery: ",
        skip_instruction=True,
        model_types=("nvembed",),
    ),
    # A raw language model without a chat format, as the newcomer's student.
    "smol": Template(
        text="{text}\nSummary above sentence in one word:",
        image="{image}\nSummary above image in one word:",
        both="{image}\n{text}\nSummary above image and sentence in one word:",
        model_types=("unime_smol", "llama", "mistral", "phi3"),
    ),
    # The released demo of the Phi-3.5-V model: a space before <|end|>.
    "phi35v": Template(
        text="<|user|>\n{text}\nSummary above sentence in one word: <|end|>\n<|assistant|>\n",
        image="<|user|>\n{image}\nSummary above image in one word: <|end|>\n<|assistant|>\n",
        both="<|user|>\n{image}\n{text}\nSummary above image and sentence in one word: "
        "<|end|>\n<|assistant|>\n",
        model_types=("phi3_v",),
    ),
    # Its evaluation scripts drop that space: another embedding.
    "phi35v_eval": Template(
        text="<|user|>\n{text}\nSummary above sentence in one word:<|end|>\n<|assistant|>\n",
        image="<|user|>\n{image}\nSummary above image in one word:<|end|>\n<|assistant|>\n",
        both="<|user|>\n{image}\n{text}\nSummary above image and sentence in one word:"
        "<|end|>\n<|assistant|>\n",
    ),
    # Stage 1 as the paper words it (section 3.2): plural, newline behind the colon. An image with a
    # text is the sum of both (`fusion="sum"`).
    "phi35v_stage1": Template(
        text="<|user|>\n{text}\nSummary above sentences in one word:\n<|end|>\n<|assistant|>\n",
        image="<|user|>\n{image}\nSummary above image in one word:\n<|end|>\n<|assistant|>\n",
    ),
    "llava16": Template(
        text="[INST] {text}\nSummary above sentence in one word: [/INST]",
        image="[INST] {image}\nSummary above image in one word: [/INST]",
        both="[INST] {image}\n{text}\nSummary above image and sentence in one word: [/INST]",
        model_types=("llava_next",),
    ),
    "llava16_stage1": Template(
        text="[INST] {text}\nSummary above sentences in one word:\n [/INST]",
        image="[INST] {image}\nSummary above image in one word:\n [/INST]",
    ),
    # MMEB's rows bring their wording, the image's place included; no chat format around it.
    "mmeb": Template(text="{text}", both="{text}", raw=True),
}
MMEB_SLOT = "<|image_1|>"


def slotted(text: str, slot: str = MMEB_SLOT) -> str | Slotted:
    """Reads a data set's text that marks the place of its image in its own way.

    For data of a known format alone: a user's text is text, whatever it contains.

    Raises:
      UserError: more than one slot.
    """
    before, found, after = text.partition(slot)
    if slot in after:
        raise UserError(f"more than one {slot} in {text[:60]!r}: a row has one image")
    return Slotted(before, after) if found else text


def name_for(model_type: str) -> str:
    """Returns the default prompt of a `model_type`.

    Raises:
      UserError: no template lists it.
    """
    for name, template in TEMPLATES.items():
        if model_type in template.model_types:
            return name
    known = sorted(kind for template in TEMPLATES.values() for kind in template.model_types)
    raise UserError(f"no prompt for model_type {model_type!r}; known: {', '.join(known)}")


def digest(name: str) -> str:
    """Returns 8 hex digits that change with the wording of a prompt."""
    return hashlib.blake2b(repr(TEMPLATES[name]).encode(), digest_size=4).hexdigest()


def skipped(name: str, instruction: str | None) -> str:
    """Returns the words in front of a row's text that a mean over tokens leaves out, "" if none."""
    template = TEMPLATES[name]
    if not (instruction and template.skip_instruction):
        return ""
    return template.instruction.replace("{instruction}", instruction)


def render(
    name: str, text: str | Slotted | None, has_image: bool, instruction: str | None = None
) -> list[Segment]:
    """Puts a row into a prompt.

    Args:
      name: key of `TEMPLATES`.
      text: the row's text; None or "" for an image alone.
      has_image: whether the row has an image.
      instruction: a task description, put before the text on a line of its own; never cut.

    Raises:
      UserError: an unknown name, an empty row, an image (with a text) for a prompt that takes none,
        a raw prompt whose text and image do not fit each other.
    """
    if name not in TEMPLATES:
        raise UserError(f"unknown prompt {name!r}; known: {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    words = _words(name, template, text, has_image)
    if instruction:
        stated = template.instruction.replace("{instruction}", instruction)
        words.insert(0, Segment("prompt", stated if words else stated.rstrip()))
    if not has_image:
        pattern = template.text
    else:
        pattern = template.both if words else template.image
    if not pattern:
        raise UserError(
            f"prompt {name!r} has no form for an image with a text: embed with fusion='sum'"
        )
    filling = {"{text}": words, "{image}": [Segment("image")]}
    segments = []
    while pattern:
        places = [place for place in filling if place in pattern]
        first = min(places, key=pattern.index, default=None)
        before, _, pattern = pattern.partition(first) if first else (pattern, "", "")
        segments += ([Segment("prompt", before)] if before else []) + filling.get(first, [])
    return segments


def _words(
    name: str, template: Template, text: str | Slotted | None, has_image: bool
) -> list[Segment]:
    """Returns the segments of the user's text, in a raw prompt with the image among them."""
    if template.raw and has_image and not isinstance(text, Slotted):
        text = Slotted("", f"\n{text}" if text else "")
    if isinstance(text, Slotted):
        if not template.raw:
            raise UserError(f"prompt {name!r} has its own place for the image: give a plain text")
        if not has_image:
            raise UserError(f"prompt {name!r}: prompts.Slotted is for rows with an image")
        parts = [Segment("text", text.before), Segment("image"), Segment("text", text.after)]
        return [part for part in parts if part.role == "image" or part.value]
    text = text or ""
    if not text.strip() and not has_image:
        raise UserError("empty text without an image: nothing to embed")
    if has_image and not template.image:
        raise UserError(f"prompt {name!r} takes no image: the model is for text only")
    text = text if template.raw else text.strip()
    return [Segment("text", text)] if text else []
