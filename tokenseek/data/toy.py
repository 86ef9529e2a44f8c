"""Word problems with worked answers, made from a seed: an instruction data set that needs no network."""

import random
from collections.abc import Callable

from tokenseek.errors import UserError

_NAMES = [
    "Ada", "Ben", "Chidi", "Dara", "Elif", "Farid", "Greta", "Hana", "Ines", "Jonas", "Kofi", "Lena", "Mateo", "Nora",
    "Omar", "Priya", "Quentin", "Rosa", "Sami", "Tessa", "Uma", "Viktor", "Wen", "Yara",
]  # fmt: skip
_THINGS = ["pencils", "apples", "marbles", "stickers", "books", "buttons", "postcards", "shells", "candles", "cookies"]
_SHOPS = ["a market stall", "the school shop", "a flea market", "the corner shop", "a book fair", "the museum shop"]

Problem = tuple[str, list[str], int]  # question, steps of the answer, result


def make_word_problems(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different problems, each `{"question": ..., "answer": ...}`; the answer ends with the line `#### RESULT`.

    The same `n` and `seed` give the same problems everywhere, and fewer problems of one seed are the first of more.
    Ten kinds take turns, so that lengths and methods vary. At most 5,000, for some kinds have not many more to give.
    """
    if not 0 <= n <= 5000:
        raise UserError(f"make_word_problems: n is {n}; accepted is 0 to 5000")
    random_source = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < n:
        question, steps, result = _KINDS[len(problems) % len(_KINDS)](random_source)
        problems.setdefault(question, "\n".join([*steps, f"#### {result}"]))
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def _shopping(r: random.Random) -> Problem:
    name, thing, other = r.choice(_NAMES), *r.sample(_THINGS, 2)
    count, price, count2, price2 = r.randint(3, 12), r.randint(2, 9), r.randint(2, 8), r.randint(3, 15)
    first, second = count * price, count2 * price2
    paid = first + second + r.randint(1, 40)
    return (
        f"{name} goes to {r.choice(_SHOPS)} and buys {count} {thing} for {price} dollars each and {count2} {other} for "
        f"{price2} dollars each. {name} pays with {paid} dollars. How much change does {name} get?",
        [
            f"The {thing} cost {count} * {price} = {first} dollars.",
            f"The {other} cost {count2} * {price2} = {second} dollars.",
            f"Together that is {first} + {second} = {first + second} dollars.",
            f"The change is {paid} - {first + second} = {paid - first - second} dollars.",
        ],
        paid - first - second,
    )


def _sharing(r: random.Random) -> Problem:
    name, thing = r.choice(_NAMES), r.choice(_THINGS)
    friends, each, left = r.randint(3, 9), r.randint(4, 15), r.randint(1, 2)
    total = friends * each + left
    return (
        f"{name} shares {total} {thing} equally among {friends} friends. How many {thing} are left over?",
        [
            f"Each friend gets {each} {thing}, because {friends} * {each} = {friends * each}.",
            f"Left over are {total} - {friends * each} = {left}.",
        ],
        left,
    )


def _travel(r: random.Random) -> Problem:
    name, vehicle = r.choice(_NAMES), r.choice(["bus", "train", "car", "bicycle"])
    speed, hours, speed2, hours2 = r.randint(3, 18) * 5, r.randint(2, 6), r.randint(3, 18) * 5, r.randint(1, 5)
    first, second = speed * hours, speed2 * hours2
    return (
        f"{name} travels by {vehicle} for {hours} hours at {speed} km per hour, takes a rest, and goes on for {hours2} "
        f"hours at {speed2} km per hour. How many km is the whole way?",
        [
            f"Before the rest {name} travels {hours} * {speed} = {first} km.",
            f"After the rest it is {hours2} * {speed2} = {second} km.",
            f"The whole way is {first} + {second} = {first + second} km.",
        ],
        first + second,
    )


def _rectangle(r: random.Random) -> Problem:
    width, length = r.randint(4, 25), r.randint(6, 40)
    fence = 2 * (width + length)
    return (
        f"A garden is {length} m long and {width} m wide. How many m of fence go around it?",
        [f"Length and width are {length} + {width} = {length + width} m.", f"Twice that is {fence} m."],
        fence,
    )


def _ages(r: random.Random) -> Problem:
    name, sibling = r.sample(_NAMES, 2)
    age, gap, years = r.randint(6, 30), r.randint(2, 9), r.randint(3, 15)
    return (
        f"{name} is {age} years old. {sibling} is {gap} years older than {name}. How old are they together in {years} "
        "years?",
        [
            f"{sibling} is {age} + {gap} = {age + gap} years old.",
            f"In {years} years {name} is {age} + {years} = {age + years}.",
            f"In {years} years {sibling} is {age + gap} + {years} = {age + gap + years}.",
            f"Together they are {age + years} + {age + gap + years} = {2 * (age + years) + gap}.",
        ],
        2 * (age + years) + gap,
    )


def _discount(r: random.Random) -> Problem:
    name, percent, price = r.choice(_NAMES), r.choice([5, 10, 20, 25, 50]), r.randint(2, 30) * 20
    item, off = r.choice(["coat", "bicycle", "desk", "guitar", "tent", "camera"]), price * percent // 100
    return (
        f"A {item} costs {price} dollars. {name} has a voucher for {percent} percent off. What does {name} pay?",
        [
            f"{percent} percent of {price} is {price} * {percent} / 100 = {off} dollars.",
            f"{name} pays {price} - {off} = {price - off} dollars.",
        ],
        price - off,
    )


def _saving(r: random.Random) -> Problem:
    name, start, weekly, spent, weeks = (
        r.choice(_NAMES),
        r.randint(5, 80),
        r.randint(6, 20),
        r.randint(2, 5),
        r.randint(3, 20),
    )
    kept = weekly - spent
    return (
        f"{name} has {start} dollars in a box. Every week {name} puts {weekly} dollars into it and takes {spent} "
        f"dollars out to buy a snack. How many dollars are in the box after {weeks} weeks?",
        [
            f"Every week the box gains {weekly} - {spent} = {kept} dollars.",
            f"In {weeks} weeks that is {weeks} * {kept} = {weeks * kept} dollars.",
            f"With the first {start} dollars the box holds {start} + {weeks * kept} = {start + weeks * kept} dollars.",
        ],
        start + weeks * kept,
    )


def _sequence(r: random.Random) -> Problem:
    start, step, shown = r.randint(1, 30), r.randint(2, 12), r.randint(3, 5)
    terms, following = [start + step * i for i in range(shown)], start + step * shown
    return (
        f"What is the next number: {', '.join(map(str, terms))}?",
        [f"Each number is {step} more than the one before.", f"The next one is {terms[-1]} + {step} = {following}."],
        following,
    )


def _workers(r: random.Random) -> Problem:
    thing, people, rate, hours, days = (
        r.choice(_THINGS),
        r.randint(2, 9),
        r.randint(3, 12),
        r.randint(2, 8),
        r.randint(2, 6),
    )
    broken = r.randint(1, 20)
    hourly, daily = people * rate, people * rate * hours
    return (
        f"In a workshop {people} people pack boxes of {thing}. Each of them packs {rate} boxes an hour, and they work "
        f"{hours} hours a day. After {days} days a delivery van comes, but {broken} of the boxes are damaged and stay "
        "behind. How many boxes does the van take away?",
        [
            f"In one hour the {people} people pack {people} * {rate} = {hourly} boxes.",
            f"In one day of {hours} hours they pack {hourly} * {hours} = {daily} boxes.",
            f"In {days} days they pack {daily} * {days} = {daily * days} boxes.",
            f"Without the damaged ones that leaves {daily * days} - {broken} = {daily * days - broken} boxes.",
        ],
        daily * days - broken,
    )


def _reading(r: random.Random) -> Problem:
    name, pages, days, left_days = r.choice(_NAMES), r.randint(8, 40), r.randint(2, 7), r.randint(2, 6)
    per_day = r.randint(5, 30)
    total, read = pages * days + per_day * left_days, pages * days
    return (
        f"{name} reads a book of {total} pages. For {days} days {name} reads {pages} pages a day. How many pages a day "
        f"must {name} read to finish the book in {left_days} more days?",
        [
            f"In {days} days {name} reads {days} * {pages} = {read} pages.",
            f"There are {total} - {read} = {total - read} pages left.",
            f"Over {left_days} days that is {total - read} / {left_days} = {per_day} pages a day.",
        ],
        per_day,
    )


_KINDS: list[Callable[[random.Random], Problem]] = [
    _shopping, _sharing, _travel, _rectangle, _ages, _discount, _saving, _sequence, _workers, _reading,
]  # fmt: skip
