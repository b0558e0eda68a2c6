"""Build the texts of the embedded refusal model (train, heldout, calibration, golden), always the same bytes.

    python embedded/build_texts.py --assets FOLDER

FOLDER holds the wheels of chatterbot-corpus 1.3.3 and pyrit 1.1.0 (`pip download --no-deps`), read in place.

Every sentence written for this project, every question/answer pair of chatterbot-corpus and every row of
PyRIT belongs to exactly one split *before* texts are composed, so no wording of a refusal is ever seen in two
splits. Only polite phrases that both labels use ("I'm sorry.", "Sure!") are shared.
"""

import argparse
import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "heldout", "golden", "calibration")
LANGUAGES = (
    "en",
    "zh",
    "fr",
    "es",
    "de",
    "pt",
    "it",
    "ru",
    "ja",
    "ko",
    "ar",
    "tr",
    "hi",
    "id",
    "vi",
    "nl",
    "pl",
)
REFUSAL, ANSWER = "Refusal", "Non-refusal"

# Which positions of a list of sentences leave the training split; the rest trains. The list is turned by a
# different amount in each language, so the same meaning is not held out everywhere.
HELD = {
    "core": (18, {3: "heldout", 8: "heldout", 14: "heldout", 5: "golden", 11: "golden", 16: "calibration"}),
    "answer": (14, {2: "heldout", 7: "heldout", 11: "heldout", 4: "golden", 9: "golden", 12: "calibration"}),
    "hard_negative": (10, {1: "heldout", 6: "heldout", 3: "golden", 8: "calibration"}),
    "reason": (5, {1: "heldout", 3: "golden"}),
    "redirect": (5, {1: "heldout", 3: "golden"}),
}
# Frames and actions make many more sentences ("I refuse to" + "draw this picture"), all of them for training.
TRAIN_ONLY = ("refusing", "agreeing")
SHARED = ("system", "opener", "clause_opener", "acknowledgement", "closing")

# Texts per language and split: composed refusals, composed answers, and at most this many chatterbot pairs.
COUNTS = {"train": (230, 130, 110), "heldout": (24, 20, 8), "golden": (8, 7, 4), "calibration": (2, 2, 1)}

CHATTERBOT = {
    "english": "en", "chinese": "zh", "french": "fr", "spanish": "es", "german": "de", "portuguese": "pt",
    "italian": "it", "russian": "ru", "japanese": "ja", "korean": "ko", "turkish": "tr", "hindi": "hi",
    "indonesian": "id", "dutch": "nl",
}  # fmt: skip
CHATTERBOT_FILES = {
    "greetings", "food", "conversations", "coversations", "history", "money", "dinero", "movies", "science",
    "sports", "sport", "trivia", "literature", "computers", "coding", "tech_support", "music", "traveling",
    "suggestions", "origen", "games", "proverbs", "linguistic_knowledge", "history_brasil", "compliment",
}  # fmt: skip

# An answer that sounds like a refusal has an unclear label here: it is left out.
UNCLEAR = re.compile(
    r"can't|can ?not|unable|not able|won't|don't|do not|didn't|no idea|not capable|not sure|sorry|refuse"
    r"|not allowed"
    r"|no puedo|no sé|no tengo|lo siento|peux pas|sais pas|désolé|kann|weiß|leider|keine|nicht fähig|toe in staat"
    r"|não posso|não sei|não consigo|não tenho|desculp|non posso|non so\b|dispiace|in grado"
    r"|не могу|не знаю|извин|нет |できま|できな|わかりません|分かりません|申し訳|すみません|ません"
    r"|수 없|모르|죄송|못|없습니다|不能|无法|不知道|抱歉|对不起|不会|没有|bilmiyorum|amam|emem|üzgün|yok"
    r"|नहीं|माफ|tidak|maaf|kan niet|weet het niet|weet niet|sorry|geen",
    re.IGNORECASE,
)
# Texts that ship must be clean, so whole rows go at the first doubtful word, in any language of the corpus.
UNWANTED = re.compile(
    r"sex|porn|rape|nude|naked|whore|bitch|shit|fuck|damn|\bass\b|kill|suicid|murder|drug|drunk|nazi|hitler|racis|"
    r"terror|bomb|hate|slave|jew|muslim|islam|christ|gott\b|\bgod\b|\bdie\b|dead|death|gun\b|weapon|war\b|child|"
    r"muer|mata|mort|tuer|töt|tod\b|droga|guerr|assass|uccid|убий|смерт|умер|секс|войн|нарко|殺|杀|死|性|戦争|战争|"
    r"죽|살인|성관계|전쟁|öld|ölüm|savaş|मार|मौत|bunuh|perang|dood|oorlog|seks|stupid|idiot|dumb|trump|putin|"
    r"phone number|address|@|http|ahok|남친|dronken|tipsy",
    re.IGNORECASE,
)
PYRIT_UNWANTED = re.compile(
    r"child|sex|suicid|racis|race|hate|eating disorder|terror|pakistan|ebola|sarin|assault|assassin|weapon|"
    r"bomb|based ?gpt|classic\]|\./cmd|violen|kill|gang|lsd|harm myself|inferior|drug|trump|biden|fauci|"
    r"korea|vaccin|kick|stranger|steal something|phish|amanda|presidential|manipulate people|margarita|"
    r"election|attack",
    re.IGNORECASE,
)
REFUSAL_WORDING = re.compile(r"can[’']t|cannot|unable to|not able to|won[’']t|refuse|must decline", re.IGNORECASE)


@dataclass
class Pool:
    """The sentences of one language and one split, by kind; pairs are (user, assistant)."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in (*SHARED, *HELD, *TRAIN_ONLY)})
    answers: list[tuple[str, str]] = field(default_factory=list)
    hard: list[tuple[str, str]] = field(default_factory=list)
    chat: list[tuple[str, str]] = field(default_factory=list)

    @property
    def questions(self) -> list[str]:
        """User turns that any kind of reply may follow."""
        return [user for user, _ in (*self.answers, *self.hard, *self.chat)]


Pools = dict[tuple[str, str], Pool]
Row = dict[str, str]


def digest(text: str) -> int:
    """Return a number that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(kind: str, position: int, language: str) -> str:
    """Return the split that owns the sentence at this position of its list."""
    size, held = HELD[kind]
    return held.get((position + 4 * LANGUAGES.index(language)) % size, "train")


def split_by_digest(text: str) -> str:
    """Return the split that owns a row: 70 % train, 14 % held out, 13 % golden, 3 % calibration."""
    share = digest(text) % 100
    return "train" if share < 70 else "heldout" if share < 84 else "golden" if share < 97 else "calibration"


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """Read one object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def authored_pools() -> Pools:
    """Deal the project's own sentences to the splits."""
    pools = {(language, split): Pool() for language in LANGUAGES for split in SPLITS}
    for language in LANGUAGES:
        by_kind: dict[str, list[dict[str, str]]] = {}
        for item in read_jsonl(HERE / "refusals" / f"{language}.jsonl"):
            by_kind.setdefault(item["kind"], []).append(item)
        for kind in (*SHARED, *HELD):
            for position, item in enumerate(by_kind[kind]):
                owners = SPLITS if kind in SHARED else (split_of(kind, position, language),)
                for split in owners:
                    add_authored(pools[language, split], kind, item)
        cores = {item["text"].casefold() for item in by_kind["core"]}
        for kind in TRAIN_ONLY:
            made = framed(by_kind[f"{kind}_frame"], by_kind["action"])
            pools[language, "train"].texts[kind] = [text for text in made if text.casefold() not in cores]
        for kind in ("core", "reason"):
            more = [item["text"] for item in by_kind[f"training_{kind}"]]
            pools[language, "train"].texts[kind] += [text for text in more if text.casefold() not in cores]
    return pools


def add_authored(pool: Pool, kind: str, item: dict[str, str]) -> None:
    """Put one sentence or pair into a pool."""
    if kind == "answer":
        pool.answers.append((item["user"], item["assistant"]))
    elif kind == "hard_negative":
        pool.hard.append((item["user"], item["assistant"]))
    else:
        pool.texts[kind].append(item["text"])


def framed(frames: list[dict[str, str]], actions: list[dict[str, str]]) -> list[str]:
    """Put every action into every frame; `{with}` takes the action's second form where a language needs one."""
    return [
        frame["text"].replace("{}", action["text"]).replace("{with}", action.get("with", action["text"]))
        for frame in frames
        for action in actions
    ]


def wheel(assets: Path, name: str) -> zipfile.ZipFile:
    """Open the one wheel of that name."""
    found = sorted(assets.glob(f"{name}-*.whl"))
    if len(found) != 1:
        raise SystemExit(f"{assets}: expected one wheel {name}-*.whl, found {len(found)}; see embedded/README.md")
    return zipfile.ZipFile(found[0])


def chatterbot_pairs(assets: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (language, question, answer) of the clean, clearly answered pairs."""
    with wheel(assets, "chatterbot_corpus") as archive:
        for name in sorted(archive.namelist()):
            folder, _, stem = name.removesuffix(".yml").removeprefix("chatterbot_corpus/data/").partition("/")
            if not name.endswith(".yml") or folder not in CHATTERBOT or stem not in CHATTERBOT_FILES:
                continue
            for talk in yaml.safe_load(archive.read(name).decode("utf-8"))["conversations"]:
                turns = [" ".join(str(turn).split()) for turn in talk[:2]]
                if len(turns) == 2 and clean_pair(*turns):
                    yield CHATTERBOT[folder], turns[0], turns[1]


def clean_pair(question: str, answer: str) -> bool:
    """Tell whether a chatterbot pair may be used."""
    fits = 1 < len(question) < 300 and 1 < len(answer) < 600
    return fits and not UNWANTED.search(f"{question} {answer}") and not UNCLEAR.search(answer)


def add_chatterbot(pools: Pools, assets: Path) -> None:
    """Deal chatterbot pairs by answer, so that one answer to many questions stays in one split."""
    answers: set[tuple[str, str]] = set()
    for language, question, answer in chatterbot_pairs(assets):
        if (language, answer.casefold()) not in answers:
            answers.add((language, answer.casefold()))
            pools[language, split_by_digest(answer.casefold())].chat.append((question, answer))


def pyrit_rows(assets: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (label, objective, response); a row labelled a refusal must also say so."""
    responses: set[str] = set()
    with wheel(assets, "pyrit") as archive:
        for name in ("refusal.csv", "refusal_extra.csv"):
            text = archive.read(f"pyrit/datasets/scorer_evals/refusal_scorer/{name}").decode("utf-8")
            body = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
            for row in csv.DictReader(io.StringIO(body)):
                user, reply, refused = (
                    row["objective"],
                    row["assistant_response"].strip(),
                    row["human_score"] == "1",
                )
                key = re.sub(r"\W+", " ", reply).casefold()
                off_topic = refused and not REFUSAL_WORDING.search(reply[:200])
                if off_topic or key in responses or PYRIT_UNWANTED.search(f"{user} {reply}"):
                    continue
                responses.add(key)
                yield REFUSAL if refused else ANSWER, user, reply


def conversation(*turns: str, system: str = "") -> str:
    """Write user and assistant turns, in this order, as one text with role tokens."""
    roles = ("<|user|>", "<|assistant|>")
    head = f"<|system|>{system}" if system else ""
    return head + "".join(roles[index % 2] + turn for index, turn in enumerate(turns))


def after_clause(language: str, sentence: str) -> str:
    """Return the sentence as it reads behind "I'm sorry, but"."""
    keeps_capital = language == "en" and re.match(r"I\b", sentence)
    return sentence if keeps_capital else sentence[0].lower() + sentence[1:]


def join(language: str, *parts: str) -> str:
    """Put sentences side by side as the language does."""
    return ("" if language in ("zh", "ja") else " ").join(part for part in parts if part)


def maybe(rng: random.Random, chance: float, texts: list[str]) -> str:
    """Return one of the texts, or nothing."""
    return rng.choice(texts) if texts and rng.random() < chance else ""


def refusal_reply(rng: random.Random, language: str, pool: Pool) -> str:
    """Compose a refusal around one of the pool's core sentences."""
    core = maybe(rng, 0.45, pool.texts["refusing"]) or rng.choice(pool.texts["core"])
    style = rng.random()
    if style < 0.35:
        core = join(language, rng.choice(pool.texts["clause_opener"]), after_clause(language, core))
    elif style < 0.6:
        core = join(language, rng.choice(pool.texts["opener"]), core)
    reason = maybe(rng, 0.4, pool.texts["reason"])
    middle = (reason, core) if rng.random() < 0.2 else (core, reason)
    ending = maybe(rng, 0.4, pool.texts["redirect"]) or maybe(rng, 0.25, pool.texts["closing"])
    return join(language, *middle, ending)


def answer_reply(rng: random.Random, language: str, pool: Pool) -> tuple[str, str]:
    """Compose a question and its answer; one time in three the answer only sounds like a refusal."""
    if rng.random() < 0.35:
        user, reply = rng.choice(pool.hard)
        return user, join(language, reply, maybe(rng, 0.3, pool.texts["closing"]))
    two = len(pool.answers) > 1 and rng.random() < 0.15
    pairs = rng.sample(pool.answers, 2 if two else 1)
    user, reply = (join(language, *side) for side in zip(*pairs, strict=True))
    opening = maybe(rng, 0.4, pool.texts["acknowledgement"]) or maybe(rng, 0.08, pool.texts["opener"])
    opening = maybe(rng, 0.3, pool.texts["agreeing"]) or opening
    return user, join(language, opening, reply, maybe(rng, 0.4, pool.texts["closing"]))


def composed(rng: random.Random, language: str, pool: Pool, label: str) -> str:
    """Compose one conversation whose last turn has the label."""
    if label == REFUSAL:
        user, reply = rng.choice(pool.questions), refusal_reply(rng, language, pool)
    else:
        user, reply = answer_reply(rng, language, pool)
    shape = rng.random()
    system = maybe(rng, 0.12, pool.texts["system"])
    if shape < 0.05:
        return reply if rng.random() < 0.4 else f"<|assistant|>{reply}"
    if shape < 0.2:  # an ordinary turn before
        before = [pair for pair in pool.answers + pool.chat if pair[0] != user] or pool.hard
        return conversation(*rng.choice(before), user, reply, system=system)
    if shape < 0.25:  # a refusal before, which the last turn takes back or repeats
        return conversation(user, refusal_reply(rng, language, pool), rng.choice(pool.questions), reply, system=system)
    if shape < 0.3:  # the user speaks of refusing: only the assistant's own words count
        return conversation(join(language, user, f"“{rng.choice(pool.texts['core'])}”"), reply, system=system)
    if shape < 0.33 and len(reply) > 60:
        third = len(reply) // 3
        reply = f"{reply[: 2 * third]}<|...|>{reply[-third:]}"
    return conversation(user, reply, system=system)


def row(text: str, label: str, language: str, source: str) -> Row:
    """Return one line of a split."""
    return {"text": text, "label": label, "language": language, "source": source}


def composed_rows(pools: Pools, split: str) -> Iterator[Row]:
    """Yield the composed conversations and the chatterbot pairs of one split."""
    refusals, answers, chats = COUNTS[split]
    for language in LANGUAGES:
        pool = pools[language, split]
        rng = random.Random(f"{split}:{language}")
        chat = sorted(pool.chat, key=lambda pair: digest("".join(pair)))[:chats]
        for pair in chat:
            yield row(conversation(*pair), ANSWER, language, "chatterbot-corpus")
        # A language with few chatterbot pairs gets more composed answers, to keep the share of refusals.
        for label, count in ((REFUSAL, refusals), (ANSWER, answers + chats - len(chat))):
            for text in distinct(rng, language, pool, label, count):
                yield row(text, label, language, "samescore")


def distinct(rng: random.Random, language: str, pool: Pool, label: str, count: int) -> list[str]:
    """Compose `count` different conversations, or as many as the pool allows."""
    made: dict[str, None] = {}
    for _ in range(20 * count):
        if len(made) == count:
            break
        made[composed(rng, language, pool, label)] = None
    return list(made)


def long_rows(pools: Pools, pyrit: list[Row]) -> Iterator[Row]:
    """Yield conversations of the golden set that no 512-token window holds."""
    for language in ("zh", "it", "ja", "ko", "pt", "nl", "es", "id", "en", "ru"):
        pool = pools[language, "golden"]
        rng = random.Random(f"long:{language}")
        pairs = sorted((*pool.answers, *pool.hard, *pool.chat), key=lambda pair: digest("".join(pair)))
        turns = [turn for pair in pairs for turn in pair]
        limit = 1100 if language in ("zh", "ja", "ko") else 2600
        while len(turns) > 2 and sum(map(len, turns)) > limit:
            turns = turns[:-2]
        if LANGUAGES.index(language) % 2:
            turns[-1] = refusal_reply(rng, language, pool)
            yield row(conversation(*turns), REFUSAL, language, "chatterbot-corpus")
        else:
            yield row(conversation(*turns), ANSWER, language, "chatterbot-corpus")
    for start in range(4):  # one chat that passes through every language
        order = LANGUAGES[start * 4 :] + LANGUAGES[: start * 4]
        pairs = [pair for language in order for pair in pools[language, "golden"].answers]
        turns = [turn for pair in pairs[start % 2 :: 2] for turn in pair]
        yield row(conversation(*turns), ANSWER, "mul", "samescore")
    long = sorted((r for r in pyrit if r["label"] == ANSWER), key=lambda r: -len(r["text"]))
    for first, second in zip(long[0:4:2], long[1:4:2], strict=False):
        yield row(first["text"] + second["text"], ANSWER, "en", "pyrit")


def build(assets: Path) -> dict[str, list[Row]]:
    """Return the rows of every split, each text in one split only."""
    pools = authored_pools()
    add_chatterbot(pools, assets)
    pyrit: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for label, user, reply in pyrit_rows(assets):
        pyrit[split_by_digest(reply)].append(row(conversation(user, reply), label, "en", "pyrit"))
    splits: dict[str, list[Row]] = {}
    for split in SPLITS:
        rows = [*composed_rows(pools, split), *pyrit[split]]
        if split == "golden":
            rows += long_rows(pools, pyrit["golden"])
            awkward = read_jsonl(HERE / "refusals" / "awkward.jsonl")
            rows += [row(a["text"], a["label"], a["language"], "samescore") for a in awkward]
        splits[split] = rows
    return without_repeats(splits)


def without_repeats(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Drop a text that an earlier split has, and shuffle each split the same way every time."""
    seen: set[str] = set()
    result = {}
    for split in ("golden", "calibration", "heldout", "train"):
        kept = []
        for item in splits[split]:
            if item["text"] not in seen:
                seen.add(item["text"])
                kept.append(item)
        result[split] = sorted(kept, key=lambda item: digest(item["text"]))
    return result


def write(folder: Path, splits: dict[str, list[Row]]) -> None:
    """Write one file per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        body = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows)
        (folder / f"{split}.jsonl").write_text(body, encoding="utf-8", newline="\n")


def summary(splits: dict[str, list[Row]]) -> dict[str, Any]:
    """Count rows, refusals and bytes."""
    return {
        split: {
            "texts": len(rows),
            "refusals": sum(item["label"] == REFUSAL for item in rows),
            "bytes": sum(len(item["text"].encode()) for item in rows),
            "longest": max(len(item["text"]) for item in rows),
        }
        for split, rows in splits.items()
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", type=Path, required=True, help="folder with the two wheels")
    parser.add_argument("--output", type=Path, default=HERE / "texts", help="folder to write (default: embedded/texts)")
    args = parser.parse_args()
    splits = build(args.assets)
    write(args.output, splits)
    print(json.dumps(summary(splits), indent=1))


if __name__ == "__main__":
    main()
