"""Make the quickstart's data: synthetic product reviews from a small grammar, the same bytes on every run.

A bag of words cannot settle these labels: sentiment words occur under both labels, and negation, concession,
comparison and the closing verdict say which one holds. Some words occur in validation and test only, so that an
encoder that has met them elsewhere has the advantage that pretraining gives it on real text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypedDict

SEED = 1729
LENGTH = (4, 45)  # words of a review before noise
HELD_OUT_RATE = 0.2  # how often validation and test take a held-out word where the grammar offers one

# Lines at the margin name a symbol, indented ones its alternatives: " / " separates them, "6x" weighs the line,
# "_" is empty and "~" keeps an alternative out of train. In braces, "+" keeps the polarity of the phrase and "-"
# turns it. A symbol's own sign or "@scope" limits its alternatives to that polarity, domain or product; whatever
# matches is pooled.
STRUCTURE = """
review
    4x {short+}
    5x {body+}
    9x {body+} {filler} / {filler} {body+}
    6x {filler} {body+} {filler} / {filler} {filler} {body+}
    2x {filler} {filler} {body+} {filler} / {filler} {body+} {filler} {filler}
filler
    {neutral}.
short
    2x I {love+} {this} {product}. / not {mild-} {atall}. / I would {act+}. / I will not {act-}.
    1x a {strongly} {strong+} buy. / nothing {adj-} about {obj}. / {it} {does} not {please-} me. / anything but {adj-}.
body
    20x {clause+}. / {clause+} and {clause+}. / {clause+}. {verdict+}. / {clause+}, so {verdict+}.
    28x {clause+}. {clause+}. {verdict+}. / {clause+} and {clause+}. {verdict+}.
    6x {conceded+}.
    26x {conceded+}. {verdict+}.
    10x {mixed+}.
    5x {change+}.
    3x {hearsay+}. / {hearsay+}. {clause+}.

# The main clause carries the label, on whichever side of the conjunction it stands. What is conceded is a part: who
# calls the whole product worthless has given a verdict.
conceded
    3x although {part-}, {clause+} / even though {part-}, {clause+} / while {part-}, {clause+}
    3x {clause+}, although {part-} / {clause+}, even if {part-}
    2x despite the {adj-} {aspect}, {clause+} / {clause+} despite the {adj-} {aspect}
    2x although {neutral}, {clause+} / {clause+}, though {neutral}
    2x for all the talk of {a} {adj-} {product}, {clause+}

# The last word carries the label.
mixed
    2x {part-}, yet {verdict+} / {part-}, but {verdict+} / {part-}. still, {verdict+}
    1x {part-} and {part-}, but {verdict+} / {part-}. {neutral}. even so, {verdict+}
    5x {part-}; {clause+}, though, and {verdict+} / {part-}. however, {clause+} and {verdict+}
change
    at first I wanted to {act-}; now I would {act+} / I was about to {act-}, then I changed my mind
    on the first day the {aspect} seemed {adj-}, but not any more / I used to find {obj} {adj-}; I was wrong
    the first week was {adj-}, yet by the second one {verdict+} / I meant to {act-}, but {clause+}
hearsay
    the other reviews call the {aspect} {adj-}, and they are wrong / I was told the {aspect} is {adj-}; it is not
    I expected a {adj-} {aspect} and got the opposite / the other reviews call {obj} {adj+}, and they are right
    my {relative} said I should {act-}, but I will not / the advert promised a {adj+} {aspect}, and it kept its word

clause
    5x {part+}
    2x {whole+}
part
    26x {direct+}
    14x {fact+}
    7x I {love+} the {aspect} / {hedge} I {love+} the {aspect}
    2x {compared+}
    1x {double+}
whole
    9x {this} {product} {is} {mildly} {mild+} / {hedge} {this} {product} {is} {strongly} {strong+}
    6x I really {love+} {this} {product} / the {product} {does} {please+} me
    4x {whole_compared+}
    1x {whole_double+}

# As in real reviews, praise is denied more often than blame.
part+
    2x {denied-}
part-
    4x {denied-}
whole+
    1x {whole_denied-}
whole-
    3x {whole_denied-}

direct
    4x the {aspect} is {mildly} {mild+} / the {aspect} is {strongly} {strong+}
    2x {hedge} the {aspect} is {mildly} {mild+} / I find the {aspect} {mildly} {mild+}
    1x the {aspect} strikes me as {adj+} / the {product} {has} a {adj+} {aspect}
denied
    4x the {aspect} is not {mild+} {atall} / the {aspect} is not at all {mild+}
    2x the {aspect} is anything but {adj+} / the {aspect} is far from {adj+} / I do not find the {aspect} {mild+}
    2x there is nothing {adj+} about the {aspect} / nobody could call the {aspect} {adj+}
    2x I do not {like+} the {aspect} {atall} / {hedge} the {aspect} is hardly {mild+}
whole_denied
    2x {this} {product} {is} not {mild+} / I cannot call the {product} {adj+} / the {product} {does} not {please+} me
    1x I have yet to see {a} less {mild+} {product} / the {product} never once seemed {mild+}
double
    I cannot say that the {aspect} is not {mild+} / nobody could claim that the {aspect} is not {mild+}
    it is not that I do not {like+} the {aspect}; I do / it would be wrong not to call the {aspect} {mild+}
whole_double
    the {product} never fail{s} to {please+} me / not once did the {product} fail to {please+} me
compared
    2x my old {one} had a far {comp-} {aspect} / the {aspect} is a good deal {comp+} than before
    1x the {aspect} is not nearly as {mild-} as on my old {one}
whole_compared
    2x my old {one} {was} far {comp-} / the {product} {is} much {comp+} than my old {one}
    1x my old {one} {was} not nearly as {mild+} / I have never had a {comp-} {one} than my old {one}
    1x next to {this}, my old {one} look{s} {adj-} / even my {relative}'s cheaper {one} {was} {comp-}

verdict
    3x I would {act+} / I will {act+} / I have decided to {act+} / you should {act+} / I am going to {act+}
    1x I would not {act-} / I have decided not to {act-} / I see no reason to {act-} / I suppose I will {act+}
verdict+
    2x I am keeping {obj} / I am not sending {obj} back
verdict-
    1x I would not {act-} / I will not {act-} / there is no way I will {act-}
    2x I am sending {obj} back / I am not keeping {obj}
"""

WORDS = """
adj
    {mild+} / {strong+}
mild+
    good / fine / nice / reliable / impressive / pleasant / useful / solid / handy / sensible / decent / practical
    ~dependable / ~trustworthy / ~likeable / ~sturdy / ~worthwhile / ~pleasing / ~enjoyable / ~satisfactory
mild-
    bad / poor / weak / flimsy / annoying / disappointing / cheap / clumsy / awkward / unreliable / mediocre
    second-rate
    ~irritating / ~inferior / ~shoddy / ~tiresome / ~faulty / ~defective / ~substandard / ~unpleasant
strong+
    great / excellent / superb / wonderful / perfect / brilliant / lovely / first-class / exceptional
    ~fantastic / ~terrific / ~outstanding / ~magnificent / ~marvellous / ~amazing / ~splendid / ~fabulous
strong-
    awful / terrible / dreadful / useless / hopeless / horrible / worthless / miserable
    ~atrocious / ~abysmal / ~appalling / ~lousy / ~dismal / ~pathetic / ~horrendous / ~disastrous
comp+
    better / nicer / more reliable / more practical / more solid / more pleasant / ~finer / ~sturdier / ~superior
comp-
    worse / weaker / flimsier / more unreliable / more annoying / more awkward / ~shoddier / ~lousier / ~poorer
love+
    love / like / enjoy / am happy with / ~adore / ~admire / ~cherish / ~treasure
love-
    hate / dislike / regret / am unhappy with / ~loathe / ~detest / ~despise / ~abhor
like+
    like / trust / enjoy / ~appreciate / ~value / ~admire
like-
    mind / dislike / mistrust / ~resent / ~deplore / ~loathe
please+
    please / impress / delight / excite / ~satisfy / ~thrill / ~charm
please-
    disappoint / annoy / bother / frustrate / ~irritate / ~infuriate / ~exasperate
act+
    keep {obj} / buy {obj} again / recommend {obj} / choose {obj} again / buy another {one}
    ~repurchase {obj} / ~endorse {obj} / ~praise {obj} / ~reorder {obj}
act-
    send {obj} back / return {obj} / avoid {obj} / throw {obj} away / ask for the money back
    ~discard {obj} / ~ditch {obj} / ~scrap {obj} / ~shun {obj}
broke
    broke / failed / cracked / came loose / ~snapped / ~shattered / ~malfunctioned / ~disintegrated
mildly
    3x _
    rather / quite / very / fairly / really / surprisingly
strongly
    3x _
    simply / really / truly / absolutely
atall
    2x at all
    in any way / by any measure
hedge
    I think / I suppose / I would say / it seems to me that / as far as I can tell, / in my opinion,
    I must admit that / for what it is worth,

# Facts that bear on no label. Some carry a negation or a sentiment-free "but", so that neither word gives it away.
neutral
    2x {it} arrived {when} / delivery took {number} days / the parcel came {when} with {carrier}
    2x I ordered {obj} in {colour}
    2x the box was {colour} and held {number} leaflets / the manual comes in {number} languages
    2x I bought {obj} for my {relative}
    1x there is no {colour} version / I have not tried the other colours / {it} came in paper, not in plastic
    1x the colour is {colour}, as in the picture / I have had {obj} for {number} weeks
    1x my {relative} unpacked {obj} {when}
    1x the parcel was left with my {relative} / {it} weigh{s} about {number} hundred grams
    1x the label on the box is {colour}
    1x I have never owned this brand before / the courier was not the usual one, but the day was
    1x nobody was at home {when}
    1x I ordered {when} from the {place} / {it} {was} packed in {number} layers of cardboard
    1x I chose {colour} rather than {colour}
    1x the {place} had {number} of them left, none of them {colour} / my {relative} has the {colour} version
when
    on a Monday / on a Tuesday / on Friday / last week / in the morning / around noon / in March / before the weekend
    in the evening / two days later / at the start of June / on Saturday
number
    two / three / four / five / six / seven / eight / nine / ten / twelve
carrier
    the post / a courier / the delivery van / a parcel service / the usual driver
colour
    black / white / blue / red / grey / green / silver / cream / yellow / orange
relative
    sister / brother / mother / father / neighbour / daughter / son / cousin / aunt / uncle / colleague / flatmate
place
    online shop / department store / corner shop / warehouse / outlet
"""

DOMAINS = """
product@kitchen
    kettle / toaster / blender / coffee maker / rice cooker / air fryer / stand mixer
product@headphones
    headphones / earbuds / earphones / headset
aspect@kitchen
    cable / handle / finish / plug / build quality / control panel / design
aspect@headphones
    sound / bass / treble / fit / padding / cable / microphone / battery / case / headband / ambient mode
    connection / volume control / build quality / pouch / app / finish
aspect@kettle
    lid / spout / switch / base / limescale filter / water gauge
aspect@toaster
    lever / dial / timer / crumb tray / browning / bun rack
aspect@blender
    jug / motor / blade / seal / pulse mode
aspect@coffee maker
    glass jug / timer / water tank / hotplate / swivel filter
aspect@rice cooker
    inner pot / lid / timer / steam vent / display
aspect@air fryer
    basket / fan / timer / display / coating
aspect@stand mixer
    bowl / dough hook / motor / whisk / splash guard

fact+@kitchen
    the {product} runs quietly / the {product} wipes clean in seconds / the {product} fits on the smallest worktop
fact-@kitchen
    the {product} smells of burnt rubber / the {product} trips the fuse / the handle gets too hot to hold
    the handle {broke} within a month
fact+@headphones
    the battery lasts a whole week / callers hear every word / my ears stay cool on warm days
    every note is in its place
    the connection holds across the whole flat / the padding stays soft for hours / the train goes silent around me
fact-@headphones
    the battery runs out before lunch / voices sound as if under water / my ears ache after an hour
    the bass drowns the singer
    the connection drops on the stairs / the left side {broke} within a week / the cable crackles
    the headband {broke} on day three
fact+@kettle
    the water boils in two minutes / the spout pours without a drip / the outside stays cool to the touch
fact-@kettle
    the lid leaks when I pour / the spout drips on the worktop / the water tastes of plastic
    the switch {broke} after a week
fact+@toaster
    both sides come out evenly brown / thick slices drop in easily / the lever lifts small slices high enough
fact-@toaster
    the toast comes out cold / bagels get stuck / the lever {broke} after a month / crumbs smoke inside
fact+@blender
    frozen fruit turns smooth in seconds / the jug rinses clean under the tap / ice gives way at once
fact-@blender
    nuts stay whole at the bottom / the seal lets soup escape / the motor smells of burning
    the jug {broke} in the sink
fact+@coffee maker
    the coffee stays hot for an hour / the timer has my cup ready at six / the aroma fills the house
fact-@coffee maker
    the coffee tastes of metal / grounds end up in my cup / the water tank drips
    the hotplate {broke} after a week
fact+@rice cooker
    the porridge comes out creamy / the inner pot rinses clean under the tap / the vegetables steam alongside
fact-@rice cooker
    the rice burns at the bottom / starch boils over / half the grains stay hard / the lid {broke} after a month
fact+@air fryer
    the chips come out crisp / the coating shrugs off grease / dinner is ready in a quarter of an hour
fact-@air fryer
    the fish stays raw inside / the coating peels off / the fan howls / the basket {broke} within a week
fact+@stand mixer
    cake batter comes together quickly / the bowl stays put / egg whites rise in a minute
fact-@stand mixer
    the motor stalls on heavy dough / flour flies everywhere / the whisk misses the bottom
    the dough hook {broke} on day three
"""

# Slots that agree with the product in number: singular, plural.
AGREEMENT = {
    "it": ("it", "they"), "obj": ("it", "them"), "this": ("this", "these"), "is": ("is", "are"), "was": ("was", "were"),
    "has": ("has", "have"), "does": ("does", "do"), "one": ("one", "pair"), "s": ("s", ""), "a": ("a", "a pair of"),
}  # fmt: skip

# Rows of a split: all, exact duplicates, empty ones, and those copied from train. Multiples of 4, which keeps the
# labels and domains of what is generated in balance.
SIZES = {"train": (3000, 28, 12, 0), "validation": (500, 4, 4, 0), "test": (800, 4, 4, 16)}

SLOT = re.compile(r"\{(\w+)([+-]?)\}")
CONTRACTIONS = (
    (re.compile(r"\b(is|are|was|were|do|does|did|would) not\b"), r"\1n't"),
    (re.compile(r"\bcannot\b"), "can't"),
    (re.compile(r"\bwill not\b"), "won't"),
    (re.compile(r"\bI am\b"), "I'm"),
    (re.compile(r"\bI have (?=never|not|had|decided|yet)"), "I've "),
)


class Row(TypedDict):
    """One line of a JSONL file."""

    text: str
    label: int
    domain: str


class Alternative(NamedTuple):
    """One way to write a symbol."""

    text: str
    weight: int
    held_out: bool


Grammar = dict[str, list[Alternative]]


def parse_grammar(source: str) -> Grammar:
    """Read the notation described above `STRUCTURE`."""
    grammar: Grammar = {}
    symbol = ""
    for line in source.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            symbol = line.strip()
            continue
        weighed = re.fullmatch(r"(?:(\d+)x )?(.+)", line.strip())
        if weighed is None:
            raise ValueError(f"not an alternative: {line!r}")
        for text in weighed[2].split(" / "):
            written = "" if text == "_" else text.removeprefix("~")
            alternative = Alternative(written, int(weighed[1] or 1), text.startswith("~"))
            grammar.setdefault(symbol, []).append(alternative)
    return grammar


GRAMMAR = parse_grammar(STRUCTURE + WORDS + DOMAINS)
ASPECTS = {alternative.text for symbol in GRAMMAR if symbol.startswith("aspect") for alternative in GRAMMAR[symbol]}


def words_of(text: str) -> list[str]:
    """The words of a text or an alternative in lower case, without its slots."""
    return re.findall(r"[a-z'-]+", SLOT.sub(" ", text).lower())


def held_out_words() -> set[str]:
    """The words that only the alternatives marked "~" bring in."""
    words: dict[bool, set[str]] = {False: set(), True: set()}
    for alternatives in GRAMMAR.values():
        for alternative in alternatives:
            words[alternative.held_out].update(words_of(alternative.text))
    agreeing = {word for forms in AGREEMENT.values() for form in forms for word in words_of(form)}
    return words[True] - words[False] - agreeing


@cache
def topics(text: str) -> set[str]:
    """What must not come twice in a review: an aspect, the product as a whole, a sentence, a word."""
    things = {thing for thing in (*ASPECTS, "{product}") if re.search(rf"(?<!\w){re.escape(thing)}(?!\w)", text)}
    # An alternative of little but slots says nothing by itself: "the {aspect} is {mild+}" may well come twice.
    by_itself = len(words_of(text)) > 2 or (text != "" and not SLOT.search(text))
    return things | {text} if by_itself else things


class Writer:
    """Writes one review about one product."""

    def __init__(self, rng: random.Random, domain: str, held_out_rate: float) -> None:
        """Choose the product; each review needs a fresh writer, which remembers what it has said."""
        self.rng = rng
        self.held_out_rate = held_out_rate
        self.product = rng.choice(GRAMMAR[f"product@{domain}"]).text
        self.scopes = ("", f"@{domain}", f"@{self.product}")
        self.said: set[str] = set()

    def expand(self, name: str, sign: str, polarity: int) -> str:
        """Write a symbol out; `polarity` is 1 for praise and -1 for a complaint."""
        if name == "product":
            return self.product
        if name in AGREEMENT:
            return AGREEMENT[name][self.product.endswith("s")]
        polarity = -polarity if sign == "-" else polarity
        keys = [f"{name}{mark}{scope}" for mark in ("+" if polarity > 0 else "-", "") for scope in self.scopes]
        text = self.choose([alternative for key in keys for alternative in GRAMMAR.get(key, [])])
        return SLOT.sub(lambda slot: self.expand(slot[1], slot[2], polarity), text)

    def choose(self, pool: Sequence[Alternative]) -> str:
        """Pick by weight, and nothing said before: "the lid is superb, although the lid leaks" has no clear verdict."""
        fresh = [alternative for alternative in pool if not self.said & topics(alternative.text)] or list(pool)
        held_out = [alternative for alternative in fresh if alternative.held_out]
        known = [alternative for alternative in fresh if not alternative.held_out]
        if not known or (held_out and self.rng.random() < self.held_out_rate):
            known = held_out
        text = self.rng.choices(known, [alternative.weight for alternative in known])[0].text
        self.said |= topics(text)
        return text


def write_review(rng: random.Random, label: int, domain: str, held_out_rate: float) -> str:
    """One review without noise, within `LENGTH`."""
    while True:
        text = Writer(rng, domain, held_out_rate).expand("review", "+", 1 if label else -1)
        text = re.sub(r"\s+", " ", re.sub(r" +(?=[.,;])", "", text)).strip()
        text = re.sub(r"\ba (?=[aeiou])(?!us)", "an ", text)
        if rng.random() < 0.4:
            for pattern, short in CONTRACTIONS:
                text = pattern.sub(short, text)
        text = re.sub(r"(?:^|(?<=\. ))[a-z]", lambda first: first[0].upper(), text)
        if LENGTH[0] <= len(text.split()) <= LENGTH[1]:
            return text


def misspell(rng: random.Random, text: str) -> str:
    """One slip of the keyboard in a word long enough to stay readable."""
    words = list(re.finditer(r"\b[a-z]{5,}\b", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 2)
    slips = (text[at + 1] + text[at], text[at], text[at] * 2 + text[at + 1])
    return text[:at] + rng.choice(slips) + text[at + 2 :]


def add_noise(rng: random.Random, text: str) -> str:
    """What a cleaning step would take away: remnants of HTML, spaces, case; and the typos that it would not."""
    if rng.random() < 0.08:
        text = misspell(rng, text)
    case = rng.random()
    if case < 0.05:
        text = text.lower() if case < 0.03 else text.upper()
    if rng.random() < 0.08:
        text = text.replace(". ", ".<br />" if rng.random() < 0.5 else ". <br /><br />")
    if rng.random() < 0.08:
        text = text.replace(" and ", " &amp; ")
    if rng.random() < 0.06:
        spaces = [at for at, character in enumerate(text) if character == " "]
        at = rng.choice(spaces)
        text = text[:at] + " " + text[at:]
    return text


def make_split(name: str, seen: set[str], train: Sequence[Row]) -> list[Row]:
    """One split; `seen` holds every text so far, so that the only repeated rows are those of `SIZES`."""
    size, duplicates, empty, copied = SIZES[name]
    rng = random.Random(SEED + list(SIZES).index(name))
    rate = 0.0 if name == "train" else HELD_OUT_RATE
    rows: list[Row] = []
    while len(rows) < size - duplicates - empty - copied:
        label, domain = len(rows) % 2, ("kitchen", "headphones")[len(rows) // 2 % 2]
        text = write_review(rng, label, domain, rate)
        if text.lower() not in seen:
            seen.add(text.lower())
            rows.append({"text": add_noise(rng, text), "label": label, "domain": domain})
    rows += rows[:duplicates]
    rows += [{"text": "", "label": at % 2, "domain": rows[at]["domain"]} for at in range(empty)]
    # Train is shuffled by now; equal shares of the labels keep the balance.
    filled = [row for row in train if row["text"]]
    for label in (0, 1):
        rows += [row for row in filled if row["label"] == label][: copied // 2]
    rng.shuffle(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description="Make the quickstart's synthetic reviews.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the three files")
    folder: Path = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    train: list[Row] = []
    for name in SIZES:
        rows = make_split(name, seen, train)
        train = train or rows
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
