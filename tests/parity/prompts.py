"""The prompts on which Forge and llama.cpp are compared, and a text for perplexity. All written for this purpose."""

_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*turns, system=_SYSTEM):
    """ChatML of user and assistant turns, ready for the next answer."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


# A document of several kinds of text: prose, notes, code, tables, letters, other languages.
DOCUMENT = """The lighthouse keeper of Marren Point had not seen a ship for eleven days when the fog finally lifted. She climbed
the ninety-four steps with a can of oil in one hand and a folded letter in the other, stopping twice to catch her
breath and once to watch a gull quarrel with the wind. From the gallery the sea looked like hammered tin. To the
north lay the skerries, black and wet, and beyond them the thin line where the shipping lane began. She counted the
buoys, as she did every morning: four, five, six. The seventh was gone.

A missing buoy is not a disaster by itself. Chains wear through, shackles rust, and in spring the ice carries away
whatever it likes. But the seventh marked the shallow that sailors called the Anvil, and a captain who trusted his
chart would look for its light and, finding none, conclude that he was somewhere else. She wrote the time in the log,
ten minutes past seven, and beneath it a single sentence: "The Anvil is unmarked until further notice." Then she sat
down at the telegraph, warmed her fingers over the lamp, and began to send.

Notes on bread, third attempt. Flour 500 g, water 350 g, salt 10 g, starter 100 g. The dough was mixed at eight in the
evening and folded four times, every thirty minutes. The kitchen was cold, about 17 degrees, so the first rise took
all night. Shaped at seven, proved for two hours in a basket lined with a towel, baked at 240 degrees in an iron pot:
twenty-five minutes with the lid on, twenty without. The crust was better than last week, thin and loud. The crumb is
still too tight near the bottom. Next time: five percent more water, and let the pot get hotter before the loaf goes in.

def moving_average(values, width):
    \"\"\"Means of every run of `width` neighbours.\"\"\"
    if width < 1 or width > len(values):
        raise ValueError(f"width must be between 1 and {len(values)}, got {width}")
    total = sum(values[:width])
    means = [total / width]
    for left, right in zip(values, values[width:]):
        total += right - left
        means.append(total / width)
    return means


class Inventory:
    def __init__(self):
        self._items = {}

    def add(self, name, count=1):
        self._items[name] = self._items.get(name, 0) + count

    def remove(self, name, count=1):
        left = self._items.get(name, 0) - count
        if left < 0:
            raise KeyError(f"only {left + count} of {name} in stock")
        self._items[name] = left

| city      | founded | rivers | bridges |
|-----------|---------|--------|---------|
| Ostrava   | 1267    | 4      | 38      |
| Ghent     | 650     | 3      | 71      |
| Porto     | 868     | 1      | 6       |
| Kazan     | 1005    | 2      | 17      |

Dear Ms. Okafor,
thank you for your letter of the fourth of March. We have looked into the matter and found that the parcel left our
warehouse on the twenty-sixth of February, was handed to the carrier the same evening, and has not been seen since.
We are sorry for the trouble. A second parcel with the same contents is on its way to you and should arrive within
three working days; if the first one turns up after all, please keep it or give it to a neighbour. Should you prefer
your money back, a short note is enough.
Yours sincerely, Tomas Lindqvist

How does a heat pump work? In short, it moves heat instead of making it. A liquid with a very low boiling point is
pumped through a coil outside the house, where even cold air is warm enough to make it boil. The vapour is compressed,
which raises its temperature, and led through a second coil inside, where it gives its heat to the rooms and becomes
liquid again. A valve lowers the pressure, the liquid cools down, and the cycle starts from the beginning. For each
unit of electricity that the compressor uses, three or four units of heat arrive in the house. The colder it is
outside, the harder the machine has to work, and the smaller this number becomes.

Der Zug hielt auf offener Strecke. Niemand wusste warum, und der Schaffner, der es vielleicht gewusst haette, liess
sich nicht blicken. Draussen lag ein Feld, dahinter ein Wald, und ueber dem Wald stand der Mond, obwohl es erst vier
Uhr war. Eine Frau packte Brote aus und bot sie allen an. Nach einer halben Stunde kannte jeder jeden.

Le marche ouvre a six heures. Les premiers clients sont des cuisiniers qui choisissent les poissons en silence, puis
viennent les grands-meres avec leurs paniers, et vers dix heures les touristes, qui photographient les tomates.

Problem 4. A tank holds 240 litres. One pipe fills it in 6 hours, a second one in 4 hours, and a drain at the bottom
empties the full tank in 12 hours. All three are opened at noon. The first pipe brings 240 / 6 = 40 litres an hour, the
second 240 / 4 = 60 litres an hour, and the drain takes away 240 / 12 = 20 litres an hour. Together the tank gains
40 + 60 - 20 = 80 litres an hour, so that it is full after 240 / 80 = 3 hours, at three in the afternoon.

Minutes of the garden committee. Present: six members, one dog. The compost heap has grown beyond its fence again and
will be divided in two. The proposal to plant a second row of currants was accepted with five votes; the sixth member
prefers gooseberries and asked that this be recorded. The water bill rose by a fifth, which is explained by the dry
May and by a tap that nobody admits to having left open. The summer feast is planned for the second Saturday in July.
"""

CASES = {
    # chat
    "chat_sky": chat("Why is the sky blue?"),
    "chat_capital": chat("What is the capital of France?"),
    "chat_story": chat("Write a short story about a robot who learns to paint."),
    "chat_list": chat("List five healthy breakfast ideas with one sentence each."),
    "chat_math": chat("If a train travels 60 km in 45 minutes, what is its average speed in km/h?"),
    "chat_python": chat("Write a Python function that checks whether a string is a palindrome."),
    "chat_haiku": chat("Compose a haiku about autumn rain."),
    "chat_explain": chat("Explain photosynthesis to a ten-year-old."),
    "chat_two_turns": chat("Hi, my name is Nadia.", "Hello Nadia! How can I help you today?", "What is my name?"),
    "chat_four_turns": chat(
        "Name a fruit.", "Apple.", "Name another one.", "Banana.", "And which of the two is usually yellow, and why?"
    ),
    "chat_pirate": chat("Where is the treasure?", system="You are a pirate. Answer every question like one."),
    "chat_json": chat("Give me a JSON object with the keys name, age and city for a fictional person."),
    "chat_translate": chat("Translate to Spanish: The library opens at nine in the morning."),
    "chat_summary": chat("Summarize in one sentence:\n\n" + DOCUMENT.split("\n\n")[0]),
    "chat_empty_system": chat("Who are you?", system=""),
    "chat_email": chat("Draft a polite email asking my landlord to repair the heating."),
    # raw English
    "raw_once": "Once upon a time, in a village at the edge of the forest,",
    "raw_history": "The Roman Empire reached its greatest extent under the emperor",
    "raw_science": "Water boils at 100 degrees Celsius at sea level, but on a high mountain",
    "raw_recipe": "Ingredients:\n- 2 cups of flour\n- 1 teaspoon of baking powder\n-",
    "raw_dialogue": '"You are late," said the clockmaker.\n"I know," said the girl,',
    "raw_numbers": "1, 2, 4, 8, 16, 32,",
    "raw_one_token": "The",
    "raw_newlines": "\n\n\n",
    "raw_spaces": "name        age     city\nAda         36      London\nAlan        41     ",
    "raw_repeat": "tick tock " * 40,
    "raw_quote": "As the old saying goes, a bird in the hand",
    "raw_wiki": "== Early life ==\nMaria Kowalska was born in 1891 in",
    "raw_table": "| x | x^2 |\n|---|-----|\n| 1 | 1   |\n| 2 | 4   |\n| 3 |",
    "raw_shout": "ATTENTION PASSENGERS: THE TRAIN TO",
    # code and markup
    "code_python": "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "code_rust": "/// Returns the largest element of a slice.\nfn largest(values: &[i32]) -> Option<i32> {\n",
    "code_c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "code_sql": "SELECT customers.name, SUM(orders.total)\nFROM customers\nJOIN orders ON",
    "code_html": "<!DOCTYPE html>\n<html>\n<head>\n  <title>My page</title>\n",
    "code_json": '{"users": [{"id": 1, "name": "Ann"}, {"id": 2,',
    "code_shell": "#!/bin/bash\n# Back up every .txt file of a folder\nfor file in",
    "code_javascript": "const sum = (numbers) => numbers.reduce(",
    # other languages and scripts
    "lang_german": "Die Katze sitzt auf dem Dach und schaut",
    "lang_french": "Il était une fois un petit prince qui habitait",
    "lang_spanish": "La ciudad de México es conocida por",
    "lang_russian": "Москва является столицей",
    "lang_chinese": "今天天气很好,我们去",
    "lang_japanese": "むかしむかし、あるところに",
    "lang_arabic": "كان يا ما كان في قديم الزمان",
    "lang_hindi": "भारत की राजधानी",
    "lang_emoji": "I love summer! ☀️🏖️🍦 My favourite",
    # long
    "long_document": DOCUMENT,
    "long_chat": chat("Read this collection of notes.\n\n" + DOCUMENT + "\nWhich buoy was missing, and how was the crust?"),
    "long_half": DOCUMENT[: len(DOCUMENT) // 2],
}
