"""The text side of the bundled tiny model: verses, tokenizer, chat template, training rows.

It hides where the words come from (the Debian packages ``bible-kjv`` and ``bible-kjv-text``, or a
file in the same format), how a byte-level BPE is trained on them, and how verses become rows of
token ids: running text, or short dialogues whose answers are verses.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, USER, ASSISTANT = SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
BEGIN_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)
IGNORED = -100  # label of a position that adds nothing to the loss

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}<|user|>{{ message['content'] | trim }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "<|assistant|>{{ message['content'] | trim }}<|end|>"
    "{%- else -%}{{ raise_exception('only the roles user and assistant are known') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

# The abbreviations that the `bible` program prints, in its order, and the names people type.
BOOKS: dict[str, str] = dict(
    re.findall(
        r"(\w+)=([\w ]+)",
        "Ge=Genesis|Exo=Exodus|Lev=Leviticus|Num=Numbers|Deu=Deuteronomy|Josh=Joshua|Jdgs=Judges|"
        "Ruth=Ruth|1Sm=1 Samuel|2Sm=2 Samuel|1Ki=1 Kings|2Ki=2 Kings|1Chr=1 Chronicles|"
        "2Chr=2 Chronicles|Ezra=Ezra|Neh=Nehemiah|Est=Esther|Job=Job|Psa=Psalm|Prv=Proverbs|"
        "Eccl=Ecclesiastes|SSol=Song of Solomon|Isa=Isaiah|Jer=Jeremiah|Lam=Lamentations|"
        "Eze=Ezekiel|Dan=Daniel|Hos=Hosea|Joel=Joel|Amos=Amos|Obad=Obadiah|Jonah=Jonah|Mic=Micah|"
        "Nahum=Nahum|Hab=Habakkuk|Zep=Zephaniah|Hag=Haggai|Zec=Zechariah|Mal=Malachi|Mat=Matthew|"
        "Mark=Mark|Luke=Luke|John=John|Acts=Acts|Rom=Romans|1Cor=1 Corinthians|2Cor=2 Corinthians|"
        "Gal=Galatians|Eph=Ephesians|Phi=Philippians|Col=Colossians|1Th=1 Thessalonians|"
        "2Th=2 Thessalonians|1Tim=1 Timothy|2Tim=2 Timothy|Titus=Titus|Phmn=Philemon|Heb=Hebrews|"
        "Jas=James|1Pet=1 Peter|2Pet=2 Peter|1Jn=1 John|2Jn=2 John|3Jn=3 John|Jude=Jude|"
        "Rev=Revelation",
    )
)

# What a user may ask about, besides every name that the text itself spells with a capital letter.
THEMES = frozenset(
    re.findall(
        r"\w+",
        "angel anger ark bread bride brother captain cattle chariot child children cloud "
        "commandment covenant creation darkness daughter death desert dream earth enemies evil "
        "faith famine father fear feast fire fish flesh flood flower food fool forgiveness "
        "garden gift glory gold grace grapes grass harvest heart heaven hell honey hope horse "
        "house hunger idols iron joy judgment king kingdom lamb lamp law life light lion love "
        "manna marriage mercy money moon mother mountain music night oath offering oil peace "
        "poor praise prayer priest prophet queen rain resurrection rich river rock sabbath "
        "sacrifice salvation sea serpent servant sheep shepherd ship silver sin slave sleep "
        "soldier son soul sparrow spirit stars stone storm sun sword temple thief tree trumpet "
        "truth vineyard vision war water wheat wicked widow wife wilderness wind wine wisdom "
        "wise woman word",
    )
)
REQUESTS = (
    "Tell me about {}.",
    "Tell me of {}.",
    "What is written about {}?",
    "What is written of {}?",
    "Speak of {}.",
    "{}",
    "What about {}?",
    "Who is {}?",
)

_VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)")


class TextError(RuntimeError):
    """The text cannot be had, or is not one verse a line with its reference in front."""


@dataclass(frozen=True)
class Verse:
    """One verse: ``reference`` as people type it ("Genesis 1:1"), ``chapter`` without the verse."""

    chapter: str
    number: int
    text: str

    @property
    def reference(self) -> str:
        return f"{self.chapter}:{self.number}"


def read_verses(text_file: Path | None) -> list[Verse]:
    """Return all verses, from ``text_file`` or else from the installed ``bible`` program.

    Lines read "Ge1:1 In the beginning ...". Raises TextError when there is no text to read, or
    when a line has another form.
    """
    if text_file is not None:
        if not text_file.is_file():
            raise TextError(f"{text_file}: no such file")
        raw = text_file.read_text(encoding="utf-8")
    else:
        program = shutil.which("bible")
        if program is None:
            raise TextError(
                "the program `bible` is missing: apt-get install bible-kjv bible-kjv-text, "
                "or name a file of its output with --text"
            )
        # -f switches pretty-printing off: one verse a line, with its reference.
        done = subprocess.run(
            [program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not done.stdout:
            raise TextError(f"`bible` failed: {done.stderr.strip() or 'it printed nothing'}")
        raw = done.stdout
    verses = []
    for number, line in enumerate(raw.splitlines(), start=1):
        match = _VERSE.fullmatch(line.strip())
        if match is None or match[1] not in BOOKS:
            raise TextError(f"line {number} is not 'Book1:1 text': {line[:60]!r}")
        verses.append(Verse(f"{BOOKS[match[1]]} {match[2]}", int(match[3]), match[4].strip()))
    return verses


def split_chapters(
    verses: list[Verse], held_out: float, seed: int
) -> tuple[list[list[Verse]], ...]:
    """Group verses by chapter and return (training chapters, held-out chapters), in text order."""
    chapters: dict[str, list[Verse]] = {}
    for verse in verses:
        chapters.setdefault(verse.chapter, []).append(verse)
    names = list(chapters)
    count = max(1, round(len(names) * held_out))
    chosen = set(np.random.default_rng(seed).choice(len(names), size=count, replace=False).tolist())
    train = [chapters[name] for i, name in enumerate(names) if i not in chosen]
    return train, [chapters[name] for i, name in enumerate(names) if i in chosen]


def train_tokenizer(chapters: list[list[Verse]], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose first four ids are SPECIAL_TOKENS; it puts BEGIN in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Requests and chapter names join the text, so that a question costs few tokens.
    lines = [" ".join(verse.text for verse in chapter) for chapter in chapters]
    lines += [chapter[0].reference for chapter in chapters] + [r.format("") for r in REQUESTS] * 20
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


class Rows:
    """Draws training rows: running text, and dialogues with the user's half left out of the loss.

    ``chat_share`` is the fraction of rows that are dialogues. Verses are tokenised once, both with
    a space in front (inside a paragraph) and without (at its start).
    """

    def __init__(
        self, tokenizer: Tokenizer, chapters: list[list[Verse]], chat_share: float, seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._chapters = chapters
        self._chat_share = chat_share
        self._rng = np.random.default_rng(seed)
        self._inside = [self._encode_all([" " + v.text for v in c]) for c in chapters]
        self._first = [self._encode_all([v.text for v in c]) for c in chapters]
        self._places = [(c, v) for c, chapter in enumerate(chapters) for v in range(len(chapter))]
        self._mentions = _mentions(chapters)
        self._subjects = sorted(self._mentions)

    def batch(self, rows: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (ids, labels), both int64 [rows, length]; labels are ids or IGNORED, unshifted."""
        ids = np.empty((rows, length), dtype=np.int64)
        labels = np.empty_like(ids)
        for row in range(rows):
            make = self._dialogue if self._rng.random() < self._chat_share else self._text
            tokens: list[int] = []
            wanted: list[int] = []
            while len(tokens) < length:
                make(tokens, wanted)
            ids[row], labels[row] = tokens[:length], wanted[:length]
        return ids, labels

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _pick(self) -> tuple[int, int]:
        return self._places[self._rng.integers(len(self._places))]

    def _text(self, tokens: list[int], wanted: list[int]) -> None:
        """Append one document: from a verse (half the time the first) to its chapter's end."""
        chapter, verse = self._pick()
        if self._rng.random() < 0.5:
            verse = 0
        document = [BEGIN_ID, *self._passage(chapter, verse, len(self._chapters[chapter]))]
        tokens += [*document, END_ID]
        wanted += [*document, END_ID]

    def _passage(self, chapter: int, start: int, count: int) -> list[int]:
        """Return the ids of up to ``count`` verses of one chapter from ``start`` on."""
        rest = self._inside[chapter][start + 1 : start + count]
        return self._first[chapter][start] + [token for verse in rest for token in verse]

    def _dialogue(self, tokens: list[int], wanted: list[int]) -> None:
        """Append one dialogue of one to three turns."""
        tokens.append(BEGIN_ID)
        wanted.append(IGNORED)
        for _ in range(self._rng.integers(1, 4)):
            question, answer = self._turn()
            asked = [USER_ID, *self._encode_all([question])[0], ASSISTANT_ID]
            tokens += [*asked, *answer, END_ID]
            wanted += [*[IGNORED] * len(asked), *answer, END_ID]

    def _turn(self) -> tuple[str, list[int]]:
        """Return a question and its answer's ids: by reference, by first words, or by subject."""
        kind = self._rng.random()
        count = int(self._rng.integers(1, 4))
        if kind < 0.5:
            subject = self._subjects[self._rng.integers(len(self._subjects))]
            places = self._mentions[subject]
            chapter, verse = places[self._rng.integers(len(places))]
            template = REQUESTS[self._rng.integers(len(REQUESTS))]
            return template.format(subject), self._passage(chapter, verse, count)
        chapter, verse = self._pick()
        source = self._chapters[chapter]
        count = min(count, len(source) - verse)
        if kind < 0.7:
            last = f"-{source[verse + count - 1].number}" if count > 1 else ""
            return source[verse].reference + last, self._passage(chapter, verse, count)
        words = source[verse].text.split(" ")
        known = min(int(self._rng.integers(2, 9)), len(words) - 1)
        tail = [" ".join(words[known:])] + [v.text for v in source[verse + 1 : verse + count]]
        return " ".join(words[:known]), self._encode_all([" ".join(tail)])[0]


def held_out_rows(tokenizer: Tokenizer, chapters: list[list[Verse]]) -> list[list[int]]:
    """Return each chapter as BEGIN, its running text, END."""
    texts = [" ".join(verse.text for verse in chapter) for chapter in chapters]
    return [[*encoding.ids, END_ID] for encoding in tokenizer.encode_batch(texts)]


def _mentions(chapters: list[list[Verse]]) -> dict[str, list[tuple[int, int]]]:
    """Map each name and theme to the (chapter, verse) places that speak of it, six at least."""
    found: dict[str, list[tuple[int, int]]] = {}
    lower: set[str] = set()
    for c, chapter in enumerate(chapters):
        for v, verse in enumerate(chapter):
            words = set(re.findall(r"[A-Za-z]+", verse.text))
            lower |= {word for word in words if word.islower()}
            for word in words:
                if word in THEMES or (word[0].isupper() and len(word) > 2):
                    found.setdefault(word, []).append((c, v))
    # A capitalised word that also occurs in lower case only began a sentence.
    return {
        word: places
        for word, places in found.items()
        if len(places) >= 6 and (word in THEMES or word.lower() not in lower)
    }
