"""The words of the embedded task: its stories, and the sentences about them.

A template holds {slots} and [choices|like|these], one level deep; a choice may be empty. The same
template serves twice: micro_task.py writes a sentence by choosing one of each, and micro_labels.py
recognises every sentence that the template can write.
"""

from dataclasses import dataclass

NAMES = {
    "She": "Mia Anna Rosa Lily Emma Sara Nina Ella Kate Jane Lucy Zoe".split(),
    "He": "Tom Ben Sam Max Leo Jack Paul Adam Noah Luke Omar Ivan".split(),
}
ITEMS = (
    "pens books stamps cards coins shells beads apples cups toys "
    "stones balls eggs nuts pears buttons photos flowers hats keys"
).split()
PLACES = "shop school farm market store hotel museum library".split()

MACROS = {
    "{who}": "[{name}|{She}|Then {she}|Later {she}|Next {she}]",
    "{then}": "[Then|Later|Next|Soon|After that]",
    "{end}": "[now|in the end|at the end|after all this]",
}


@dataclass(frozen=True)
class Domain:
    """A kind of story: how its start, its steps, its question and its running state are worded."""

    weight: float  # how often a problem tells such a story
    start: list[str]  # slot x
    ops: dict[str, list[str]]  # slots b and k; the keys are those of micro_task.OPERATORS
    question: list[str]
    state: str  # slot eq: an equation inside words
    money: bool = False
    signed: bool = False  # the quantity may fall below zero


THING_OPS = {
    "add": [
        "{who} [finds|buys|gets|makes] {b} [more|new] {items}.",
        "{then} [a friend|an uncle|a truck|a man|a woman] brings {b} [more|new] {items}.",
    ],
    "sub": [
        "{who} [loses|sells|breaks|gives away|throws away] {b} {items}.",
        "{then} [children|visitors|friends] [take|buy|break] {b} {items}.",
    ],
    "add_groups": [
        "{who} [buys|finds|gets] {b} [boxes|bags|packs] of {k} {items} each.",
        "{then} {b} [friends|workers|children] bring {k} {items} each.",
    ],
    "sub_groups": [
        "{who} [sells|loses] {b} [boxes|bags|packs] of {k} {items} each.",
        "{who} gives {k} {items} to each of {b} [friends|children|visitors].",
    ],
    "times": ["{who} [has|gets] {k} times as many {items}[| as before]."],
    "double": ["{who} [doubles the number of|gets twice as many] {items}."],
    "triple": ["{who} triples the number of {items}[| there]."],
    "half": ["{who} [loses|sells|gives away] half of the {items}."],
}
DOMAINS = {
    "collecting": Domain(
        weight=38,
        start=[
            "{name} [has|owns|starts with|begins with] {x} {items}[| at home| in a box].",
            "There are {x} {items} in {name}'s [room|bag|box].",
            "[At first|At home|In a bag], {name} has {x} {items}.",
        ],
        ops=THING_OPS,
        question=[
            "How many {items} [does {name} have|does {she} have|are there] {end}?",
            "What is the number of {items} {end}?",
        ],
        state="[Now|Then|So] {she} has {eq} {items}.",
    ),
    "stock": Domain(
        weight=35,
        start=[
            "[A|The] {place} has {x} {items}[| on a shelf| in boxes].",
            "There are {x} {items} [in|at] [a|the] {place}.",
            "[A worker counts|We see] {x} {items} at [a|the] {place}.",
        ],
        ops={  # a place's things change as a person's do
            op: [template.replace("{who}", "{then} the {place}") for template in templates]
            for op, templates in THING_OPS.items()
        },
        question=[
            "How many {items} [does the {place} have|are there|are at the {place}] {end}?",
            "What is the number of {items} {end}?",
        ],
        state="[Now|Then|So] the {place} has {eq} {items}.",
    ),
    "money": Domain(
        weight=18,
        money=True,
        start=[
            "{name} [has|saves|starts with|begins with] {x}[| at home| in a box].",
            "[At first|At home|In a bag], {name} has {x}.",
        ],
        ops={
            "add": [
                "{who} [earns|gets|finds|saves] {b}[| more].",
                "{then} [a friend|an uncle|a man|a woman] gives {name} {b}.",
            ],
            "sub": [
                "{who} [spends|loses|pays|gives away] {b}.",
                "{who} [spends|pays] {b} [for|on] [food|books|toys|a hat].",
            ],
            "add_groups": [
                "{who} sells {b} {items} for {k} each.",
                "{who} works {b} [days|hours|times] and [earns|gets] {k} each time.",
            ],
            "sub_groups": [
                "{who} buys {b} {items} for {k} each.",
                "{who} [gives|pays] {k} to each of {b} [friends|children|workers].",
            ],
            "times": ["{who} [has|gets] {k} times as much[| money][| as before]."],
            "double": ["{who} [doubles the|gets twice as much] money."],
            "triple": ["{who} triples the money[| there]."],
            "half": ["{who} [loses|spends|gives away] half of the money."],
        },
        question=[
            "How much[| money] [does {name} have|does {she} have|is there] {end}?",
            "How many dollars does {name} have {end}?",
        ],
        state="[Now|Then|So] {she} has {eq}.",
    ),
    "balance": Domain(
        weight=2.5,
        money=True,
        signed=True,
        start=[
            "{name}'s [account|card] [has|starts with|begins with] {x}.",
            "{name} has {x} [in the account|on the card|in the bank].",
        ],
        ops={
            "add": ["{who} [puts|pays] {b} [in|into] the [account|bank]."],
            "sub": ["{who} [spends|pays] {b}[| with the card| from the account]."],
            "sub_groups": ["{who} pays {b} [bills|fees] of {k} each."],
        },
        question=["What is the balance {end}?", "How much is in the [account|bank] {end}?"],
        state="[Now|Then|So] the balance is {eq}.",
    ),
    "temperature": Domain(
        weight=2.5,
        signed=True,
        start=[
            "The temperature [in the town|in the hills|at home] is {x} degrees.",
            "[At first|In the morning|At noon], the temperature is {x} degrees.",
        ],
        ops={
            "add": ["{then} it [rises|climbs|goes up] by {b} degrees."],
            "sub": ["{then} it [falls|drops|goes down] by {b} degrees."],
            "sub_groups": ["{then} it [falls|drops] by {k} degrees in each of {b} hours."],
        },
        question=["[What is the temperature|How many degrees is it] {end}?"],
        state="[Now|Then|So] it is {eq} degrees.",
    ),
    "score": Domain(
        weight=2.5,
        signed=True,
        start=[
            "{name} [has|starts with|begins with] {x} points in a game.",
            "In a game, {name} [has|starts with|begins with] {x} points.",
        ],
        ops={
            "add": ["{who} [wins|gets|earns] {b} [more|new] points."],
            "sub": ["{who} [loses|drops|gives away] {b} points."],
            "sub_groups": ["{who} [loses|drops] {k} points in each of {b} rounds."],
        },
        question=["[What is {name}'s score|How many points does {name} have] {end}?"],
        state="[Now|Then|So] the score is {eq} points.",
    ),
}
DISTRACTORS = [  # slot d: a number that the answer does not need
    "{name}'s [brother|sister|friend|teacher] is {d} years old.",
    "The [house|school|room|hotel] has {d} [doors|windows|chairs|lamps].",
    "The [bus|train] to town has {d} seats.",
    "The walk to [town|school] takes {d} minutes.",
    "{name}'s [dog|cat] is {d} years old.",
    "The [party|game|holiday] is in {d} days.",
]
OPENINGS = [
    "Let us [think|go] step by step.",
    "We [read|solve] this [slowly|with care].",
    "[First|Now] we look at the story.",
]
BETWEEN = ["Now we go on.", "That was [easy|one step].", "We take the next [step|part]."]
CLOSINGS = ["That is the final [count|number].", "[So|Now] we are done.", "This is the end."]
BARE = "{eq}."
PART = "[First|Here] we [find|get|need] {eq}."  # an equation that does not yet complete its step
CHECK = "[Check|To check]: {eq}."
ASIDE = ["[Also|By the way], {eq}.", "We also [know|see] that {eq}.", BARE]


def expand(template: str) -> str:
    """The template with its macros, such as {who}, replaced by the choices that they stand for."""
    for macro, choices in MACROS.items():
        template = template.replace(macro, choices)
    return template
