"""Render the embedded data set `glyphs`: letters of many writing systems in many typefaces.

Everything is drawn with openly licensed fonts from the Debian packages in `SOURCES` below. On
Debian 12 (bookworm), with these packages and `pip install numpy pillow scikit-learn fonttools`, the
script reproduces the files byte for byte; if packages are missing, it prints the `apt-get install`
line to run.

Run `python tools/render_glyphs.py` in the repository root.  It writes

    src/nearfar/app/assets/glyphs.npz    the images and their labels
    src/nearfar/app/assets/GLYPHS.md     a description, with the licence of every font used

The steps are: find the fonts and the letters they cover; choose letters per writing system; draw
each letter in several typefaces; find look-alikes by their pixels and merge or drop them; thin out
near-duplicate drawings; name the split groups; write the files; measure how hard the task is.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from fontTools import unicodedata as scripts
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.metrics import roc_curve

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "src" / "nearfar" / "app" / "assets"

SIDE = 32  # side of an image in pixels
BOX = 26  # the ink is scaled to fit this box, which leaves a margin for shifts and rotations
DRAW_SIZE = 160  # font size of the large drawing that is then scaled down
LEVELS = 8  # grey levels: eight are enough to look smooth, and compress far better than 256
MOST_TYPEFACES = 16  # per identity; more would exceed the size limit
FEWEST_TYPEFACES = 6  # an identity with fewer distinct drawings is left out
CANDIDATE_TYPEFACES = 30  # tried per letter before near-duplicates are thinned out
FEWEST_IDENTITIES = 8  # a writing system with fewer is left out
NEAR_DUPLICATE = 7.0  # mean absolute difference in grey levels below which a drawing is a repeat
LOOK_ALIKE = 0.03  # `unlikeness` below which two letters of one typeface are the same shape
CASE_PAIR = 0.16  # the same for the two cases of one letter, whose stroke widths differ
MOST_BYTES = 3_000_000


class System(NamedTuple):
    """A writing system and which of its letters to draw."""

    name: str
    scripts: str  # ISO 15924 codes, separated by blanks
    most: int  # letters to draw at most, spread evenly over those the fonts share
    ranges: str = ""  # code points allowed, "0041-005A 0061-007A"; empty allows all
    first: str = ""  # letters to take before any other


ASCII = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Order matters: where letters of two unrelated systems look alike, the later one's is dropped.
SYSTEMS = (
    System("Latin", "Latn", 125, "0041-024F 0250-02AF 1E9E-1E9E A722-A787", ASCII),
    System("Greek", "Grek", 50, "0391-03C9"),
    System("Cyrillic", "Cyrl", 100, "0400-045F 0460-04FF 0500-052F"),
    System("Armenian", "Armn", 76),
    System("Georgian", "Geor", 76, "10A0-10FA"),
    System("Hebrew", "Hebr", 30, "05D0-05EA"),
    System("Arabic", "Arab", 50, "0620-06D5"),
    System("Thaana", "Thaa", 45),
    System("N'Ko", "Nkoo", 40),
    System("Ethiopic", "Ethi", 80, "1200-135A"),
    System("Tifinagh", "Tfng", 40),
    System("Devanagari", "Deva", 55),
    System("Bengali", "Beng", 55),
    System("Gurmukhi", "Guru", 50),
    System("Gujarati", "Gujr", 50),
    System("Oriya", "Orya", 50),
    System("Tamil", "Taml", 40),
    System("Telugu", "Telu", 55),
    System("Kannada", "Knda", 55),
    System("Malayalam", "Mlym", 55),
    System("Sinhala", "Sinh", 60),
    System("Thai", "Thai", 50),
    System("Lao", "Laoo", 45),
    System("Khmer", "Khmr", 50),
    System("Myanmar", "Mymr", 55),
    System("Tibetan", "Tibt", 45),
    System("Meetei Mayek", "Mtei", 35),
    System("Cham", "Cham", 45),
    System("Balinese", "Bali", 45),
    System("New Tai Lue", "Talu", 50),
    System("Kayah Li", "Kali", 30),
    System("Cherokee", "Cher", 85, "13A0-13F4"),
    System("Canadian syllabics", "Cans", 70, "1401-166C"),
    System("Miao", "Plrd", 60),
    System("Hiragana", "Hira", 50),
    System("Katakana", "Kana", 50, "30A1-30FA"),
    System("Bopomofo", "Bopo", 40),
    System("Hangul", "Hang", 60, "AC00-D7A3"),
    System("Han", "Hani", 60, "4E00-9FA5"),
    System("Runic", "Runr", 45),
    System("Gothic", "Goth", 27),
    System("Old Italic", "Ital", 30),
    System("Phoenician", "Phnx", 22),
)

# Systems that share so many shapes that they must be on the same side of a split.
RELATED = (
    ("Latin", "Greek", "Cyrillic"),
    ("Telugu", "Kannada"),
)

# Letters that readers see as the same shape, although some typefaces draw them differently.
SAME = (
    "AΑА BΒВв CcСсϹ EΕЕ HΗНн JjЈј KkΚκКк MΜМм NΝ PpΡρРр SsЅѕ TΤТт UuՍ VvνѴѵ WwԜԝ XxΧχХх YΥҮ "
    "ZzΖ aа eе yу ɑα ƐɛεЀ ƆɔϽ ƏəӘә ΓГг ΠПп Лл Дд Жж Зз Ии Йй Лл Ээ Юю Яя Цц Чч Шш Щщ Ъъ Ыы Ьь "
    "Єє Іі Ђ Фф ÞþϷϸ Ðɖ Đ Øø Œœ Ææ Ŋŋ Ʌʌ Ωω"
).replace("Ωω", "")
SIMPLE = "OoΟοОоIlΙІӀ"  # circles and bars, which many systems have; look-alikes are dropped too

APACHE, OFL, VERA, BSD = "Apache-2.0", "OFL-1.1", "Bitstream Vera", "BSD-3-Clause"
DAMASE, MPLUS = "public domain", "OFL-1.1"


class Source(NamedTuple):
    """A Debian package of fonts, in order of preference."""

    package: str
    licence: str
    evidence: str  # a pattern that the package's copyright file must hold
    files: str = "."  # pattern of the file names to use


OFL_TEXT = r"OFL|SIL[- ]1\.1|SIL O(pen|PEN) F(ont|ONT) L(icense|ICENSE)|Open Font License"
SOURCES = (
    Source("fonts-noto-core", OFL, OFL_TEXT),
    Source("fonts-noto-extra", OFL, OFL_TEXT),
    Source("fonts-noto-cjk", OFL, OFL_TEXT),
    Source("fonts-noto-cjk-extra", OFL, OFL_TEXT),
    Source("fonts-dejavu-core", VERA, "Bitstream"),
    Source("fonts-dejavu-extra", VERA, "Bitstream"),
    Source("fonts-seto", OFL, OFL_TEXT),
    Source("fonts-liberation2", OFL, OFL_TEXT),
    Source("fonts-roboto-slab", APACHE, "Apache"),
    Source("fonts-comic-neue", OFL, OFL_TEXT),
    Source("fonts-ebgaramond", OFL, OFL_TEXT),
    Source("fonts-comfortaa", OFL, OFL_TEXT),
    Source("fonts-firacode", OFL, OFL_TEXT),
    Source("fonts-yusei-magic", OFL, OFL_TEXT),
    Source("fonts-gfs-artemisia", OFL, OFL_TEXT),
    Source("fonts-gfs-neohellenic", OFL, OFL_TEXT),
    Source("fonts-gfs-didot", OFL, OFL_TEXT),
    Source("fonts-jura", OFL, "OFL"),
    Source("fonts-play", OFL, OFL_TEXT),
    Source("fonts-vollkorn", OFL, OFL_TEXT),
    Source("fonts-open-sans", APACHE, "Apache"),
    Source("fonts-roboto-unhinted", APACHE, "Apache"),
    Source("fonts-lato", OFL, OFL_TEXT),
    Source("fonts-inter", OFL, OFL_TEXT),
    Source("fonts-jetbrains-mono", APACHE, "Apache"),
    Source("fonts-dkg-handwriting", OFL, OFL_TEXT),
    Source("fonts-sil-andika", OFL, OFL_TEXT),
    Source("fonts-sil-charis", OFL, OFL_TEXT),
    Source("fonts-sil-doulos", OFL, OFL_TEXT),
    Source("fonts-sil-gentiumplus", OFL, OFL_TEXT),
    Source("fonts-linuxlibertine", OFL, OFL_TEXT),
    Source("fonts-hack-ttf", VERA, "BitstreamVera"),
    Source("fonts-cardo", OFL, OFL_TEXT),
    Source("fonts-junicode", OFL, OFL_TEXT),
    Source("fonts-elstob", OFL, OFL_TEXT),
    Source("fonts-mph-2b-damase", DAMASE, "[Pp]ublic [Dd]omain"),
    Source("fonts-tuffy", DAMASE, "public-domain"),
    Source("fonts-sil-ezra", OFL, OFL_TEXT),
    Source("fonts-hosny-amiri", OFL, OFL_TEXT),
    Source("fonts-hosny-thabit", OFL, OFL_TEXT),
    Source("fonts-lemonada", OFL, OFL_TEXT),
    Source("fonts-sil-scheherazade", OFL, OFL_TEXT),
    Source("fonts-sil-lateef", OFL, OFL_TEXT),
    Source("fonts-sil-harmattan", OFL, OFL_TEXT),
    Source("fonts-sil-alkalami", OFL, OFL_TEXT),
    Source("fonts-sil-abyssinica", OFL, OFL_TEXT),
    Source("fonts-senamirmir-washra", OFL, OFL_TEXT),
    Source("fonts-evertype-conakry", OFL, OFL_TEXT),
    Source("fonts-sil-akatab", OFL, OFL_TEXT),
    Source("fonts-sil-tagmukay", OFL, OFL_TEXT),
    Source("fonts-sil-annapurna", OFL, OFL_TEXT),
    Source("fonts-lohit-deva", OFL, OFL_TEXT),
    Source("fonts-lohit-beng-bengali", OFL, OFL_TEXT),
    Source("fonts-lohit-guru", OFL, OFL_TEXT),
    Source("fonts-lohit-gujr", OFL, OFL_TEXT),
    Source("fonts-lohit-orya", OFL, OFL_TEXT),
    Source("fonts-lohit-taml", OFL, OFL_TEXT),
    Source("fonts-lohit-telu", OFL, OFL_TEXT),
    Source("fonts-lohit-knda", OFL, OFL_TEXT),
    Source("fonts-lohit-mlym", OFL, OFL_TEXT),
    Source("fonts-yrsa-rasa", OFL, "sil-1.1", "Rasa"),
    Source("fonts-kalapi", OFL, OFL_TEXT),
    Source("fonts-meera-inimai", OFL, OFL_TEXT),
    Source("fonts-karla", OFL, OFL_TEXT, "TamilUpright"),
    Source("fonts-teluguvijayam", OFL, OFL_TEXT),
    Source("fonts-navilu", OFL, OFL_TEXT),
    Source("fonts-smc-chilanka", OFL, OFL_TEXT),
    Source("fonts-smc-manjari", OFL, OFL_TEXT),
    Source("fonts-smc-gayathri", OFL, OFL_TEXT),
    Source("fonts-smc-uroob", OFL, OFL_TEXT),
    Source("fonts-smc-karumbi", OFL, OFL_TEXT),
    Source("fonts-smc-keraleeyam", OFL, OFL_TEXT),
    Source("fonts-smc-rachana", OFL, OFL_TEXT),
    Source("fonts-smc-meera", OFL, OFL_TEXT),
    Source("fonts-smc-dyuthi", OFL, OFL_TEXT),
    Source("fonts-smc-anjalioldlipi", OFL, OFL_TEXT),
    Source("fonts-rit-sundar", OFL, OFL_TEXT),
    Source("fonts-gemunu-libre", OFL, OFL_TEXT),
    Source("fonts-sil-mondulkiri", OFL, OFL_TEXT),
    Source("fonts-sil-mondulkiri-extra", OFL, OFL_TEXT),
    Source("fonts-sil-padauk", OFL, OFL_TEXT),
    Source("fonts-ddc-uchen", OFL, OFL_TEXT),
    Source("fonts-eeyek", OFL, OFL_TEXT),
    Source("fonts-sil-dai-banna", OFL, OFL_TEXT),
    Source("fonts-sil-shimenkan", OFL, OFL_TEXT),
    Source("fonts-sil-shimenkan-gsm", OFL, OFL_TEXT),
    Source("fonts-sil-shimenkan-mas", OFL, OFL_TEXT),
    Source("fonts-sil-shimenkan-zonghe", OFL, OFL_TEXT),
    Source("fonts-lxgw-wenkai", OFL, OFL_TEXT),
    Source("fonts-klee", OFL, OFL_TEXT),
    Source("fonts-reggae", OFL, OFL_TEXT),
    Source("fonts-rocknroll", OFL, OFL_TEXT),
    Source("fonts-stick", OFL, OFL_TEXT),
    Source("fonts-dotgothic16", OFL, OFL_TEXT),
    Source("fonts-motoya-l-cedar", APACHE, "Apache"),
    Source("fonts-motoya-l-maruberi", APACHE, "Apache"),
    Source("fonts-morisawa-bizud-gothic", OFL, OFL_TEXT),
    Source("fonts-morisawa-bizud-mincho", OFL, OFL_TEXT),
    Source("fonts-mplus", MPLUS, OFL_TEXT),
    Source("fonts-nanum", OFL, OFL_TEXT),
    Source("fonts-nanum-extra", OFL, OFL_TEXT),
    Source("fonts-woowa-bm", OFL, OFL_TEXT),
)

# Slanted and interface twins, hairlines that vanish at this size, outlines, typefaces that use
# another letter form altogether, and symbol fonts that carry plain letters as a courtesy.
UNWANTED = re.compile(
    r"Italic|Oblique|Inclined|Slanted|italic|Cardoi|UI[-.]|Thin|Hairline|ExtraLight|UltraLight"
    r"|Rashi|NotoSansMath|NotoSansSymbols|NotoSansDisplay|NotoSerifDisplay|MonoCJK"
    r"|LinLibertine_K|LinLibertine_I|LinLibertine_(M|DR)|Sundar-Outline|Eco|UKIJ|LinBiolinum_K"
    r"|OTF|NotoSansDuployan|SILEOTSR|_R[BZ]?I|TifinaghHawad|TifinaghRhissa|TifinaghAgraw"
    r"|TifinaghAzawagh|TifinaghTawellemmet|TifinaghAir|TifinaghGhat|TifinaghAhaggar|NastaliqUrdu"
    r"|EUNJIN|Inter-.*Display|VF|Variable|\[wght\]"
)


# ---------------------------------------------------------------------------------- the fonts


@dataclass(frozen=True)
class Face:
    """One typeface: a font file, its number in a collection, and the letters it covers."""

    path: Path
    number: int
    name: str
    family: str
    style: tuple[float, float]  # weight and width, on comparable scales
    copyright: str
    source: Source
    letters: frozenset[int]

    def __hash__(self) -> int:
        return hash((self.path, self.number))

    @property
    def design(self) -> str:
        """Name of the design, shared by the per-script files of one superfamily."""
        for super_family in ("NotoSans", "NotoSerif"):
            if self.path.name.startswith(super_family) and self.source.package != "fonts-noto-cjk":
                return f"{super_family}{self.style}"
        return self.name


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@cache
def package_version(package: str) -> str:
    """Version of an installed Debian package; empty if it is not installed."""
    status = run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package)
    return status.removeprefix("installed ") if status.startswith("installed ") else ""


def check_packages() -> None:
    """Stop if a package is missing, with the line that installs it, or if a licence differs."""
    missing = [source.package for source in SOURCES if not package_version(source.package)]
    if missing:
        sys.exit(
            f"missing Debian packages: {', '.join(missing)}\n"
            f"apt-get install --no-install-recommends {' '.join(missing)}"
        )
    for source in SOURCES:
        folder = Path("/usr/share/doc", source.package)
        text = "".join(run("zcat", "-f", str(path)) for path in sorted(folder.glob("copyright*")))
        if not re.search(source.evidence, text):
            sys.exit(f"{folder}: the copyright file does not say {source.licence}")


def style_of(stem: str) -> tuple[float, float]:
    """Weight and width of a font from its file name, on scales where 1 is a visible step."""
    weights = {
        "black": 2.2, "heavy": 2.2, "extrabold": 1.7, "ultrabold": 1.7, "semibold": 0.7,
        "demibold": 0.7, "bold": 1.2, "medium": 0.4, "light": -1.0,
    }  # fmt: skip
    widths = {"extracondensed": -1.6, "semicondensed": -0.5, "condensed": -1.0}
    stem = stem.lower()
    weight = next((value for word, value in weights.items() if word in stem), 0.0)
    width = next((value for word, value in widths.items() if word in stem), 0.0)
    return weight, width


def family_of(path: Path) -> str:
    """Family of a font from its file name: the part before the style."""
    stem = re.split(r"[-\[]", path.stem)[0]
    return re.sub(r"(Sans|Serif)Condensed|Extra(Light|Bold)$|Book$|Light$|Bold$", r"\1", stem)


def read_face(path: Path, number: int, source: Source) -> Face:
    with TTFont(path, lazy=True, fontNumber=number) as font:
        names = font["name"]
        return Face(
            path=path,
            number=number,
            name=str(names.getDebugName(4) or path.stem),
            family=family_of(path) + (f"#{number}" if path.suffix == ".ttc" else ""),
            style=style_of(path.stem),
            copyright=" ".join(str(names.getDebugName(0) or "").split()),
            source=source,
            letters=frozenset(font.getBestCmap() or {}),
        )


def find_faces() -> list[Face]:
    """All usable typefaces, in order of preference."""
    faces: list[Face] = []
    for source in SOURCES:
        listing = run("dpkg", "-L", source.package).splitlines()
        for path in sorted(map(Path, listing)):
            if path.suffix.lower() not in {".ttf", ".otf", ".ttc"} or UNWANTED.search(path.name):
                continue
            if re.search(source.files, path.name) and path.is_file() and not path.is_symlink():
                # The first font of a collection is the Japanese version, which suits all we draw.
                faces.append(read_face(path, 0, source))
    first = {face.name: face for face in reversed(faces)}  # a font may be packaged twice
    return [face for face in faces if first[face.name] is face]


# ------------------------------------------------------------------------------ the letters


def in_ranges(code: int, ranges: str) -> bool:
    bounds = [part.split("-") for part in ranges.split()]
    return not bounds or any(int(low, 16) <= code <= int(high, 16) for low, high in bounds)


def is_plain_letter(code: int) -> bool:
    """Whether the code point is a letter of its own, not an accented or positional form.

    Hangul syllables decompose too, but each is one drawn block and stays.
    """
    letter = chr(code)
    if unicodedata.category(letter) not in {"Lu", "Ll", "Lo"}:
        return False
    if 0xAC00 <= code <= 0xD7A3:
        return True
    return unicodedata.normalize("NFKD", letter) == letter


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def choose_letters(system: System, faces: Sequence[Face]) -> list[int]:
    """The letters of a system that enough typefaces have, thinned to its limit."""
    wanted = set(system.scripts.split())
    counts = Counter(
        code for face in faces for code in face.letters if in_ranges(code, system.ranges)
    )
    usable = sorted(
        code
        for code, count in counts.items()
        if count >= FEWEST_TYPEFACES
        and scripts.script(chr(code)) in wanted
        and is_plain_letter(code)
    )
    first = [code for code in usable if chr(code) in system.first]
    rest = [code for code in usable if chr(code) not in system.first]
    return sorted(first + spread(rest, system.most - len(first)))


def order_styles(faces: Sequence[Face]) -> list[Face]:
    """A family's styles, regular first, then always the one least like those already listed."""
    left = sorted(faces, key=lambda face: (abs(face.style[0]) + abs(face.style[1]), face.name))
    ordered = [left.pop(0)]
    while left:
        gaps = [
            min(abs(a.style[0] - b.style[0]) + abs(a.style[1] - b.style[1]) for b in ordered)
            for a in left
        ]
        ordered.append(left.pop(int(np.argmax(gaps))))
    return ordered


def order_faces(faces: Sequence[Face], letters: Iterable[int]) -> list[Face]:
    """Typefaces that cover a system: one style of every family, then a second of each, ..."""
    wanted = set(letters)
    families: dict[str, list[Face]] = defaultdict(list)
    for face in faces:
        if len(wanted & face.letters) >= 0.3 * len(wanted):
            families[face.family].append(face)
    ranked = [
        (rank, order, face)
        for order, members in enumerate(families.values())
        for rank, face in enumerate(order_styles(members))
    ]
    return [face for _, _, face in sorted(ranked, key=lambda entry: entry[:2])]


# ---------------------------------------------------------------------------------- drawing


@cache
def load_font(face: Face) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(face.path), DRAW_SIZE, index=face.number, layout_engine=ImageFont.Layout.BASIC
    )


def draw(face: Face, letter: str) -> Images | None:
    """The letter cropped to its ink, scaled to the box and centred; None if there is no ink."""
    font = load_font(face)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(letter))
    if right <= left or bottom <= top:
        return None
    margin = 8
    large = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin), 0)
    ImageDraw.Draw(large).text((margin - left, margin - top), letter, fill=255, font=font)
    ink = large.point(lambda value: 255 if value >= 64 else 0).getbbox()
    if ink is None:
        return None
    large = large.crop(ink)
    scale = BOX / max(large.size)
    size = (max(1, round(large.width * scale)), max(1, round(large.height * scale)))
    small = large.resize(size, Image.Resampling.HAMMING)
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    step = 255 / (LEVELS - 1)
    return np.asarray(np.rint(np.rint(np.asarray(image) / step) * step), dtype=np.uint8)


@cache
def draw_missing(face: Face) -> bytes:
    """The placeholder that a typeface draws for a missing code point (a non-character)."""
    image = draw(face, "\U0010fffe")
    return b"" if image is None else image.tobytes()


Drawings = dict[int, dict[Face, Images]]


def draw_letters(letters: Iterable[int], faces: Sequence[Face]) -> Drawings:
    """Every letter, drawn in the first typefaces of the list that have it."""
    drawings: Drawings = {}
    for code in letters:
        row: dict[Face, Images] = {}
        for face in (face for face in faces if code in face.letters):
            image = draw(face, chr(code))
            if image is not None and image.tobytes() != draw_missing(face):
                row[face] = image
            if len(row) == CANDIDATE_TYPEFACES:
                break
        drawings[code] = row
    return without_placeholders(drawings)


def without_placeholders(drawings: Drawings) -> Drawings:
    """Remove drawings that a typeface uses for three letters or more: placeholder boxes."""
    seen = Counter(
        (face, image.tobytes()) for row in drawings.values() for face, image in row.items()
    )
    return {
        code: {face: image for face, image in row.items() if seen[face, image.tobytes()] < 3}
        for code, row in drawings.items()
    }


# ------------------------------------------------------------------------------ look-alikes


def soften(image: Images) -> Floats:
    """Blur and scale to unit length, so that an offset of one pixel matters little."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.9))
    flat = np.asarray(blurred, dtype=np.float64).ravel()
    return flat / max(float(np.linalg.norm(flat)), 1e-9)


def unlikeness(drawings: Drawings) -> tuple[list[int], Floats]:
    """Median over the shared designs of 1 - cosine between the softened drawings of two letters.

    Letters that share no design are compared across typefaces by their closest pair of drawings,
    which errs on the side of calling them alike.
    """
    codes = sorted(drawings)
    soft = {
        code: {face: soften(image) for face, image in row.items()} for code, row in drawings.items()
    }
    designs: dict[str, dict[int, Floats]] = defaultdict(dict)
    for index, code in enumerate(codes):
        for face, vector in soft[code].items():
            designs[face.design].setdefault(index, vector)
    # Medians over a ragged set: collect per-design matrices in one float16 stack.
    most = len(designs)
    stack = np.full((most, len(codes), len(codes)), np.nan, dtype=np.float16)
    for layer, members in enumerate(designs.values()):
        where = np.fromiter(members, dtype=np.intp)
        vectors = np.stack(list(members.values()))
        stack[layer][np.ix_(where, where)] = 1.0 - vectors @ vectors.T
    result = np.empty((len(codes), len(codes)))
    for row in range(len(codes)):
        values = np.sort(stack[:, row, :].astype(np.float32), axis=0)  # nan sorts last
        known = np.sum(~np.isnan(values), axis=0)
        middle = np.take_along_axis(values, np.maximum(known - 1, 0)[None] // 2, axis=0)[0]
        result[row] = np.where(known > 0, middle, 1.0)
    return codes, np.minimum(result, result.T)


@dataclass
class Shapes:
    """Result of the look-alike search."""

    identities: list[list[int]]
    dropped: list[str]  # dropped letters and why, for the log


def find_shapes(drawings: Drawings, home: dict[int, str]) -> Shapes:
    """Merge look-alikes within related systems; drop those between unrelated systems."""
    codes, distance = unlikeness(drawings)
    index = {code: i for i, code in enumerate(codes)}
    rank = {system.name: order for order, system in enumerate(SYSTEMS)}
    hub = {name: names[0] for names in RELATED for name in names}
    hubs = [hub.get(home[code], home[code]) for code in codes]
    ranks = [rank[home[code]] for code in codes]
    gone: set[int] = set()
    dropped: list[str] = []

    def drop(i: int, why: str) -> None:
        if i not in gone:
            gone.add(i)
            dropped.append(f"{chr(codes[i])} ({home[codes[i]]}): {why}")

    simple = [index[ord(letter)] for letter in SIMPLE if ord(letter) in index]
    for i, code in enumerate(codes):
        if (
            i in simple
            or any(distance[i, j] < LOOK_ALIKE for j in simple)
            or is_bar(drawings[code])
        ):
            drop(i, "a bare circle, bar or blot")

    same_by_hand = [
        {index[ord(letter)] for letter in group if ord(letter) in index} for group in SAME.split()
    ]
    cluster = list(range(len(codes)))

    def unite(i: int, j: int) -> None:
        old, new = cluster[j], cluster[i]
        cluster[:] = [new if c == old else c for c in cluster]

    for group in same_by_hand:
        for i in group:
            unite(min(group), i)
    pairs = np.argwhere(np.triu(distance < CASE_PAIR, 1))
    for i, j in sorted(((int(i), int(j)) for i, j in pairs), key=lambda p: distance[p]):
        if i in gone or j in gone or cluster[i] == cluster[j]:
            continue
        is_case = chr(codes[i]).lower() == chr(codes[j]).lower()
        if distance[i, j] >= (CASE_PAIR if is_case else LOOK_ALIKE):
            continue
        later = j if ranks[j] >= ranks[i] else i
        if hubs[i] != hubs[j]:
            drop(later, f"looks like {chr(codes[i + j - later])}, of another system")
            continue
        members = [k for k in range(len(codes)) if cluster[k] in (cluster[i], cluster[j])]
        # A chain: a is like b and b like c, but a and c differ. Drop the link.
        if max(distance[a, b] for a in (i, j) for b in members if b not in gone) > 2 * CASE_PAIR:
            drop(later, f"between {chr(codes[i])} and {chr(codes[j])}")
        else:
            unite(i, j)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, code in enumerate(codes):
        if i not in gone:
            groups[cluster[i]].append(code)
    return Shapes(sorted(groups.values()), dropped)


def is_bar(row: dict[Face, Images]) -> bool:
    """Whether most typefaces draw the letter as little more than a line or a filled blot."""
    if not row:
        return True
    bare = []
    for image in row.values():
        ink = np.argwhere(image > 64)
        height, width = np.ptp(ink, axis=0) + 1
        bare.append(min(height, width) <= 7 or len(ink) > 0.75 * height * width)
    return sum(bare) > len(bare) / 2


# -------------------------------------------------------------------------- rows of the set


class Row(NamedTuple):
    face: Face
    image: Images


def pick_rows(members: Sequence[int], drawings: Drawings) -> list[Row]:
    """Drawings of one identity: one per typeface, letters taking turns, no near-duplicates."""
    faces: list[Face] = []  # in the members' common order of preference
    for place in range(CANDIDATE_TYPEFACES):
        for code in members:
            row = list(drawings[code])
            if place < len(row) and row[place] not in faces:
                faces.append(row[place])
    rows: list[Row] = []
    for turn, face in enumerate(faces):
        for offset in range(len(members)):
            image = drawings[members[(turn + offset) % len(members)]].get(face)
            if image is not None and all(differ(image, row.image) for row in rows):
                rows.append(Row(face, image))
                break
        if len(rows) == MOST_TYPEFACES:
            break
    return rows


def differ(a: Images, b: Images) -> bool:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()) >= NEAR_DUPLICATE


def name_groups(identities: Sequence[Sequence[int]], home: dict[int, str]) -> list[str]:
    """The split group of every identity: systems that are related or share an identity."""
    parent = {system.name: system.name for system in SYSTEMS}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    links = [*RELATED, *([home[code] for code in members] for members in identities)]
    for names in links:
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    present = {home[code] for members in identities for code in members}
    full: dict[str, list[str]] = defaultdict(list)
    for system in SYSTEMS:
        if system.name in present:
            full[root(system.name)].append(system.name)
    return [", ".join(full[root(home[members[0]])]) for members in identities]


@dataclass
class Glyphs:
    """The arrays of the npz file, and the typefaces they were drawn from."""

    arrays: dict[str, npt.NDArray[np.generic]]
    faces: list[Face]


def assemble(
    identities: Sequence[Sequence[int]], rows: Sequence[Sequence[Row]], groups: Sequence[str]
) -> Glyphs:
    """Number everything; rows are ordered by identity, then by typeface."""
    faces = sorted({row.face for of_one in rows for row in of_one}, key=lambda face: face.name)
    number = {face: i for i, face in enumerate(faces)}
    x, y, typeface = [], [], []
    for identity, of_one in enumerate(rows):
        for row in sorted(of_one, key=lambda row: number[row.face]):
            x.append(row.image)
            y.append(identity)
            typeface.append(number[row.face])
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "x": np.stack(x),
        "y": np.array(y, dtype=np.int16),
        "typeface": np.array(typeface, dtype=np.int16),
        "characters": np.array(["".join(map(chr, members)) for members in identities]),
        "systems": np.array(groups),
        "typefaces": np.array([face.name for face in faces]),
    }
    return Glyphs(arrays, faces)


def save(path: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    """Like np.savez_compressed, but with the best compression and a fixed date: reproducible."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)


# ------------------------------------------------------------------------------- difficulty


def equal_error_rate(same: npt.NDArray[np.bool_], distance: Floats) -> float:
    false_accept, true_accept, _ = roc_curve(same, -distance)
    gap = int(np.argmin(np.abs(false_accept - (1 - true_accept))))
    return float((false_accept[gap] + 1 - true_accept[gap]) / 2)


def raw_pixel_error(glyphs: Glyphs, splits: int = 20, pairs: int = 4000) -> tuple[float, float]:
    """Mean and deviation of the equal error rate of pixel distance on held-out split groups.

    Each split holds out groups until they have a quarter of the identities. Half of the pairs are
    two typefaces of one identity, half are two identities, all from held-out groups.
    """
    x = glyphs.arrays["x"].reshape(len(glyphs.arrays["x"]), -1).astype(np.float32)
    y = glyphs.arrays["y"].astype(np.intp)
    systems = glyphs.arrays["systems"]
    rates = []
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        held: set[str] = set()
        for group in rng.permutation(np.unique(systems)):
            if np.isin(systems, list(held)).mean() < 0.25:
                held.add(str(group))
        rows = np.flatnonzero(np.isin(systems[y], list(held)))
        of = {k: rows[y[rows] == k] for k in np.unique(y[rows])}
        keys = np.array(list(of))
        chosen = rng.choice(keys, pairs // 2)
        first = [rng.choice(of[k], 2, replace=False) for k in chosen]
        second = [
            [rng.choice(of[a]), rng.choice(of[b])]
            for a, b in (rng.choice(keys, 2, replace=False) for _ in range(pairs // 2))
        ]
        both = np.array(first + second)
        distance = np.linalg.norm(x[both[:, 0]] - x[both[:, 1]], axis=1).astype(np.float64)
        rates.append(equal_error_rate(np.arange(pairs) < pairs // 2, distance))
    return float(np.mean(rates)), float(np.std(rates))


# ------------------------------------------------------------------------------ the reports


def summary(glyphs: Glyphs) -> list[tuple[str, int, int, int]]:
    """Per split group: its name, identities, rows and typefaces."""
    y, systems = glyphs.arrays["y"].astype(np.intp), glyphs.arrays["systems"]
    table = []
    for group in sorted(set(map(str, systems))):
        rows = systems[y] == group
        used = len(np.unique(glyphs.arrays["typeface"][rows]))
        table.append((group, int((systems == group).sum()), int(rows.sum()), used))
    return table


def markdown(glyphs: Glyphs) -> str:
    """The text of GLYPHS.md."""
    arrays = glyphs.arrays
    lines = [
        "# glyphs",
        "",
        "<!-- written by tools/render_glyphs.py; edit that, not this -->",
        "",
        f"{len(arrays['x'])} grey images of {SIDE} x {SIDE} pixels: "
        f"{len(arrays['characters'])} letter shapes of {len(home_names(glyphs))} writing systems, "
        f"each as drawn by {FEWEST_TYPEFACES} to {MOST_TYPEFACES} of "
        f"{len(arrays['typefaces'])} typefaces. "
        "The question it poses is one-shot: are two images the same character?",
        "",
        "Letters that look alike, across systems too (Latin A, Greek Alpha, Cyrillic A), are one "
        "identity. Systems that share an identity, or are related, are one split group, so that "
        "a split of the groups puts no shape on both sides. Drawn by `tools/render_glyphs.py`, "
        "which says what it needs; ink is bright on black, in eight grey levels, scaled to fit "
        f"{BOX} x {BOX} and centred.",
        "",
        "| array | shape | content |",
        "|---|---|---|",
        "| `x` | (n, 32, 32) uint8 | the images |",
        "| `y` | (n,) | identity of each image |",
        "| `typeface` | (n,) | index into `typefaces` |",
        "| `characters` | (identities,) | the letters of each identity |",
        "| `systems` | (identities,) | split group of each identity |",
        "| `typefaces` | (typefaces,) | names of the fonts |",
        "",
        "| split group | identities | images | typefaces |",
        "|---|---|---|---|",
        *(f"| {name} | {n} | {rows} | {used} |" for name, n, rows, used in summary(glyphs)),
        "",
        "## Fonts and their licences",
        "",
        "The images show these fonts; the fonts themselves are not included.",
        "",
        "| font family | Debian package | licence | copyright |",
        "|---|---|---|---|",
        *sorted(licence_line(face) for face in one_face_per_family(glyphs.faces)),
        "",
    ]
    return "\n".join(lines)


def one_face_per_family(faces: Iterable[Face]) -> list[Face]:
    return list({(face.family, face.source.package): face for face in faces}.values())


def licence_line(face: Face) -> str:
    package = f"{face.source.package} {package_version(face.source.package)}"
    owner = face.copyright.replace("|", "/")[:120] or "see the package"
    return f"| {face.family} | {package} | {face.source.licence} | {owner} |"


def home_names(glyphs: Glyphs) -> set[str]:
    return {name for group in glyphs.arrays["systems"] for name in str(group).split(", ")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    out: Path = parser.parse_args().out

    check_packages()
    faces = find_faces()
    print(f"{len(faces)} typefaces in {len(SOURCES)} packages")

    drawings: Drawings = {}
    home: dict[int, str] = {}
    for system in SYSTEMS:
        letters = choose_letters(system, faces)
        serving = order_faces(faces, letters)
        drawn = draw_letters(letters, serving)
        kept = {code: row for code, row in drawn.items() if len(row) >= FEWEST_TYPEFACES}
        print(f"  {system.name}: {len(kept)} letters, {len(serving)} typefaces")
        drawings |= kept
        home |= dict.fromkeys(kept, system.name)

    shapes = find_shapes(drawings, home)
    print(f"{len(shapes.dropped)} letters dropped:")
    for line in shapes.dropped:
        print(f"  {line}")
    merged = ["".join(map(chr, members)) for members in shapes.identities if len(members) > 1]
    print(f"{len(merged)} merged identities: {' '.join(merged)}")

    picked = [(members, pick_rows(members, drawings)) for members in shapes.identities]
    picked = [(members, rows) for members, rows in picked if len(rows) >= FEWEST_TYPEFACES]
    large_enough = Counter(home[members[0]] for members, _ in picked)
    picked = [
        (members, rows)
        for members, rows in picked
        if large_enough[home[members[0]]] >= FEWEST_IDENTITIES
    ]
    order = {system.name: i for i, system in enumerate(SYSTEMS)}
    picked.sort(key=lambda entry: (order[home[entry[0][0]]], entry[0]))
    identities = [members for members, _ in picked]
    glyphs = assemble(identities, [rows for _, rows in picked], name_groups(identities, home))

    out.mkdir(parents=True, exist_ok=True)
    save(out / "glyphs.npz", glyphs.arrays)
    (out / "GLYPHS.md").write_text(markdown(glyphs), encoding="utf-8")
    size = (out / "glyphs.npz").stat().st_size

    print(f"\n{'split group':34}{'identities':>11}{'rows':>7}{'typefaces':>11}")
    for name, count, rows, used in summary(glyphs):
        print(f"{name:34}{count:11}{rows:7}{used:11}")
    mean, deviation = raw_pixel_error(glyphs)
    print(
        f"{len(home_names(glyphs))} systems, {len(identities)} identities, "
        f"{len(glyphs.arrays['x'])} rows, {len(glyphs.faces)} typefaces, {size} bytes, "
        f"raw-pixel equal error rate {mean:.3f} (deviation {deviation:.3f} over splits)"
    )
    if size > MOST_BYTES:
        sys.exit(f"glyphs.npz is over its limit of {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
