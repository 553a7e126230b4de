"""The words of the embedded task: its stories, and the sentences about them.

A template holds {slots} and [choices|like|these], one level deep; a choice may be empty. The same
template serves twice: micro_task.py writes a sentence by choosing one of each, and micro_labels.py
recognises every sentence that the template can write.
"""

from dataclasses import dataclass
from functools import cached_property

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
    table: str  # a template a line, after what it tells
    money: bool = False
    signed: bool = False  # the quantity may fall below zero

    @cached_property
    def templates(self) -> dict[str, list[str]]:
        """Templates of "start" (slot x), "question", "state" (slot eq) and each kind of step.

        The kinds are those of micro_task.OPERATORS, with slots b and k.
        """
        kinds: dict[str, list[str]] = {}
        for line in filter(None, self.table.splitlines()):
            kind, template = line.split(maxsplit=1)
            kinds.setdefault(kind, []).append(template)
        return kinds


THINGS = """
add        {who} [finds|buys|gets|makes] {b} [more|new] {items}.
add        {then} [a friend|an uncle|a truck|a man|a woman] brings {b} [more|new] {items}.
sub        {who} [loses|sells|breaks|gives away|throws away] {b} {items}.
sub        {then} [children|visitors|friends] [take|buy|break] {b} {items}.
add_groups {who} [buys|finds|gets] {b} [boxes|bags|packs] of {k} {items} each.
add_groups {then} {b} [friends|workers|children] bring {k} {items} each.
sub_groups {who} [sells|loses] {b} [boxes|bags|packs] of {k} {items} each.
sub_groups {who} gives {k} {items} to each of {b} [friends|children|visitors].
times      {who} [has|gets] {k} times as many {items}[| as before].
double     {who} [doubles the number of|gets twice as many] {items}.
triple     {who} triples the number of {items}[| there].
half       {who} [loses|sells|gives away] half of the {items}.
"""
COLLECTING = """
start      {name} [has|owns|starts with|begins with] {x} {items}[| at home| in a box].
start      There are {x} {items} in {name}'s [room|bag|box].
start      [At first|At home|In a bag], {name} has {x} {items}.
question   How many {items} [does {name} have|does {she} have|are there] {end}?
question   What is the number of {items} {end}?
state      [Now|Then|So] {she} has {eq} {items}.
"""
STOCK = """
start      [A|The] {place} has {x} {items}[| on a shelf| in boxes].
start      There are {x} {items} [in|at] [a|the] {place}.
start      [A worker counts|We see] {x} {items} at [a|the] {place}.
question   How many {items} [does the {place} have|are there|are at the {place}] {end}?
question   What is the number of {items} {end}?
state      [Now|Then|So] the {place} has {eq} {items}.
"""
MONEY = """
start      {name} [has|saves|starts with|begins with] {x}[| at home| in a box].
start      [At first|At home|In a bag], {name} has {x}.
add        {who} [earns|gets|finds|saves] {b}[| more].
add        {then} [a friend|an uncle|a man|a woman] gives {name} {b}.
sub        {who} [spends|loses|pays|gives away] {b}.
sub        {who} [spends|pays] {b} [for|on] [food|books|toys|a hat].
add_groups {who} sells {b} {items} for {k} each.
add_groups {who} works {b} [days|hours|times] and [earns|gets] {k} each time.
sub_groups {who} buys {b} {items} for {k} each.
sub_groups {who} [gives|pays] {k} to each of {b} [friends|children|workers].
times      {who} [has|gets] {k} times as much[| money][| as before].
double     {who} [doubles the|gets twice as much] money.
triple     {who} triples the money[| there].
half       {who} [loses|spends|gives away] half of the money.
question   How much[| money] [does {name} have|does {she} have|is there] {end}?
question   How many dollars does {name} have {end}?
state      [Now|Then|So] {she} has {eq}.
"""
BALANCE = """
start      {name}'s [account|card] [has|starts with|begins with] {x}.
start      {name} has {x} [in the account|on the card|in the bank].
add        {who} [puts|pays] {b} [in|into] the [account|bank].
sub        {who} [spends|pays] {b}[| with the card| from the account].
sub_groups {who} pays {b} [bills|fees] of {k} each.
question   What is the balance {end}?
question   How much is in the [account|bank] {end}?
state      [Now|Then|So] the balance is {eq}.
"""
TEMPERATURE = """
start      The temperature [in the town|in the hills|at home] is {x} degrees.
start      [At first|In the morning|At noon], the temperature is {x} degrees.
add        {then} it [rises|climbs|goes up] by {b} degrees.
sub        {then} it [falls|drops|goes down] by {b} degrees.
sub_groups {then} it [falls|drops] by {k} degrees in each of {b} hours.
question   [What is the temperature|How many degrees is it] {end}?
state      [Now|Then|So] it is {eq} degrees.
"""
SCORE = """
start      {name} [has|starts with|begins with] {x} points in a game.
start      In a game, {name} [has|starts with|begins with] {x} points.
add        {who} [wins|gets|earns] {b} [more|new] points.
sub        {who} [loses|drops|gives away] {b} points.
sub_groups {who} [loses|drops] {k} points in each of {b} rounds.
question   [What is {name}'s score|How many points does {name} have] {end}?
state      [Now|Then|So] the score is {eq} points.
"""

DOMAINS = {
    "collecting": Domain(38, COLLECTING + THINGS),
    "stock": Domain(35, STOCK + THINGS.replace("{who}", "{then} the {place}")),
    "money": Domain(18, MONEY, money=True),
    "balance": Domain(2.5, BALANCE, money=True, signed=True),
    "temperature": Domain(2.5, TEMPERATURE, signed=True),
    "score": Domain(2.5, SCORE, signed=True),
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
BARE = ["{eq}."]
PART = ["[First|Here] we [find|get|need] {eq}."]  # an equation that does not yet complete its step
CHECK = ["[Check|To check]: {eq}."]
ASIDE = ["[Also|By the way], {eq}.", "We also [know|see] that {eq}.", *BARE]


def expand(template: str) -> str:
    """The template with its macros, such as {who}, replaced by the choices that they stand for."""
    for macro, choices in MACROS.items():
        template = template.replace(macro, choices)
    return template
